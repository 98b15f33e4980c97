import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from app.bench import cli as bench_cli
from app.bench import pictures, samples, ticker
from app.bench.ceiling import _within
from app.bench.load import Plan, ask, measure, run_load
from app.bench.report import Latency, Strain, report_of
from app.bench.requests import Endpoint, build_requests, read_bodies
from app.bench.samples import UNANSWERED, Samples
from app.errors import BadRequestError
from tests.bundles import plain_image

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nServer-Timing: decode;dur=2.0, infer;dur=4.5\r\n\r\n{}"
FULL = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n%b\r\nfull"
BROKEN = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\noops"

Answer = Callable[[int], Awaitable[bytes]]


@asynccontextmanager
async def fake_service(answer: Answer):
    """Answers each request with what `answer(how many came before)` gives; an empty answer closes the connection."""
    count = 0

    async def connected(reader, writer):
        nonlocal count
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
                count += 1
                said = await answer(count - 1)
                if not said:
                    break
                writer.write(said)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield Endpoint.of(f"http://{host}:{port}")


def load(answer: Answer, **plan):
    async def main():
        async with fake_service(answer) as endpoint:
            fields = {"connections": 2, "seconds": 0.3, "warm_up_s": 0.05, "patience_s": 5.0} | plan
            return await run_load(Plan(endpoint, build_requests(endpoint, [b"image"]), **fields))

    return asyncio.run(main())


async def at_once(_: int) -> bytes:
    return OK


def total(report):
    return (
        report.accepted
        + report.rejected
        + sum(report.statuses.values())
        + sum(report.errors.values())
        + report.unanswered
    )


def test_a_closed_loop_counts_what_was_accepted():
    report = load(at_once)
    assert report.accepted == report.due == total(report) > 0
    assert report.latency_ms.p50 <= report.latency_ms.p99 <= report.latency_ms.max
    assert report.stages_ms == {"decode": 2.0, "infer": 4.5}
    assert report.connections == 2
    assert sum(second.accepted for second in report.per_second) == pytest.approx(report.requests_per_s * report.seconds)


def test_an_open_loop_counts_from_the_moment_a_request_was_due():
    """A service of 20/s is asked 100/s: who only counts from the moment of sending does not see the line before it."""

    async def slow(_):
        await asyncio.sleep(0.05)
        return OK

    closed = load(slow, connections=1, seconds=0.5)
    opened = load(slow, connections=1, seconds=0.5, rate=100.0)
    assert closed.held_back == 0 and opened.held_back > 0
    assert opened.due == pytest.approx(50, abs=1), "the rate does not follow the service"
    assert total(opened) == opened.due
    assert opened.latency_ms.p50 > 3 * closed.latency_ms.p50


def test_an_open_loop_takes_more_connections_where_it_may():
    async def slow(_):
        await asyncio.sleep(0.1)
        return OK

    report = load(slow, connections=200, rate=100.0)
    assert report.connections > 5 and report.held_back == 0
    assert report.accepted == report.due == pytest.approx(30, abs=1)


def test_what_is_not_accepted_is_told_apart():
    async def mixed(count):
        if count % 5 == 4:
            await asyncio.sleep(0.001)
        return (OK, FULL % b"Retry-After: 1\r\n", FULL % b"", BROKEN, b"")[count % 5]

    report = load(mixed, connections=1, warm_up_s=0.0, rate=200.0)
    assert total(report) == report.due
    assert min(report.accepted, report.rejected, report.statuses[500]) > 0
    assert report.errors.keys() == {"closed before the answer was whole"}
    assert 0 < report.rejected_with_retry_after < report.rejected
    assert report.first_bodies == {429: "full", 500: "oops"}
    assert 0.15 < report.share_within(10_000) < 0.25


@pytest.mark.parametrize("ending", [b"", b"Connection: close\r\n"], ids=["kept", "closed"])
def test_a_closed_loop_comes_back_when_it_is_told_to(ending):
    """Each client is refused once and stays away for the rest of the run, whether or not its connection stays."""

    async def full(_):
        return FULL % (b"Retry-After: 30\r\n" + ending)

    report = load(full, connections=3, warm_up_s=0.0, seconds=0.5)
    assert report.rejected == report.due == report.rejected_with_retry_after == 3


@pytest.mark.parametrize("header", [b"", b"Retry-After: Fri, 31 Dec 1999 23:59:59 GMT\r\n"], ids=["none", "date"])
def test_a_closed_loop_hammers_nobody_who_does_not_say_when_to_come_back(header):
    async def full(_):
        return FULL % header

    report = load(full, connections=2, warm_up_s=0.0, seconds=0.55)
    assert 2 * 2 <= report.rejected <= 2 * 6


def test_a_closed_loop_goes_on_after_its_pause():
    async def first_full(count):
        return FULL % b"Retry-After: 0\r\n" if count < 2 else OK

    report = load(first_full, connections=2, warm_up_s=0.0)
    assert report.rejected == 2 and report.accepted > 2


def test_an_open_loop_is_traffic_that_no_refusal_slows_down():
    async def full(_):
        return FULL % b"Retry-After: 30\r\n"

    report = load(full, rate=100.0, warm_up_s=0.0)
    assert report.rejected == report.due == pytest.approx(30, abs=1)


def test_an_answer_that_is_not_http_is_an_error():
    async def nonsense(_):
        return b"SMTP ready\r\n\r\n"

    report = load(nonsense)
    assert report.errors.keys() == {"the answer is not HTTP"} and report.accepted == 0


def test_a_service_that_never_answers_does_not_hold_up_the_end():
    async def silent(_):
        await asyncio.sleep(60)
        return OK

    closed = load(silent, patience_s=0.1, warm_up_s=0.0)
    assert (closed.due, closed.unanswered, closed.latency_ms) == (2, 2, None)
    opened = load(silent, patience_s=0.1, warm_up_s=0.0, rate=100.0)
    assert opened.unanswered == opened.due == pytest.approx(30, abs=1), "also those that never left"
    assert opened.share_within(1e9) == 0


def test_nobody_there_is_counted_and_not_hammered():
    endpoint = Endpoint("127.0.0.1", 1, "/predict")
    for rate in (None, 50.0):
        report = measure(Plan(endpoint, [b"x"], connections=2, seconds=0.3, warm_up_s=0.0, rate=rate))
        assert report.errors == {"connection refused": report.due}
        assert 0 < report.due <= 16


def test_a_run_can_be_ended_early():
    async def main():
        stop = asyncio.Event()
        async with fake_service(at_once) as endpoint:
            asyncio.get_running_loop().call_later(0.2, stop.set)
            return await run_load(Plan(endpoint, build_requests(endpoint, [b"x"]), warm_up_s=0.0, seconds=60), stop)

    report = asyncio.run(main())
    assert report.interrupted and 0 < report.seconds < 30 and report.accepted > 0


def test_one_question_and_its_answer():
    async def main():
        async with fake_service(broken) as endpoint:
            return await ask(endpoint, build_requests(endpoint, [b"x"])[0])

    async def broken(_):
        return BROKEN

    answer = asyncio.run(main())
    assert (answer.status, answer.body) == (500, "oops")


def test_the_figures_of_known_samples(monkeypatch):
    """Ten seconds from 100 on: what was due in them counts, and what arrived in them makes the rate."""
    known = Samples()
    for due, done, status in (
        (99.0, 99.5, 200),  # warm-up
        (99.9, 100.1, 200),  # arrives in the measured time, but was due before
        (100.0, 100.010, 200),
        (101.0, 101.030, 200),
        (102.0, 102.020, 429),
        (109.9, 110.4, 200),  # was due in the measured time, but arrives after it
        (109.95, 111.0, UNANSWERED),
    ):
        monkeypatch.setattr(samples, "time", SimpleNamespace(monotonic=lambda done=done: done))
        known.add(due, status)
    report = report_of(
        known,
        begin=100.0,
        end=110.0,
        interrupted=False,
        images_per_request=3,
        held_back=0,
        connections=1,
        strain=Strain(0.1, 0.1),
    )
    assert (report.due, report.accepted, report.rejected, report.unanswered) == (5, 3, 1, 1)
    assert (report.requests_per_s, report.images_per_s) == (0.3, 0.9)
    assert (report.latency_ms.p50, report.latency_ms.max) == (30, 500)
    assert report.rejected_p99_ms == 20
    assert [second.accepted for second in report.per_second] == [2, 1, *[0] * 8]
    assert (report.share_within(31), report.share_within(29), report.share_within(1000)) == (0.4, 0.2, 0.6)


def test_quantiles_are_observed_values():
    latency = Latency.of(np.arange(1, 1001, dtype=float))
    assert (latency.p50, latency.p90, latency.p99, latency.p99_9, latency.max) == (500, 900, 990, 999, 1000)


@pytest.mark.parametrize(
    ("strain", "sentence"),
    [(Strain(0.95, 0.1), "took 95% of a processor"), (Strain(0.1, 50.0), "50.0 ms late"), (Strain(0.5, 1.0), "")],
)
def test_a_generator_that_could_not_keep_up_says_so(strain, sentence):
    report = report_of(
        Samples(), begin=0, end=1, interrupted=False, images_per_request=1, held_back=0, connections=1, strain=strain
    )
    assert sentence in report.saturated and bool(report.saturated) == bool(sentence)


def test_without_kernel_timers_there_are_coarse_ones(monkeypatch):
    monkeypatch.setattr(ticker, "_timer_file", lambda _: -1)
    report = load(at_once, rate=200.0)
    assert report.accepted == report.due == pytest.approx(60, abs=1)


def test_images_are_taken_in_turn():
    endpoint = Endpoint.of("http://localhost:8000/prefix/", "a b")
    single = build_requests(endpoint, [b"one", b"two"], timeout_ms=50)
    assert [request.rpartition(b"\r\n\r\n")[2] for request in single] == [b"one", b"two"]
    assert single[0].startswith(b"POST /prefix/models/a%20b/predict HTTP/1.1\r\nHost: localhost:8000\r\n")
    assert b"\r\nTimeout-Ms: 50\r\n" in single[0]
    pairs = build_requests(endpoint, [b"<1>", b"<2>", b"<3>"], images_per_request=2)
    assert [[image for image in (b"<1>", b"<2>", b"<3>") if image in pair] for pair in pairs] == [
        [b"<1>", b"<2>"],
        [b"<1>", b"<3>"],
    ]


def test_memory_is_bounded(tmp_path):
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(b"12345")
    assert read_bodies(files, 12) == [b"12345"] * 2
    with pytest.raises(BadRequestError, match="larger than the 4 bytes"):
        read_bodies(files, 4)
    assert _within([b"123", b"4", b"5"], 1) == [b"123", b"4"]


@pytest.mark.parametrize("url", ["https://localhost", "ftp://x", "http://", "http://x:y", "http://x:99999999"])
def test_what_is_no_url_is_said(url):
    with pytest.raises(BadRequestError, match="is no URL"):
        Endpoint.of(url)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(plain_image("red"))
    return path


def bench(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", "bench", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "150"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, **options)


def test_the_command_measures_a_service(server, models, picture, tmp_path):
    figures, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    result = bench(
        server.url, picture.parent, "--model", "colours", "--models", models, "--images-per-request", 3,
        "--seconds", 0.5, "--warm-up", 0.1, "--connections", 3, "--ceiling", "--json", figures, "--plot", plot,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for word in ("accepted", "images/s", "of the ceiling", "p99.9", "decode", "3 connections", "█"):
        assert word in result.stdout
    document = json.loads(figures.read_text())
    report, ceiling = document["report"], document["ceiling"]
    assert document["machine"].keys() == {"cpu", "usable_cpus", "python"}
    assert document["plan"]["url"] == f"{server.url}/models/colours/predict"
    assert document["plan"]["loop"] == "closed"
    assert report["accepted"] == report["due"] > 0
    assert report["images_per_s"] == pytest.approx(3 * report["requests_per_s"], rel=0.01)
    assert report["stages_ms"].keys() == {"decode", "queue", "infer"}
    assert min(ceiling["threads_per_s"], ceiling["processes_per_s"]) > 0
    assert ceiling["served_over_ceiling"] == pytest.approx(report["images_per_s"] / ceiling["images_per_s"], abs=1e-3)
    assert "percentile of accepted requests" in plot.read_text() or "<svg" in plot.read_text()


def test_the_command_has_an_open_loop(server, picture, tmp_path):
    figures = tmp_path / "bench.json"
    result = bench(server.url, picture, "--rate", 40, "--seconds", 0.5, "--warm-up", 0.1, "--json", figures)
    assert result.returncode == 0, result.stderr
    document = json.loads(figures.read_text())
    assert (document["plan"]["loop"], document["plan"]["rate"]) == ("open", 40)
    assert document["report"]["due"] == pytest.approx(20, abs=1)


def test_an_interrupted_run_still_prints_what_it_measured(server, picture):
    command = [sys.executable, "-m", "app.cli", "bench", server.url, str(picture), "--warm-up", "0", "--seconds", "50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "closed loop" in process.stdout.readline()
        time.sleep(0.5)  # some of the measured time
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Interrupted" in out and "p99.9" in out and err == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("{url}",), "No image is given"),
        (("https://localhost", "{red}"), "without TLS"),
        (("http://127.0.0.1:1", "{red}"), "Nothing listens at http://127.0.0.1:1: start `convoy serve`"),
        (("{url}", "nothing.jpg"), "There is no file nothing.jpg."),
        (("{url}", "{empty}"), "holds no JPEG, PNG or WebP image."),
        (("{url}", "{red}", "--model", "nobody"), "answers 404 to {red}: There is no model 'nobody' here"),
        (("{url}", "{notes}"), "answers 422 to {notes}: The data is not a JPEG, PNG or WebP image."),
        (("{url}", "{red}", "--plot", "bench.pdf"), "its name ends in .svg or .png"),
        (("{url}", "{red}", "--json", "nowhere/bench.json"), "there is no folder nowhere"),
        (("{url}", "{red}", "--ceiling", "--models", "nowhere"), "The models directory nowhere does not exist"),
    ],
)
def test_a_fault_is_one_sentence_and_status_2(server, picture, tmp_path, arguments, sentence):
    (tmp_path / "empty").mkdir()
    notes = tmp_path / "notes.txt"
    notes.write_text("not an image")
    names = {"url": server.url, "red": picture, "empty": tmp_path / "empty", "notes": notes}
    result = bench(*(argument.format(**names) for argument in arguments))
    assert result.returncode == 2, result.stdout
    assert sentence.format(**names) in result.stderr
    assert result.stderr.startswith("convoy: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [("--rate", "0"), ("--rate", "nan"), ("--connections", "0"), ("--seconds", "many")])
def test_impossible_numbers_are_refused(capsys, flags):
    from app import cli

    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "red.png", *flags])
    assert f"argument {flags[0]}: invalid" in capsys.readouterr().err


def test_a_missing_matplotlib_is_said_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BadRequestError, match=r"pip install 'convoy-serve\[bench\]'"):
        pictures.check_can_draw(tmp_path / "bench.svg")


def test_a_body_of_some_other_service_is_shown_as_it_is():
    assert bench_cli._sentence_of("Bad gateway") == "Bad gateway"
    assert bench_cli._sentence_of('{"error": "Full."}') == "Full."
