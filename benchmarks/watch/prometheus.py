"""A Prometheus of one's own with the shipped rules, in time-lapse where ten minutes or hours would be too long."""

import json
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

RULES = Path(__file__).parents[2] / "deploy/prometheus/rules/convoy.yml"
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
START_S = 30.0
_WINDOW = re.compile(r"(\[|\boffset )(\d+)([smhd])\b")


class Prometheus:
    """One that runs: what it scrapes may change, by job; every target of a job is watched as one service."""

    def __init__(self, client: httpx.Client, targets: Path) -> None:
        self._client = client
        self._targets = targets
        self._jobs: dict[str, tuple[str, Mapping[str, str]]] = {}

    def scrape(self, job: str, url: str, labels: Mapping[str, str] | None = None) -> None:
        """Watch a service from now on, its series with these labels."""
        self._jobs[job] = (url.removeprefix("http://"), labels or {})
        self._write()

    def forget(self, job: str) -> None:
        """Watch it no longer."""
        del self._jobs[job]
        self._write()

    def query(self, query: str) -> list[dict[str, Any]]:
        """Return the series that a query has now."""
        return self._ask("query", query=query)

    def value(self, query: str) -> float:
        """Return the one value that a query has now; NaN: it has none."""
        found = self.query(query)
        assert len(found) < 2, f"{query} has {len(found)} values"
        return float(found[0]["value"][1]) if found else float("nan")

    def over(self, query: str, start: float, end: float, step_s: float) -> list[dict[str, Any]]:
        """Return the series that a query had, Unix times."""
        return self._ask("query_range", query=query, start=start, end=end, step=step_s)

    def firing(self, job: str) -> set[str]:
        """Return the alerts of a job that fire now, and those that are nobody's."""
        found = self.query(f'ALERTS{{alertstate="firing", job=~"{job}|"}}')
        return {series["metric"]["alertname"] for series in found}

    def _ask(self, what: str, **parameters: object) -> list[dict[str, Any]]:
        answer = self._client.get(f"/api/v1/{what}", params={name: str(value) for name, value in parameters.items()})
        content = answer.json()
        assert content["status"] == "success", (parameters, content)
        result: list[dict[str, Any]] = content["data"]["result"]
        return result

    def _write(self) -> None:
        found = [
            {"targets": [address], "labels": {"job": job, **labels}} for job, (address, labels) in self._jobs.items()
        ]
        whole = self._targets.with_suffix(".new")
        whole.write_text(json.dumps(found))
        whole.replace(self._targets)


@contextmanager
def watching(*, scrape_s: int, evaluate_s: int, lapse: float = 1.0) -> Iterator[Prometheus]:
    """Run Prometheus with the shipped rules until the block ends.

    Args:
        scrape_s: seconds between scrapes.
        evaluate_s: seconds between evaluations of the rules.
        lapse: by how much every window and every waiting time of the rules is shortened.
    """
    with tempfile.TemporaryDirectory(prefix="convoy-watch-") as name, socket.create_server(("127.0.0.1", 0)) as free:
        folder, port = Path(name), free.getsockname()[1]
        free.close()
        (folder / "rules.yml").write_text(yaml.safe_dump(shortened(yaml.safe_load(RULES.read_text()), lapse)))
        (folder / "targets.json").write_text("[]")
        discovery = {"files": [str(folder / "targets.json")], "refresh_interval": "1s"}
        config = {
            "global": {
                "scrape_interval": f"{scrape_s}s",
                "scrape_timeout": f"{scrape_s}s",
                "evaluation_interval": f"{evaluate_s}s",
            },
            "rule_files": ["rules.yml"],
            "scrape_configs": [{"job_name": "watched", "file_sd_configs": [discovery]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                wait_until(lambda: _is_ready(client), START_S, "Prometheus did not start")
                yield Prometheus(client, folder / "targets.json")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def shortened(document: dict[str, Any], lapse: float) -> dict[str, Any]:
    """Return rules whose windows, intervals and waiting times are shorter by a factor; nothing else is another."""
    if lapse == 1:
        return document
    for group in document["groups"]:
        group.pop("interval", None)
        for rule in group["rules"]:
            rule["expr"] = _WINDOW.sub(lambda found: found[1] + _shorter(found[2], found[3], lapse), rule["expr"])
            if "for" in rule:
                rule["for"] = _shorter(rule["for"][:-1], rule["for"][-1], lapse)
    return document


def _shorter(number: str, unit: str, lapse: float) -> str:
    # A rate needs two scrapes, a second apart.
    return f"{max(5, round(int(number) * SECONDS[unit] / lapse))}s"


def wait_until(condition: Callable[[], object], timeout_s: float, otherwise: str) -> float:
    """Wait for something to be true, and return how long it took, seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + timeout_s, otherwise
        time.sleep(0.5)
    return time.monotonic() - began


def labels_of(series: Mapping[str, Any]) -> dict[str, str]:
    """Return a series' labels without its name."""
    return {name: value for name, value in series["metric"].items() if name != "__name__"}


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False
