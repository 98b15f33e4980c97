"""`convoy tune`: the search on a user's bundle and machine, told as it goes, shown, and written down."""

import argparse
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.bench.flags import check_folder, number, write_text
from app.bench.search import TARGET_SHARE, Candidate, Search, Trial, Value, candidates, settings_of
from app.cpus import machine, usable_cpus
from app.settings import Settings

if TYPE_CHECKING:
    from app.manifest import Bundle

EXIT_NOT_FOUND = 1
EXIT_INTERRUPTED = 130

DESCRIPTION = """\
Find the settings with which this machine sustains the highest rate of requests while 99 % of them are accepted and
answered within --p99. Each candidate is a real `convoy serve` on a free loopback port under load from the same
machine: let nothing else run. What the environment sets beside the candidates' settings stays as it is."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the words of `convoy tune`."""
    parser.add_argument("--p99", type=number(0.1, 60_000), required=True, metavar="MS", help="the limit to keep")
    parser.add_argument(
        "--images", nargs="+", type=Path, required=True, metavar="IMAGE", help="what is asked: image files or folders"
    )
    parser.add_argument("--model", default="", help="which model; default: the default model")
    parser.add_argument(
        "--budget-s", type=number(5, 86_400), default=240.0, metavar="S", help="time for the search (default: 240)"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a file for convoy serve --settings FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what was tried: .svg or .png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every trial")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Search, print, write; return the exit status.

    Raises:
        ConvoyError: no such model, no image, a file that cannot be written; the sentence says what to do.
    """
    from app.bench.pictures import check_can_draw, draw_search
    from app.bench.requests import read_bodies
    from app.bench.trials import Trials
    from app.offline import find_bundle, image_files

    for target in filter(None, (options.write, options.plot, options.json)):
        check_folder(target)
    if options.plot:
        check_can_draw(options.plot)
    bundle = find_bundle(settings, options.model)
    images = read_bodies(image_files(options.images))
    for image in images:  # one that every service refuses would fail every trial
        _check(image, bundle, settings)

    console = Console(highlight=False)
    found = candidates(usable_cpus())
    console.print(
        f"{bundle.manifest.name}, {len(images)} images, p99 ≤ {options.p99:g} ms: "
        f"{len(found)} candidates in {options.budget_s:g} s …"
    )
    interrupted = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever ends the search ends the service it started
    with Trials(bundle, images, options.p99) as trials:
        search = Search(found, trials, options.p99, options.budget_s, tell=lambda trial: console.print(_line(trial)))
        try:
            search.run()
        except KeyboardInterrupt:
            interrupted = True
    console.print(table(search))
    for sentence in sentences(search):
        console.print(Text(sentence))
    if options.json:
        write_text(options.json, json.dumps(_document(search, bundle), indent=2, ensure_ascii=False) + "\n")
    if options.plot and search.trials:
        draw_search(search, options.plot)
    if interrupted:
        return EXIT_INTERRUPTED
    if search.best is None:
        return EXIT_NOT_FOUND
    if options.write:
        write_text(options.write, settings_file(search, bundle))
        console.print(f"Wrote {options.write}: convoy serve --settings {options.write}")
    return 0


def table(search: Search) -> Table:
    """Return what each candidate did: its last closed loop, and a finalist's rate within the limit."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    names = list(search.candidates[0])
    for name in names:
        shown.add_column(name, justify="right")
    for name in ("closed loop/s", "p99 ms", f"open loop/s with p99 ≤ {search.limit_ms:g} ms"):
        shown.add_column(name, justify="right")
    finalists = {_key(each.candidate): each for each in search.finalists}
    last = {_key(trial.candidate): trial for trial in search.trials if trial.loop == "closed"}
    for trial in sorted(last.values(), key=lambda trial: -trial.requests_per_s):
        finalist = finalists.get(_key(trial.candidate))
        kept = ""
        if finalist is not None:
            kept = f"{finalist.rate:,.1f}{' ✓' if finalist.confirmed else '  '}" if finalist.rate else "none"
        shown.add_row(
            *(
                f"{trial.candidate[name]:g}" if _is_number(trial.candidate[name]) else str(trial.candidate[name])
                for name in names
            ),
            trial.fault or f"{trial.requests_per_s:,.1f}",
            f"{trial.p99_ms:,.1f}" if trial.p99_ms is not None else "",
            kept,
            style="bold" if trial.candidate == search.best else None,
        )
    return shown


def sentences(search: Search) -> list[str]:
    """Return what the search found, and what limits it."""
    said = []
    if (winner := search.winner) is not None:
        chosen = ", ".join(f"{name} {value}" for name, value in winner.candidate.items())
        said.append(f"Sustainable: {winner.rate:,.1f} requests/s with p99 ≤ {search.limit_ms:g} ms: {chosen}.")
        if not winner.confirmed:
            said.append("A longer run at that rate did not keep the limit, or the budget did not allow one: take less.")
    elif search.trials:
        said.append(
            f"No rate was found at which p99 ≤ {search.limit_ms:g} ms: the limit is too tight for this machine, "
            "or --budget-s too short."
        )
    if (concurrency := search.concurrency) is not None:
        said.append(
            f"Concurrency target for autoscaling: {concurrency.in_flight:.1f} requests in flight a replica "
            f"(convoy_inflight_requests). Little's law at {TARGET_SHARE:g} of the sustainable rate: "
            f"{concurrency.rate:,.1f} requests/s × {concurrency.mean_ms / 1000:.4f} s mean latency, measured."
        )
    if search.untried:
        said.append(f"{search.untried} of {len(search.candidates)} candidates were not tried: --budget-s was spent.")
    return said


def settings_file(search: Search, bundle: "Bundle") -> str:
    """Return the text of a settings file with the best candidate and the limit, and where they come from."""
    assert search.best is not None
    here = machine()
    lines = [
        f"# convoy tune, {time.strftime('%Y-%m-%d')}: {bundle.manifest.name} version {bundle.manifest.version}",
        f"# on {here['cpu']}, {here['usable_cpus']} usable processors.",
        *(f"# {sentence}" for sentence in sentences(search)),
        *(f"{name} = {_toml(value)}" for name, value in settings_of(search.best, search.limit_ms).items()),
    ]
    return "\n".join(lines) + "\n"


def _line(trial: Trial) -> Text:
    settings = ", ".join(f"{name} {value}" for name, value in trial.candidate.items())
    if trial.fault:
        return Text(f"{settings}: {trial.fault}", style="red")
    load = f"{trial.asked:g} connections" if trial.loop == "closed" else f"{trial.asked:,.1f}/s due"
    p99 = f"{trial.p99_ms:,.1f} ms" if trial.p99_ms is not None else "none"
    verdict = "" if trial.loop == "closed" else " ✓" if trial.holds else " ✗"
    return Text(f"{settings}: {load} → {trial.requests_per_s:,.1f}/s, p99 {p99}{verdict}", style="dim")


def _document(search: Search, bundle: "Bundle") -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(),
        "model": {"name": bundle.manifest.name, "version": bundle.manifest.version},
        "p99_ms": search.limit_ms,
        "best": search.best,
        "sustainable_per_s": search.winner.rate if search.winner else 0.0,
        "confirmed": search.winner is not None and search.winner.confirmed,
        "finalists": [asdict(finalist) for finalist in search.finalists],
        "concurrency": asdict(search.concurrency) | {"in_flight": search.concurrency.in_flight}
        if search.concurrency
        else None,
        "untried": search.untried,
        "trials": [asdict(trial) | {"holds": trial.holds} for trial in search.trials],
    }


def _check(image: bytes, bundle: "Bundle", settings: Settings) -> None:
    from app.images import decode

    decode(image, bundle.manifest.pixels, settings.max_image_pixels)


def _key(candidate: Candidate) -> Sequence[Value]:
    return tuple(candidate.values())


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _toml(value: Value) -> str:
    # JSON writes strings, numbers, true and false as TOML does.
    return json.dumps(value)
