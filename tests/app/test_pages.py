"""Pages: what one process writes and others read, from one writer to the next."""

import math
import os
import subprocess
import sys

import pytest

from app import pages
from app.metrics import Metrics
from app.pages import MAX_WIDTH, Page, WriterState, create_shared, open_shared, private_page

COUNT_ELSEWHERE = """
import sys
from app.metrics import Metrics
from app.pages import open_shared
page = open_shared(int(sys.argv[1]))[1]
page.take_over(4242)
metrics = Metrics(page)
metrics.images.labels("m", "1").inc(5)
metrics.queue_rows.labels("m", "1").set(7)
metrics.for_model("m", "1").infer.observe(0.25)
"""


@pytest.fixture
def shared():
    descriptor = create_shared(3)
    yield descriptor
    os.close(descriptor)


def samples(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines)}


def test_what_another_process_counts_is_in_the_sum(shared):
    own = open_shared(shared)
    own[0].take_over(os.getpid())
    metrics = Metrics(own[0], own)
    metrics.images.labels("m", "1").inc(2)
    metrics.for_model("m", "1").infer.observe(0.25)
    subprocess.run([sys.executable, "-c", COUNT_ELSEWHERE, str(shared)], pass_fds=[shared], check=True)
    shown = samples(metrics)
    assert shown['convoy_images_total{model="m",version="1"}'] == 7
    assert shown['convoy_queue_rows{model="m"}'] == 7
    assert shown['convoy_stage_duration_seconds_count{model="m",stage="infer"}'] == 2
    assert shown['convoy_stage_duration_seconds_bucket{le="0.3",model="m",stage="infer"}'] == 2
    assert shown['convoy_stage_duration_seconds_bucket{le="0.2",model="m",stage="infer"}'] == 0
    assert shown['convoy_stage_duration_seconds_sum{model="m",stage="infer"}'] == 0.5
    assert own[1].pid == 4242


def test_what_is_hidden_is_summed_up_for_prometheus_and_told_apart_for_statistics(shared):
    own = open_shared(shared)
    metrics = Metrics(own[0], own)
    for version, seconds in (("1", 0.25), ("2", 0.5), ("2", 1.0)):
        metrics.for_model("m", version).infer.observe(seconds)
    assert samples(metrics)['convoy_stage_duration_seconds_sum{model="m",stage="infer"}'] == 1.75
    sums = metrics.sums("convoy_stage_duration_seconds")["convoy_stage_duration_seconds"]
    assert (sums["m", "infer", "1"][-1], sums["m", "infer", "2"][-1]) == (0.25, 1.5)


def test_runs_are_counted_by_their_rows_and_the_last_one_is_the_latest_of_all(shared):
    first, second = (Metrics(page) for page in open_shared(shared)[:2])
    for metrics, rows, moment in ((first, 3, 100.0), (first, 17, 101.0), (first, 5000, 300.0), (second, 3, 200.0)):
        metrics.for_model("m", "1").ran(rows, 0.5)
        metrics.last_inference.labels("m", "1").set(moment)
    shown = samples(Metrics(pages=open_shared(shared)))
    runs = {key: value for key, value in shown.items() if key.startswith("convoy_batches_total")}
    assert runs == {
        'convoy_batches_total{model="m",rows="3",version="1"}': 2,
        'convoy_batches_total{model="m",rows="20",version="1"}': 1,
        'convoy_batches_total{model="m",rows="1024",version="1"}': 1,
    }
    assert shown['convoy_batch_seconds_total{model="m",rows="3",version="1"}'] == 1.0
    assert shown['convoy_last_inference_timestamp_seconds{model="m",version="1"}'] == 300.0


def test_the_next_writer_goes_on_counting_and_forgets_the_gauges(shared):
    first = Metrics(open_shared(shared)[0])
    first.page.take_over(1)
    first.images.labels("m", "1").inc(5)
    first.queue_rows.labels("m", "1").set(7)
    first.inflight_images.set(3)
    first.model_info.labels("m", "1", "", "", "loading").set(1)

    mine = open_shared(shared)
    reader = Metrics(pages=mine)
    mine[0].release()
    assert samples(reader)['convoy_images_total{model="m",version="1"}'] == 5
    assert not [key for key in samples(reader) if key.startswith(("convoy_queue_rows", "convoy_model_info"))]

    page = open_shared(shared)[0]
    page.take_over(2)
    second = Metrics(page, mine)
    second.images.labels("m", "1").inc()
    second.for_model("m", "1")
    shown = samples(second)
    assert shown['convoy_images_total{model="m",version="1"}'] == 6
    assert shown['convoy_queue_rows{model="m"}'] == 0
    assert shown["convoy_inflight_images"] == 0
    assert len(page.series()) == len({series[:3] for series in page.series()}), "a series was entered twice"


def test_restarts_do_not_fill_a_page(shared):
    for writer in range(50):
        page = open_shared(shared)[0]
        page.take_over(writer + 1)
        Metrics(page).for_model("m", "1")
    assert len(page.series()) == len(private_series())


def private_series() -> list[pages.Series]:
    metrics = Metrics()
    metrics.for_model("m", "1")
    return metrics.page.series()


def test_a_full_page_is_said_once_and_counting_goes_on(caplog):
    metrics = Metrics()
    for number in range(2000):
        metrics.for_model(f"model-{number}", "1").infer.observe(0.1)
        metrics.for_model(f"model-{number}", "1").images.inc()
    complaints = [record for record in caplog.records if "page is full" in record.message]
    assert len(complaints) == 1
    shown = samples(metrics)
    images = [value for key, value in shown.items() if key.startswith("convoy_images_total")]
    assert 100 < len(images) < 2000
    assert set(images) == {1}, "a series without room was written over another one"


def test_a_full_directory_is_a_full_page_too(caplog):
    metrics = Metrics()
    for number in range(500):
        metrics.rejected.labels("m" * 10_000, str(number)).inc()
    assert len([record for record in caplog.records if "page is full" in record.message]) == 1
    shown = [value for key, value in samples(metrics).items() if key.startswith("convoy_rejected_total")]
    assert len(shown) < 500 and set(shown) == {1}
    assert metrics.page.state is WriterState.STARTING


def test_no_series_is_wider_than_the_waste_bin():
    with pytest.raises(AssertionError):
        private_page().place("wide", (), MAX_WIDTH + 1)
    assert all(family.width <= MAX_WIDTH for family in Metrics().families.values())


def test_a_note_is_read_whole_or_not_at_all():
    page = private_page()
    assert page.note == {}
    page.tell(WriterState.LOADING, {"models": {"grün": "loading"}})
    assert (page.state, page.note) == (WriterState.LOADING, {"models": {"grün": "loading"}})
    page.tell(WriterState.READY, {"reason": "x" * pages.PAGE_BYTES})
    assert (page.state, page.note) == (WriterState.READY, {})


def test_a_writer_killed_in_the_middle_of_a_note_leaves_the_page_usable():
    page = private_page()
    page.tell(WriterState.READY, {"reason": "old"})
    page.slots[pages._NOTE_VERSION] += 1  # what is left when a writer is killed there
    assert page.note == {}
    page.take_over(2)
    page.tell(WriterState.READY, {"reason": "new"})
    assert page.note == {"reason": "new"}


def test_a_line_that_is_not_there_yet_is_read_later(shared):
    writer, reader = open_shared(shared)[0], open_shared(shared)[0]
    writer.place("early", (), 1)
    used = int(writer.slots[pages._DIRECTORY_USED])
    writer.place("late", (), 1)
    end = int(writer.slots[pages._DIRECTORY_USED])
    line = bytes(writer._memory[pages._DIRECTORY + used : pages._DIRECTORY + end])
    writer._memory[pages._DIRECTORY + used : pages._DIRECTORY + end] = bytes(len(line))
    assert [series.name for series in reader.series()] == ["early"]
    writer._memory[pages._DIRECTORY + used : pages._DIRECTORY + end] = line
    assert [series.name for series in reader.series()] == ["early", "late"]


def test_a_heartbeat_is_seen():
    page = private_page()
    page.slots[pages._HEARTBEAT] -= 100
    assert page.silent_s > 99
    page.beat()
    assert page.silent_s < 50
    assert sum(runs for _, _, runs in page.collections) > 0


def test_pages_do_not_touch_each_other(shared):
    one, two, three = open_shared(shared)
    assert [page.number for page in (one, two, three)] == [1, 2, 3]
    for page in (one, three):
        page.slots[:] = memoryview(bytes(pages.PAGE_BYTES)).cast("d")
        first = page.place("n", (), MAX_WIDTH)
        page.slots[first] = page.slots[len(page.slots) - 1] = math.pi
    assert set(two.slots) == {0.0}
    assert isinstance(two, Page)


def test_the_place_of_a_series_that_is_forgotten_is_given_to_the_next(shared):
    writer, reader = open_shared(shared)[0], open_shared(shared)[0]
    kept = writer.place("kept", ("m",), 1)
    writer.slots[kept] = 7
    first = writer.place("gone", ("m", "1"), 3)
    writer.slots[first] = writer.slots[first + 2] = 5
    assert [series.name for series in reader.series()] == ["kept", "gone"]
    writer.forget([series for series in writer.series() if series.name == "gone"])
    assert [series.name for series in writer.series()] == [series.name for series in reader.series()] == ["kept"]
    assert writer.place("too wide", ("m", "1"), 4) != first
    assert writer.place("next", ("m", "2"), 3) == first
    assert list(writer.slots[first : first + 3]) == [0, 0, 0]
    assert {series.name for series in reader.series()} == {"kept", "too wide", "next"}
    assert writer.place("kept", ("m",), 1) == kept and writer.slots[kept] == 7
    after = open_shared(shared)[0]
    after.forget([series for series in after.series() if series.name == "next"])
    assert after.place("once more", ("m", "3"), 3) == first, "the next writer knows what is free"
    assert {series.name for series in writer.series()} == {"kept", "too wide", "once more"}


def test_versions_that_come_and_go_do_not_fill_a_page(caplog):
    metrics = Metrics()
    sizes = []
    for version in range(1, 400):
        model = metrics.for_model("m", str(version))
        model.images.inc()
        model.infer.observe(0.1)
        metrics.request_duration.labels("m", "/predict", str(version), 200).observe(0.1)
        metrics.requests.labels("m", str(version), "/predict", 200).inc()
        metrics.model_info.labels("m", str(version), "d", "cpu", "ready").set(1)
        metrics.model_info.remove("m", str(version), "d", "cpu", "ready")
        if version > 3:
            metrics.forget("m", str(version - 3))
        sizes.append(int(metrics.page.slots[pages._DIRECTORY_USED]))
    assert not [record for record in caplog.records if "page is full" in record.message]
    assert sizes[-1] <= 1.5 * sizes[10]
    shown = samples(metrics)
    assert shown['convoy_stage_duration_seconds_count{model="m",stage="infer"}'] == 399
    assert shown['convoy_request_duration_seconds_count{model="m",route="/predict"}'] == 399
    assert len([key for key in shown if key.startswith("convoy_images_total")]) == 3


def test_a_writer_killed_while_it_rewrote_a_line_leaves_the_others_readable(shared):
    writer, reader = open_shared(shared)[0], open_shared(shared)[0]
    names = ["one", "two", "three"]
    places = {name: writer.place(name, (), 1) for name in names}
    writer.slots[pages._EPOCH] += 1
    start, length = writer._places["two", (), 1]
    writer._memory[pages._DIRECTORY + start : pages._DIRECTORY + start + 5] = b"\x00" * 5
    assert [series.name for series in reader.series()] == ["one", "three"]
    after = open_shared(shared)[0]
    after.take_over(2)
    assert after.place("three", (), 1) == places["three"]
    assert after.place("four", (), 1) not in places.values()
    assert [series.name for series in reader.series()] == ["one", "three", "four"]
    assert length % 32 == 0
