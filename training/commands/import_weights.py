"""`import`: published weights in, a bundle that proves itself out."""

import argparse
from pathlib import Path
from typing import Any

from training.commands.bundles import add_bundle, add_card, add_tolerance, card_of, golden_photos, version_of, write
from training.commands.flags import add_cache, add_knobs, recipe_of
from training.recipes import PIXEL_KNOBS

UNKNOWN_TRAINING = "What the published weights were trained on is not described: no counts, splits or digests of it."


def add(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser("import", help="turn published weights into a bundle that proves itself")
    parser.set_defaults(run=_run)
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
    add_card(parser)
    add_bundle(parser)
    add_tolerance(parser)
    add_cache(parser)
    add_knobs(parser.add_argument_group("recipe", "As the weights were trained."), PIXEL_KNOBS)


def _run(options: argparse.Namespace) -> None:
    from training.data.arrays import load_split, read_listing
    from training.export import Offer
    from training.published import read_labels, read_network
    from training.servable import Servable

    version = version_of(options, options.name)
    golden_from = golden_photos(options)
    recipe = recipe_of(options, checkpoint=None)
    labels = read_labels(options.labels)
    network = read_network(options.weights, recipe, classes=len(labels))
    listing = read_listing(options.data).relabelled(labels)
    split = load_split(listing.part("all"), recipe.pixels, options.cache_dir)
    preprocessing = recipe.model_dump(mode="json", include=set(PIXEL_KNOBS))
    card = card_of(options, listing, recipe.pixels, options.data, is_trained_on=False, unknown=(UNKNOWN_TRAINING,))
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
        data_card=card.encoded(),
        golden_tolerance=options.golden_tolerance,
    )
    write(Servable(network, recipe), offer, split, golden_from, options)
