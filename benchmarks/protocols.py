"""How fast the Open Inference Protocol is answered, beside `/predict` with the same image, in turns; needs wrk.

    python -m benchmarks.protocols          # a table, and benchmarks/results/protocols.json

The image goes as a decoded uint8 tensor and as an encoded image in a tensor of BYTES, both in the binary form; the
answers are binary too.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from app.cpus import machine
from app.images import decode
from app.manifest import read_bundle
from benchmarks.others import Others
from benchmarks.peers.load import measure, require_wrk
from benchmarks.peers.scenarios import IMAGES
from benchmarks.server import ROOT, serving
from convoy.tensors import LENGTH_HEADER, pack

RESULTS = ROOT / "benchmarks/results/protocols.json"
BAR = 0.9
PREDICT = "/predict"


@dataclass(frozen=True, slots=True)
class Case:
    """A model, the image that it is asked about, and how many connections ask."""

    model: str
    image: str
    connections: int


CASES = (Case("cifar10-article", "small.jpg", 32), Case("imagenet", "web.jpg", 16))


def main() -> int:
    """Measure every case; return 1 if a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.protocols", description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load of a turn")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args()
    require_wrk()
    document: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "seconds": options.seconds,
        "bar": BAR,
        "cases": [],
    }
    table = Table("model", "form", "answers/s", f"÷ {PREDICT}", "wanted")
    missed = False
    for case in CASES:
        with Others() as others:
            turns = measure_case(case, options.turns, options.seconds)
        ratios = ratios_of(turns)
        row = {"model": case.model, "connections": case.connections, "others_cpus": others.cpus}
        document["cases"].append({**row, "per_s_turns": turns, "over_predict": ratios})
        for form, rates in turns.items():
            bar = "" if form == PREDICT else f"≥ {BAR}"
            table.add_row(case.model, form, f"{statistics.median(rates):.1f}", f"{ratios[form]:.2f}", bar)
        missed |= min(ratios.values()) < BAR
    options.output.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    Console(highlight=False).print(table)
    return int(missed)


def measure_case(case: Case, turns: int, seconds: float) -> dict[str, list[float]]:
    """Return the answers per second of each form, turn by turn."""
    image = IMAGES[case.image]()
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="convoy-protocols-") as folder, serving() as service:
        asked = forms(case.model, image)
        for place, (path, body, headers) in enumerate(asked.values()):
            (Path(folder) / str(place)).write_bytes(body)
            measure(service.url + path, [Path(folder) / str(place)], case.connections, 1.0, headers)
        for _ in range(turns):
            for place, (form, (path, _, headers)) in enumerate(asked.items()):
                found = measure(service.url + path, [Path(folder) / str(place)], case.connections, seconds, headers)
                rates.setdefault(form, []).append(round(found.per_s, 1))
    return rates


def forms(model: str, image: bytes) -> dict[str, tuple[str, bytes, Mapping[str, str]]]:
    """Return path, body and headers of the same question in each form."""
    pixels = decode(image, read_bundle(ROOT / "models" / model / "1").manifest.pixels)
    infer = f"/v2/models/{model}/infer"
    asked: dict[str, tuple[str, bytes, Mapping[str, str]]] = {
        PREDICT: (f"/models/{model}/predict", image, {"Content-Type": "image/jpeg"})
    }
    encoded = np.empty(1, np.object_)
    encoded[0] = image
    for form, tensor in (("V2, uint8 tensor", pixels[None]), ("V2, encoded image", encoded)):
        body, json_length = pack({"image": tensor})
        asked[form] = infer, body, {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(json_length)}
    return asked


def ratios_of(turns: Mapping[str, list[float]]) -> dict[str, float]:
    """Return each form's median ratio to `/predict` of the same turn."""
    return {
        form: round(statistics.median(rate / base for rate, base in zip(rates, turns[PREDICT], strict=True)), 3)
        for form, rates in turns.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
