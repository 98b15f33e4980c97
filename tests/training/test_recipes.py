import numpy as np
import pytest
import torch

from training.errors import RecipeError
from training.recipes import Recipe, make_recipe
from training.servable import Normalise, Servable


def test_the_defaults_are_the_articles():
    recipe = Recipe()
    assert (recipe.network, recipe.size, recipe.epochs, recipe.batch_size) == ("article_cnn", 32, 10, 32)
    assert (recipe.optimizer, recipe.learning_rate, recipe.loss) == ("adam", 0.001, "cross-entropy")
    assert (recipe.rescale, recipe.shear, recipe.zoom, recipe.flip) == (1 / 255, 0.2, 0.2, True)
    assert (recipe.shift, recipe.rotate, recipe.cutout, recipe.mixup, recipe.cutmix) == (0, 0, 0, 0, 0)
    assert (recipe.alternate_flip, recipe.balance) == (False, "none")
    assert (recipe.dropout, recipe.test_fraction) == (0.5, 0.2)


def test_every_knob_is_described():
    assert all(field.description for field in Recipe.model_fields.values())


def test_text_is_read_as_the_command_line_gives_it():
    recipe = make_recipe(epochs="3", learning_rate="1e-4", mean="0.5", std="0.2,0.3,0.4")
    assert (recipe.epochs, recipe.learning_rate) == (3, 1e-4)
    assert (recipe.mean, recipe.std) == ((0.5, 0.5, 0.5), (0.2, 0.3, 0.4))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"epochs": "0"}, "--epochs: input should be greater than or equal to 1."),
        ({"epochs": "many"}, "--epochs: input should be a valid integer"),
        ({"zoom": "1"}, "--zoom: input should be less than 1."),
        ({"shift": 32}, "--shift: input should be less than --size, which is 32."),
        ({"cutout": 16, "size": 16}, "--cutout: input should be less than --size, which is 16."),
        ({"balance": "fair"}, "--balance: input should be 'none', 'weights' or 'sampling'"),
        ({"std": "0"}, "--std: 0 cannot be divided by."),
        ({"mean": "1,2"}, "--mean: "),
        ({"learning_rate": "nan"}, "--learning-rate: "),
        ({"seed": str(2**63)}, "--seed: input should be less than 9223372036854775808."),
        ({"epoks": 3}, "--epoks: extra inputs are not permitted."),
        ({"resize_short_side": 16}, "--resize-short-side: resize_short_side 16 is smaller than the 32×32 crop."),
    ],
)
def test_an_impossible_knob_is_named(fields: dict[str, object], sentence: str):
    with pytest.raises(RecipeError) as caught:
        make_recipe(**fields)
    assert caught.value.message.startswith(sentence)


def test_the_pixel_recipe_follows():
    assert make_recipe(size=48).pixels.resize_short_side == 48
    assert make_recipe(size=48, resize_short_side=64).pixels.resize_short_side == 64


def test_normalise_is_rescale_then_mean_then_std():
    recipe = make_recipe(rescale=0.5, mean="1,2,3", std="2,4,8")
    planes = torch.rand(2, 3, 4, 4) * 255
    by_channel = [(planes[:, c] * 0.5 - recipe.mean[c]) / recipe.std[c] for c in range(3)]
    torch.testing.assert_close(Normalise(recipe)(planes), torch.stack(by_channel, dim=1))


def test_a_servable_never_trains():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.9), torch.nn.Linear(3 * 64, 4))
    servable = Servable(network, make_recipe(size=8)).train()
    image = torch.from_numpy(np.full((2, 8, 8, 3), 200, np.uint8))
    assert not network.training
    assert torch.equal(servable(image), servable(image))
    torch.testing.assert_close(servable(image).sum(dim=1), torch.ones(2))
