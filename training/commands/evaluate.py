"""`evaluate`: figures of a run or a bundle on labelled images."""

import argparse
import json
from pathlib import Path
from typing import Any

from training.commands.flags import DATA_HELP, add_cache, add_device, data_of
from training.progress import say
from training.views import TTA


def add(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser("evaluate", help="measure a run or a bundle on labelled images")
    parser.set_defaults(run=_run)
    parser.add_argument("model", type=Path, help="run directory (PyTorch) or bundle directory (ONNX Runtime)")
    parser.add_argument("--data", type=Path, help=f"{DATA_HELP}; default: what the run was trained on")
    parser.add_argument(
        "--split", choices=("test", "train", "all"), help="which part; default: what was kept from training"
    )
    parser.add_argument(
        "--tta", choices=TTA, default="none", help="classify by several views of each image; slower (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print every figure as one line of JSON")
    parser.add_argument("--out", type=Path, help="folder for a report (report.html) and its pictures")
    add_device(parser)
    add_cache(parser)


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from training.classifiers import BATCH, in_batches, open_classifier
    from training.data.arrays import load_split, read_listing
    from training.data.listing import choose_part
    from training.evaluate import measure_figures
    from training.learning.devices import choose_device
    from training.views import several_views

    classifier = open_classifier(options.model, choose_device(options.device))
    data = data_of(options.model, options.data)
    listing = read_listing(data).relabelled(classifier.labels)
    part, pictures, words = choose_part(listing, data, classifier.origin, options.split)
    split = load_split(pictures, classifier.pixels, options.cache_dir)
    probabilities = in_batches(several_views(classifier.run, options.tta), split.images, BATCH)
    if options.tta != "none":
        words += f", by several views (--tta {options.tta})"
    figures = measure_figures(probabilities, split.labels, classifier.labels)
    if options.out is not None:
        from training.pictures import draw_confusion, draw_mistakes
        from training.report.page import write_report
        from training.report.sources import told_of

        draw_confusion(figures, options.out)
        draw_mistakes(split, probabilities, classifier.labels, options.out)
        told = told_of(options.model, data=data, measured=words, command=options.command_line)
        write_report(options.out, told, split, probabilities, classifier.labels)
    if options.json:
        about = {"model": str(options.model), "data": str(data), "split": part, "measured": words}
        say(json.dumps(about | figures.record() | {"command": options.command_line}, ensure_ascii=False))
    else:
        say(f"{figures.headline()} ({words})")
        Console().print(figures.table())
