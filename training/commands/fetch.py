"""`fetch`: a data set from its home, checked."""

import argparse
from pathlib import Path
from typing import Any

from training.progress import say


def add(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser("fetch", help="download a data set from its home, and check it")
    parser.set_defaults(run=_run)
    parser.add_argument("dataset", choices=("cifar10", "cifar10-binary"), help="what to download")
    parser.add_argument("--into", type=Path, default=Path("data"), help="folder for the archive (%(default)s)")


def _run(options: argparse.Namespace) -> None:
    from training.data.fetch import ARCHIVES, fetch

    path = fetch(ARCHIVES[options.dataset], options.into)
    say(f"{path} is the published archive: train on it with `convoy-train train --data {path}`.")
