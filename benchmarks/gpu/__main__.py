"""What a GPU can do, what the service gets of it, and what its settings change: one command for the whole table.

    make bench-gpu              # on a machine with a GPU: benchmarks/results/gpu-<device>.json and a picture
    python -m benchmarks.gpu --seconds 3 --budget 540             # what fits into nine minutes, first things first
    python -m benchmarks.gpu --device cpu --seconds 1 --output /tmp/look.json      # a look, without a GPU

ResNet-50 with random weights, 224×224, in float32 and in half precision. Needs the extra `train` for the bundles; what
goes over HTTP is sent by wrk, or where that is missing by the project's own generator. The parts, in their order:

| part | measures |
|---|---|
| `ceiling` | the device alone: batches that lie in its memory, for each size, precision and provider |
| `answers` | differences from the processor: float32, TF32, half precision; golden answers of the trained bundles |
| `photos` | photos of 500×375 over HTTP, ÷ the smaller of the ceilings of device and decoding; who was busy |
| `tensors` | uint8 tensors over binary V2, several workers, one engine, ÷ the ceiling |
| `one` | one photo on an idle service, beside bare decode and run |
| `options` | sessions, search, layout, TF32, recorded launches, buffers: from this table the defaults are chosen |
| `memory` | memory of device and host over ten minutes of changing batches and twenty hot swaps, or what fits |
| `peers` | LitServe and mosec with the same runtime on the same device; needs their environment (`make bench-peers`) |

Every ratio is of one run. Where something cannot be done the entry says why, and nothing takes its place: each part has
a process of its own, and is kept when it has ended, beside what an earlier run has kept of other parts.
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from app import runtime
from app.cpus import machine
from app.sessions import Device
from benchmarks.gpu.bench import Task, reason_of, replace_text
from benchmarks.gpu.load import generator
from benchmarks.gpu.parts import BUNDLES, PARTS, Part, limit_s, perform_apart
from benchmarks.peers.servers import end_servers_when_ended
from benchmarks.survival.__main__ import table

RESULTS = Path(__file__).parents[1] / "results"
UNKNOWN = "unknown"
BUNDLES_S = 600.0
Perform = Callable[[Part, str, Task], dict[str, Any]]


def device_name(device: Device) -> str:
    """Return the device's name, as it goes into the name of a file; `unknown` where NVML does not tell."""
    if device == "cpu":
        return "none"
    try:
        import pynvml

        pynvml.nvmlInit()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    except Exception:
        return UNKNOWN
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def measured(
    names: Sequence[str], task: Task, budget_s: float, perform: Perform = perform_apart
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Do the parts that fit, one after the other, and yield what each has found, in order.

    Args:
        names: of parts.
        task: what each is to do; its limit, bundles and rates of the device are filled in here.
        budget_s: for all of them; infinite: however long they take.
        perform: does one.
    """
    until = time.monotonic() + budget_s
    bundles = _done(perform, BUNDLES, "bundles", replace(task, limit_s=min(budget_s, BUNDLES_S)))
    task = _with_bundles(task, bundles)
    for name in names:
        left_s, part = until - time.monotonic(), PARTS[name]
        limit = limit_s(name, part, task.seconds, left_s)
        if not limit:
            cost = part.cost_s(task.seconds)
            yield name, nothing(f"It takes about {cost:.0f} s, and {max(0.0, left_s):.0f} s of the budget are left.")
            continue
        started = time.monotonic()
        found = _done(perform, part, name, replace(task, limit_s=limit))
        found["took_s"] = round(time.monotonic() - started, 1)
        task = replace(task, best=task.best | found["evidence"].get("best", {}))
        if task.full is None or task.half is None:
            found["evidence"]["bundles"] = {"skipped": bundles["skipped"], **bundles["evidence"]}
        yield name, found


def _done(perform: Perform, part: Part, name: str, task: Task) -> dict[str, Any]:
    try:
        return perform(part, name, task)
    except Exception as error:
        return nothing(reason_of(error))


def short(why: str) -> str:
    """Return the first line of a reason and the last, which is where a log says it."""
    lines = why.splitlines()
    return why if len(lines) < 2 else f"{lines[0]} … {lines[-1]}"


def nothing(why: str) -> dict[str, Any]:
    """Return what a part has found that was not done."""
    return {"skipped": why, "rows": [], "evidence": {}}


def _with_bundles(task: Task, found: Mapping[str, Any]) -> Task:
    places = {which: Path(found["evidence"][which]) for which in ("full", "half") if which in found["evidence"]}
    return replace(task, full=places.get("full"), half=places.get("half"))


def keep(file: Path, part: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Put one part's entry into the file, beside those of the others, and return them all in order."""
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        kept = {}
    kept[part] = entry
    ordered = {name: kept[name] for name in PARTS if name in kept}
    replace_text(file, json.dumps(ordered, indent=2, ensure_ascii=False, default=str) + "\n")
    return ordered


def picture(document: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draw the ceiling by batch size, and what was served; of what there is."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    rates = document.get("ceiling", {}).get("evidence", {}).get("images_per_s", {})
    for label, found in rates.items():
        axes.plot([int(rows) for rows in found], list(found.values()), marker="o", label=label)
    for part in ("photos", "tensors"):
        for row in document.get(part, {}).get("rows", []):
            if row["figure"] == "requests a second" and row["value"] is not None:
                axes.axhline(row["value"], linestyle="--", linewidth=1, color="grey")
                axes.annotate(f"{part}, served", (1, row["value"]), fontsize=8, va="bottom")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("images in a batch")
    axes.set_ylabel("images/s")
    axes.set_title(f"ResNet-50 on {next(iter(document.values()))['device']}")
    if rates:
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def about(device: Device, name: str, seconds: int) -> dict[str, Any]:
    """Return what each entry says of the run: when, where, with what."""
    try:
        version = f"{runtime.load().__version__} ({', '.join(runtime.installed_wheels())})"
    except Exception as error:
        version = reason_of(error)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
        "provider": device,
        "machine": machine(),
        "onnxruntime": version,
        "load": generator(),
        "seconds": seconds,
    }


def main() -> int:
    """Measure, print, keep; return 1 if a bar was missed or a part left out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "tensorrt", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=int, default=10, help="of each measurement")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS", help="for all; what does not fit is left out"
    )
    parser.add_argument("--output", type=Path, help="instead of benchmarks/results/gpu-<device>.json")
    chosen = parser.parse_args()
    if chosen.device == "cpu" and chosen.output is None:
        parser.error("--device cpu is for a look: say with --output where its figures go, which are no GPU's")
    end_servers_when_ended()
    name = device_name(chosen.device)
    output = chosen.output or RESULTS / f"gpu-{name}.json"
    said, missed, document = about(chosen.device, name, chosen.seconds), False, dict[str, Any]()
    for part, found in measured(chosen.only, Task(chosen.device, chosen.seconds, math.inf), chosen.budget):
        document = keep(output, part, said | found)
        missed |= bool(found["skipped"]) or any(row["met"] is False for row in found["rows"])
        if found["skipped"]:
            print(f"  {part}: left out, or ended early: {short(found['skipped'])}", flush=True)
    try:
        picture(document, output.with_suffix(".png"))
    except Exception as error:
        print(f"no picture: {reason_of(error)}")
    told = {part: {**document[part], "skipped": short(document[part]["skipped"])} for part in chosen.only}
    Console(highlight=False).print(table(told))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
