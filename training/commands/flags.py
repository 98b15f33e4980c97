"""Flags that several sub-commands have, and what is read from them.

Owns the words of `--data`, `--device`, `--cache-dir` and of a recipe's knobs. Knows no step of any command.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from training.claims import named_recipe
from training.errors import RecipeError, RunError
from training.recipes import Recipe, flag, make_recipe

if TYPE_CHECKING:
    from training.runs import Checkpoint

DATA_HELP = "folder with train/<class>/ and test/<class>/, folder with <class>/ to be split, or a CIFAR-10 archive"


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (%(default)s)"
    )


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add `--cache-dir`."""
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=_default_cache(),
        help="where decoded images are kept between starts (%(default)s)",
    )


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convoy"


def add_knobs(group: Any, knobs: tuple[str, ...]) -> None:
    """Add a flag per knob; values stay text, which the recipe reads and checks, and a flag not given stays absent."""
    for knob in knobs:
        field = Recipe.model_fields[knob]
        text = f"{field.description} [{_shown(field.default)}]".replace("%", "%%")
        if field.annotation is bool:
            group.add_argument(flag(knob), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif get_origin(field.annotation) is Literal:
            choices = get_args(field.annotation)
            group.add_argument(flag(knob), choices=choices, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(flag(knob), metavar="VALUE", default=argparse.SUPPRESS, help=text)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    number = int(text) if text.isdecimal() and len(text) < 10 else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 1")
    return number


def recipe_of(
    options: argparse.Namespace, checkpoint: "Checkpoint | None", defaults: Mapping[str, Any] | None = None
) -> Recipe:
    """Return the recipe of the flags that were given, upon a named one, upon the run's own where one is resumed.

    `defaults` are what a run that is not resumed stands on instead, such as those of the weights it begins from.

    Raises:
        RecipeError: a knob is impossible, or would change nothing.
    """
    stored = dict(defaults or {}) if checkpoint is None else checkpoint.recipe.model_dump()
    name = getattr(options, "recipe", None)
    named = {} if name is None else named_recipe(name).model_dump()
    recipe = make_recipe(**(stored | named | knobs_given(options)))
    if recipe.warmup and recipe.schedule == "constant":
        raise RecipeError("--warmup: a constant --schedule does not rise; give one-cycle or cosine with it.")
    return recipe


def knobs_given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the knobs whose flags were given, as text."""
    return {knob: getattr(options, knob) for knob in Recipe.model_fields if hasattr(options, knob)}


def data_of(model: Path, given: Path | None) -> Path:
    """Return the data to measure on: what was given, or what the run was trained on."""
    from training.runs import is_run, read_checkpoint

    if given is not None:
        return given
    if not is_run(model):
        raise RunError(f"{model} is not a run, so it does not say what to measure it on: give --data.")
    return Path(read_checkpoint(model).data)
