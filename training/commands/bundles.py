"""What every sub-command that writes a bundle shares: where it goes, its golden photos, what is told of it."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.atomic import can_be_written
from training.errors import ExportError
from training.names import check_name, check_version, next_version
from training.progress import say

if TYPE_CHECKING:
    from app.manifest import Manifest, PixelRecipe
    from training.data.arrays import Split
    from training.data.cards import DataCard
    from training.data.listing import Listing, Picture
    from training.export import Exported, Offer
    from training.servable import Servable
    from training.trust.fitted import Strangers

MOST_STRANGERS = 1000
LARGEST_TOLERANCE = 0.02
"""Beyond it the likeliest label of a golden image could change unnoticed (`training/golden.py`)."""


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where the bundle goes, what is told of it, and what its probabilities are measured by."""
    add_place(parser)
    parser.add_argument(
        "--golden-from",
        type=Path,
        metavar="FOLDER",
        help="photos to make the golden set from, where the test images may not be passed on; default: test images",
    )
    parser.add_argument("--description", help="what the model is, for the manifest")
    add_evidence(parser)


def add_place(parser: argparse.ArgumentParser, models_dir: Path | None = Path("models")) -> None:
    """Add the flags that say where the bundle goes; without a folder by default, beside the one that is given."""
    kept = models_dir or "where the bundle is"
    parser.add_argument("--models-dir", type=Path, default=models_dir, help=f"where bundles are kept ({kept})")
    parser.add_argument("--version", help="a whole number; default: the next free one")
    parser.add_argument("--force", action="store_true", help="replace the version if it exists")


def add_evidence(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what the probabilities are fitted and measured with."""
    parser.add_argument(
        "--calibrate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the graph gets the temperature that makes its probabilities honest (yes)",
    )
    parser.add_argument(
        "--unfamiliar",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="images of none of the classes, to measure how well they are told apart; may be given several times",
    )


def add_tolerance(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says how far a device may be from the golden answers."""
    parser.add_argument(
        "--golden-tolerance",
        type=_tolerance,
        default=1e-4,
        metavar="X",
        help="largest difference from a golden probability where it is served; a GPU that rounds to TF32 wants 0.01 "
        "(%(default)s, at most 0.02)",
    )


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= LARGEST_TOLERANCE:
        raise argparse.ArgumentTypeError(f"must be a number above 0, and at most {LARGEST_TOLERANCE}")
    return value


def add_card(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only the data card needs."""
    parser.add_argument("--data-name", help="what people call the data, for the data card; default: its folder's name")
    parser.add_argument("--data-source", help="where the data comes from, for the data card")
    parser.add_argument(
        "--data-licence", default="not stated", help="terms of the data's use, for the data card (%(default)s)"
    )


def card_of(
    options: argparse.Namespace,
    listing: "Listing",
    pixels: "PixelRecipe",
    data: Path,
    drawn: tuple[float, int] | None = None,
    *,
    source: str | None = None,
    is_trained_on: bool = True,
    unknown: Sequence[str] = (),
) -> "DataCard":
    """Describe the data for the bundle's card: all of it is read once, for its digests.

    Args:
        options: with the flags of `add_card`.
        listing: divided as for training.
        pixels: how its images are brought to size.
        data: its path.
        drawn: test fraction and seed, where the test part was drawn.
        source: where the data comes from, if --data-source does not say it.
        is_trained_on: False where the model was only measured on it.
        unknown: what is not known, a sentence each.
    """
    from training.data.cards import UNKNOWN, describe

    return describe(
        listing,
        pixels,
        name=options.data_name or data.resolve().name,
        source=options.data_source or source or UNKNOWN,
        licence=options.data_licence,
        drawn=drawn,
        is_trained_on=is_trained_on,
        unknown=unknown,
        command=options.command_line,
    )


def version_of(options: argparse.Namespace, name: str) -> str:
    """Return the version to write, with name and version checked before anything is computed."""
    check_name(name)
    version: str = next_version(options.models_dir, name) if options.version is None else options.version
    check_version(version)
    if (options.models_dir / name / version).exists() and not options.force:
        raise ExportError(
            f"{options.models_dir / name / version} exists: leave --version out for the next free one, "
            "or replace it with --force."
        )
    if not can_be_written(options.models_dir / name):
        raise ExportError(f"{options.models_dir / name} cannot be written: name another folder by --models-dir.")
    return version


def golden_photos(options: argparse.Namespace) -> "tuple[Picture, ...]":
    """Return the photos that the golden set is to be made from; none: those of the split."""
    from training.data.trees import read_photos

    return () if options.golden_from is None else read_photos(options.golden_from)


def strangers(options: argparse.Namespace, pixels: "PixelRecipe") -> "tuple[Strangers, ...]":
    """Return the images of `--unfamiliar`, up to 1,000 of each folder, at even distances."""
    from training.data.arrays import load_split
    from training.data.trees import read_photos_below
    from training.trust.fitted import Strangers

    found = []
    for folder in options.unfamiliar:
        pictures = read_photos_below(folder)
        some = pictures[:: -(-len(pictures) // MOST_STRANGERS)]
        found.append(Strangers(str(folder), load_split(some, pixels, options.cache_dir).images))
    return tuple(found)


def describe_trust(manifest: "Manifest") -> None:
    """Say how honest a bundle's probabilities are."""
    calibration, conformal, ood = manifest.calibration, manifest.conformal, manifest.ood
    assert calibration is not None and conformal is not None and ood is not None, "every new bundle has them"
    say(
        f"Temperature {calibration.temperature:g}: calibration error "
        f"{calibration.before.calibration_error:.2%} before, "
        f"{calibration.after.calibration_error:.2%} after ({calibration.after.chance_error:.2%} would be chance), "
        f"on {calibration.measured_images:,} images. {calibration.note}".rstrip()
    )
    sets = ", ".join(f"{entry.coverage:.0%}: {entry.mean_size:.4g}" for entry in conformal.sets)
    say(f"Labels in a set that holds the true one, by promise: {sets}.")
    for stranger in ood.unfamiliar:
        say(
            f"Told from {stranger.data} by energy with AUROC {stranger.auroc:.3f}, "
            f"by probability with {stranger.auroc_of_probability:.3f}."
        )


def write(
    servable: "Servable",
    offer: "Offer",
    split: "Split",
    golden_from: "tuple[Picture, ...]",
    options: argparse.Namespace,
    held_out: "Split | None" = None,
) -> None:
    """Export, and say what was measured."""
    from training.export import export
    from training.trust.fitted import Evidence

    target = options.models_dir / offer.name / offer.version
    evidence = Evidence(held_out, strangers=strangers(options, offer.pixels), calibrate=options.calibrate)
    tell(export(servable, offer, split, target, golden_from, evidence), offer, "ONNX Runtime and PyTorch")


def tell(exported: "Exported", offer: "Offer", compared: str) -> None:
    """Say what export measured, and of which two ways to compute the difference is."""
    target = exported.bundle.directory
    size_mb = exported.bundle.manifest.model.size_bytes / 1e6
    say(f"{target}: {size_mb:.2f} MB, accuracy {exported.bundle.manifest.evaluation['accuracy']:.2%} on {offer.data}.")
    say(f"{compared} differ by at most {exported.difference:.1e} in a probability.")
    describe_trust(exported.bundle.manifest)
    unnoticed = [wrong for wrong, change in exported.detects.items() if change <= offer.golden_tolerance]
    if unnoticed:
        say(f"Note: this network hardly reacts to {', '.join(unnoticed)}, so its golden images would not notice.")
