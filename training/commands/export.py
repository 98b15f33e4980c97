"""`export`: a run in, a bundle that proves itself out."""

import argparse
from pathlib import Path
from typing import Any

from training.commands.bundles import add_bundle, add_card, add_tolerance, card_of, golden_photos, version_of, write
from training.commands.flags import DATA_HELP, add_cache, data_of
from training.progress import say

OTHER_DATA = "What the model was trained on, {}, is not described: it was exported with other images to measure on."


def add(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser("export", help="turn a run into a bundle that proves itself")
    parser.set_defaults(run=_run)
    parser.add_argument("model", type=Path, metavar="run", help="run directory")
    parser.add_argument("--data", type=Path, help=f"{DATA_HELP}; default: what the run was trained on")
    parser.add_argument("--name", help="name of the model; default: the run's")
    parser.add_argument("--source", help="where the data comes from, for the manifest")
    parser.add_argument("--licence", default="not stated", help="terms of use, for the manifest (%(default)s)")
    add_card(parser)
    add_bundle(parser)
    add_tolerance(parser)
    add_cache(parser)


def _run(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from training.classifiers import origin_of, servable_of
    from training.data.arrays import load_split, read_listing
    from training.data.listing import choose_part, kept_from_training, validation_of
    from training.export import Offer
    from training.runs import read_checkpoint

    checkpoint = read_checkpoint(options.model)
    name = options.model.resolve().name if options.name is None else options.name
    version = version_of(options, name)
    golden_from = golden_photos(options)
    recipe, origin = checkpoint.recipe, origin_of(checkpoint)
    data = data_of(options.model, options.data)
    listing = read_listing(data).relabelled(checkpoint.classes)
    divided = kept_from_training(listing, data, origin)
    _, pictures, words = choose_part(listing, data, origin, "test")
    split = load_split(pictures, recipe.pixels, options.cache_dir)
    held_out = validation_of(listing, data, origin)
    held_out_split = load_split(held_out, recipe.pixels, options.cache_dir) if held_out else None
    weights = checkpoint.weights_in_words
    if not checkpoint.is_finished:
        say(f"Note: the run is not finished; the weights are {weights}.")
    drawn = (origin.test_fraction, origin.seed) if listing.test is None else None
    is_trained_on = divided.digest == origin.digest
    card = card_of(
        options,
        divided,
        recipe.pixels,
        data,
        drawn if is_trained_on else None,
        source=options.source if is_trained_on else None,
        is_trained_on=is_trained_on,
        unknown=() if is_trained_on else (OTHER_DATA.format(checkpoint.data),),
    )
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
            **({"begun_from": checkpoint.begun_from} if checkpoint.begun_from else {}),
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
        data_card=card.encoded(),
        golden_tolerance=options.golden_tolerance,
    )
    write(servable_of(checkpoint), offer, split, golden_from, options, held_out_split)
