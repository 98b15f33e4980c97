"""Small bundles for tests, made without torch: a classifier of mean colours, exact enough to reason about."""

import io
from datetime import date
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from app.images import decode
from app.manifest import Bundle, PixelRecipe, write_bundle
from app.runtime import load

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 220, 30),
    "blue": (30, 30, 220),
    "white": (240, 240, 240),
    "black": (10, 10, 10),
    "gray": (128, 128, 128),
}
RECIPE = PixelRecipe(height=16, width=16, resize_short_side=16)


def colour_graph(side: int = RECIPE.height, classes: int = len(COLOURS), slow: bool = False) -> onnx.ModelProto:
    """Probability of a colour = softmax of minus the squared distance (in units of 64 levels) to the mean colour.

    A slow one also convolves an enlarged image, about 0.1 s of work per image, and adds none of it to the answer.
    """
    colours = np.array(list(COLOURS.values()), np.float32)[:classes] / 64
    weights = 2 * colours.T
    bias = -(colours**2).sum(axis=1)
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["scaled"]),
        helper.make_node("Gemm", ["scaled", "weights", "bias"], ["distances"]),
        *(_busy_nodes() if slow else [helper.make_node("Identity", ["distances"], ["logits"])]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    constants = {
        "axes": np.array([1, 2], np.int64),
        "scale": np.array(1 / 64, np.float32),
        "weights": weights.astype(np.float32),
        "bias": bias.astype(np.float32),
    }
    if slow:
        rng = np.random.default_rng(0)
        constants |= {
            "first": rng.normal(size=(64, 3, 3, 3)).astype(np.float32),
            "second": rng.normal(size=(64, 64, 3, 3)).astype(np.float32),
            "all_but_rows": np.array([1, 2, 3], np.int64),
            "zero": np.array(0, np.float32),
            "one": np.array([1], np.int64),
            "scales": np.array([1, 1, 24, 24], np.float32),
        }
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", side, side, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _busy_nodes() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Transpose", ["float"], ["channels_first"], perm=[0, 3, 1, 2]),
        helper.make_node("Resize", ["channels_first", "", "scales"], ["large"], mode="nearest"),
        helper.make_node("Conv", ["large", "first"], ["features"]),
        helper.make_node("Conv", ["features", "second"], ["more"]),
        helper.make_node("Clip", ["more", "zero", "zero"], ["nothing"]),
        helper.make_node("ReduceMean", ["nothing", "all_but_rows"], ["none"], keepdims=0),
        helper.make_node("Unsqueeze", ["none", "one"], ["none_each"]),
        helper.make_node("Add", ["distances", "none_each"], ["logits"]),
    ]


def encode(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def plain_image(colour: str, kind: str = "PNG", size: tuple[int, int] = (16, 16), **options: object) -> bytes:
    width, height = size
    pixels = np.broadcast_to(np.array(COLOURS[colour], np.uint8), (height, width, 3))
    return encode(pixels, kind, **options)


def noise_image(seed: int, kind: str = "PNG", size: tuple[int, int] = (16, 16), **options: object) -> bytes:
    """A random image: blocks of random colours, different for every seed."""
    width, height = size
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (4, 4, 3), np.uint8)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    return encode(blocks[rows][:, columns], kind, **options)


def half_and_half(size: tuple[int, int] = (64, 16)) -> bytes:
    """Red, white and blue thirds: what is left of the red depends on resize and crop."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    for third, colour in enumerate(("red", "white", "blue")):
        pixels[:, third * width // 3 : (third + 1) * width // 3] = COLOURS[colour]
    return encode(pixels)


def make_bundle(
    models: Path, name: str = "colours", version: str = "1", *, slow: bool = False, **manifest: object
) -> Bundle:
    """Write a colour bundle under `models` and return it."""
    scratch = models.parent / f"{name}-{version}.onnx"
    scratch.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(colour_graph(slow=slow), scratch)
    golden = {f"{colour}.png": plain_image(colour) for colour in ("red", "blue")}
    golden |= {"thirds.png": half_and_half(), "noise.jpg": noise_image(7, "JPEG", (40, 30))}
    pixels = np.stack([decode(image, RECIPE) for image in golden.values()])
    session = load().InferenceSession(str(scratch), providers=["CPUExecutionProvider"])
    probabilities = session.run(None, {"image": pixels})[0]
    labels = tuple(COLOURS)
    fields = {
        "name": name,
        "version": version,
        "description": "Mean colour, for tests.",
        "pixels": RECIPE.model_dump(),
        "labels": labels,
        "opset": 18,
        "tolerance": 1e-4,
        "golden_labels": [labels[int(row.argmax())] for row in probabilities],
        "provenance": {
            "source": "tests/bundles.py",
            "licence": "Apache-2.0",
            "command": "make_bundle",
            "created": date(2026, 1, 1).isoformat(),
        },
    }
    return write_bundle(models / name / version, fields | manifest, scratch, golden, probabilities)
