"""What has gone is shown for a while, and gives its place to others."""

import os
import threading
import time

import pytest

from app import pages
from app.admission import Admission, Limits
from app.board import Board
from app.gone import SHOWN_GONE, Gone
from app.journal import Journal, Trace
from app.metrics import Metrics, ModelMetrics
from tests.app.test_pages import samples

TRACE_ID = "f" * 32


def used(metrics: Metrics, name: str, version: str = "1", seconds: float = 0.1) -> ModelMetrics:
    """Show of a model what one that has answered shows."""
    model = metrics.for_model(name, version)
    model.images.inc()
    model.infer.observe(seconds)
    model.ran(1, seconds)
    model.dropped("queue", "deadline")
    model.busy("cpu", 0).inc(seconds)
    metrics.reloaded(name, ok=True)
    metrics.model_info.labels(name, version, "d", "cpu", "ready").set(1)
    metrics.keep_exemplars(TRACE_ID, (name, "/predict", version, 200), seconds, {"infer": seconds})
    Journal(metrics, access_log=False).record(answered(name, version), "POST", "/predict")
    return model


def answered(name: str, version: str = "1") -> Trace:
    return Trace("id", time.monotonic(), "/predict", name, version, 1, 200)


def names_in(metrics: Metrics) -> set[str]:
    return {key.split('model="')[1].split('"')[0] for key in samples(metrics) if 'model="' in key} - {""}


def test_models_that_come_and_go_do_not_fill_a_page(caplog):
    metrics = Metrics()
    gone = Gone(metrics)
    metrics.requests.labels("", "", "/metrics", 200).inc(7)
    kept = used(metrics, "kept")
    counts, sizes = [], []
    for number in range(200):
        name = f"model-{number:0{1 + number % 30}}"
        used(metrics, name)
        gone.settle({"kept": ["1"], name: ["1"]})
        gone.settle({"kept": ["1"]})
        counts.append(len(samples(metrics)))
        sizes.append(int(metrics.page.slots[pages._DIRECTORY_USED]))
    kept.images.inc()
    assert not [record for record in caplog.records if "page is full" in record.message]
    assert counts[-1] == counts[10]
    assert sizes[-1] <= 2 * sizes[30]
    assert len(names_in(metrics)) == 1 + SHOWN_GONE and name in names_in(metrics)
    shown = samples(metrics)
    assert shown['convoy_images_total{model="kept",version="1"}'] == 2
    assert shown['convoy_stage_duration_seconds_count{model="kept",stage="infer"}'] == 1
    assert shown['convoy_requests_total{code="200",model="",route="/metrics",version=""}'] == 7


def test_a_model_that_comes_back_while_it_is_shown_goes_on_and_a_later_one_begins_anew():
    metrics = Metrics()
    gone = Gone(metrics)
    key = 'convoy_batch_size_count{model="m"}'
    used(metrics, "m")
    gone.settle({"m": ["1"]})
    for number in range(3):
        gone.settle({})
        used(metrics, f"other-{number}")
        gone.settle({f"other-{number}": ["1"]})
    used(metrics, "m")
    gone.settle({"m": ["1"]})
    assert samples(metrics)[key] == 2
    for number in range(20):
        gone.settle({f"more-{number}": ["1"], "m": ["1"]})
        used(metrics, f"more-{number}")
    gone.settle({"m": ["1"]})
    assert samples(metrics)[key] == 2, "it is there"
    gone.settle({})
    assert samples(metrics)[key] == 2, "it was the last to go"
    for number in range(SHOWN_GONE):
        used(metrics, f"last-{number}")
        gone.settle({})
    assert key not in samples(metrics)
    used(metrics, "m")
    assert samples(metrics)[key] == 1


def test_old_versions_of_a_model_that_is_there_go_and_its_sums_stay():
    metrics = Metrics()
    gone = Gone(metrics)
    for version in range(1, 11):
        used(metrics, "m", str(version))
        gone.settle({"m": [str(version)]})
    shown = samples(metrics)
    versions = {key.split(chr(34))[3] for key in shown if key.startswith("convoy_images_total")}
    assert versions == {"5", "6", "7", "8", "9", "10"}
    assert shown['convoy_stage_duration_seconds_count{model="m",stage="infer"}'] == 10


def test_who_still_counts_for_a_model_that_is_forgotten_harms_nobody():
    metrics = Metrics()
    gone = Gone(metrics)
    old = used(metrics, "old")
    busy = old.busy("cpu", 0)
    metrics.forget_model("old")
    assert names_in(metrics) == set()
    used(metrics, "new")
    before = samples(metrics)
    old.inflight_requests.inc(-1)
    old.images.inc(100)
    old.ran(4, 1.0, padding=3)
    old.infer.observe(1.0)
    old.queue_age.set(1.0)
    busy.inc(100)
    after = {key: value for key, value in samples(metrics).items() if 'model="new"' in key}
    assert after == {key: value for key, value in before.items() if 'model="new"' in key}
    for number in range(SHOWN_GONE):
        Journal(metrics, access_log=False).record(answered(f"late-{number}"), "POST", "/predict")
    Journal(metrics, access_log=False).record(answered("old"), "POST", "/predict")
    gone.settle({"new": ["1"]})
    assert len(names_in(metrics)) == 1 + SHOWN_GONE, "what was counted late goes with the next"


@pytest.mark.parametrize("back", ["while it is shown", "later"])
def test_requests_of_a_model_that_came_back_are_counted(back):
    metrics = Metrics()
    admission = Admission(Limits(10, 10, 10, {}, 0.0), metrics)
    first = admission.lane(metrics.for_model("m", "1"))
    first.metrics.inflight_requests.inc()
    assert admission.lane(metrics.for_model("m", "2")) is first
    if back == "later":
        metrics.forget_model("m")
    second = admission.lane(metrics.for_model("m", "1"))
    second.metrics.inflight_requests.inc()
    first.metrics.inflight_requests.inc(-1)
    assert samples(metrics)['convoy_inflight_requests{model="m"}'] == 1


def test_readers_see_what_took_a_place():
    descriptor = pages.create_shared(2)
    writers, readers = pages.open_shared(descriptor), pages.open_shared(descriptor)
    one, other = Metrics(writers[0], writers), Metrics(readers[1], readers)
    for number in range(30):
        used(one, f"m{number}")
        used(other, f"m{number}")
        if number >= 3:
            one.forget_model(f"m{number - 3}")
        now = {key: value for key, value in samples(one).items() if key.startswith("convoy_images_total")}
        assert now == {key: value for key, value in samples(other).items() if key.startswith("convoy_images_total")}
        assert now[f'convoy_images_total{{model="m{number}",version="1"}}'] == 2
        again = pages.open_shared(descriptor)[0]
        assert sorted(again.series()) == sorted(writers[0].series()), "what the writer has noted is what it wrote"
        assert sorted(again._free) == sorted(writers[0]._free)
        assert again._places == writers[0]._places


def test_a_model_that_found_no_room_is_shown_when_it_comes_back_and_there_is_some():
    metrics = Metrics()
    number = 0
    while metrics.page.place("filler", (str(number),), pages.MAX_WIDTH) != pages.WASTE:
        number += 1
    while metrics.page.place("filler", (str(number),), 1) != pages.WASTE:
        number += 1
    used(metrics, "m")
    assert names_in(metrics) == set()
    metrics.page.forget(metrics.page.series())
    metrics.forget_model("m")
    used(metrics, "m")
    assert samples(metrics)['convoy_images_total{model="m",version="1"}'] == 1


def test_two_threads_that_show_a_series_at_once_hold_one_child_which_is_let_go():
    metrics = Metrics()
    children = []
    with metrics.page.lock:
        threads = [threading.Thread(target=lambda: children.append(metrics.images.labels("m", "1"))) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)  # both have found none, and wait for the lock
    for thread in threads:
        thread.join()
    metrics.forget_model("m")
    other = metrics.images.labels("other", "1")
    for child in children:
        child.inc()
    assert other.get() == 0


@pytest.fixture
def workers():
    """Two workers' numbers, and their boards, over one memory."""
    memory = pages.create_shared(2)
    shared = pages.open_shared(memory)
    for page in shared:
        page.take_over(os.getpid())
    yield [
        (Metrics(page, shared, pages.open_common(memory)), Board(pages.open_common(memory), memory)) for page in shared
    ]
    os.close(memory)


def test_what_one_worker_has_forgotten_is_not_the_sum_of_the_others(workers):
    (one, board), (other, other_board) = workers
    board.join("")
    first, second = Gone(one, board), Gone(other, other_board)
    names = [f"m{number}" for number in range(SHOWN_GONE + 1)]
    for name in names:
        for metrics, gone in ((one, first), (other, second)):
            used(metrics, name)
            gone.settle({name: ["1"]})
    assert names_in(one) == set(names)
    first.settle({})
    assert names_in(one) == names_in(other) == set(names[1:])
    second.settle({})
    # One that has just been started has seen nothing go, and keeps to what is hidden already.
    Gone(one, board).settle({})
    assert names_in(other) == set(names[1:])
    for metrics, gone in ((one, first), (other, second)):
        used(metrics, names[0])
        gone.settle({names[0]: ["1"]})
    assert samples(one)['convoy_images_total{model="m0",version="1"}'] == 2, "it is there again, and counts from 0"


def test_a_version_that_one_worker_has_forgotten_is_hidden_and_stays_in_the_sums(workers):
    (one, board), (other, _) = workers
    board.join("")
    for metrics in (one, other):
        for version in range(1, SHOWN_GONE + 3):
            used(metrics, "m", str(version))
    Gone(one, board).settle({"m": [str(SHOWN_GONE + 2)]})
    for metrics in (one, other):
        shown = samples(metrics)
        assert 'convoy_images_total{model="m",version="1"}' not in shown
        assert shown['convoy_images_total{model="m",version="2"}'] == 2
        assert shown['convoy_stage_duration_seconds_count{model="m",stage="infer"}'] == 2 * (SHOWN_GONE + 2)
