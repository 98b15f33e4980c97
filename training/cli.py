"""`convoy-train`: data in, a trained run or a bundle out.

Owns the command line and how a fault is told: one sentence on stderr and exit code 2. PyTorch is imported by the
sub-command that needs it, so that `--help` answers at once.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

from app.errors import ConvoyError
from training.errors import ExportError, RecipeError, RunError
from training.names import check_name, check_version, is_text, name_of
from training.recipes import Recipe, flag, make_recipe

if TYPE_CHECKING:
    import torch

    from training.data import Split
    from training.export import Offer
    from training.listing import Picture
    from training.runs import Checkpoint
    from training.servable import Servable

DATA_HELP = "folder with train/<class>/ and test/<class>/, folder with <class>/ to be split, or a CIFAR-10 archive"
IMPORT_KNOBS = (
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
"""Knobs that say how published weights want their pixels; how they were trained is history."""
USER_FAULT = 2
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parse(given)
        options.run(options)
    except ConvoyError as error:
        sys.stderr.write(f"convoy-train: {error.message}\n")
        return USER_FAULT
    except OSError as error:  # a full disk, a folder that may not be written
        sys.stderr.write(f"convoy-train: {error.filename or 'A file'} cannot be used: {error.strerror or error}.\n")
        return USER_FAULT
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"convoy-train: {str(stop) or 'interrupted.'}\n")
        return INTERRUPTED
    return 0


# ---------------------------------------------------------------- sub-commands


def _train(options: argparse.Namespace) -> None:
    from training.runs import locked

    name = name_of(options.data) if options.name is None else options.name
    check_name(name)
    directory = options.runs_dir / name
    with locked(directory):
        _train_into(directory, options)


def _train_into(directory: Path, options: argparse.Namespace) -> None:
    from training.data import load_split, read_listing
    from training.devices import choose_device, describe
    from training.runs import match_run, open_run
    from training.train import Start, check_network, train

    device = choose_device(options.device)
    checkpoint = open_run(directory, resume=options.resume, force=options.force)
    recipe = _recipe(options, checkpoint)
    listing = read_listing(options.data).split(recipe.test_fraction, recipe.seed)
    if checkpoint is not None:
        match_run(directory, checkpoint, recipe, listing)
    check_network(recipe, len(listing.classes))
    train_split = load_split(listing.part("train"), recipe.pixels, options.cache_dir)
    test_split = load_split(listing.part("test"), recipe.pixels, options.cache_dir)
    start = Start(
        recipe=recipe,
        classes=listing.classes,
        data=str(options.data),
        data_digest=listing.digest,
        command=options.command_line,
        hardware=describe(device),
        checkpoint=checkpoint,
    )
    _say(
        f"Training {recipe.network} on {len(train_split.labels):,} images of {len(listing.classes)} classes, "
        f"testing on {len(test_split.labels):,}, into {directory} ({start.hardware})."
    )
    finished = 0 if checkpoint is None else len(checkpoint.history)
    try:
        for epoch in train(directory, start, train_split, test_split, device):
            finished = epoch.epoch
            _say(
                f"epoch {epoch.epoch}/{recipe.epochs}  train loss {epoch.train_loss:.4f}, {epoch.train_accuracy:.2%}  "
                f"test loss {epoch.test_loss:.4f}, {epoch.test_accuracy:.2%}  "
                f"{epoch.seconds:.1f} s, {epoch.images_per_s:,.0f} images/s"
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_resume(directory, finished, recipe.epochs, options.command_line)) from None
    _draw_run(directory, test_split, device)
    _say(f"Done: {directory} holds the weights after epoch {finished} of {recipe.epochs}, and pictures of the run.")


def _how_to_resume(directory: Path, finished: int, epochs: int, command_line: str) -> str:
    from training.runs import is_run

    if not finished and is_run(directory):
        return f"interrupted before the first epoch was finished; {directory} still holds the run before."
    if not finished:
        return "interrupted before the first epoch was finished; nothing is kept."
    again = command_line if " --resume" in command_line else f"{command_line} --resume"
    again = again.replace(" --force", "")
    return f"interrupted; {directory}/checkpoint.pt holds epoch {finished} of {epochs}: continue with `{again}`."


def _evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console

    from training.classifiers import open_classifier
    from training.data import load_split, read_listing
    from training.devices import choose_device
    from training.evaluate import measure_figures
    from training.listing import choose_part

    classifier = open_classifier(options.model, choose_device(options.device))
    data = _data_of(options.model, options.data)
    listing = read_listing(data).relabelled(classifier.labels)
    part, pictures, words = choose_part(listing, data, classifier.origin, options.split)
    split = load_split(pictures, classifier.pixels, options.cache_dir)
    probabilities = classifier.probabilities(split)
    figures = measure_figures(probabilities, split.labels, classifier.labels)
    if options.out is not None:
        from training.pictures import draw_confusion, draw_mistakes

        draw_confusion(figures, options.out)
        draw_mistakes(split, probabilities, classifier.labels, options.out)
    if options.json:
        about = {"model": str(options.model), "data": str(data), "split": part, "measured": words}
        _say(json.dumps(about | figures.record() | {"command": options.command_line}, ensure_ascii=False))
    else:
        _say(f"{figures.headline()} ({words})")
        Console().print(figures.table())


def _predict(options: argparse.Namespace) -> None:
    from rich.console import Console

    from training.classifiers import open_classifier
    from training.devices import choose_device
    from training.evaluate import predict, prediction_table

    classifier = open_classifier(options.model, choose_device(options.device))
    probabilities = predict(classifier, options.files)
    Console().print(prediction_table(options.files, probabilities, classifier.labels, options.top_k))


def _export(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from training.classifiers import origin_of, servable_of
    from training.data import load_split, read_listing
    from training.export import Offer
    from training.listing import choose_part, kept_from_training
    from training.runs import read_checkpoint

    checkpoint = read_checkpoint(options.model)
    name = options.model.resolve().name if options.name is None else options.name
    version = _version(options, name)
    golden_from = _golden_from(options)
    recipe, origin = checkpoint.recipe, origin_of(checkpoint)
    data = _data_of(options.model, options.data)
    listing = read_listing(data).relabelled(checkpoint.classes)
    kept_from_training(listing, data, origin)
    _, pictures, words = choose_part(listing, data, origin, "test")
    split = load_split(pictures, recipe.pixels, options.cache_dir)
    finished = len(checkpoint.history)
    is_finished = finished == recipe.epochs
    weights = "those after the last epoch" if is_finished else f"those after epoch {finished} of {recipe.epochs}"
    if not is_finished:
        _say(f"Note: the run is not finished; the weights are {weights}.")
    offer = Offer(
        name=name,
        version=version,
        description=options.description or f"{recipe.network} trained on {Path(checkpoint.data).name}.",
        labels=checkpoint.classes,
        pixels=recipe.pixels,
        training={
            "recipe": recipe.model_dump(mode="json"),
            "history": [asdict(epoch) for epoch in checkpoint.history],
            "weights": weights,
            "seconds": round(sum(epoch.seconds for epoch in checkpoint.history), 1),
            "hardware": checkpoint.hardware,
            "data": checkpoint.data,
            "data_digest": checkpoint.data_digest,
            "command": checkpoint.command,
        },
        data=f"{data}, {'its test part' if listing.test is not None else words}",
        source=options.source or f"Trained on {checkpoint.data} by convoy-train.",
        licence=options.licence,
        command=options.command_line,
    )
    _write(servable_of(checkpoint), offer, split, golden_from, options)


def _import(options: argparse.Namespace) -> None:
    from training.data import load_split, read_listing
    from training.export import Offer
    from training.published import read_labels, read_network
    from training.servable import Servable

    version = _version(options, options.name)
    golden_from = _golden_from(options)
    recipe = _recipe(options, checkpoint=None)
    labels = read_labels(options.labels)
    network = read_network(options.weights, recipe, classes=len(labels))
    listing = read_listing(options.data).relabelled(labels)
    split = load_split(listing.part("all"), recipe.pixels, options.cache_dir)
    preprocessing = recipe.model_dump(mode="json", include=set(IMPORT_KNOBS))
    offer = Offer(
        name=options.name,
        version=version,
        description=options.description or f"{recipe.network} with published weights.",
        labels=labels,
        pixels=recipe.pixels,
        training={"recipe": preprocessing, "weights": f"published: {options.weights.name}"},
        data=f"{options.data}, all of it",
        source=options.source,
        licence=options.licence,
        command=options.command_line,
    )
    _write(Servable(network, recipe), offer, split, golden_from, options)


def _fetch(options: argparse.Namespace) -> None:
    from training.fetch import ARCHIVES, fetch

    path = fetch(ARCHIVES[options.dataset], options.into)
    _say(f"{path} is the published archive: train on it with `convoy-train train --data {path}`.")


# ---------------------------------------------------------------- what they share


def _recipe(options: argparse.Namespace, checkpoint: "Checkpoint | None") -> Recipe:
    """Return the recipe of the flags that were given, upon the run's own where one is resumed."""
    given = {knob: getattr(options, knob) for knob in Recipe.model_fields if hasattr(options, knob)}
    stored = {} if checkpoint is None else checkpoint.recipe.model_dump()
    return make_recipe(**(stored | given))


def _data_of(model: Path, given: Path | None) -> Path:
    """Return the data to measure on: what was given, or what the run was trained on."""
    from training.runs import is_run, read_checkpoint

    if given is not None:
        return given
    if not is_run(model):
        raise RunError(f"{model} is not a run, so it does not say what to measure it on: give --data.")
    return Path(read_checkpoint(model).data)


def _version(options: argparse.Namespace, name: str) -> str:
    """Return the version to write, with name and version checked before anything is computed."""
    from training.export import next_version

    check_name(name)
    version = next_version(options.models_dir, name) if options.version is None else options.version
    check_version(version)
    if (options.models_dir / name / version).exists() and not options.force:
        raise ExportError(
            f"{options.models_dir / name / version} exists: leave --version out for the next free one, "
            "or replace it with --force."
        )
    return version


def _golden_from(options: argparse.Namespace) -> "tuple[Picture, ...]":
    from training.trees import read_photos

    return () if options.golden_from is None else read_photos(options.golden_from)


def _write(
    servable: "Servable",
    offer: "Offer",
    split: "Split",
    golden_from: "tuple[Picture, ...]",
    options: argparse.Namespace,
) -> None:
    from training.export import GOLDEN_TOLERANCE, export

    target = options.models_dir / offer.name / offer.version
    exported = export(servable, offer, split, target, golden_from)
    size_mb = exported.bundle.manifest.model.size_bytes / 1e6
    _say(f"{target}: {size_mb:.2f} MB, accuracy {exported.bundle.manifest.evaluation['accuracy']:.2%} on {offer.data}.")
    _say(f"ONNX Runtime and PyTorch differ by at most {exported.difference:.1e} in a probability.")
    unnoticed = [wrong for wrong, change in exported.detects.items() if change <= GOLDEN_TOLERANCE]
    if unnoticed:
        _say(f"Note: this network hardly reacts to {', '.join(unnoticed)}, so its golden images would not notice.")


def _draw_run(directory: Path, split: "Split", device: "torch.device") -> None:
    from training.classifiers import open_classifier
    from training.evaluate import measure_figures
    from training.pictures import draw_confusion, draw_curves, draw_mistakes
    from training.runs import read_checkpoint

    classifier = open_classifier(directory, device)
    probabilities = classifier.probabilities(split)
    draw_curves(read_checkpoint(directory).history, directory)
    draw_confusion(measure_figures(probabilities, split.labels, classifier.labels), directory)
    draw_mistakes(split, probabilities, classifier.labels, directory)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convoy"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# ---------------------------------------------------------------- the command line


class _Parser(argparse.ArgumentParser):
    """Tells a wrong command line as any other fault is told: argparse would print its usage first."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message.removeprefix('argument ').rstrip('.')}.")


def _parse(given: list[str]) -> argparse.Namespace:
    for argument in given:
        if not is_text(argument):
            raise RecipeError(f"The argument {argument!a} is not UTF-8: rename the file or folder.")
    options = _parser().parse_args(given)
    options.command_line = shlex.join(["convoy-train", *given])
    return options


def _count(text: str) -> int:
    count = int(text) if text.isdecimal() and len(text) < 10 else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 1")
    return count


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="convoy-train", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_fetch(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_export(commands)
    _add_import(commands)
    return parser


def _add_fetch(commands: Any) -> None:
    parser = commands.add_parser("fetch", help="download a data set from its home, and check it")
    parser.set_defaults(run=_fetch)
    parser.add_argument("dataset", choices=("cifar10", "cifar10-binary"), help="what to download")
    parser.add_argument("--into", type=Path, default=Path("data"), help="folder for the archive (%(default)s)")


def _add_train(commands: Any) -> None:
    parser = commands.add_parser("train", help="train a network by a recipe", description="Train into runs/NAME.")
    parser.set_defaults(run=_train)
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    parser.add_argument("--name", help="name of the run, and of models made of it; default: the data's")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are kept (%(default)s)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run after its last finished epoch")
    again.add_argument("--force", action="store_true", help="discard the run that is there, and start anew")
    _add_device(parser)
    _add_cache(parser)
    _add_knobs(parser.add_argument_group("recipe", "The defaults are the article's."), tuple(Recipe.model_fields))


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="measure a run or a bundle on labelled images")
    parser.set_defaults(run=_evaluate)
    parser.add_argument("model", type=Path, help="run directory (PyTorch) or bundle directory (ONNX Runtime)")
    parser.add_argument("--data", type=Path, help=f"{DATA_HELP}; default: what the run was trained on")
    parser.add_argument(
        "--split", choices=("test", "train", "all"), help="which part; default: what was kept from training"
    )
    parser.add_argument("--json", action="store_true", help="print every figure as one line of JSON")
    parser.add_argument("--out", type=Path, help="folder for pictures of confusions and worst mistakes")
    _add_device(parser)
    _add_cache(parser)


def _add_predict(commands: Any) -> None:
    parser = commands.add_parser("predict", help="classify image files")
    parser.set_defaults(run=_predict)
    parser.add_argument("model", type=Path, help="run directory (PyTorch) or bundle directory (ONNX Runtime)")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JPEG, PNG or WebP images")
    parser.add_argument("--top-k", type=_count, default=3, metavar="K", help="how many labels to show (%(default)s)")
    _add_device(parser)


def _add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="turn a run into a bundle that proves itself")
    parser.set_defaults(run=_export)
    parser.add_argument("model", type=Path, metavar="run", help="run directory")
    parser.add_argument("--data", type=Path, help=f"{DATA_HELP}; default: what the run was trained on")
    parser.add_argument("--name", help="name of the model; default: the run's")
    parser.add_argument("--source", help="where the data comes from, for the manifest")
    parser.add_argument("--licence", default="not stated", help="terms of use, for the manifest (%(default)s)")
    _add_bundle(parser)
    _add_cache(parser)


def _add_import(commands: Any) -> None:
    parser = commands.add_parser("import", help="turn published weights into a bundle that proves itself")
    parser.set_defaults(run=_import)
    parser.add_argument("--weights", type=Path, required=True, help="PyTorch state dict of the network")
    parser.add_argument(
        "--labels", type=Path, required=True, help="text file, one label a line, in the order of outputs"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="images to compare and measure on; folders named by label"
    )
    parser.add_argument("--name", required=True, help="name of the model")
    parser.add_argument("--source", required=True, help="where the weights come from, for the manifest")
    parser.add_argument("--licence", required=True, help="terms of use, for the manifest")
    _add_bundle(parser)
    _add_cache(parser)
    _add_knobs(parser.add_argument_group("recipe", "As the weights were trained."), IMPORT_KNOBS)


def _add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models-dir", type=Path, default=Path("models"), help="where bundles are kept (%(default)s)")
    parser.add_argument("--version", help="a whole number; default: the next free one")
    parser.add_argument("--force", action="store_true", help="replace the version if it exists")
    parser.add_argument(
        "--golden-from",
        type=Path,
        metavar="FOLDER",
        help="photos to make the golden set from, where the test images may not be passed on; default: test images",
    )
    parser.add_argument("--description", help="what the model is, for the manifest")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (%(default)s)"
    )


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=_default_cache(),
        help="where decoded images are kept between starts (%(default)s)",
    )


def _add_knobs(group: Any, knobs: tuple[str, ...]) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
