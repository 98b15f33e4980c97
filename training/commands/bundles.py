"""What every sub-command that writes a bundle shares: where it goes, its golden photos, what is told of it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import ExportError
from training.names import check_name, check_version, next_version
from training.progress import say

if TYPE_CHECKING:
    from training.data import Split
    from training.export import Offer
    from training.listing import Picture
    from training.servable import Servable


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where the bundle goes and what is told of it."""
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
    return version


def golden_photos(options: argparse.Namespace) -> "tuple[Picture, ...]":
    """Return the photos that the golden set is to be made from; none: those of the split."""
    from training.trees import read_photos

    return () if options.golden_from is None else read_photos(options.golden_from)


def write(
    servable: "Servable",
    offer: "Offer",
    split: "Split",
    golden_from: "tuple[Picture, ...]",
    options: argparse.Namespace,
) -> None:
    """Export, and say what was measured."""
    from training.export import GOLDEN_TOLERANCE, export

    target = options.models_dir / offer.name / offer.version
    exported = export(servable, offer, split, target, golden_from)
    size_mb = exported.bundle.manifest.model.size_bytes / 1e6
    say(f"{target}: {size_mb:.2f} MB, accuracy {exported.bundle.manifest.evaluation['accuracy']:.2%} on {offer.data}.")
    say(f"ONNX Runtime and PyTorch differ by at most {exported.difference:.1e} in a probability.")
    unnoticed = [wrong for wrong, change in exported.detects.items() if change <= GOLDEN_TOLERANCE]
    if unnoticed:
        say(f"Note: this network hardly reacts to {', '.join(unnoticed)}, so its golden images would not notice.")
