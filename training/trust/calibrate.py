"""A graph in; the same graph out, calibrated and with an energy output, and what is known of its trustworthiness.

Owns the way from a graph to its logits and back, and the proof that the rewritten graph answers by the arithmetic that
it was fitted with. Works on graphs, so on every bundle, whatever wrote it.
"""

import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from app.golden import prove
from app.images import decode
from app.manifest import ENERGY_NAME, Bundle, write_bundle
from training.classifiers import in_batches, onnx_run
from training.data.arrays import Split
from training.errors import ExportError
from training.golden import detected
from training.graphs.ending import LOGITS_NAME, logits_of, with_temperature
from training.trust.calibration import Floats, softmax
from training.trust.energy import energy_of
from training.trust.fitted import Evidence, Trust, assess

BATCH = 64
PROVED = 500
LARGEST_DIFFERENCE = 1e-4
"""Of a probability, or of an energy as a share of it, between graph and arithmetic. Measured: 1e-6."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A rewritten graph, and what it says of the split: probabilities float32 `[n, classes]`."""

    graph: onnx.ModelProto
    trust: Trust
    probabilities: NDArray[np.float32]

    def records(self) -> dict[str, Any]:
        """Return the manifest's sections."""
        return {name: getattr(self.trust, name) for name in ("calibration", "conformal", "ood", "reference")}


def calibrate_graph(graph: onnx.ModelProto, split: Split, data: str, evidence: Evidence) -> Calibrated:
    """Fit, measure, and rewrite a graph's end.

    Args:
        graph: from `image` to `probabilities`; a temperature that it has already is replaced.
        split: the images that figures are measured on; the model was not trained on them.
        data: what the split is, for people.
        evidence: what else there is to fit and measure with.

    Raises:
        ExportError: the graph does not end in a softmax, or the rewritten one does not answer as it should.
        BundleError: ONNX Runtime does not take it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        bare, final = Path(scratch) / "logits.onnx", Path(scratch) / "model.onnx"
        onnx.save(logits_of(graph), bare)
        run = onnx_run(bare, given=LOGITS_NAME)

        def ask(images: NDArray[np.uint8]) -> Floats:
            return in_batches(run, images, BATCH)

        logits = ask(split.images)
        trust = assess(ask, split, logits, evidence, data)
        rewritten = with_temperature(graph, trust.temperature)
        onnx.save(rewritten, final)
        _prove(final, split.images, logits, trust.temperature)
    return Calibrated(rewritten, trust, softmax(logits, trust.temperature).astype(np.float32))


def _prove(model: Path, images: NDArray[np.uint8], logits: Floats, temperature: float) -> None:
    chosen = np.linspace(0, len(images) - 1, min(PROVED, len(images))).round().astype(int)
    some = np.asarray(images[chosen])
    expected = softmax(logits[chosen], temperature), energy_of(logits[chosen], temperature)
    found = in_batches(onnx_run(model), some, BATCH), in_batches(onnx_run(model, given=ENERGY_NAME), some, BATCH)
    scales = 1.0, 1 + np.abs(expected[1])
    for wanted, given, scale in zip(expected, found, scales, strict=True):
        difference = float(np.nan_to_num(np.abs(given - wanted) / scale, nan=np.inf).max())
        if not difference <= LARGEST_DIFFERENCE:
            raise ExportError(
                f"The calibrated graph differs by {difference:.2g} from the arithmetic of temperature {temperature}, "
                f"allowed is {LARGEST_DIFFERENCE:.0e}: no bundle was written."
            )


def recalibrate(
    bundle: Bundle, split: Split, data: str, evidence: Evidence, target: Path, version: str, command: str
) -> Bundle:
    """Write a bundle that differs from another in nothing but its calibration: same weights, labels, golden images.

    Args:
        bundle: where it starts from; stays as it is unless `target` is its own place.
        split: images that the model was not trained on.
        data: what they are, for people.
        evidence: what else there is to fit and measure with.
        target: `<models>/<name>/<version>`.
        version: of the new bundle.
        command: what was called for it.

    Raises:
        ExportError: the graph has no softmax to calibrate, or the rewritten one answers wrongly; nothing is written.
        BundleError: the bundle is damaged, or the new one does not prove itself; nothing is written.
    """
    before = bundle.manifest
    calibrated = calibrate_graph(onnx.load(bundle.model_path), split, data, evidence)
    images = {Path(image.file).name: image for image in before.golden.images}
    golden = dict(zip(images, bundle.golden_bytes(), strict=True))
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model.onnx"
        onnx.save(calibrated.graph, model)
        run = onnx_run(model)
        probabilities = run(np.stack([decode(data, before.pixels) for data in golden.values()]))
        detects = detected(list(golden.values()), before.pixels, probabilities, run)
        fields = before.model_dump(exclude={"model", "golden"}) | calibrated.records()
        fields["version"] = version
        fields["evaluation"] = before.evaluation | {
            "golden_detects": {wrong: float(f"{change:.2g}") for wrong, change in detects.items()}
        }
        fields["provenance"] = before.provenance.model_dump() | {
            "command": f"{before.provenance.command}\n{command}",
            "created": datetime.now(UTC).date().isoformat(),
        }
        fields |= {
            "opset": before.model.opset,
            "tolerance": before.golden.tolerance,
            "golden_labels": [image.label for image in images.values()],
        }
        return write_bundle(
            target,
            fields,
            model,
            golden,
            probabilities,
            check=lambda written: prove(written, onnx_run(written.model_path)),
            data_card=bundle.data_card_bytes(),
        )
