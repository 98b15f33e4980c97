"""`calibrate`: a bundle in, the same bundle with honest probabilities out."""

import argparse
from pathlib import Path
from typing import Any

from training.commands.bundles import add_evidence, add_place, describe_trust, strangers, version_of
from training.commands.flags import DATA_HELP, add_cache
from training.errors import ExportError
from training.progress import say


def add(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser("calibrate", help="fit a bundle's temperature anew, and all that follows from it")
    parser.set_defaults(run=_run)
    parser.add_argument("model", type=Path, metavar="bundle", help="bundle directory")
    parser.add_argument("--data", type=Path, required=True, help=f"{DATA_HELP}; images it was not trained on")
    add_place(parser, models_dir=None)
    add_evidence(parser)
    add_cache(parser)


def _run(options: argparse.Namespace) -> None:
    from app.manifest import read_bundle, verify_files
    from training.classifiers import origin_told
    from training.data.arrays import load_split, read_listing
    from training.data.listing import choose_part, validation_of
    from training.trust.calibrate import recalibrate
    from training.trust.fitted import Evidence

    bundle = read_bundle(options.model)
    verify_files(bundle)
    manifest = bundle.manifest
    if options.models_dir is None:
        name, models_dir = options.model.resolve().parent.name, options.model.resolve().parent.parent
        if name != manifest.name:
            raise ExportError(
                f"{options.model} is not in a folder {manifest.name}/, where the new version would lie beside it: "
                "say by --models-dir where it is to go."
            )
        options.models_dir = models_dir
    version = version_of(options, manifest.name)
    origin = origin_told(bundle)
    listing = read_listing(options.data).relabelled(manifest.labels)
    part, pictures, words = choose_part(listing, options.data, origin)
    held_out = validation_of(listing, options.data, origin) if part == "test" else ()
    split = load_split(pictures, manifest.pixels, options.cache_dir)
    evidence = Evidence(
        held_out=load_split(held_out, manifest.pixels, options.cache_dir) if held_out else None,
        strangers=strangers(options, manifest.pixels),
        calibrate=options.calibrate,
    )
    target = options.models_dir / manifest.name / version
    written = recalibrate(bundle, split, f"{options.data}, {words}", evidence, target, version, options.command_line)
    say(f"{target}: the weights of version {manifest.version}, calibrated.")
    describe_trust(written.manifest)
