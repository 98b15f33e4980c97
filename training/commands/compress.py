"""`compress`: a model in, a cheaper one beside it in one table, or a refusal: INT8, FP16, pruning, distillation."""

import argparse
import math
from pathlib import Path
from typing import Any

from training.commands.bundles import add_bundle, add_card, add_evidence, add_place
from training.commands.compress_bundle import run_fp16, run_int8
from training.commands.compress_network import run_distil, run_prune
from training.commands.flags import DATA_HELP, add_cache, add_device, add_knobs, count
from training.recipes import Recipe

CALIBRATIONS = ("minmax", "entropy", "percentile")


def add(commands: Any) -> None:
    """Add the sub-command and its four methods."""
    parser = commands.add_parser("compress", help="make a model cheaper, within a bound on what accuracy it may lose")
    methods = parser.add_subparsers(required=True, metavar="METHOD")
    _add_int8(methods)
    _add_fp16(methods)
    _add_prune(methods)
    _add_distil(methods)


def _add_int8(methods: Any) -> None:
    parser = methods.add_parser("int8", help="a bundle's graph in 8-bit integers, for CPUs")
    parser.set_defaults(run=run_int8)
    _add_common(parser)
    parser.add_argument(
        "--calibrate-on",
        type=Path,
        metavar="FOLDER",
        help="photos to measure activations' ranges on, without labels; default: training images of --data",
    )
    parser.add_argument(
        "--calibration",
        choices=("auto", *CALIBRATIONS),
        default="auto",
        help="how ranges are chosen; auto: by whichever the answers stay nearest to the parent's (%(default)s)",
    )
    parser.add_argument(
        "--calibration-images", type=count, default=300, metavar="N", help="how many at most (%(default)s)"
    )


def _add_fp16(methods: Any) -> None:
    parser = methods.add_parser("fp16", help="a bundle's graph in half precision, for GPUs")
    parser.set_defaults(run=run_fp16)
    _add_common(parser)


def _add_prune(methods: Any) -> None:
    parser = methods.add_parser("prune", help="a run's network with fewer channels, trained on; as a bundle")
    parser.set_defaults(run=run_prune)
    parser.add_argument("model", type=Path, metavar="run", help="run directory")
    parser.add_argument("--data", type=Path, help=f"{DATA_HELP}; default: what the run was trained on")
    parser.add_argument(
        "--drop", type=_share, default=0.4, metavar="SHARE", help="of multiply-adds that has to go (%(default)s)"
    )
    _add_training(parser, "The defaults are the run's own.")


def _add_distil(methods: Any) -> None:
    parser = methods.add_parser("distil", help="another network, trained with a bundle as its teacher; as a bundle")
    parser.set_defaults(run=run_distil)
    parser.add_argument("model", type=Path, metavar="bundle", help="bundle directory of the teacher")
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    parser.add_argument(
        "--beside",
        type=Path,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="another model for the table, such as the same network trained without a teacher",
    )
    _add_training(parser, "The defaults are the article's.")


def _add_training(parser: argparse.ArgumentParser, defaults: str) -> None:
    _add_bound(parser)
    parser.add_argument(
        "--teacher-weight", type=_share, default=0.9, metavar="SHARE", help="of the teacher in the loss (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=_warmth, default=4.0, help="what answers are softened by in the loss (%(default)s)"
    )
    parser.add_argument("--name", help="name of the new model; default: the run's or network's, and the method")
    parser.add_argument("--source", help="where the data comes from, for the manifest")
    parser.add_argument("--licence", default="not stated", help="terms of use, for the manifest (%(default)s)")
    add_bundle(parser)
    add_card(parser)
    add_device(parser)
    add_cache(parser)
    add_knobs(parser.add_argument_group("recipe", defaults), tuple(Recipe.model_fields))


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="bundle", help="bundle directory")
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    _add_bound(parser)
    parser.add_argument("--name", help="name of the new model; default: the parent's and the method")
    parser.add_argument("--description", help="what the model is, for the manifest")
    add_place(parser)
    add_evidence(parser)
    add_cache(parser)


def _add_bound(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-loss",
        type=_points,
        required=True,
        metavar="POINTS",
        help="percentage points of accuracy that may be lost; beyond, nothing is written",
    )


def _points(text: str) -> float:
    return _number(text, 0, 100, "number of points from 0 to 100")


def _share(text: str) -> float:
    return _number(text, 0, 1, "share from 0 to 1")


def _warmth(text: str) -> float:
    return _number(text, 0.01, 1000, "temperature from 0.01 to 1000")


def _number(text: str, least: float, most: float, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"'{text}' is no {what}")
    return number
