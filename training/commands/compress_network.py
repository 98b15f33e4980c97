"""`compress prune` and `compress distil`: the steps of the two methods that train."""

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.commands.bundles import card_of, golden_photos, version_of, write
from training.commands.flags import data_of, knobs_given, recipe_of
from training.errors import CompressError
from training.progress import say
from training.recipes import PIXEL_KNOBS, flag

if TYPE_CHECKING:
    from app.manifest import Bundle, Manifest
    from training.data.arrays import Split
    from training.data.cards import DataCard
    from training.recipes import Recipe
    from training.runs import Epoch
    from training.servable import Servable

DIVISION_KNOBS = ("test_fraction", "validation_fraction", "seed")
"""What a run's images were divided by: with another the pruned network would be measured on images trained on."""
WEIGHED = 1000
"""Training images that channels are weighed by."""


@dataclass(frozen=True, slots=True)
class _Trained:
    """A network that was trained to be cheaper, and what it is compared with."""

    servable: "Servable"
    recipe: "Recipe"
    labels: tuple[str, ...]
    test: "Split"
    measured_on: str
    parent: Mapping[str, Any]
    beside: Mapping[str, Path]
    """Name → ONNX file, first the parent's."""
    training: Mapping[str, Any]
    source: str
    licence: str
    card: "DataCard"
    held_out: "Split | None"


def run_prune(options: argparse.Namespace) -> None:
    """Prune a run's network, train it on with the run's own answers as teacher, and write a bundle."""
    from app.manifest import sha256_of
    from training.classifiers import origin_of, servable_of
    from training.compress.distilling import asked_in_torch
    from training.compress.pruning import prune
    from training.data.arrays import load_split, read_listing
    from training.data.listing import kept_from_training
    from training.export import write_graph
    from training.learning.devices import choose_device, describe
    from training.runs import CHECKPOINT_FILE, read_checkpoint
    from training.servable import Servable
    from training.train import Teacher, fit

    checkpoint = read_checkpoint(options.model)
    run_name = options.model.resolve().name
    options.name = options.name or f"{run_name}-pruned"
    options.version = version_of(options, options.name)
    golden_photos(options)
    device, recipe = choose_device(options.device), recipe_of(options, checkpoint)
    _check_same(recipe, checkpoint.recipe)
    _check_goes_to_the_end(options)
    data = data_of(options.model, options.data)
    origin = origin_of(checkpoint)
    whole = read_listing(data).relabelled(checkpoint.classes)
    listing = kept_from_training(whole, data, origin)
    rest, held_out = listing.hold_out(recipe.validation_fraction, recipe.seed)
    drawn = (origin.test_fraction, origin.seed) if whole.test is None else None
    train_split = load_split(rest.part("train"), recipe.pixels, options.cache_dir)
    test_split = load_split(listing.part("test"), recipe.pixels, options.cache_dir)
    parent = servable_of(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / "parent.onnx"
        write_graph(parent, recipe.pixels, graph)
        planes, labels = _some(train_split, parent)
        pruned = prune(parent.network, planes, labels, len(checkpoint.classes), options.drop)
        say(
            f"Pruned {pruned.drop:.1%} of {pruned.before / 1e6:,.1f} million multiply-adds; "
            f"training on for {recipe.epochs} epochs ({describe(device)})."
        )
        teacher = Teacher(asked_in_torch(parent, recipe, device), options.teacher_weight, options.temperature)
        epochs = fit(pruned.network, len(checkpoint.classes), recipe, train_split, test_split, device, teacher=teacher)
        history = _told(epochs, recipe)
        trained = _Trained(
            servable=Servable(pruned.network.cpu(), recipe).eval(),
            recipe=recipe,
            labels=checkpoint.classes,
            test=test_split,
            measured_on=f"{data}, {len(test_split.labels):,} images kept from training",
            parent={
                "name": run_name,
                "version": None,
                "sha256": sha256_of(options.model / CHECKPOINT_FILE),
                "method": "prune",
                "details": {
                    "multiply_adds_gone": round(pruned.drop, 4),
                    "channels_gone": round(pruned.share, 4),
                    "teacher_weight": options.teacher_weight,
                    "temperature": options.temperature,
                },
            },
            beside={run_name: graph},
            training=_story(recipe, history, str(data), listing.digest, describe(device), options),
            source=options.source or f"Trained on {checkpoint.data} by convoy-train, then pruned.",
            licence=options.licence,
            card=card_of(options, listing, recipe.pixels, data, drawn, source=options.source),
            held_out=load_split(held_out, recipe.pixels, options.cache_dir) if held_out else None,
        )
        _finish(trained, options)


def run_distil(options: argparse.Namespace) -> None:
    """Train a network by a recipe with a bundle as its teacher, and write a bundle."""
    import torch

    from app.manifest import read_bundle, verify_files
    from training.classifiers import onnx_run
    from training.compress.distilling import asked_of
    from training.data.arrays import load_split, read_listing
    from training.learning.devices import choose_device, describe
    from training.nets import build
    from training.servable import Servable
    from training.train import SetByData, Teacher, check_network, first_look, fit

    teacher_bundle = read_bundle(options.model)
    verify_files(teacher_bundle)
    manifest = teacher_bundle.manifest
    recipe = recipe_of(options, checkpoint=None)
    _check_goes_to_the_end(options)
    if (manifest.pixels.height, manifest.pixels.width) != (recipe.size, recipe.size):
        raise CompressError(
            f"The teacher {options.model} sees {manifest.pixels.height}×{manifest.pixels.width} pixels, the student "
            f"{recipe.size}×{recipe.size}: give both the same --size, for they look at the same images."
        )
    others = {path: read_bundle(path) for path in options.beside}
    for path, bundle in {options.model: teacher_bundle, **others}.items():
        _check_sees_alike(path, bundle.manifest, recipe, manifest.labels)
    options.name = options.name or f"{recipe.network.replace('_', '-')}-distilled"
    options.version = version_of(options, options.name)
    golden_photos(options)
    labels = manifest.labels
    check_network(recipe, len(labels))
    device = choose_device(options.device)
    whole = read_listing(options.data).relabelled(labels)
    listing = whole.split(recipe.test_fraction, recipe.seed)
    rest, held_out = listing.hold_out(recipe.validation_fraction, recipe.seed)
    drawn = (recipe.test_fraction, recipe.seed) if whole.test is None else None
    train_split = load_split(rest.part("train"), recipe.pixels, options.cache_dir)
    test_split = load_split(listing.part("test"), recipe.pixels, options.cache_dir)
    torch.manual_seed(recipe.seed)
    network = build(recipe.network, classes=len(labels), size=recipe.size, dropout=recipe.dropout)
    if isinstance(network, SetByData):
        network.initialise(first_look(train_split, recipe))
    teacher = Teacher(asked_of(onnx_run(teacher_bundle.model_path)), options.teacher_weight, options.temperature)
    say(f"Training {recipe.network} for {recipe.epochs} epochs with {options.model} as teacher ({describe(device)}).")
    history = _told(fit(network, len(labels), recipe, train_split, test_split, device, teacher=teacher), recipe)
    beside = {f"{manifest.name}/{manifest.version}": teacher_bundle.model_path}
    beside |= {str(path): bundle.model_path for path, bundle in others.items()}
    trained = _Trained(
        servable=Servable(network.cpu(), recipe).eval(),
        recipe=recipe,
        labels=labels,
        test=test_split,
        measured_on=f"{options.data}, {len(test_split.labels):,} images kept from training",
        parent=_parent_of(teacher_bundle, options),
        beside=beside,
        training=_story(recipe, history, str(options.data), listing.digest, describe(device), options),
        source=options.source or f"Trained on {options.data} by convoy-train, with {manifest.name} as teacher.",
        licence=options.licence,
        card=card_of(options, listing, recipe.pixels, options.data, drawn, source=options.source),
        held_out=load_split(held_out, recipe.pixels, options.cache_dir) if held_out else None,
    )
    _finish(trained, options)


def _check_same(recipe: "Recipe", trained: "Recipe") -> None:
    """Refuse knobs that a pruned network has no choice in.

    Raises:
        CompressError: one says how the network or its pixels are, or which images were kept from training.
    """
    for knob in (*PIXEL_KNOBS, *DIVISION_KNOBS):
        if getattr(recipe, knob) != getattr(trained, knob):
            raise CompressError(
                f"{flag(knob)} {getattr(recipe, knob)}: the run has {getattr(trained, knob)}, and its pruned network "
                "and images are the same; leave it out."
            )


def _check_goes_to_the_end(options: argparse.Namespace) -> None:
    if "patience" in knobs_given(options):
        raise CompressError("--patience: `compress` trains to the last epoch and keeps its weights; leave it out.")


def _check_sees_alike(path: Path, manifest: "Manifest", recipe: "Recipe", labels: tuple[str, ...]) -> None:
    """Refuse a model that would be measured on other pixels than its own, or by another order of labels."""
    if manifest.labels != labels:
        raise CompressError(f"{path} has other labels than the teacher, so both cannot be in one table: leave it out.")
    for field, value in manifest.pixels.model_dump().items():
        wanted = getattr(recipe.pixels, field)
        if value != wanted:
            raise CompressError(
                f"{path} has {field} {value}, and the student would have {wanted}: both look at the same images, so "
                "give the student the same."
            )


def _parent_of(bundle: "Bundle", options: argparse.Namespace) -> dict[str, Any]:
    return {
        "name": bundle.manifest.name,
        "version": bundle.manifest.version,
        "sha256": bundle.manifest.model.sha256,
        "method": "distil",
        "details": {"teacher_weight": options.teacher_weight, "temperature": options.temperature},
    }


def _some(split: "Split", parent: "Servable") -> tuple[Any, Any]:
    """Return training images at even distances, normalised, and their labels."""
    import numpy as np
    import torch

    places = np.linspace(0, len(split.labels) - 1, min(WEIGHED, len(split.labels))).round().astype(int)
    planes = parent.normalise(torch.from_numpy(split.images[places]).permute(0, 3, 1, 2).float())
    return planes, torch.from_numpy(split.labels[places])


def _told(epochs: "Iterable[Epoch]", recipe: "Recipe") -> "list[Epoch]":
    """Train, and tell of every epoch."""
    history = []
    for epoch in epochs:
        history.append(epoch)
        say(
            f"epoch {epoch.epoch}/{recipe.epochs}  train loss {epoch.train_loss:.4f}, {epoch.train_accuracy:.2%}  "
            f"test {epoch.test_accuracy:.2%}  {epoch.seconds:.1f} s"
        )
    return history


def _story(
    recipe: "Recipe", history: "list[Epoch]", data: str, digest: str, hardware: str, options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "recipe": recipe.model_dump(mode="json"),
        "history": [asdict(epoch) for epoch in history],
        "weights": f"{'the moving average' if recipe.ema else 'those'} after the last epoch",
        "seconds": round(sum(epoch.seconds for epoch in history), 1),
        "hardware": hardware,
        "data": data,
        "data_digest": digest,
        "command": options.command_line,
    }


def _finish(trained: _Trained, options: argparse.Namespace) -> None:
    """Compare, refuse what lost too much, and otherwise write the bundle and show the table."""
    from rich.console import Console

    from training.compress.beside import measure, record_of, rows_of
    from training.compress.table import check_bound, comparison_table, in_words
    from training.export import Offer, write_graph

    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / "child.onnx"
        write_graph(trained.servable, trained.recipe.pixels, graph)
        models = {**trained.beside, f"{options.name}/{options.version}": graph}
        measured = [measure(name, path, trained.test, trained.labels) for name, path in models.items()]
        check_bound(measured[0].accuracy, measured[-1].accuracy, options.max_loss)
        rows = rows_of(measured, trained.test.images)
    offer = Offer(
        name=options.name,
        version=options.version,
        description=options.description or f"{trained.recipe.network}, compressed: {trained.parent['method']}.",
        labels=trained.labels,
        pixels=trained.recipe.pixels,
        training=dict(trained.training),
        data=trained.measured_on,
        source=trained.source,
        licence=trained.licence,
        command=options.command_line,
        data_card=trained.card.encoded(),
        parent=dict(trained.parent),
        figures={"beside_parent": record_of(rows)},
    )
    write(trained.servable, offer, trained.test, golden_photos(options), options, trained.held_out)
    Console().print(comparison_table(rows))
    say(in_words(rows[0], rows[-1]))
