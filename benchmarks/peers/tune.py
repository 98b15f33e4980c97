"""Finds each peer's best settings here: every combination of its grid, a few seconds each, best first.

    python -m benchmarks.peers.tune photo --decoder convoy

What comes out on top goes into `scenarios.py`, by hand. So that luck does not choose, the best two are measured again.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

from benchmarks.peers.__main__ import PYTHON, bundle_of, locked, right_labels
from benchmarks.peers.load import LoadError, measure
from benchmarks.peers.scenarios import IMAGES, SCENARIOS, Setting
from benchmarks.peers.servers import PeerError, end_servers_when_ended, peer, serving

SECONDS = 4.0
WARM_UP_S = 1.0
BEST, AGAIN = 2, 2
GRID: dict[str, dict[str, tuple[float, ...]]] = {
    "litserve": {"workers": (1, 2), "batch": (4, 16), "wait_ms": (0, 2), "fronts": (1, 2)},
    "mosec": {"workers": (2, 3), "batch": (1, 4, 16), "wait_ms": (1,), "fronts": (0,)},
    "triton": {"workers": (2, 3), "batch": (1, 4, 16), "wait_ms": (0, 1), "fronts": (0,)},
}


def main() -> None:
    options = parse()
    end_servers_when_ended()
    scenario = next(scenario for scenario in SCENARIOS if scenario.name == options.scenario)
    bundle = bundle_of(scenario.model)
    encoded = [IMAGES[name]() for name in scenario.images]
    checks = list(zip(encoded, right_labels(bundle, encoded), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in scenario.images]
        for file, data in zip(files, encoded, strict=True):
            file.write_bytes(data)

        def rate(name: str, setting: Setting) -> float:
            try:
                launch = peer(name, options.python, bundle, setting, options.decoder)
                with locked(options.lock), serving(launch, checks) as url:
                    measure(url, files, scenario.connections, WARM_UP_S)
                    return measure(url, files, scenario.connections, SECONDS).per_s
            except (PeerError, LoadError) as error:
                print(f"{name} {setting}: {error}.", flush=True)
                return 0.0

        for name in options.peers:
            found = {setting: [rate(name, setting)] for setting in settings(name)}
            for setting in best_first(found)[:BEST]:
                found[setting] += [rate(name, setting) for _ in range(AGAIN)]
            for setting in best_first(found):
                figures = " ".join(f"{figure:8.1f}" for figure in found[setting])
                print(f"{name:10}{setting}  {figures}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("scenario", choices=[scenario.name for scenario in SCENARIOS])
    parser.add_argument("--peers", nargs="+", choices=GRID, default=list(GRID))
    parser.add_argument("--decoder", choices=("plain", "convoy"), default="plain")
    parser.add_argument("--python", type=Path, default=PYTHON)
    parser.add_argument("--lock", type=Path, help="hold this file's lock while measuring, on a machine that is shared")
    return parser.parse_args()


def settings(name: str) -> list[Setting]:
    """Return every combination; waiting is pointless where a batch is one image."""
    grid = GRID[name]
    found = [
        Setting(int(workers), int(batch), wait_ms, int(fronts))
        for workers, batch, wait_ms, fronts in itertools.product(*grid.values())
    ]
    return [setting for setting in found if setting.batch > 1 or setting.wait_ms == min(grid["wait_ms"])]


def best_first(found: dict[Setting, list[float]]) -> list[Setting]:
    return sorted(found, key=lambda setting: -sorted(found[setting])[len(found[setting]) // 2])


if __name__ == "__main__":
    main()
