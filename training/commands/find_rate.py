"""`find-rate`: data and a recipe in, a learning rate out."""

import argparse
from pathlib import Path
from typing import Any

from training.claims import CLAIMED
from training.commands.flags import DATA_HELP, add_cache, add_device, add_knobs, count, recipe_of
from training.progress import say
from training.recipes import Recipe

LINES = 12


def add(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser("find-rate", help="look for a learning rate: a few hundred steps at growing rates")
    parser.set_defaults(run=_run)
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    parser.add_argument("--recipe", choices=sorted(CLAIMED), help="recipe to begin from; flags count more")
    parser.add_argument("--lowest", type=float, default=1e-6, help="rate of the first step (%(default)s)")
    parser.add_argument("--highest", type=float, default=1.0, help="rate of the last step (%(default)s)")
    parser.add_argument("--steps", type=count, default=300, metavar="N", help="how many at most (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for a picture of loss over rate")
    add_device(parser)
    add_cache(parser)
    knobs = tuple(knob for knob in Recipe.model_fields if knob != "learning_rate")
    add_knobs(parser.add_argument_group("recipe", "The defaults are the article's."), knobs)


def _run(options: argparse.Namespace) -> None:
    from training.data.arrays import load_split, read_listing
    from training.learning.devices import choose_device
    from training.learning.rates import best_rate, try_rates
    from training.train import check_network

    recipe = recipe_of(options, None)
    listing = read_listing(options.data).split(recipe.test_fraction, recipe.seed)
    check_network(recipe, len(listing.classes))
    split = load_split(listing.part("train"), recipe.pixels, options.cache_dir)
    device = choose_device(options.device)
    limits = {"lowest": options.lowest, "highest": options.highest, "steps": options.steps}
    tries = []
    every = max(1, options.steps // LINES)
    for number, each in enumerate(try_rates(recipe, len(listing.classes), split, device, **limits)):
        tries.append(each)
        if number % every == 0:
            say(f"rate {each.rate:.2e}  loss {each.loss:.4f}")
    rate = best_rate(tries)
    if options.out is not None:
        from training.pictures import draw_rates

        say(f"{draw_rates([(each.rate, each.loss) for each in tries], rate, options.out)} shows them all.")
    say(f"The loss falls fastest at --learning-rate {rate:.1e}: begin there, and with a schedule a few times higher.")
