"""`check`: a data set looked over before it is trained on, or compared with a data card."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.commands.flags import DATA_HELP
from training.progress import say
from training.recipes import Recipe, flag, make_recipe

if TYPE_CHECKING:
    from training.checks.findings import Checked

UNFIT = 1
SPLIT_KNOBS = ("test_fraction", "seed")
PAGE_FILE, RECORD_FILE = "report.html", "check.json"


def add(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "check",
        help="find broken files, duplicates, leaks and wrong labels before training",
        description="Look a data set over before training: broken and odd files, duplicates within and across train "
        "and test, suspect labels, class balance.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    parser.add_argument(
        "--model",
        type=Path,
        metavar="RUN_OR_BUNDLE",
        help="whose features the labels are judged by, best one not trained on this data; without it they are not",
    )
    parser.add_argument("--out", type=Path, help=f"folder for {PAGE_FILE} and {RECORD_FILE}")
    parser.add_argument("--json", action="store_true", help="print every finding as one line of JSON")
    parser.add_argument("--strict", action="store_true", help=f"end with {UNFIT} if a finding forbids training")
    parser.add_argument("--no-near", action="store_true", help="do not compare every picture with every other")
    for knob in SPLIT_KNOBS:
        words = f"as training will have it, for data without a test part [{Recipe.model_fields[knob].default}]"
        parser.add_argument(flag(knob), metavar="VALUE", default=argparse.SUPPRESS, help=words)
    parser.add_argument(
        "--card", type=Path, metavar="DATA_JSON", help="say instead whether this is the data of a bundle's data card"
    )


def _run(options: argparse.Namespace) -> int:
    if options.card is not None:
        return _compare(options)
    from training.checks.check import check
    from training.checks.page import write_page

    began = time.perf_counter()
    recipe = make_recipe(**{knob: getattr(options, knob) for knob in SPLIT_KNOBS if hasattr(options, knob)})
    checked = check(options.data, options.model, recipe.test_fraction, recipe.seed, with_near=not options.no_near)
    record = checked.record() | {"seconds": round(time.perf_counter() - began, 1), "command": options.command_line}
    if options.out is not None:
        from training.atomic import replacing

        write_page(checked, options.out / PAGE_FILE)
        with replacing(options.out / RECORD_FILE) as file:
            file.write(json.dumps(record, indent=1, ensure_ascii=False).encode())
    if options.json:
        say(json.dumps(record, ensure_ascii=False))
    else:
        _summarise(checked, record["seconds"], options)
    return UNFIT if options.strict and not checked.is_fit else 0


def _summarise(checked: "Checked", seconds: float, options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from training.checks.findings import KINDS
    from training.checks.page import verdict

    table = Table("", "finding")
    table.add_column("count", justify="right")
    table.add_column("the first", overflow="fold")
    colours = {"error": "red", "warning": "yellow", "note": "dim"}
    for name, kind in KINDS.items():
        if found := checked.of_kind(name):
            names = ", ".join(checked.survey.pictures[place].name for place in found[0].places[:2])
            first = f"{names}: {found[0].sentence}" if names else found[0].sentence
            table.add_row(Text(kind.severity, colours[kind.severity]), kind.title, f"{len(found):,}", Text(first))
    say(f"{verdict(checked)} ({seconds:.0f} s)")
    if checked.findings:
        Console().print(table)
    broken = [checked.survey.pictures[finding.places[0]].name for finding in checked.of_kind("broken")]
    for line in [finding.sentence for finding in checked.of_kind("layout")] + broken:
        say(f"  {line}")
    if options.model is None:
        say("Labels were not judged: give --model a run or a bundle, such as models/imagenet/1.")
    if options.out is not None:
        say(f"{options.out / PAGE_FILE} shows them; {options.out / RECORD_FILE} has them all.")


def _compare(options: argparse.Namespace) -> int:
    from training.data.arrays import read_listing
    from training.data.cards import compare, read_card

    compared = compare(read_card(options.card), read_listing(options.data), options.data)
    if options.json:
        say(json.dumps({"card": str(options.card), "data": str(options.data), **compared.record()}, ensure_ascii=False))
    else:
        for sentence in compared.sentences:
            say(sentence)
    return 0 if compared.is_same else UNFIT
