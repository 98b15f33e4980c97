"""`bench`: a recipe's claim, held against runs on this machine."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.claims import CLAIMED, named
from training.claims.claim import Claim, Trial, Verdict, judge
from training.commands.flags import DATA_HELP, add_cache, add_device, count
from training.errors import ClaimError
from training.progress import duration, say
from training.recipes import Recipe

if TYPE_CHECKING:
    import torch

    from training.data.arrays import Split
    from training.data.listing import Listing


def add(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "bench",
        help="train by a recipe again, and hold its claim against what comes out",
        description="Trains from other seeds, keeps no weights, and ends with status 2 where the claim is not held.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("recipe", choices=sorted(CLAIMED), help="name of the recipe")
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    parser.add_argument(
        "--runs", type=count, default=1, metavar="N", help="how often, each from its seed (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where figures are kept as JSON; default: bench-RECIPE.json"
    )
    add_device(parser)
    add_cache(parser)


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from training.atomic import can_be_written
    from training.data.arrays import load_split, read_listing
    from training.learning.devices import choose_device, describe

    path = options.out or Path(f"bench-{options.recipe}.json")
    if not can_be_written(path.parent):
        raise ClaimError(f"{path} cannot be written: name another file by --out.")
    device = choose_device(options.device)
    recipe, claim = named(options.recipe)
    listing = read_listing(options.data).split(recipe.test_fraction, recipe.seed)
    _check_data(claim, listing, options.data)
    rest, held_out = listing.hold_out(recipe.validation_fraction, recipe.seed)
    train_split = load_split(rest.part("train"), recipe.pixels, options.cache_dir)
    test_split = load_split(rest.part("test"), recipe.pixels, options.cache_dir)
    validation_split = load_split(held_out, recipe.pixels, options.cache_dir) if held_out else None
    say(f"{options.recipe}: {_words(claim)} Training {options.runs} times on {describe(device)}.")
    trials = []
    for number in range(options.runs):
        seeded = recipe.model_copy(update={"seed": recipe.seed + number})
        trial = _trial(seeded, listing, device, train_split, test_split, validation_split)
        trials.append(trial)
        say(
            f"run {number + 1}/{options.runs}  seed {trial.seed}  accuracy {trial.accuracy:.2%}  "
            f"{duration(trial.seconds)}, {trial.images_per_s:,.0f} images/s"
        )
    verdict = judge(trials, claim)
    _write(path, options, claim, trials, verdict, listing.digest, describe(device))
    Console().print(_table(claim, verdict, len(trials), describe(device)))
    _tell(options.recipe, claim, verdict)


def _check_data(claim: Claim, listing: "Listing", data: Path) -> None:
    found = (len(listing.part("train")), len(listing.part("test")))
    if found != (claim.train_images, claim.test_images):
        raise ClaimError(
            f"{data} has {found[0]:,} training and {found[1]:,} test images, and the claim is about {claim.data}, "
            f"with {claim.train_images:,} and {claim.test_images:,}: give it as --data, or use `convoy-train train`."
        )


def _trial(
    recipe: Recipe,
    listing: "Listing",
    device: "torch.device",
    train_split: "Split",
    test_split: "Split",
    validation_split: "Split | None",
) -> Trial:
    from tempfile import TemporaryDirectory

    from training.train import Start, train

    start = Start(recipe, listing.classes, data="", data_digest=listing.digest, command="", hardware="")
    with TemporaryDirectory() as scratch:
        history = list(train(Path(scratch), start, train_split, test_split, device, validation_split))
    seconds = sum(epoch.seconds for epoch in history)
    images = sum(epoch.images_per_s * epoch.seconds for epoch in history)
    return Trial(recipe.seed, history[-1].test_accuracy, seconds, images / seconds)


# ---------------------------------------------------------------- what is told


def _words(claim: Claim) -> str:
    runs = "one run" if claim.runs == 1 else f"{claim.runs} runs"
    return f"claimed are {claim.accuracy:.2%} on {claim.data} in {duration(claim.seconds)} ({claim.hardware}; {runs})."


def _table(claim: Claim, verdict: Verdict, runs: int, hardware: str) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("", "claimed", "here")
    for name, claimed, here in (
        ("accuracy", _spread(claim.accuracy, claim.deviation), _spread(verdict.accuracy, verdict.deviation)),
        ("training time", duration(claim.seconds), duration(verdict.seconds)),
        ("runs", str(claim.runs), str(runs)),
        ("hardware", claim.hardware, hardware),
    ):
        table.add_row(name, Text(claimed), Text(here))
    return table


def _spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.2%}" if deviation is None else f"{mean:.2%} ± {deviation * 100:.2f}"


def _tell(name: str, claim: Claim, verdict: Verdict) -> None:
    below = claim.accuracy - verdict.accuracy
    time = f"training took {verdict.seconds / claim.seconds:.2f} times the time claimed"
    chance = f"{verdict.allowed * 100:.2f} points below may be chance"
    if not verdict.held:
        raise ClaimError(
            f"The claim of {name} is not held: {verdict.accuracy:.2%} is {below * 100:.2f} points below "
            f"{claim.accuracy:.2%}, where {chance}; {time}."
        )
    say(f"Held: {verdict.accuracy:.2%} beside {claim.accuracy:.2%}, where {chance}; {time}.")


def _write(
    path: Path,
    options: argparse.Namespace,
    claim: Claim,
    trials: list[Trial],
    verdict: Verdict,
    digest: str,
    hardware: str,
) -> None:
    from training.atomic import replacing

    record = {
        "recipe": options.recipe,
        "claim": asdict(claim),
        "here": asdict(verdict) | {"hardware": hardware, "trials": [asdict(trial) for trial in trials]},
        "knobs": named(options.recipe)[0].model_dump(mode="json"),
        "data_digest": digest,
        "command": options.command_line,
    }
    with replacing(path) as file:
        file.write((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
