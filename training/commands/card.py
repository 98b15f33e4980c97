"""`card`: a data card for a bundle that has none, or a better one."""

import argparse
from pathlib import Path
from typing import Any

from training.commands.bundles import add_card, card_of
from training.commands.flags import DATA_HELP
from training.errors import DataError
from training.progress import say

UNPROVED = "Whether the model was trained on these very files: the bundle has no digest of their names and labels."


def add(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser("card", help="write what a bundle was trained on into it")
    parser.set_defaults(run=_run)
    parser.add_argument("bundle", type=Path, help="bundle directory")
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    parser.add_argument(
        "--only-measured",
        action="store_true",
        help="the bundle was not trained on this data, only its figures were measured on it",
    )
    parser.add_argument(
        "--unknown",
        action="append",
        default=[],
        metavar="SENTENCE",
        help="something that is not known; may be repeated",
    )
    add_card(parser)


def _run(options: argparse.Namespace) -> None:
    from app.manifest import add_data_card, read_bundle
    from training.classifiers import origin_told
    from training.data.arrays import read_listing
    from training.data.listing import kept_from_training

    bundle = read_bundle(options.bundle)
    listing = read_listing(options.data).relabelled(bundle.manifest.labels)
    drawn, unknown = None, list(options.unknown)
    if not options.only_measured:
        origin = origin_told(bundle)
        if listing.test is None:
            drawn = origin.test_fraction, origin.seed
        listing = kept_from_training(listing, options.data, origin)
        if not origin.digest:
            unknown.append(UNPROVED)
        elif listing.digest != origin.digest:
            raise DataError(
                f"{options.data} does not have the names and labels that {options.bundle} was trained on: give the "
                "data of the training, or --only-measured."
            )
    card = card_of(
        options,
        listing,
        bundle.manifest.pixels,
        options.data,
        drawn,
        is_trained_on=not options.only_measured,
        unknown=unknown,
    )
    add_data_card(bundle, card.encoded())
    images = ", ".join(f"{name} {part.images:,}" for name, part in card.parts.items())
    say(f"{options.bundle} has a data card: {images} images, {len(card.unknown)} things not known.")
