"""New heads on old graphs: the mathematics, the surgery, and the command that makes a bundle of both."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from app.golden import prove
from app.manifest import read_bundle
from app.runtime import load
from tests.bundles import colour_graph, make_bundle
from training import cli
from training.classifiers import onnx_run
from training.data.listing import Listing, Picture
from training.errors import SurgeryError
from training.graphs.cut import FEATURES_NAME, above, backbone, find_cut, graft
from training.transfer.fewshot import draw_shots
from training.transfer.heads import ALONE_STRENGTH, HEADS, STRENGTHS, fit_cosine, fit_logistic


def clouds(shots: int, spread: float = 1.0, classes: int = 4, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Draw features around a point of each class, far from the origin as those after a ReLU are."""
    random = np.random.default_rng(3)
    middles = random.normal(8, 2, (classes, width))
    labels = np.repeat(np.arange(classes), shots)
    return (middles[labels] + random.normal(0, spread, (len(labels), width))).astype(np.float32), labels


def run_graph(model: onnx.ModelProto, given: dict[str, np.ndarray], output: str) -> np.ndarray:
    session = load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([output], given)[0]


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize("fit", HEADS.values(), ids=HEADS)
def test_a_head_tells_apart_what_lies_apart(fit: Callable):
    features, labels = clouds(8)
    for shots in (1, 2, 5):
        chosen = np.arange(len(labels)) % 8 < shots
        head = fit(features[chosen], labels[chosen], 4)
        probabilities = head.probabilities(features)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
        assert (probabilities.argmax(axis=1) == labels).mean() == 1


def test_a_cosine_head_gives_the_nearest_mean():
    features, labels = clouds(5)
    head = fit_cosine(features, labels, 4)
    middle = np.stack([features[labels == label].mean(axis=0) for label in range(4)]).mean(axis=0)
    directions = [row / np.linalg.norm(row) for row in features.astype(float) - middle]
    means = [
        np.mean([d for d, of in zip(directions, labels, strict=True) if of == label], axis=0) for label in range(4)
    ]
    cosines = np.array([[d @ mean / np.linalg.norm(mean) for mean in means] for d in directions])
    powers = np.exp(head.about["sharpness"] * cosines)
    np.testing.assert_allclose(head.probabilities(features), powers / powers.sum(axis=1, keepdims=True), atol=1e-3)


def test_a_logistic_head_is_at_the_minimum_of_its_loss():
    features, labels = clouds(6, spread=3)
    head = fit_logistic(features, labels, 4)
    scale = np.sqrt(((features - features.mean(axis=0)) ** 2).sum(axis=1).mean())
    weight = torch.tensor(head.weights["weight"], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(head.weights["bias"], dtype=torch.float64, requires_grad=True)
    logits = torch.tensor(features, dtype=torch.float64) @ weight + bias
    # The penalty is on weights for features of mean square norm 1.
    penalty = head.about["l2"] / 2 * (weight * scale).square().sum()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)) + penalty
    loss.backward()
    assert float((weight.grad / scale).abs().max()) < 1e-4
    assert float(bias.grad.abs().max()) < 1e-4
    assert float(penalty.detach()) > 1e-3, "a penalty that weighs nothing would prove nothing"


def test_the_penalty_is_chosen_by_images_left_out():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 10)
    noise = random.normal(size=(30, 40)).astype(np.float32)
    assert fit_logistic(noise, labels, 3).about["l2"] == STRENGTHS[-1]
    apart = (noise * 0.1 + 5 * np.eye(3, 40)[labels]).astype(np.float32)
    assert fit_logistic(apart, labels, 3).about["l2"] < 1e-3
    assert fit_logistic(apart[::10], labels[::10], 3).about == {
        "head": "logistic",
        "l2": ALONE_STRENGTH,
        "left_out_loss": None,
    }


@pytest.mark.parametrize("fit", HEADS.values(), ids=HEADS)
def test_features_that_say_nothing_are_refused(fit: Callable):
    features, labels = clouds(2)
    with pytest.raises(SurgeryError, match="the same features for all images"):
        fit(np.ones_like(features), labels, 4)
    features[3, 3] = np.nan
    with pytest.raises(SurgeryError, match="features that are not numbers"):
        fit(features, labels, 4)


# ---------------------------------------------------------------- surgery


IMAGES = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8)


def test_a_graph_is_the_sum_of_its_parts():
    whole = colour_graph()
    cut = find_cut(whole, "colours")
    features = run_graph(backbone(whole, cut), {"image": IMAGES}, FEATURES_NAME)
    np.testing.assert_allclose(features, IMAGES.mean(axis=(1, 2)) / 64, rtol=1e-5)
    found = run_graph(above(whole, cut), {FEATURES_NAME: features}, "probabilities")
    np.testing.assert_allclose(found, run_graph(whole, {"image": IMAGES}, "probabilities"), atol=1e-6)


def ending(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """Return the colour graph with other nodes after its linear layer, which gives `distances`."""
    model = colour_graph()
    kept = [node for node in model.graph.node if node.op_type not in ("Identity", "Softmax")]
    del model.graph.node[:]
    model.graph.node.extend([*kept, *nodes, helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)])
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def test_a_temperature_and_rounding_to_int8_do_not_hide_the_last_layer():
    scale, zero = np.float32(0.25), np.int8(0)
    model = ending(
        helper.make_node("QuantizeLinear", ["distances", "scale_q", "zero_q"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["rounded", "scale_q", "zero_q"], ["again"]),
        helper.make_node("Div", ["again", "temperature"], ["logits"]),
        scale_q=np.array(scale),
        zero_q=np.array(zero),
        temperature=np.array(2, np.float32),
    )
    cut = find_cut(model, "colours")
    assert cut.features == "scaled"
    features = run_graph(backbone(model, cut), {"image": IMAGES}, FEATURES_NAME)
    found = run_graph(above(model, cut), {FEATURES_NAME: features}, "probabilities")
    np.testing.assert_array_equal(found, run_graph(model, {"image": IMAGES}, "probabilities"))


def test_a_graph_without_a_last_linear_layer_is_refused():
    sum_of_two = ending(helper.make_node("Add", ["distances", "distances"], ["logits"]))
    with pytest.raises(SurgeryError, match=r"^colours does not end in a linear layer and a softmax: Add"):
        find_cut(sum_of_two, "colours")
    bare = colour_graph(classes=3)
    nodes = [node for node in bare.graph.node if node.op_type in ("Cast", "ReduceMean")]
    del bare.graph.node[:]
    bare.graph.node.extend([*nodes, helper.make_node("Softmax", ["mean"], ["probabilities"], axis=1)])
    with pytest.raises(SurgeryError, match="does not end in a linear layer and a softmax: ReduceMean"):
        find_cut(bare, "colours")


@pytest.mark.parametrize("fit", HEADS.values(), ids=HEADS)
def test_a_grafted_head_answers_as_it_does_alone_and_can_be_cut_off_again(fit: Callable):
    whole = colour_graph()
    cut = find_cut(whole, "colours")
    features, labels = clouds(3, classes=5, width=3)
    head = fit(features / 4, labels, 5)
    grown = graft(whole, cut, head.steps, head.weights, 5)
    below = run_graph(backbone(whole, cut), {"image": IMAGES}, FEATURES_NAME)
    np.testing.assert_allclose(
        run_graph(grown, {"image": IMAGES}, "probabilities"), head.probabilities(below), atol=1e-6
    )
    again = find_cut(grown, "grown")
    np.testing.assert_array_equal(run_graph(backbone(grown, again), {"image": IMAGES}, FEATURES_NAME), below)
    twice = graft(grown, again, head.steps, head.weights, 5)
    np.testing.assert_allclose(
        run_graph(twice, {"image": IMAGES}, "probabilities"), head.probabilities(below), atol=1e-6
    )


def test_an_image_without_features_has_an_answer_under_a_cosine_head():
    features, labels = clouds(3, width=3)
    head = fit_cosine(features, labels, 4)
    entry = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3])
    middle = helper.make_graph([helper.make_node("Identity", ["image"], ["same"])], "g", [entry], [])
    alone = helper.make_model(middle, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    cut = type(find_cut(colour_graph(), "colours"))(features="same", linear="")
    grown = graft(alone, cut, head.steps, head.weights, 4)
    at_the_centre = head.weights["centre"][None]
    np.testing.assert_allclose(run_graph(grown, {"image": at_the_centre}, "probabilities"), [[0.25] * 4])


# ---------------------------------------------------------------- shots


def test_shots_are_as_many_of_each_class_and_of_the_training_part():
    pictures = tuple(Picture(f"{label}/{number}.jpg", label, "", Path()) for label in (0, 1) for number in range(9))
    listing = Listing(("a", "b"), pictures[:7] + pictures[9:], pictures[7:9])
    chosen = draw_shots(listing, 4, seed=0)
    assert [picture.label for picture in chosen] == [0] * 4 + [1] * 4
    assert set(chosen) <= set(listing.train)
    assert chosen == draw_shots(listing, 4, seed=0) != draw_shots(listing, 4, seed=1)
    assert len(draw_shots(listing, None, seed=0)) == len(listing.train)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose features are the mean colour; read only."""
    return make_bundle(tmp_path_factory.mktemp("colours") / "models").directory


@pytest.mark.parametrize("head", HEADS)
def test_a_few_images_make_a_bundle_that_proves_itself(
    colours: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str
):
    where = [f"--models-dir={tmp_path / 'models'}", f"--cache-dir={tmp_path / 'cache'}"]
    command = ["few-shot", "--from", str(colours), "--data", str(tree), "--shots", "5", "--head", head, *where]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert f"Fitted a {head} head to 3 features of 15 images of 3 classes in " in said
    bundle = read_bundle(tmp_path / "models" / "insects" / "1")
    assert prove(bundle, onnx_run(bundle.model_path)) <= 1e-6
    manifest = bundle.manifest
    assert manifest.labels == ("ant", "bee", "cow")
    assert manifest.evaluation["images"] == 30
    assert manifest.evaluation["accuracy"] > 0.9
    told = manifest.training
    assert (told["head"], told["shots"], told["images"]) == (head, 5, 15)
    assert told["backbone"]["name"] == "colours"
    assert told["backbone"]["sha256"] == read_bundle(colours).manifest.model.sha256
    assert cli.main(["evaluate", str(bundle.directory), "--data", str(tree), f"--cache-dir={tmp_path / 'cache'}"]) == 0
    assert f"accuracy {manifest.evaluation['accuracy']:.2%}" in capsys.readouterr().out


def test_a_folder_without_a_test_part_is_divided_and_the_bundle_remembers_how(
    colours: Path, draw_tree: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = draw_tree(tmp_path / "zoo", parts=(("", 10),))
    where = [f"--models-dir={tmp_path / 'models'}", f"--cache-dir={tmp_path / 'cache'}"]
    assert cli.main(["few-shot", "--from", str(colours), "--data", str(data), "--test-fraction=0.3", *where]) == 0
    bundle = tmp_path / "models" / "zoo" / "1"
    manifest = read_bundle(bundle).manifest
    assert manifest.training["images"] == 21
    assert manifest.evaluation["data"] == f"{data}, a held-out 30%: 9 of 30 images"
    capsys.readouterr()
    assert cli.main(["evaluate", str(bundle), "--data", str(data), f"--cache-dir={tmp_path / 'cache'}"]) == 0
    assert "on 9 images (a held-out 30%: 9 of 30 images)" in capsys.readouterr().out


def test_each_fault_is_one_sentence(
    colours: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "one" / "ant").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").touch()
    other = tmp_path / "other"
    for folder in ("train/ant", "train/bee", "test/ant", "test/cow"):
        (other / folder).mkdir(parents=True)
    damaged = make_bundle(tmp_path / "damaged").directory
    (damaged / "model.onnx").write_bytes(b"no graph")
    for bundle, data, more, sentence in (
        ("nowhere", tree, [], "nowhere/model.json is missing, so nowhere is not a bundle."),
        ("run", tree, [], "run is a run, not a bundle: make one of it with `convoy-train export run`."),
        (damaged, tree, [], f"{damaged}/model.onnx is not the file that was exported: its SHA-256 starts "),
        (colours, "nowhere", [], "nowhere does not exist: give --data"),
        (colours, "one", [], "one has the single class 'ant': a classifier needs two or more class folders."),
        (colours, other, [], f"{other}/train/bee has no counterpart {other}/test/bee: train and test need the same"),
        (colours, tree, ["--shots=21"], "The class 'ant' has 20 images to train on, fewer than --shots 21: add some"),
        (colours, tree, ["--shots=0"], "--shots: '0' is no whole number of at least 1."),
        (colours, tree, ["--head=svm"], "--head: invalid choice: 'svm'"),
        (colours, tree, ["--seed=x"], "--seed: input should be a valid integer"),
    ):
        assert cli.main(["few-shot", "--from", str(bundle), "--data", str(data), *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"convoy-train: {sentence}")
        assert error.count("\n") == 1
    assert not (tmp_path / "models").exists()
