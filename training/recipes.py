"""The recipe: every knob of a training, once.

A field's name is its command-line flag, its description is its help, its default is the article's value. The record
goes into the checkpoint and into the bundle's manifest, and is the only source of the bundle's pixel recipe. Knows
neither PyTorch nor files.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from app.manifest import PixelRecipe
from training.errors import RecipeError


def _three(value: Any) -> Any:
    """Take `0.5`, `"0.5"` or `"0.49,0.48,0.45"` for a channel triple."""
    if isinstance(value, str):
        value = value.split(",")
    elif isinstance(value, int | float):
        value = [value]
    return [value[0]] * 3 if isinstance(value, list | tuple) and len(value) == 1 else value


PIXEL_KNOBS = (
    "network",
    "size",
    "resize_short_side",
    "interpolation",
    "exif",
    "min_decode_ratio",
    "rescale",
    "mean",
    "std",
)
"""Knobs that say which network weights are of and how they want their pixels; how they were trained is history."""

Channels = Annotated[tuple[float, float, float], BeforeValidator(_three)]


class Recipe(BaseModel):
    """What is trained and how; the defaults are the article's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    network: str = Field(default="article_cnn", description="Network to train, by name.")
    size: int = Field(default=32, ge=8, le=1024, description="Side of the square that the network sees, pixels.")
    resize_short_side: int = Field(
        default=0, ge=0, le=8192, description="Short side after the resize, before the crop, pixels; 0 means --size."
    )
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = Field(
        default="bilinear", description="How an image is resized."
    )
    exif: Literal["apply", "ignore"] = Field(
        default="apply", description="Whether the camera's orientation tag turns the picture upright."
    )
    min_decode_ratio: float = Field(
        default=2.0,
        ge=0,
        description="Least size of a JPEG decoded at reduced scale, in short sides after resize; 0: never.",
    )
    test_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="Share held out for test where the data has no test/ folder."
    )

    validation_fraction: float = Field(
        default=0, ge=0, lt=1, description="Share held out from the training images, to calibrate and stop by."
    )

    epochs: int = Field(default=10, ge=1, description="Passes over the training images.")
    batch_size: int = Field(default=32, ge=1, description="Images per step.")
    optimizer: Literal["adam", "sgd", "adamw", "muon"] = Field(default="adam", description="What takes the steps.")
    learning_rate: float = Field(default=0.001, gt=0, description="Step size, at its largest.")
    plain_rate: float = Field(default=0.05, gt=0, description="Step size of what is not a filter, with muon.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of sgd, and of muon's filters.")
    nesterov: bool = Field(default=False, description="Let sgd look ahead along its momentum.")
    weight_decay: float = Field(default=0, ge=0, description="Pull towards zero: L2 for sgd and adam, apart for adamw.")
    schedule: Literal["constant", "one-cycle", "cosine"] = Field(
        default="constant", description="How the step size changes over the run."
    )
    warmup: float = Field(default=0, ge=0, lt=1, description="Share of the run in which the step size rises.")
    loss: Literal["cross-entropy"] = Field(default="cross-entropy", description="Training loss.")
    label_smoothing: float = Field(default=0, ge=0, lt=1, description="Share of the target that goes to all classes.")
    ema: float = Field(default=0, ge=0, lt=1, description="Decay of a moving average of the weights, kept; 0: none.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="What convolutions compute in; weights and steps stay fp32. fp16 needs a GPU."
    )
    channels_last: bool = Field(default=False, description="Lay planes out by pixel: faster with bf16 and on GPUs.")
    accumulate: int = Field(default=1, ge=1, description="Parts that a step's images pass the network in, for memory.")
    patience: int = Field(
        default=0, ge=0, description="Stop after so many epochs without a better validation loss, keep the best; 0: no."
    )
    frozen_epochs: int = Field(default=0, ge=0, description="First epochs, in which the last layer alone learns.")
    backbone_rate: float = Field(
        default=1.0, gt=0, le=1, description="Step size of all below the last layer, as a share of --learning-rate."
    )
    keep_statistics: bool = Field(
        default=False, description="Normalise by the statistics that the weights came with, not by each batch's."
    )
    dropout: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Share of features dropped before the last layer; ResNets, DenseNets: none.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Same seed, data and machine: same weights, bit for bit.")

    rescale: float = Field(default=1 / 255, gt=0, description="Factor on pixel values 0-255, before mean and std.")
    mean: Channels = Field(default=(0.0, 0.0, 0.0), description="Subtracted after rescale; one number or R,G,B.")
    std: Channels = Field(default=(1.0, 1.0, 1.0), description="Divided by after mean; one number or R,G,B.")

    shear: float = Field(default=0.2, ge=0, lt=90, description="Augmentation: shear up to this many degrees.")
    zoom: float = Field(default=0.2, ge=0, lt=1, description="Augmentation: scale each axis by 1 ± this.")
    flip: bool = Field(default=True, description="Augmentation: mirror half of the images.")
    alternate_flip: bool = Field(
        default=False, description="Mirror the one half in odd epochs, the other in even ones, not at random."
    )
    shift: int = Field(default=0, ge=0, description="Augmentation: shift each axis by up to this many pixels.")
    rotate: float = Field(default=0, ge=0, le=180, description="Augmentation: rotate up to this many degrees.")
    cutout: int = Field(default=0, ge=0, description="Augmentation: cover a square of this many pixels a side.")
    mixup: float = Field(
        default=0, ge=0, le=100, description="Augmentation: blend with another image by Beta(this, this); 0: never."
    )
    cutmix: float = Field(
        default=0, ge=0, le=100, description="Augmentation: paste a box of another, its area by Beta(this, this)."
    )
    balance: Literal["none", "weights", "sampling"] = Field(
        default="none", description="Rare classes: as they come, counting for more in the loss, or met more often."
    )

    @property
    def pixels(self) -> PixelRecipe:
        """The half of preprocessing that training and serving share; the other half is in the graph."""
        return PixelRecipe(
            height=self.size,
            width=self.size,
            resize_short_side=self.resize_short_side or self.size,
            interpolation=self.interpolation,
            exif=self.exif,
            min_decode_ratio=self.min_decode_ratio,
        )


def make_recipe(**fields: Any) -> Recipe:
    """Build a recipe from knobs, values as numbers or as text.

    Raises:
        RecipeError: a knob is unknown or its value impossible; the sentence names its flag.
    """
    try:
        recipe = Recipe.model_validate(fields)
        if recipe.accumulate > recipe.batch_size:
            raise RecipeError(f"--accumulate: input should be at most --batch-size, which is {recipe.batch_size}.")
        if recipe.patience and not recipe.validation_fraction:
            raise RecipeError("--patience: needs --validation-fraction: the test images must not say when to stop.")
        if recipe.backbone_rate != 1 and recipe.optimizer == "muon":
            raise RecipeError("--backbone-rate: muon has two step sizes of its own; choose another --optimizer.")
        if not all(recipe.std):
            raise RecipeError("--std: 0 cannot be divided by.")
        for knob in ("shift", "cutout"):
            if getattr(recipe, knob) >= recipe.size:
                raise RecipeError(f"{flag(knob)}: input should be less than --size, which is {recipe.size}.")
        _ = recipe.pixels
    except ValidationError as error:
        problem = error.errors()[0]
        knob = str(problem["loc"][0]) if problem["loc"] else "resize_short_side"
        reason = problem["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{flag(knob)}: {reason[0].lower()}{reason[1:]}.") from error
    return recipe


def flag(knob: str) -> str:
    """Return the command-line flag of a knob."""
    return "--" + knob.replace("_", "-")
