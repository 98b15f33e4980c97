"""The one table of models/README.md: what each bundle attains and costs, from manifests, graphs and a measurement here.

    python -m benchmarks.models             # measures speed, keeps it in results/models.json, writes the table
    python -m benchmarks.models --no-speed  # writes the table from the speeds that were kept

Speeds are of ONNX Runtime alone, without HTTP or decoding: medians over turns in which all models take part, so that
what disturbs the machine for a while disturbs all of them.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.cpus import machine, usable_cpus
from app.manifest import MANIFEST_FILE, Bundle, read_bundle
from app.sessions import ClassifierSession
from benchmarks.others import Others
from training.costs import costs_of
from training.report.sources import counted

ROOT = Path(__file__).parent.parent
MODELS, README, RESULT = ROOT / "models", ROOT / "models/README.md", ROOT / "benchmarks/results/models.json"
BEGIN, END = "<!-- models: begin (python -m benchmarks.models) -->", "<!-- models: end -->"
COLUMNS = (
    "model",
    "accuracy",
    "tested on",
    "calibration error",
    "parameters",
    "multiply-adds",
    "size",
    "1 image, 1 thread",
    "1 image, {cpus} threads",
    "images/s",
    "weights",
    "licence",
)
WORDS = {"model", "tested on", "weights", "licence"}
TURNS = 3
SECONDS = 0.5
BATCH = 8
NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a bundle runs here, and which file it was measured on."""

    sha256: str
    one_thread_ms: float
    all_threads_ms: float
    images_per_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--no-speed", action="store_true", help="write the table from the speeds that were kept")
    bundles = read_bundles(MODELS)
    if not parser.parse_args().no_speed:
        RESULT.write_text(json.dumps(measured(bundles), indent=2, ensure_ascii=False) + "\n")
    README.write_text(with_table(README.read_text(), table(bundles, json.loads(RESULT.read_text()))))
    print(README.read_text().partition(BEGIN)[2].partition(END)[0].strip())


def read_bundles(models: Path) -> list[Bundle]:
    """Return every version of every model, by name and number."""
    found = [read_bundle(path.parent) for path in models.glob(f"*/*/{MANIFEST_FILE}")]
    return sorted(found, key=lambda bundle: (bundle.manifest.name, int(bundle.manifest.version)))


def name_of(bundle: Bundle) -> str:
    return f"{bundle.manifest.name}/{bundle.manifest.version}"


# ---------------------------------------------------------------- speed


def measured(bundles: list[Bundle]) -> dict[str, Any]:
    """Measure all bundles in turns."""
    everything = usable_cpus()
    turns: dict[str, list[tuple[float, float, float]]] = {name_of(bundle): [] for bundle in bundles}
    with Others() as others:
        for _ in range(TURNS):
            for bundle in bundles:
                turns[name_of(bundle)].append(
                    (latency_ms(bundle, 1), latency_ms(bundle, everything), throughput(bundle, everything))
                )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "others_cpus": others.cpus,
        "batch": BATCH,
        "models": {
            name_of(bundle): asdict(Speed(bundle.manifest.model.sha256, *medians(turns[name_of(bundle)])))
            for bundle in bundles
        },
    }


def medians(turns: list[tuple[float, float, float]]) -> list[float]:
    return [float(f"{statistics.median(values):.4g}") for values in zip(*turns, strict=True)]


def latency_ms(bundle: Bundle, threads: int) -> float:
    """Median milliseconds of one image in a session of so many threads."""
    session, image = ClassifierSession(bundle.model_path, "cpu", threads), noise(bundle, 1)
    times: list[float] = []
    _repeat(lambda: session.run(image), times)
    return statistics.median(times) * 1000


def throughput(bundle: Bundle, sessions: int) -> float:
    """Images a second of so many sessions of one thread, each on batches of its own: as the service runs them."""
    rows = noise(bundle, BATCH)
    opened = [ClassifierSession(bundle.model_path, "cpu", 1) for _ in range(sessions)]
    times: list[list[float]] = [[] for _ in opened]
    workers = [
        threading.Thread(target=_repeat, args=(lambda session=session: session.run(rows), taken))
        for session, taken in zip(opened, times, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(BATCH * len(taken) / sum(taken) for taken in times)


def _repeat(work: Callable[[], object], times: list[float]) -> None:
    """Work for a while, at least three times, and note the seconds of each; the first one is a warm-up."""
    work()
    stop = time.perf_counter() + SECONDS
    while (begun := time.perf_counter()) < stop or len(times) < 3:
        work()
        times.append(time.perf_counter() - begun)


def noise(bundle: Bundle, rows: int) -> np.ndarray:
    pixels = bundle.manifest.pixels
    return np.random.default_rng(0).integers(0, 256, (rows, pixels.height, pixels.width, 3), np.uint8)


# ---------------------------------------------------------------- the table


def with_table(page: str, written: str) -> str:
    """Put the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{README} lacks the marks {BEGIN} and {END}: put them where the table is to stand.")
    return f"{before}{BEGIN}\n{written}{END}{after}"


def table(bundles: list[Bundle], result: dict[str, Any]) -> str:
    """Return the table, and a line on each model's provenance under it."""
    columns = [name.format(cpus=result["machine"]["usable_cpus"]) for name in COLUMNS]
    rules = ["---" if name in WORDS else "---:" for name in columns]
    rows = [cells(bundle, speed_of(bundle, result)) for bundle in bundles]
    lines = [f"| {' | '.join(row)} |" for row in (columns, rules, *rows)]
    origins = [f"- `{name_of(bundle)}`: {sentence(bundle.manifest.provenance.source)}" for bundle in bundles]
    others = "" if result["others_cpus"] is None else f"; other work took {result['others_cpus']} processors meanwhile"
    about = (
        f"Speeds: medians of ONNX Runtime alone, without HTTP or decoding, {result['machine']['cpu']}, "
        f"{result['date']}{others}. Images/s: {result['machine']['usable_cpus']} sessions of one thread, batches of "
        f"{result['batch']}. Parameters are those of the graph, where batch normalisation is folded into convolutions; "
        "multiply-adds are for one image."
    )
    return "\n".join([*lines, "", about, "", *origins, ""])


def cells(bundle: Bundle, speed: Speed | None) -> list[str]:
    manifest, costs = bundle.manifest, costs_of(bundle.model_path)
    error = calibration_error(bundle)
    tested = f"{manifest.evaluation['images']:,} of {Path(data_of(bundle)).name}"
    return [
        f"`{name_of(bundle)}`",
        percent(manifest.evaluation["accuracy"]),
        tested,
        NOTHING if error is None else percent(error),
        counted(costs.parameters),
        counted(costs.multiply_adds),
        f"{manifest.model.size_bytes / 1e6:.2f} MB",
        NOTHING if speed is None else f"{speed.one_thread_ms:.3g} ms",
        NOTHING if speed is None else f"{speed.all_threads_ms:.3g} ms",
        NOTHING if speed is None else f"{float(f'{speed.images_per_s:.3g}'):,.0f}",
        weights(bundle),
        licence(bundle),
    ]


def percent(share: float) -> str:
    return f"{share * 100:.2f} %"


def speed_of(bundle: Bundle, result: dict[str, Any]) -> Speed | None:
    """Return what was measured on this very file; None: it is another one since."""
    kept = result["models"].get(name_of(bundle))
    return Speed(**kept) if kept is not None and kept["sha256"] == bundle.manifest.model.sha256 else None


def calibration_error(bundle: Bundle) -> float | None:
    """Return the calibration error of what is served; older manifests do not tell."""
    calibration = bundle.manifest.calibration
    return None if calibration is None else calibration.after.calibration_error


def data_of(bundle: Bundle) -> str:
    return str(bundle.manifest.evaluation["data"]).partition(",")[0]


def weights(bundle: Bundle) -> str:
    told = bundle.manifest.training
    if "parent" in told:
        return f"from `{told['parent']}`"
    return "published" if str(told.get("weights", "")).startswith("published") else "trained here"


def licence(bundle: Bundle) -> str:
    """Return the terms of the weights, which stand first."""
    return sentence(bundle.manifest.provenance.licence.partition(". ")[0]).removeprefix("Weights: ").rstrip(".")


def sentence(text: str) -> str:
    text = text.strip().replace("|", "/")
    return text if text.endswith(".") else f"{text}."


if __name__ == "__main__":
    main()
