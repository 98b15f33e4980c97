"""Every way of compressing, on tiny networks and tens of images: what is written, and when nothing is."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from app.golden import prove
from app.manifest import Bundle, read_bundle, verify_files
from app.sessions import ClassifierSession
from tests.bundles import make_bundle
from training import cli
from training.classifiers import onnx_run
from training.compress import int8, speed
from training.compress.distilling import asked_of
from training.compress.fp16 import halve
from training.compress.pruning import multiply_adds, prune
from training.compress.speed import Speed
from training.compress.table import Row, check_bound, in_words
from training.costs import Costs
from training.errors import CompressError
from training.graphs.ending import plain
from training.graphs.parts import around_network, weighted_nodes
from training.nets import build


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of speed are not looked at here."""
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "TURN_S", 0.0)


@pytest.fixture(scope="module")
def work(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run and the bundle made of it; read only."""
    work = tmp_path_factory.mktemp("compress")
    common = [f"--cache-dir={work / 'cache'}"]
    train = ["train", f"--data={tree}", f"--runs-dir={work / 'runs'}", "--name=insects", "--epochs=3", "--seed=4"]
    assert cli.main([*train, *common]) == 0
    assert cli.main(["export", str(work / "runs" / "insects"), f"--models-dir={work / 'models'}", *common]) == 0
    return work


@pytest.fixture
def parent(work: Path) -> Bundle:
    return read_bundle(work / "models" / "insects" / "1")


def compress(method: str, model: Path, work: Path, into: Path, *flags: str) -> int:
    places = [f"--models-dir={into}", f"--cache-dir={work / 'cache'}"]
    return cli.main(["compress", method, str(model), *places, *flags])


def served(bundle: Bundle) -> float:
    """Prove a bundle as the service does."""
    verify_files(bundle)
    session = ClassifierSession(bundle.model_path, "cpu", 1)
    return prove(bundle, lambda images: session.run(images)[0])


@pytest.mark.parametrize(("method", "smaller"), [("int8", 0.4), ("fp16", 0.6)])
def test_a_graph_is_compressed_beside_its_parent(method, smaller, parent, work, tree, tmp_path, capsys):
    assert compress(method, parent.directory, work, tmp_path, f"--data={tree}", "--max-loss=20") == 0
    bundle = read_bundle(tmp_path / f"insects-{method}" / "1")
    assert served(bundle) <= bundle.manifest.golden.tolerance
    record = bundle.manifest.parent
    assert record is not None
    assert (record.name, record.version, record.method) == ("insects", "1", method)
    assert record.sha256 == parent.manifest.model.sha256
    first, last = bundle.manifest.evaluation["beside_parent"]["models"]
    assert (first["name"], last["name"]) == ("insects/1", f"insects-{method}/1")
    assert last["size_bytes"] == bundle.manifest.model.size_bytes < smaller * first["size_bytes"]
    assert last["parameters"] == first["parameters"]
    assert first["accuracy"] == parent.manifest.evaluation["accuracy"]
    assert first["accuracy"] - last["accuracy"] <= 0.2
    assert last["images_per_s"] > 0
    assert last["accuracy"] == bundle.manifest.evaluation["accuracy"]
    assert set(bundle.golden_bytes()) <= set(parent.golden_bytes())
    assert bundle.manifest.evaluation["golden_detects"].keys() == parent.manifest.evaluation["golden_detects"].keys()
    expected = np.sort(bundle.golden_probabilities(), axis=1)
    assert (expected[:, -1] - expected[:, -2] > 2 * bundle.manifest.golden.tolerance).all()
    assert bundle.manifest.calibration is not None
    assert bundle.manifest.calibration.measured_images == 30
    assert "points of accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["int8", "fp16"])
def test_input_and_output_keep_their_types_and_probabilities_sum_to_one(method, parent, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    if method == "fp16":
        model = tmp_path / "half.onnx"
        halve(parent.model_path, model)
    else:
        model = int8.Quantiser(parent.model_path, images, tmp_path).attempt("minmax").path
    onnx.checker.check_model(onnx.load(model), full_check=True)
    untempered = tmp_path / "plain.onnx"
    onnx.save(plain(onnx.load(parent.model_path)), untempered)
    found, expected = onnx_run(model)(images), onnx_run(untempered)(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found, expected, atol=0.1 if method == "int8" else 0.005)
    assert np.abs(found - expected).max() > 0


def test_weights_have_seven_bits_so_that_no_processor_saturates(parent, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    graph = onnx.load(int8.Quantiser(parent.model_path, images, tmp_path).attempt("minmax").path).graph
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == 3]
    large = [array for array in weights if array.size > 100]
    assert len(large) == len(weighted_nodes(onnx.load(parent.model_path)))
    assert max(int(np.abs(array.astype(int)).max()) for array in large) == 64  # 2 · 255 · 64 < 2**15


def test_what_loses_too_much_is_refused_and_nothing_is_written(parent, work, tree, tmp_path, monkeypatch, capsys):
    def ruin(model: Path, into: Path) -> None:
        halve(model, into)
        graph = onnx.load(into)
        for tensor in graph.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT16:
                zeros = np.zeros(tuple(tensor.dims), np.float16)
                tensor.CopyFrom(onnx.numpy_helper.from_array(zeros, tensor.name))
        onnx.save(graph, into)

    monkeypatch.setattr("training.compress.fp16.halve", ruin)
    assert compress("fp16", parent.directory, work, tmp_path / "models", f"--data={tree}", "--max-loss=0.5") == 2
    message = capsys.readouterr().err
    assert "points of accuracy would be lost" in message
    assert "more than --max-loss 0.5: no bundle was written." in message
    assert not (tmp_path / "models").exists()


def test_layers_stay_in_float_until_the_bound_holds(parent, work, tree, tmp_path, monkeypatch, capsys):
    """The answers of a graph with no layer in float32 are spoilt, so that the search has to find another."""
    quantise = int8.Quantiser._quantise

    def spoil(self: int8.Quantiser, into: Path, method: int8.Method, in_float: tuple[str, ...]) -> None:
        quantise(self, into, method, in_float)
        if not in_float:
            graph = onnx.load(into)
            for tensor in graph.graph.initializer:
                if tensor.data_type == onnx.TensorProto.INT8:
                    zeros = np.zeros(tuple(tensor.dims), np.int8)
                    tensor.CopyFrom(onnx.numpy_helper.from_array(zeros, tensor.name))
            onnx.save(graph, into)

    monkeypatch.setattr(int8.Quantiser, "_quantise", spoil)
    flags = (f"--data={tree}", "--max-loss=10", "--calibration=minmax", "--calibration-images=20")
    assert compress("int8", parent.directory, work, tmp_path, *flags) == 0
    bundle = read_bundle(tmp_path / "insects-int8" / "1")
    assert bundle.manifest.parent is not None
    assert len(bundle.manifest.parent.details["layers_in_float32"]) == 1
    assert bundle.manifest.parent.details["looks_at_the_test_images"] == 2
    assert "1 of the layers in float32" in capsys.readouterr().out


def test_a_quantised_bundle_is_not_quantised_again(parent, tmp_path):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    path = int8.Quantiser(parent.model_path, images, tmp_path).attempt("minmax").path
    with pytest.raises(CompressError, match="is quantised already"):
        int8.Quantiser(path, images, tmp_path)
    halve(parent.model_path, tmp_path / "half.onnx")
    with pytest.raises(CompressError, match="has no float32 weights to halve"):
        halve(tmp_path / "half.onnx", tmp_path / "again.onnx")


def test_photos_to_calibrate_on_are_asked_for_where_the_data_has_none_to_spare(
    parent, work, draw_tree, tmp_path, capsys
):
    other = draw_tree(tmp_path / "other", parts=((".", 4),))
    flags = (f"--data={other}", "--max-loss=50")
    assert compress("int8", parent.directory, work, tmp_path / "models", *flags) == 2
    assert "give --calibrate-on a folder of other photos" in capsys.readouterr().err
    photos = f"--calibrate-on={other / 'ant'}"
    assert compress("int8", parent.directory, work, tmp_path / "models", *flags, photos, "--calibration=minmax") == 0
    bundle = read_bundle(tmp_path / "models" / "insects-int8" / "1")
    assert bundle.manifest.parent is not None
    assert bundle.manifest.parent.details["calibrated_on"] == f"4 images of {other / 'ant'}"


def test_entropy_and_percentile_cut_off_what_min_and_max_keep(parent, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    quantiser = int8.Quantiser(parent.model_path, images, tmp_path)
    ranges = {}
    for method in get_args(int8.Method):
        quantiser.attempt(method)
        record = json.loads((tmp_path / f"{method}.json").read_text())
        ranges[method] = json.dumps(record["data"])
    assert len(set(ranges.values())) == 3


def test_around_a_network_is_what_no_weights_come_before_or_after(parent):
    graph = plain(onnx.load(parent.model_path))
    kept = around_network(graph)
    assert {node.op_type for node in graph.graph.node if node.name in kept} == {"Transpose", "Cast", "Mul", "Softmax"}


# ---------------------------------------------------------------- pruning


class Residual(nn.Module):
    """A sum, a normalisation whose scale is frozen, and a layer that is called twice a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.inner = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.norm.weight.requires_grad_(False)
        self.head = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.gelu(self.stem(x))
        logits: torch.Tensor = self.head((x + self.norm(self.inner(x))).amax(dim=(2, 3)))
        return logits


def test_pruning_takes_whole_channels_of_what_is_joined_and_leaves_the_network_alone():
    torch.manual_seed(0)
    network, planes = Residual().eval(), torch.randn(20, 3, 8, 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pruned = prune(network, planes, torch.arange(20) % 3, classes=3, drop=0.4)
    assert 0.4 <= pruned.drop < 0.8
    assert pruned.before == multiply_adds(network, planes[:1]) == 64 * (27 * 32 + 9 * 32 * 32) + 32 * 3
    assert pruned.after == multiply_adds(pruned.network, planes[:1])
    channels = pruned.network.stem.out_channels
    assert channels < 32
    assert channels % 8 == 0
    assert pruned.network.inner.weight.shape[:2] == (channels, channels)
    assert pruned.network.head.out_features == 3
    assert not pruned.network.norm.weight.requires_grad
    assert pruned.network.stem.weight.requires_grad
    assert pruned.network.stem.weight.grad is None
    assert pruned.network(planes).shape == (20, 3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_channels_that_matter_least_go():
    torch.manual_seed(0)
    network = Residual().eval()
    with torch.no_grad():
        network.stem.weight[8:16] = 0  # nothing comes out of these, so nothing is lost with them
        network.stem.bias[8:16] = 0
        network.inner.weight[8:16] = 0
        network.head.weight[:, 8:16] = 0
    planes = torch.randn(20, 3, 8, 8)
    pruned = prune(network, planes, torch.arange(20) % 3, classes=3, drop=0.2)
    assert pruned.network.stem.out_channels == 24
    torch.testing.assert_close(pruned.network.eval()(planes), network(planes))


def test_more_than_there_is_cannot_be_pruned():
    network = build("article_cnn", classes=3, size=32, dropout=0.0)
    with pytest.raises(CompressError, match="not 100%: ask for a smaller --drop"):
        prune(network, torch.randn(4, 3, 32, 32), torch.arange(4) % 3, classes=3, drop=1.0)


def test_a_run_is_pruned_trained_on_and_written(work, tree, tmp_path, capsys):
    run = work / "runs" / "insects"
    assert compress("prune", run, work, tmp_path, "--max-loss=30", "--epochs=1", "--drop=0.5") == 0
    bundle = read_bundle(tmp_path / "insects-pruned" / "1")
    assert served(bundle) <= bundle.manifest.golden.tolerance
    record = bundle.manifest.parent
    assert record is not None
    assert (record.name, record.version, record.method) == ("insects", None, "prune")
    first, last = bundle.manifest.evaluation["beside_parent"]["models"]
    assert last["multiply_adds"] <= 0.5 * first["multiply_adds"]
    assert last["parameters"] < first["parameters"]
    assert len(bundle.manifest.training["history"]) == 1
    assert "times the images a second" in capsys.readouterr().out


# ---------------------------------------------------------------- distillation


def test_a_network_learns_from_a_bundle(parent, work, tree, tmp_path):
    flags = (f"--data={tree}", "--max-loss=70", "--epochs=1", f"--beside={parent.directory}", "--name=student")
    assert compress("distil", parent.directory, work, tmp_path, *flags) == 0
    bundle = read_bundle(tmp_path / "student" / "1")
    assert served(bundle) <= bundle.manifest.golden.tolerance
    record = bundle.manifest.parent
    assert record is not None
    assert (record.name, record.version, record.method) == ("insects", "1", "distil")
    assert record.details == {"teacher_weight": 0.9, "temperature": 4.0}
    names = [row["name"] for row in bundle.manifest.evaluation["beside_parent"]["models"]]
    assert names == ["insects/1", str(parent.directory), "student/1"]


def test_a_student_that_is_much_worse_than_its_teacher_is_refused(parent, work, tree, tmp_path, capsys):
    flags = (f"--data={tree}", "--max-loss=1", "--epochs=1", "--learning-rate=1e-9", "--name=student")
    assert compress("distil", parent.directory, work, tmp_path / "models", *flags) == 2
    assert "no bundle was written" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_teacher_and_student_see_the_same_pixels(parent, work, tree, tmp_path, capsys):
    flags = (f"--data={tree}", "--max-loss=1", "--size=40")
    assert compress("distil", parent.directory, work, tmp_path / "models", *flags) == 2
    assert "sees 32×32 pixels, the student 40×40" in capsys.readouterr().err


def test_what_is_measured_beside_each_other_sees_and_says_the_same(parent, work, tree, tmp_path, capsys):
    flags = (f"--data={tree}", "--max-loss=1")
    for given, sentence in (
        (("--interpolation=bicubic",), "has interpolation bilinear, and the student would have bicubic"),
        ((f"--beside={make_bundle(tmp_path / 'models').directory}",), "has other labels than the teacher"),
        (("--patience=3", "--validation-fraction=0.2"), "trains to the last epoch"),
    ):
        assert compress("distil", parent.directory, work, tmp_path / "made", *flags, *given) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("given", ["--seed=5", "--validation-fraction=0.2", "--size=40"])
def test_a_pruned_network_is_of_its_run(work, tmp_path, capsys, given):
    assert compress("prune", work / "runs" / "insects", work, tmp_path, "--max-loss=30", given) == 2
    assert "the run has " in capsys.readouterr().err


def test_a_teacher_is_asked_with_the_levels_that_it_takes():
    asked = []

    def run(images: np.ndarray) -> np.ndarray:
        asked.append(images)
        return np.full((len(images), 2), 0.5, np.float32)

    planes = torch.tensor([-3.0, 0.4, 0.6, 300.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    answers = asked_of(run)(planes)
    assert asked[0].dtype == np.uint8
    assert asked[0][0, :, :, 0].tolist() == [[0, 0], [1, 255]]
    assert answers.tolist() == [[0.5, 0.5]]


# ---------------------------------------------------------------- the table


def row(accuracy: float, rate: float, size: int = 1000) -> Row:
    return Row("x", accuracy, size, Costs(1, 1), Speed(1.0, rate, "CPUExecutionProvider"))


def test_the_bound_is_in_points_and_holds_to_the_point():
    check_bound(0.9, 0.895, 0.5)
    check_bound(0.9, 0.95, 0)
    with pytest.raises(CompressError, match=r"0\.51 points of accuracy would be lost \(90\.00% → 89\.49%\)"):
        check_bound(0.9, 0.8949, 0.5)


def test_what_is_no_faster_is_called_so():
    assert "no faster here (1.04 times" in in_words(row(0.9, 100), row(0.9, 104))
    assert "0.50 points of accuracy lost, 25% of the size, 2.00 times the images" in in_words(
        row(0.9, 100), row(0.895, 200, size=250)
    )
    assert "1.00 points of accuracy gained" in in_words(row(0.9, 100), row(0.91, 100))


@pytest.mark.parametrize("bound", ["-1", "101", "much", "nan"])
def test_a_bound_is_a_number_of_points(bound, parent, work, tree, tmp_path, capsys):
    assert compress("fp16", parent.directory, work, tmp_path, f"--data={tree}", f"--max-loss={bound}") == 2
    assert "is no number of points from 0 to 100" in capsys.readouterr().err
