"""`python -m tests.networks`: every network learns from a few drawn images, is exported, and is served.

The whole way that a user's network goes: one epoch, the comparison with PyTorch in batches of 1, 7 and 64, the golden
set, the service's loader with its proof, and the service's engine, whose answer to encoded images must be PyTorch's.
What it measures is kept in benchmarks/results/networks.json, each network as it is done; one that is asked for by name
replaces its own entry there.
"""

import argparse
import asyncio
import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import torch

from app.admission import Admission, Limits
from app.engine import LocalEngine
from app.images import decode
from app.loading import Loader
from app.manifest import Bundle, read_bundle
from app.metrics import Metrics
from tests.training.conftest import draw_images
from training import cli
from training.classifiers import open_classifier
from training.errors import RecipeError
from training.graphs.ending import temperature_of
from training.nets import NETWORKS, build
from training.trust.calibration import softmax

RESULTS = Path(__file__).parent.parent / "benchmarks/results/networks.json"
LARGEST_DIFFERENCE = 1e-4
DEADLINE_S = 60
SMALL, LESS_SMALL = 16, 32
TRAIN, TEST = 8, 22
"""Images of each of three classes; 66 to test on, so that batches of 64 are compared."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was seen of one network: processor time of this process, and differences of a probability."""

    size: int
    parameters: int
    train_cpu_s: float
    export_cpu_s: float
    onnx_megabytes: float
    onnx_against_pytorch: float
    served_against_pytorch: float


def learn_export_and_serve(name: str, data: Path, work: Path, size: int) -> Outcome:
    """Take a network the whole way, on images of `size` pixels a side.

    Raises:
        AssertionError: a command failed, or what is served answers otherwise than PyTorch does.
    """
    model = name.replace("_", "-")
    places = [f"--cache-dir={work / 'cache'}"]
    train = ["train", f"--data={data}", f"--runs-dir={work / 'runs'}", f"--name={model}", f"--network={name}"]
    begun = time.process_time()
    _succeed([*train, f"--size={size}", "--epochs=1", "--batch-size=8", "--learning-rate=0.0001", *places])
    trained = time.process_time()
    photos = sorted(data.glob("test/*/000.jpg"))
    models, own = work / "models" / model, work / "golden" / model
    own.mkdir(parents=True)
    for number, photo in enumerate(photos):
        shutil.copyfile(photo, own / f"{number}.jpg")
    # Of few pictures the golden set is soon chosen.
    _succeed(["export", str(work / "runs" / model), f"--models-dir={models}", f"--golden-from={own}", *places])
    exported = time.process_time()
    bundle = read_bundle(models / model / "1")
    pixels = np.stack([decode(photo.read_bytes(), bundle.manifest.pixels) for photo in photos])
    # PyTorch's answer, at the temperature that export found and the graph applies.
    logits = np.log(open_classifier(work / "runs" / model, torch.device("cpu")).run(pixels).clip(1e-30))
    expected = softmax(logits, temperature_of(onnx.load(bundle.model_path)))
    with torch.device("meta"):
        network = build(name, classes=len(bundle.manifest.labels), size=size, dropout=0)
    return Outcome(
        size=size,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        train_cpu_s=round(trained - begun, 1),
        export_cpu_s=round(exported - trained, 1),
        onnx_megabytes=round(bundle.model_path.stat().st_size / 1e6, 1),
        onnx_against_pytorch=bundle.manifest.evaluation["runtime_difference"],
        served_against_pytorch=_difference(bundle, [photo.read_bytes() for photo in photos], expected),
    )


def _difference(bundle: Bundle, images: list[bytes], expected: np.ndarray) -> float:
    """Return the largest difference of a probability as served from `expected`, `[images, classes]`."""
    difference = float(np.abs(asyncio.run(_serve(bundle, images)) - expected).max())
    assert difference <= LARGEST_DIFFERENCE, f"what is served differs from PyTorch by {difference:.2g}"
    return float(f"{difference:.2g}")


async def _serve(bundle: Bundle, images: list[bytes]) -> np.ndarray:
    """Load a bundle and classify encoded images as the service does, without its port."""
    metrics = Metrics()
    loader = Loader(metrics, device="cpu", sessions=1, threads_per_session=1, max_batch=4, linger_s=0)
    model, _ = loader.load(bundle.manifest.name, "1", bundle.directory, asyncio.get_running_loop())
    admission = Admission(Limits(8, 10**6, 10**7, {}, 0.0), metrics)
    engine = LocalEngine(None, admission, decode_threads=1, max_image_pixels=10**6)
    try:
        with engine.admit(model, time.monotonic() + DEADLINE_S) as ticket:
            return (await engine.classify(model, images, ticket)).probabilities
    finally:
        model.batcher.close()
        engine.close()


def _succeed(arguments: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.main(arguments)
    assert code == 0, said.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.networks", description=__doc__)
    parser.add_argument("network", nargs="*", help="some of them; by default all")
    parser.add_argument("--size", type=int, help=f"side of the images; default: {SMALL}, or {LESS_SMALL} where need be")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"networks": {}}
    failed = []
    for name in wanted.network or NETWORKS:
        with tempfile.TemporaryDirectory() as scratch:
            data = draw_images(Path(scratch) / "drawn", parts=(("train", TRAIN), ("test", TEST)))
            try:
                outcome = learn_export_and_serve(name, data, Path(scratch), wanted.size or smallest(name))
            except (AssertionError, RecipeError) as error:
                failed.append(name)
                tell(f"{name}: {error}")
                continue
        tell(f"{name}: {json.dumps(asdict(outcome))}")
        kept["networks"][f"{name}/{outcome.size}"] = asdict(outcome)
        kept |= {"command": "python -m tests.networks", "date": datetime.now(UTC).date().isoformat()}
        kept |= {"torch": torch.__version__, "threads": 1, "images": {"train": 3 * TRAIN, "test": 3 * TEST}}
        RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    tell(f"{len(failed)} networks failed{': ' if failed else '.'}{', '.join(failed)}")
    return 1 if failed else 0


def smallest(name: str) -> int:
    """Return the smaller of two sizes, if the network takes it."""
    try:
        with torch.device("meta"):
            build(name, classes=2, size=SMALL, dropout=0)
    except RecipeError:
        return LESS_SMALL
    return SMALL


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
