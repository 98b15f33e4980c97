"""The judgements of the survival benchmark: what makes a row met or missed."""

import importlib
import json
import math
import os
import socket
import time

import numpy as np
import pytest

from app.bench.requests import Endpoint
from benchmarks.survival import __main__ as survival
from benchmarks.survival import material, rows
from benchmarks.survival.service import cpu_s, peers_of, rss_bytes, samples_of


def windows(*latencies_ms, each=4, status=200):
    """Requests every 62.5 ms: four in each quarter of a second, with that quarter's latency."""
    latency = np.repeat(np.array(latencies_ms, float), each)
    due = np.arange(len(latency)) * rows.WINDOW_S / each
    return due, latency, np.full(len(latency), status, np.int16)


@pytest.mark.parametrize(
    ("latencies", "expected"),
    [
        ((10, 10, 10, 10), 0),
        ((90, 90, 10, 10, 10, 10, 10), 0.5),
        ((90, 10, 10, 10, 90, 10, 10, 10, 10, 90), 1.25),
        ((10, 10, 10), math.inf),
        ((90, 10, 10, 90, 10), math.inf),
        ((), math.inf),
    ],
)
def test_recovery_is_the_first_normal_second(latencies, expected):
    assert rows.recovery_s(*windows(*latencies), normal_ms=20) == expected


def test_refusals_are_not_normal():
    due, latency, status = windows(1, 1, 1, 1, 1, 1)
    status[5] = 429
    assert rows.recovery_s(due, latency, status, normal_ms=20) == 0.5


def test_counters_that_shrink_or_vanish_are_found():
    earlier = {
        'convoy_images_total{model="a"}': 5,
        'convoy_images_total{model="b"}': 5,
        'convoy_batch_size_bucket{le="1"}': 3,
        "convoy_inflight_images": 9,
        "process_cpu_seconds_total": 7,
    }
    later = {'convoy_images_total{model="a"}': 5, 'convoy_batch_size_bucket{le="1"}': 2, "convoy_inflight_images": 0}
    counters = ["convoy_images_total", "convoy_batch_size"]
    assert rows.went_backwards(earlier, earlier, counters) == []
    found = rows.went_backwards(earlier, later, counters)
    assert found == ['convoy_images_total{model="b"}', 'convoy_batch_size_bucket{le="1"}']


def test_images_run_for_nobody_are_what_nobody_got_and_nobody_left():
    earlier = {'convoy_images_total{model="a"}': 100.0}
    later = {
        'convoy_batch_size_sum{model="a"}': 20,
        'convoy_batch_size_sum{model="b"}': 10,
        'convoy_images_total{model="a"}': 117,
        'convoy_images_total{model="b"}': 9,
        'convoy_dropped_total{model="a",reason="disconnected",stage="infer"}': 2,
        'convoy_dropped_total{model="a",reason="disconnected",stage="queue"}': 40,
    }
    assert rows.rows_unaccounted(rows.growth_of(earlier, later)) == 20 + 10 - 17 - 9 - 2


def test_a_request_is_lost_that_was_whole_before_the_signal():
    answered = rows.Exchange(sent_s=1, ended_s=3, status=200, port=1)
    refused = rows.Exchange(sent_s=1, ended_s=3, status=429, port=2)
    missing = rows.Exchange(sent_s=1, ended_s=3, status=0, port=3)
    after = rows.Exchange(sent_s=2.1, ended_s=3, status=0, port=4)
    unsent = rows.Exchange(sent_s=math.inf, ended_s=3, status=0, port=5)
    assert rows.lost([answered, refused, missing, after, unsent], at_s=2) == [missing]


def test_first_and_last_leave_the_warm_up_out():
    times = np.arange(0, 100.0)
    memory = np.where(times < 10, 1.0, np.where(times < 70, 100.0, 104.0))
    assert rows.first_and_last(times, memory, warm_up_s=10, span_s=29) == (100, 104)


def test_bars():
    finding = rows.Finding()
    finding.at_most("a", 2.0, 2.0)
    finding.at_most("b", 2.01, 2.0)
    finding.at_least("c", 0.9, 0.9)
    finding.at_least("d", math.nan, 0.9)
    finding.exactly("e", 1, 0)
    finding.told("f", 1)
    finding.at_most("g", math.inf, 2.0)
    assert [row.met for row in finding.rows] == [True, False, True, False, False, None, False]
    assert [row.bar for row in finding.rows] == ["≤ 2", "≤ 2", "≥ 0.9", "≥ 0.9", "= 0", "", "≤ 2"]
    assert [row.value for row in finding.rows] == [2, 2.01, 0.9, None, 1, 1, None], "JSON knows no infinity"


def test_one_scenario_leaves_the_others_figures(tmp_path):
    file = tmp_path / "survival.json"
    row = vars(rows.Row("a", None, "ms", "≤ 2", False))
    survival.keep(file, "soak", {"skipped": "", "rows": [row]})
    survival.keep(file, "overload", {"skipped": "", "rows": []})
    document = survival.keep(file, "overload", {"skipped": "no such thing here", "rows": []})
    assert list(document) == ["overload", "soak"] == list(json.loads(file.read_text()))
    assert document["soak"]["rows"] == [row]
    assert survival.table(document).row_count == 2


def test_every_scenario_can_be_run():
    for name in survival.SCENARIOS:
        assert callable(importlib.import_module(f"benchmarks.survival.{name}").run)


def test_every_kind_of_request_is_whole_and_expects_something():
    kinds = material.mixture("http://127.0.0.1:8000")
    for requests in kinds.values():
        for request, statuses in requests:
            head, _, body = request.partition(b"\r\n\r\n")
            assert int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]) == len(body)
            assert statuses <= {200, 400, 404, 413, 415, 422}
    path = Endpoint.of("http://127.0.0.1:8000", material.SMALL).path.encode()
    assert all(request.startswith(b"POST " + path) for request, _ in kinds["small"])


def test_samples_of_a_scrape():
    text = '# HELP a b\na{model="x y"} 1.0\n\nb 2e3\n'
    assert samples_of(text) == {'a{model="x y"}': 1, "b": 2000}


def test_the_clients_of_a_process_are_known_by_their_ports():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, server.accept()[0]:
            assert peers_of(os.getpid(), f"http://127.0.0.1:{port}") == {client.getsockname()[1]}
    assert rss_bytes(os.getpid()) > 1_000_000


def test_processor_time_is_in_seconds():
    while cpu_s(os.getpid()) == 0:
        pass
    assert abs(cpu_s(os.getpid()) - time.process_time()) < 0.5
