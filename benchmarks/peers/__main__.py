"""Convoy and its peers, in turns, on the same bundles, images, processors and load.

    make bench-peers                        # a table, and benchmarks/results/peers.json
    python -m benchmarks.peers --scenarios small photo --turns 5

Each turn starts one server after the other (A B C D A B C D …), checks that it names the right labels, warms it up,
measures it and ends it; nothing else is up meanwhile, for some peers poll when idle. The figures are medians over the
turns. A peer that cannot be started, or answers wrongly, is reported with its reason, and the others go on.
"""

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import PIL

import app
from app import cpus
from app.bench.ceiling import measure_ceiling
from app.images import decode
from app.manifest import Bundle, read_bundle
from app.sessions import ClassifierSession
from benchmarks.networks import resnet50
from benchmarks.peers.load import Figures, LoadError, measure, require_wrk
from benchmarks.peers.scenarios import IMAGES, ROOT, SCENARIOS, Scenario
from benchmarks.peers.servers import Launch, PeerError, convoy, end_servers_when_ended, peer, serving

RESULTS = ROOT / "benchmarks/results/peers.json"
PYTHON = ROOT / ".venv-peers/bin/python"
PACKAGES = ("litserve", "mosec", "nvidia-pytriton", "onnxruntime", "pillow", "simplejpeg", "numpy")
TURNS = 3
SECONDS = 8.0
WARM_UP_S = 2.0
CEILING_S = 4.0
CONVOY, CEILING = "Convoy", "bare loop"
OURS = ", Convoy's decoder"


@dataclass
class Entrant:
    """One line of a scenario's table: a server in one of its forms, and what it did in each turn."""

    name: str
    launch: Launch
    turns: list[Figures] = field(default_factory=list)
    reason: str = ""
    """Why it is out; empty while it is in."""

    def median(self, figure: str) -> float | None:
        values = [getattr(turn, figure) for turn in self.turns]
        return round(statistics.median(values), 2) if values and not self.reason else None


def main() -> None:
    options = parse()
    end_servers_when_ended()
    machine = cpus.machine() | {
        "wrk": require_wrk(),
        "convoy": {"version": app.__version__, "onnxruntime": onnxruntime.__version__, "pillow": PIL.__version__},
        "peers": versions(options.python),
    }
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "turns": options.turns,
        "seconds": options.seconds,
        "scenarios": {},
    }
    for scenario in SCENARIOS:
        if scenario.name in options.scenarios:
            report["scenarios"][scenario.name] = run(scenario, options)
            # Written after each: what was measured is kept, whatever happens later.
            options.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(f"\nWritten to {options.out}.")


def parse() -> argparse.Namespace:
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--scenarios", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--turns", type=int, default=TURNS, help="how often each server is measured")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of a measurement")
    parser.add_argument("--python", type=Path, default=PYTHON, help="Python of the peers' environment")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures are written")
    parser.add_argument("--lock", type=Path, help="hold this file's lock while measuring, on a machine that is shared")
    return parser.parse_args()


def run(scenario: Scenario, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a scenario, print its table and return its part of the report."""
    bundle = bundle_of(scenario.model)
    encoded = [IMAGES[name]() for name in scenario.images]
    checks = list(zip(encoded, right_labels(bundle, encoded), strict=True))
    flags, left_out = known_flags(scenario.convoy)
    entrants = [Entrant(CONVOY, convoy(bundle, flags)), *peer_entrants(scenario, bundle, options.python)]
    ceilings = []
    print(f"\n{scenario.title}, {scenario.connections} connections", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in scenario.images]
        for file, data in zip(files, encoded, strict=True):
            file.write_bytes(data)
        for _ in range(options.turns):
            for entrant in entrants:
                if not entrant.reason:
                    take_turn(entrant, checks, files, scenario.connections, options)
            if scenario.ceiling:
                ceilings.append(ceiling(bundle, encoded, options.lock))
    return conclude(scenario, entrants, encoded, ceilings, left_out)


def peer_entrants(scenario: Scenario, bundle: Bundle, python: Path) -> Iterator[Entrant]:
    for decoder in scenario.decoders:
        for name, setting in scenario.peers.items():
            label = name + (OURS if decoder == "convoy" else "")
            yield Entrant(label, peer(name, python, bundle, setting, decoder))


def take_turn(
    entrant: Entrant,
    checks: Sequence[tuple[bytes, str]],
    files: Sequence[Path],
    connections: int,
    options: argparse.Namespace,
) -> None:
    """Start, check, warm up, measure and end a server; a fault puts it out of the scenario."""
    try:
        with locked(options.lock), serving(entrant.launch, checks) as url:
            measure(url, files, connections, WARM_UP_S)
            entrant.turns.append(measure(url, files, connections, options.seconds))
    except (PeerError, LoadError, OSError) as error:
        entrant.reason = str(error)
        print(f"  {entrant.name} is out: {error}.", flush=True)


def ceiling(bundle: Bundle, encoded: Sequence[bytes], lock: Path | None) -> float:
    """Images per second of the bare loop over the images in turns."""
    with locked(lock):
        return measure_ceiling(bundle, encoded, CEILING_S).images_per_s


def conclude(
    scenario: Scenario,
    entrants: Sequence[Entrant],
    encoded: Sequence[bytes],
    ceilings: Sequence[float],
    left_out: Sequence[str],
) -> dict[str, Any]:
    ours = entrants[0].median("per_s")
    best = {
        key: max(
            (entrant for entrant in entrants[1:] if entrant.median("per_s") and entrant.name.endswith(OURS) is decoder),
            key=lambda entrant: entrant.median("per_s") or 0,
            default=None,
        )
        for key, decoder in (("as_documented", False), ("with_convoys_decoder", True))
    }
    ratios = {
        f"convoy_over_best_{key}": round(ours / rate, 2)
        if ours and entrant and (rate := entrant.median("per_s"))
        else None
        for key, entrant in best.items()
    }
    roof = round(statistics.median(ceilings), 1) if ceilings else None
    print_table(entrants, roof)
    for key, entrant in best.items():
        if (ratio := ratios[f"convoy_over_best_{key}"]) is not None and entrant:
            wanted = f", wanted {scenario.bar}" if scenario.bar and key == "as_documented" else ""
            print(f"  {CONVOY} ÷ {entrant.name}: {ratio:.2f}{wanted}", flush=True)
    return {
        "title": scenario.title,
        "model": scenario.model,
        "connections": scenario.connections,
        "images": {name: len(data) for name, data in zip(scenario.images, encoded, strict=True)},
        "settings": {name: asdict(setting) for name, setting in scenario.peers.items()},
        "convoy_flags": [flag for flag in scenario.convoy if flag not in left_out],
        "convoy_flags_unknown_here": list(left_out),
        "ceiling_per_s": roof,
        "served": {
            entrant.name: {"out": entrant.reason}
            if entrant.reason
            else {
                "per_s": entrant.median("per_s"),
                "p50_ms": entrant.median("p50_ms"),
                "p99_ms": entrant.median("p99_ms"),
                "per_s_turns": [round(turn.per_s, 1) for turn in entrant.turns],
            }
            for entrant in entrants
        },
        **ratios,
        "wanted": scenario.bar,
    }


def print_table(entrants: Sequence[Entrant], roof: float | None) -> None:
    print(f"  {'':30}{'answers/s':>10}{'p50 ms':>10}{'p99 ms':>10}{'of ceiling':>12}")
    for entrant in entrants:
        rate, p50, p99 = (entrant.median(figure) for figure in ("per_s", "p50_ms", "p99_ms"))
        if rate is None:
            print(f"  {entrant.name:30}{'out':>10}")
            continue
        share = f"{rate / roof:12.2f}" if roof else ""
        print(f"  {entrant.name:30}{rate:10.1f}{p50:10.2f}{p99:10.2f}{share}")
    if roof:
        print(f"  {CEILING:30}{roof:10.1f}")


def bundle_of(model: str) -> Bundle:
    return resnet50() if model == "resnet50" else read_bundle(ROOT / "models" / model / "1")


def right_labels(bundle: Bundle, encoded: Sequence[bytes]) -> list[str]:
    """Ask the graph itself, without any server."""
    session = ClassifierSession(bundle.model_path, "cpu", 1)
    rows = session.classify(np.stack([decode(data, bundle.manifest.pixels) for data in encoded]))
    return [bundle.manifest.labels[index] for index in rows.argmax(axis=1).tolist()]


def known_flags(wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide flags with their values into those that this version of `convoy serve` has, and the others."""
    command = [sys.executable, "-m", "app.cli", "serve", "--help"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    known: list[str] = []
    unknown: list[str] = []
    target = known
    for part in wanted:
        if part.startswith("--"):
            target = known if part in told else unknown
        target.append(part)
    return known, unknown


def versions(python: Path) -> dict[str, str]:
    """Ask the peers' environment what is installed there."""
    program = (
        "import json, sys; from importlib.metadata import distributions as d; "
        "print(json.dumps({p.metadata['Name'].lower(): p.version for p in d()}))"
    )
    try:
        told = subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(
            f"{python} is not a working Python: `make bench-peers` sets the peers' environment up."
        ) from None
    installed = json.loads(told)
    return {name: installed.get(name, "not installed") for name in PACKAGES}


@contextmanager
def locked(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
