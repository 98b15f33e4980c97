"""What all parts share: the task, the bundles, what was found, and the service on the device."""

import json
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from app.cpus import usable_cpus
from app.cuda import batch_sizes
from app.images import decode
from app.manifest import Bundle, read_bundle, write_bundle
from app.sessions import ClassifierSession, Device
from benchmarks.survival.rows import Finding, shown
from benchmarks.survival.service import Service, serving

LARGEST = 64
SIZES = batch_sizes(LARGEST)
HALF = "resnet50-fp16"
PATIENCE_S = 300.0
"""For a service to become ready: kernels are tried for seven sizes and two sessions. One that fails says so at once."""
MOST_TOLD = 2000
"""Characters of an error, of which the last ones say most."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a part is to do.

    Attributes:
        device: where sessions run.
        seconds: of each measurement.
        limit_s: after which whoever waits for the part ends it.
        full, half: directories of the bundles in float32 and in half precision; None: it could not be made.
        best: images a second of the device alone, by model, as far as this run has measured them.
    """

    device: Device
    seconds: int
    limit_s: float
    full: Path | None = None
    half: Path | None = None
    best: dict[str, float] = field(default_factory=dict)


class Found(Finding):
    """What a part finds, printed as it is found, and kept in a file: the process may not live to the part's end."""

    def __init__(self, part: str, file: Path) -> None:
        super().__init__()
        self._part, self._file = part, file
        self.keep()

    def _add(self, figure: str, value: float, unit: str, bar: str, met: bool | None) -> None:
        super()._add(figure, value, unit, bar, met)
        row = self.rows[-1]
        judged = "" if met is None else f"  {bar}: {'met' if row.met else 'MISSED'}"
        self._say(f"{figure}: {'none' if row.value is None else f'{shown(row.value)} {unit}'.strip()}{judged}")

    def note(self, what: str, value: Any) -> None:
        """Keep what was looked at, or why something was left out."""
        self.evidence[what] = value
        self._say(f"{what}: {value}")

    def left_out(self, what: str, error: BaseException) -> None:
        """Keep why something was left out, with where it happened."""
        self.evidence[f"{what}, where"] = traceback.format_exception(error)[-3:]
        self.note(what, f"left out: {reason_of(error)}")

    def give_up(self, error: BaseException) -> None:
        """Say why the rest of the part is not there."""
        self.skipped = reason_of(error)
        self.evidence["where"] = traceback.format_exception(error)
        self._say(f"left out: {self.skipped}")

    def keep(self) -> None:
        """Write the file anew, whole."""
        document = {"skipped": self.skipped, "rows": [asdict(row) for row in self.rows], "evidence": self.evidence}
        replace_text(self._file, json.dumps(document, ensure_ascii=False, default=str))

    def _say(self, line: str) -> None:
        print(f"  {self._part}: {line}", flush=True)
        self.keep()


class Bench:
    """A part's task with what it wants to work on."""

    def __init__(self, task: Task, finding: Found) -> None:
        self.task, self.finding = task, finding
        self.device: Device = task.device
        self.seconds = task.seconds

    @cached_property
    def bundles(self) -> list[Bundle]:
        """The bundles that there are: float32 first.

        Raises:
            RuntimeError: there are none.
        """
        found = [read_bundle(directory) for directory in (self.task.full, self.task.half) if directory is not None]
        if not found:
            raise RuntimeError("No bundle could be made to measure with.")
        return found

    @property
    def served(self) -> Bundle:
        """What the service serves: half precision, which a processor would convert at every layer, if it is there."""
        return self.bundles[0] if self.device == "cpu" else self.bundles[-1]

    @property
    def connections(self) -> int:
        """Clients of a closed loop that leave nothing idle."""
        return 4 * usable_cpus() if self.device == "cpu" else 512

    @property
    def workers(self) -> int:
        """Processes that decode: all processors but those of the engine's sessions and of the load."""
        return max(1, usable_cpus() - 3)

    @property
    def best(self) -> float | None:
        """Images a second of the device alone with what is served; None: it was not measured in this run."""
        return self.task.best.get(self.served.manifest.name)

    @contextmanager
    def service(self, **settings: object) -> Iterator[Service]:
        """Run the service with an engine on the device and nothing but the model that is served."""
        name = self.served.manifest.name
        fixed: dict[str, Any] = {
            "models": self.served.directory.parent,
            "model_name": name,
            "device": self.device,
            "engines": 1,
            "workers": self.workers,
            "max_batch": LARGEST,
            "sessions": 2,
            "queue_target_ms": 0,
            "max_inflight_images": 4096,
            "max_inflight_bytes": 2_000_000_000,
            "max_inflight_pixels": 10**10,
        }
        started = time.monotonic()
        with serving(patience_s=min(PATIENCE_S, self.task.limit_s), **(fixed | settings)) as running:
            self.finding.note("the service was ready after, seconds", round(time.monotonic() - started, 1))
            yield running


def reason_of(error: BaseException) -> str:
    """Return an error's kind and words; of very many, the first line and the last."""
    words = str(error).strip()
    if len(words) > MOST_TOLD:
        words = f"{words.splitlines()[0][:MOST_TOLD]} … {words[-MOST_TOLD:]}"
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def replace_text(file: Path, text: str) -> None:
    """Write a file in one step: it holds the text, or what it held."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(file)


def make_bundles(bench: Bench) -> None:
    """Have the bundles there, and tell where they are."""
    from benchmarks.networks import resnet50  # PyTorch takes seconds, and only this part needs it

    full = resnet50()
    bench.finding.note("full", str(full.directory))
    try:
        bench.finding.note("half", str(half_of(full).directory))
    except Exception as error:
        bench.finding.left_out("half precision", error)


def half_of(parent: Bundle) -> Bundle:
    """Return the bundle in half precision, written first where it is not there or not of its parent."""
    from benchmarks.networks import CACHE, TOLERANCE, kept
    from training.compress.fp16 import halve

    target = CACHE / HALF / "1"
    description = f"Half precision of {parent.manifest.model.sha256}, to measure speed; its answers mean nothing."
    there = kept(target)
    if there is not None and there.manifest.description == description:
        return there
    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / "model.onnx"
        halve(parent.model_path, graph)
        images = [image.file for image in parent.manifest.golden.images]
        golden = {Path(file).name: (parent.directory / file).read_bytes() for file in images}
        pixels = np.stack([decode(image, parent.manifest.pixels) for image in golden.values()])
        found = ClassifierSession(graph, "cpu", usable_cpus()).classify(pixels)
        manifest = parent.manifest
        fields = manifest.model_dump(mode="json", exclude={"model", "golden", "schema_version"}, exclude_none=True)
        fields |= {
            "name": HALF,
            "description": description,
            "opset": manifest.model.opset,
            "tolerance": TOLERANCE,
            "golden_labels": [manifest.labels[int(row.argmax())] for row in found],
        }
        return write_bundle(target, fields, graph, golden, found)
