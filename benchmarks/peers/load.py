"""The load: `wrk`, a closed loop of connections on one thread, the same for every server."""

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parent / "post.lua"
NO_HEADERS: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Figures:
    per_s: float
    p50_ms: float
    p99_ms: float


class LoadError(Exception):
    """A measurement that says nothing; the message is one sentence."""


def require_wrk() -> str:
    """Return the version of wrk, or end with a sentence."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed, and it is what posts the images: apt install wrk (Debian, Ubuntu).")
    # It prints its version with the usage, and exits with 1.
    found = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False)
    return (found.stdout + found.stderr).split("[")[0].strip()


def measure(
    url: str,
    images: Sequence[Path],
    connections: int,
    seconds: float,
    headers: Mapping[str, str] = NO_HEADERS,
    threads: int = 1,
) -> Figures:
    """Post the images, or whatever else is in the files, in turns.

    Raises:
        LoadError: an answer was not 200, or a connection broke: what answers wrongly is not measured.
    """
    command = ["wrk", f"-t{threads}", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s", "--latency"]
    command += [word for name, value in headers.items() for word in ("-H", f"{name}: {value}")]
    command += ["-s", str(SCRIPT), url, "--", *map(str, images)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode:
        raise LoadError(f"wrk ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-200:]}")
    return read_figures(done.stdout)


def read_figures(output: str) -> Figures:
    """Read what `post.lua` writes at the end.

    Raises:
        LoadError: an answer was not 200, a connection broke, or nothing was answered.
    """
    found = json.loads(output.strip().splitlines()[-1])
    if found["refused"] or found["broken"] or not found["requests"]:
        raise LoadError(
            f"of {found['requests']} answers {found['refused']} were not 200, and {found['broken']} connections failed"
        )
    return Figures(
        per_s=found["requests"] / found["microseconds"] * 1e6,
        p50_ms=found["p50_us"] / 1000,
        p99_ms=found["p99_us"] / 1000,
    )
