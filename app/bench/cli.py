"""`convoy bench`: from words of the command line to a printed report."""

import argparse
import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.bench.flags import check_folder, number, whole, write_text
from app.errors import BadRequestError
from app.settings import API_KEY_VARIABLE, Settings

if TYPE_CHECKING:
    from app.bench.ceiling import Ceiling
    from app.bench.load import Plan
    from app.bench.report import Report

CLOSED_CONNECTIONS = 16
OPEN_CONNECTIONS = 1024
EXIT_NOTHING_ACCEPTED = 1
EXIT_INTERRUPTED = 130

DESCRIPTION = """\
Measure a running service. Without --rate the loop is closed: each connection sends its next request when its answer is
there, which shows the most that the service can do. With --rate it is open: requests are due at constant distances
whatever the service does, and a latency counts from the moment at which its request was due, which shows what users of
that traffic see. Images are held in memory, at most 512 MB of them. Where the service asks for an API key, it is taken
from the environment variable CONVOY_API_KEY."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the words of `convoy bench`."""
    parser.usage = "convoy bench [URL] IMAGE... [options]"
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files or folders; before them the service's URL, if it is not the local one (http://HOST:PORT)",
    )
    parser.add_argument("--model", default="", help="which model; default: the service's default model")
    parser.add_argument(
        "--connections",
        type=whole(1, 20_000),
        metavar="N",
        help=f"connections (default: {CLOSED_CONNECTIONS}); with --rate, at most so many (default: {OPEN_CONNECTIONS})",
    )
    parser.add_argument("--rate", type=number(0.01, 1e6), metavar="R", help="open loop with so many requests a second")
    parser.add_argument(
        "--seconds", type=number(0.1, 3600), default=10.0, metavar="S", help="measured time (default: 10)"
    )
    parser.add_argument("--warm-up", type=number(0, 3600), default=2.0, metavar="S", help="load before it (default: 2)")
    parser.add_argument(
        "--images-per-request", type=whole(1, 1024), default=1, metavar="N", help="images in a request (default: 1)"
    )
    parser.add_argument("--timeout-ms", type=whole(1, 86_400_000), metavar="MS", help="send this deadline (Timeout-Ms)")
    parser.add_argument(
        "--ceiling",
        action="store_true",
        help="first measure decode and run of the same images without HTTP on this machine's processors; "
        "only tells something where the service runs here too, on the same --models",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw percentiles and time: .svg or .png")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Measure, print, write; return the exit status.

    Raises:
        ConvoyError: nothing listens there, no such model, no image; the sentence says what to do.
    """
    from app.bench.load import Plan, new_runner
    from app.bench.pictures import check_can_draw, draw_report
    from app.bench.requests import Endpoint, build_requests, read_bodies
    from app.bench.show import show
    from app.offline import image_files

    url, paths = _split(options.images, settings)
    endpoint = Endpoint.of(url, options.model)
    files = image_files([Path(path) for path in paths])
    images = read_bodies(files)
    if len(images) < len(files):
        print(f"Taking the first {len(images)} of {len(files)} images: more do not fit into memory.")
    for target in filter(None, (options.json, options.plot)):
        check_folder(target)
    if options.plot:
        check_can_draw(options.plot)
    open_loop = options.rate is not None
    plan = Plan(
        endpoint,
        build_requests(
            endpoint,
            images,
            images_per_request=options.images_per_request,
            timeout_ms=options.timeout_ms,
            api_key=os.environ.get(API_KEY_VARIABLE, ""),
        ),
        images_per_request=options.images_per_request,
        connections=options.connections or (OPEN_CONNECTIONS if open_loop else CLOSED_CONNECTIONS),
        rate=options.rate,
        seconds=options.seconds,
        warm_up_s=options.warm_up,
    )
    with new_runner() as runner:
        runner.run(check_answers(plan, files[0]))
        ceiling = _ceiling(options, settings, images) if options.ceiling else None
        print(_announcement(plan, len(images)), flush=True)
        report = runner.run(_run_until_interrupted(plan))
    if not report.seconds:
        print("Interrupted during the warm-up: nothing was measured.")
        return EXIT_INTERRUPTED
    show(report, ceiling)
    if options.json:
        document = _document(report, plan, ceiling, options, len(images))
        write_text(options.json, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    if options.plot:
        draw_report(report, options.plot)
    if report.interrupted:
        return EXIT_INTERRUPTED
    return 0 if report.accepted else EXIT_NOTHING_ACCEPTED


async def check_answers(plan: "Plan", file: Path) -> None:
    """Send the first request once.

    Raises:
        BadRequestError: there is no answer, or one that every later request would get too.
    """
    from app.bench.load import ask, reason_of

    address = plan.endpoint.address
    try:
        answer = await ask(plan.endpoint, plan.requests[0])
    except ConnectionRefusedError:
        raise BadRequestError(f"Nothing listens at {address}: start `convoy serve`, or give the URL.") from None
    except OSError as error:
        raise BadRequestError(f"{address} does not answer: {reason_of(error)}.") from error
    if answer.status not in (200, 429):
        raise BadRequestError(f"{address} answers {answer.status} to {file}: {_sentence_of(answer.body)}")


def _split(words: list[str], settings: Settings) -> tuple[str, list[str]]:
    """Return the URL, and the paths that follow it."""
    if "://" in words[0]:
        if len(words) == 1:
            raise BadRequestError("No image is given: name files or folders after the URL.")
        return words[0], words[1:]
    return settings.local_url(), words


async def _run_until_interrupted(plan: "Plan") -> "Report":
    from app.bench.load import run_load

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    try:
        return await run_load(plan, stop)
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _ceiling(options: argparse.Namespace, settings: Settings, images: list[bytes]) -> "Ceiling":
    from app.bench.ceiling import measure_ceiling
    from app.offline import find_bundle

    bundle = find_bundle(settings, options.model)
    seconds = min(options.seconds, 5.0)
    print(
        f"The bare loop of {bundle.manifest.name}: {seconds:g} s in threads, {seconds:g} s in processes …", flush=True
    )
    return measure_ceiling(bundle, images, seconds)


def _announcement(plan: "Plan", images: int) -> str:
    loop = (
        f"closed loop, {plan.connections} connections"
        if plan.rate is None
        else f"open loop, {plan.rate:g} requests/s over at most {plan.connections} connections"
    )
    each = f", {plan.images_per_request} a request" if plan.images_per_request > 1 else ""
    return (
        f"{plan.endpoint.address}{plan.endpoint.path}: {loop}, {images} images{each}, "
        f"{plan.warm_up_s:g} s of warm-up and {plan.seconds:g} s …"
    )


def _document(
    report: "Report", plan: "Plan", ceiling: "Ceiling | None", options: argparse.Namespace, images: int
) -> dict[str, Any]:
    from dataclasses import asdict

    from app.cpus import machine

    document: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(),
        "plan": {
            "url": plan.endpoint.address + plan.endpoint.path,
            "loop": "closed" if plan.rate is None else "open",
            "connections": plan.connections,
            "rate": plan.rate,
            "seconds": plan.seconds,
            "warm_up_s": plan.warm_up_s,
            "images": images,
            "images_per_request": plan.images_per_request,
            "timeout_ms": options.timeout_ms,
        },
        "report": report.to_json(),
    }
    if ceiling is not None:
        document["ceiling"] = asdict(ceiling) | {
            "images_per_s": ceiling.images_per_s,
            "served_over_ceiling": round(report.images_per_s / ceiling.images_per_s, 3),
        }
    return document


def _sentence_of(body: str) -> str:
    """Return Convoy's sentence where the body has one; otherwise the body."""
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body or "(no body)"
