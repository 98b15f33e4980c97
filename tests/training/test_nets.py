import pytest
import torch

from training.errors import RecipeError, WeightsError
from training.nets import NETWORKS, build
from training.nets.efficientnet_lite import SameConv2d, from_published


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_article_cnn_has_the_parameters_that_keras_counts():
    network = build("article_cnn", classes=10, size=32, dropout=0.5)
    assert [sum(p.numel() for p in layer.parameters()) for layer in network if list(layer.parameters())] == [
        896,
        18_496,
        147_520,
        650,
    ]
    assert parameters(network) == 167_562


def test_article_cnn_starts_as_keras_does():
    torch.manual_seed(0)
    first = build("article_cnn", classes=10, size=32, dropout=0.5)[0]
    limit = (6 / (3 * 9 + 32 * 9)) ** 0.5
    assert not first.bias.any()
    assert 0.95 * limit < first.weight.abs().max() <= limit


def test_efficientnet_lite0_has_the_published_number_of_parameters():
    assert parameters(build("efficientnet_lite0", classes=1000, size=224, dropout=0.2)) == 4_652_008


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_a_logit_per_class(name: str):
    network = build(name, classes=7, size=64, dropout=0.5).eval()
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_an_unknown_network_is_named_with_those_that_exist():
    with pytest.raises(RecipeError, match="no 'article_cmm'; there are article_cnn, efficientnet_lite0"):
        build("article_cmm", classes=2, size=32, dropout=0)


@pytest.mark.parametrize(("name", "size"), [("article_cnn", 9), ("efficientnet_lite0", 31)])
def test_an_image_too_small_for_the_network_is_refused(name: str, size: int):
    with pytest.raises(RecipeError, match=f"--size: {name} .* not {size}"):
        build(name, classes=2, size=size, dropout=0)


@pytest.mark.parametrize(("side", "kernel"), [(8, 3), (8, 5), (7, 3), (7, 5)])
def test_same_padding_is_tensorflows(side: int, kernel: int):
    """On an even side TensorFlow's first window starts one pixel later than symmetric padding would have it."""
    convolution = SameConv2d(1, 1, kernel, stride=2, bias=False)
    torch.nn.init.ones_(convolution.weight)
    image = torch.arange(side * side, dtype=torch.float32).view(1, 1, side, side)
    before = (kernel - 2) // 2 if side % 2 == 0 else kernel // 2
    starts = range(-before, -before + 2 * -(-side // 2), 2)
    expected = [
        [image[0, 0, max(r, 0) : r + kernel, max(c, 0) : c + kernel].sum().item() for c in starts] for r in starts
    ]
    assert convolution(image)[0, 0].tolist() == expected


def published_names() -> dict[str, torch.Tensor]:
    """Our state dict under the publisher's names."""
    from training.nets.efficientnet_lite import _names

    ours = build("efficientnet_lite0", classes=1000, size=224, dropout=0.2).state_dict()
    names = dict(_names())
    return {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in ours.items()}


def test_published_weights_fit_key_by_key():
    published = published_names()
    assert {"_conv_stem.weight", "_blocks.15._bn2.running_var", "_fc.bias"} <= published.keys()
    assert len(published) == 296
    network = build("efficientnet_lite0", classes=1000, size=224, dropout=0.2)
    network.load_state_dict(from_published(published))
    assert torch.equal(network.classifier.weight, published["_fc.weight"])


def test_a_missing_published_tensor_is_named():
    published = published_names()
    del published["_blocks.3._expand_conv.weight"]
    with pytest.raises(WeightsError, match=r"lack '_blocks\.3\._expand_conv\.weight'"):
        from_published(published)


def test_a_published_tensor_without_a_place_is_named():
    with pytest.raises(WeightsError, match=r"hold '_blocks\.16\._bn0\.weight', which"):
        from_published(published_names() | {"_blocks.16._bn0.weight": torch.zeros(1)})
