"""`train`: data and a recipe in, a run out."""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.claims import CLAIMED
from training.commands.flags import DATA_HELP, add_cache, add_device, add_knobs, knobs_given, recipe_of
from training.errors import RecipeError
from training.names import check_name, name_of
from training.progress import duration, say
from training.recipes import Recipe, flag

if TYPE_CHECKING:
    import torch

    from training.data.arrays import Split
    from training.learning.ranks import Ranks
    from training.runs import Checkpoint, Epoch
    from training.transfer.backbones import Beginning


FINE_TUNING: dict[str, Any] = {"frozen_epochs": 3, "backbone_rate": 0.1, "keep_statistics": True}
"""The defaults of a training that begins from weights."""


def add(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser("train", help="train a network by a recipe", description="Train into runs/NAME.")
    parser.set_defaults(run=_run)
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    parser.add_argument("--name", help="name of the run, and of models made of it; default: the data's")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are kept (%(default)s)")
    parser.add_argument(
        "--from",
        dest="begun_from",
        type=Path,
        metavar="MODEL",
        help="run, bundle or file of weights to begin from: all but its last layer, and its pixels and scaling; "
        f"then {', '.join(f'{flag(knob)} {value}' for knob, value in FINE_TUNING.items() if value is not True)} "
        "and --keep-statistics are the defaults",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run after its last finished epoch")
    again.add_argument(
        "--resume-or-begin",
        action="store_true",
        help="continue the run if an epoch of it was finished, begin it if not: for a job that is started again",
    )
    again.add_argument("--force", action="store_true", help="discard the run that is there, and start anew")
    parser.add_argument(
        "--recipe", choices=sorted(CLAIMED), help="begin from a recipe with a claim; other flags win over it"
    )
    add_device(parser)
    add_cache(parser)
    add_knobs(parser.add_argument_group("recipe", "The defaults are the article's."), tuple(Recipe.model_fields))


def _run(options: argparse.Namespace) -> None:
    from training.learning.devices import choose_device
    from training.learning.ranks import joined
    from training.runs import locked

    name = name_of(options.data) if options.name is None else options.name
    check_name(name)
    directory = options.runs_dir / name
    device = choose_device(options.device)
    with joined(device) as ranks, locked(directory) if ranks.first else nullcontext():
        _train_into(directory, options, device, ranks)


def _train_into(directory: Path, options: argparse.Namespace, device: "torch.device", ranks: "Ranks") -> None:
    from training.data.arrays import load_split, read_listing
    from training.events import Events
    from training.learning.devices import describe
    from training.runs import match_run
    from training.train import Start, check_network, train
    from training.transfer.backbones import begun

    checkpoint = ranks.share(_begun(directory, options, ranks) if ranks.first else None)
    beginning = None if checkpoint is not None else _beginning(options)
    recipe = recipe_of(options, checkpoint, FINE_TUNING | dict(beginning.knobs) if beginning else None)
    listing = read_listing(options.data).split(recipe.test_fraction, recipe.seed)
    if checkpoint is not None:
        match_run(directory, checkpoint, recipe, listing)
    check_network(recipe, len(listing.classes))
    weights = None if beginning is None else begun(beginning, recipe, len(listing.classes))
    rest, held_out = listing.hold_out(recipe.validation_fraction, recipe.seed)
    with ranks.leader_first():
        train_split = load_split(rest.part("train"), recipe.pixels, options.cache_dir)
        test_split = load_split(rest.part("test"), recipe.pixels, options.cache_dir)
        validation_split = load_split(held_out, recipe.pixels, options.cache_dir) if held_out else None
    start = Start(
        recipe=recipe,
        classes=listing.classes,
        data=str(options.data),
        data_digest=listing.digest,
        command=options.command_line,
        hardware=describe(device, ranks.size),
        checkpoint=checkpoint,
        weights=weights,
        begun_from=checkpoint.begun_from if checkpoint else beginning.told if beginning else "",
    )
    tell = say if ranks.first else _silent
    tell(
        f"Training {recipe.network} on {len(train_split.labels):,} images of {len(listing.classes)} classes, "
        f"testing on {len(test_split.labels):,}, into {directory} ({start.hardware})."
    )
    if start.begun_from:
        tell(f"It began from the {start.begun_from}.")
    finished = begun_after = 0 if checkpoint is None else len(checkpoint.history)
    events = Events(directory, () if checkpoint is None else checkpoint.history) if ranks.first else None
    begun_at = time.monotonic()
    try:
        for epoch in train(directory, start, train_split, test_split, device, validation_split, ranks):
            finished = epoch.epoch
            left = (time.monotonic() - begun_at) / (finished - begun_after) * (recipe.epochs - finished)
            tell(f"{_line(epoch, recipe)}{f', {duration(left)} left' if left else ''}")
            if events is not None:
                events.append(epoch)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_resume(directory, finished, recipe.epochs, options.command_line)) from None
    if ranks.first:
        told = _draw_run(directory, test_split, device, options.command_line)
        say(f"Done: the weights in {directory} are {told}; report.html tells of the run.")


def _begun(directory: Path, options: argparse.Namespace, ranks: "Ranks") -> "Checkpoint | None":
    """Return what to continue from; a run that torchrun has started again goes on by itself."""
    from training.runs import is_run, open_run, read_checkpoint

    if options.resume_or_begin:
        return read_checkpoint(directory) if is_run(directory) else None
    if ranks.restarts and is_run(directory):
        checkpoint = read_checkpoint(directory)
        if checkpoint.command == options.command_line:
            return checkpoint
    return open_run(directory, resume=options.resume, force=options.force)


def _beginning(options: argparse.Namespace) -> "Beginning | None":
    from training.transfer.backbones import read_beginning

    if options.begun_from is not None and options.recipe is not None:
        raise RecipeError("--recipe: with --from the network and its pixels are those of the weights; leave it out.")
    return None if options.begun_from is None else read_beginning(options.begun_from, knobs_given(options))


def _silent(text: str) -> None:
    """Leave the telling to the first process."""


def _line(epoch: "Epoch", recipe: Recipe) -> str:
    validation = ""
    if epoch.validation_accuracy is not None:
        validation = f"validation loss {epoch.validation_loss:.4f}, {epoch.validation_accuracy:.2%}  "
    return (
        f"epoch {epoch.epoch}/{recipe.epochs}  train loss {epoch.train_loss:.4f}, {epoch.train_accuracy:.2%}  "
        f"{validation}test loss {epoch.test_loss:.4f}, {epoch.test_accuracy:.2%}  "
        f"{epoch.seconds:.1f} s, {epoch.images_per_s:,.0f} images/s"
    )


def _how_to_resume(directory: Path, finished: int, epochs: int, command_line: str) -> str:
    from training.runs import is_run

    if not finished and is_run(directory):
        return f"interrupted before the first epoch was finished; {directory} still holds the run before."
    if not finished:
        return "interrupted before the first epoch was finished; nothing is kept."
    again = command_line if " --resume" in command_line else f"{command_line} --resume"
    again = again.replace(" --force", "")
    return f"interrupted; {directory}/checkpoint.pt holds epoch {finished} of {epochs}: continue with `{again}`."


def _draw_run(directory: Path, split: "Split", device: "torch.device", command: str) -> str:
    """Draw the run's pictures, write its report, and say which weights both are of."""
    from training.classifiers import open_classifier
    from training.evaluate import measure_figures
    from training.pictures import draw_confusion, draw_curves, draw_mistakes
    from training.report.page import write_report
    from training.report.sources import told_of
    from training.runs import read_checkpoint

    classifier = open_classifier(directory, device)
    probabilities = classifier.probabilities(split)
    checkpoint = read_checkpoint(directory)
    words = f"its {len(split.labels):,} test images"
    draw_curves(checkpoint.history, directory)
    draw_confusion(measure_figures(probabilities, split.labels, classifier.labels), directory)
    draw_mistakes(split, probabilities, classifier.labels, directory)
    told = told_of(directory, data=Path(checkpoint.data), measured=words, command=command)
    write_report(directory, told, split, probabilities, classifier.labels)
    return checkpoint.weights_in_words
