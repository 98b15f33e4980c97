"""`predict`: labels of image files."""

import argparse
from pathlib import Path
from typing import Any

from training.commands.flags import add_device, count


def add(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser("predict", help="classify image files")
    parser.set_defaults(run=_run)
    parser.add_argument("model", type=Path, help="run directory (PyTorch) or bundle directory (ONNX Runtime)")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JPEG, PNG or WebP images")
    parser.add_argument("--top-k", type=count, default=3, metavar="K", help="how many labels to show (%(default)s)")
    add_device(parser)


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from training.classifiers import open_classifier
    from training.evaluate import predict, prediction_table
    from training.learning.devices import choose_device

    classifier = open_classifier(options.model, choose_device(options.device))
    probabilities = predict(classifier, options.files)
    Console().print(prediction_table(options.files, probabilities, classifier.labels, options.top_k))
