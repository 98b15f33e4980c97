"""What is shown of processes: how several are joined, and that a running service shows it."""

import os
import time

import pytest

from app.cpus import Throttling, throttling
from app.journal import Journal, Trace
from app.line import Line
from app.metrics import Metrics
from app.pages import SILENT_S, WriterState, create_shared, open_common, open_shared
from app.runs import Job


@pytest.fixture
def pages():
    descriptor = create_shared(2)
    found = [*open_shared(descriptor), open_common(descriptor)]
    os.close(descriptor)
    return found


def samples(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines)}


def test_what_all_must_have_done_is_told_by_the_one_that_has_not(pages):
    first, second = (Metrics(page, pages[:2]) for page in pages[:2])
    first.reloaded("m", ok=True)
    second.reloaded("m", ok=False)
    shown = samples(first)
    assert shown['convoy_last_reload_success{model="m"}'] == 0
    assert shown['convoy_reloads_total{model="m",result="failure"}'] == 1
    assert time.time() - 5 < shown['convoy_last_reload_timestamp_seconds{model="m"}'] <= time.time()
    second.reloaded("m", ok=True)
    assert samples(first)['convoy_last_reload_success{model="m"}'] == 1


def test_what_several_see_of_one_thing_is_not_added_up(pages):
    for page in pages[:2]:
        Metrics(page).cpu_limit.labels().set(1.5)
        Metrics(page).build_info.labels("1.0", "onnxruntime", "1.31.1").set(1)
    shown = samples(Metrics(pages[0], pages[:2]))
    assert shown["convoy_cpu_limit_cores"] == 1.5
    assert [value for key, value in shown.items() if key.startswith("convoy_build_info")] == [1]


def test_the_age_is_that_of_the_first_in_any_process_and_grows_by_itself(pages):
    now = time.monotonic()
    for page, version, since in ((pages[0], "1", now - 5), (pages[0], "2", 0.0), (pages[1], "1", now - 2)):
        Metrics(page).queue_age.labels("m", version).set(since)
    metrics = Metrics(pages[0], pages[:2])
    key = 'convoy_queue_age_seconds{model="m"}'
    before = samples(metrics)[key]
    assert 5 <= before < 65
    time.sleep(0.01)
    assert samples(metrics)[key] >= before + 0.01
    for page in pages[:2]:
        Metrics(page).queue_age.labels("m", "1").set(0.0)
    assert samples(metrics)[key] == 0


def test_what_the_supervisor_counts_is_shown_by_every_worker(pages):
    supervisor = Metrics(pages[2], pages[:2], pages[2])
    supervisor.worker_exits.labels("died").inc()
    supervisor.reloaded("", ok=False)
    for metrics in (supervisor, Metrics(pages[0], pages[:2], pages[2])):
        assert samples(metrics)['convoy_worker_exits_total{cause="died"}'] == 1
        assert samples(metrics)['convoy_last_reload_success{model=""}'] == 0


def test_processes_by_state_and_whether_any_is_ready(pages):
    metrics = Metrics(pages[0], pages[:2])
    assert samples(metrics)["convoy_ready"] == 0
    for page, state in zip(pages, (WriterState.READY, WriterState.LOADING), strict=False):
        page.take_over(os.getpid())
        page.tell(state, {})
    shown = samples(metrics)
    assert shown["convoy_ready"] == 1
    assert (shown['convoy_workers{state="ready"}'], shown['convoy_workers{state="loading"}']) == (1, 1)
    assert shown['convoy_workers{state="failed"}'] == 0
    pages[0].slots[2] -= SILENT_S + 1  # its loop has not turned since
    assert samples(metrics)["convoy_ready"] == 0


@pytest.mark.parametrize("slo_s", [0.25, 0.2, 0.0333])
def test_a_bucket_ends_exactly_at_the_promise(slo_s):
    metrics = Metrics(slo_s=slo_s)
    metrics.for_model("m", "1").infer.observe(slo_s)
    metrics.for_model("m", "1").infer.observe(slo_s * 1.0001)
    assert samples(metrics)[f'convoy_stage_duration_seconds_bucket{{le="{slo_s}",model="m",stage="infer"}}'] == 1


@pytest.mark.parametrize("slo_s", [0.25, 0.0333])
def test_an_answer_that_comes_later_than_was_promised_is_slow(slo_s, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    metrics = Metrics(slo_s=slo_s)
    metrics.show_promise()
    journal = Journal(metrics, access_log=False)

    def answered_within(seconds: float) -> float:
        now[0] = 0.0  # where seconds are exact
        trace = Trace("id", now[0], "/predict", "m", "1", status=200)
        now[0] = seconds
        journal.record(trace, "POST", "/predict")
        return samples(metrics)['convoy_slow_requests_total{model="m",route="/predict"}']

    assert answered_within(slo_s) == 0, (
        "the series is there from the first request, or its first increase would be lost"
    )
    assert answered_within(slo_s * 1.001) == 1
    assert answered_within(slo_s * 0.999) == 1
    assert samples(metrics)["convoy_slo_seconds"] == slo_s


def test_the_oldest_job_is_the_first_of_any_urgency():
    now = [10.0]
    line = Line(max_batch=1, linger_s=0, clock=lambda: now[0])
    assert line.oldest() == 0
    for moment, urgency in ((10.0, 7), (11.0, 0)):
        now[0] = moment
        line.extend([Job((), 1, 100.0, None, urgency)])
    assert line.oldest() == 10
    line.take()
    assert line.oldest() == 10  # the urgent one went first
    line.take()
    assert line.oldest() == 0


@pytest.mark.parametrize(
    ("group", "own", "text"),
    [
        ("pod", "0::/pod", "usage_usec 1\nnr_periods 40\nnr_throttled 10\nthrottled_usec 2500000\n"),
        ("cpu/pod", "4:cpu,cpuacct:/pod", "nr_periods 40\nnr_throttled 10\nthrottled_time 2500000000\n"),
    ],
)
def test_what_a_quota_costs_is_that_of_the_group_that_was_halted_most(tmp_path, group, own, text):
    groups = tmp_path / "cgroup"
    (groups / group).mkdir(parents=True)
    (groups / group / "cpu.stat").write_text(text)
    (groups / group).with_name("cpu.stat").write_text("nr_periods 7\nnr_throttled 0\nthrottled_usec 0\n")
    (tmp_path / "own").write_text(own + "\n")
    assert throttling(groups, tmp_path / "own") == Throttling(40, 10, 2.5)


def test_without_control_groups_there_is_no_cost(tmp_path):
    assert throttling(tmp_path, tmp_path / "none") is None


def test_a_running_service_shows_how_it_is(server):
    shown = server.metrics()
    for key, value in {
        "convoy_ready": 1,
        'convoy_workers{state="ready"}': 1,
        'convoy_last_reload_success{model="colours"}': 1,
        "convoy_slo_seconds": 0.25,
        'convoy_wanted_device_info{device="cpu"}': 1,
        'convoy_queue_age_seconds{model="colours"}': 0,
    }.items():
        assert shown[key] == value, key
    assert shown["convoy_event_loop_lag_seconds_count"] > 0
    assert shown['convoy_sessions{model="colours"}'] >= 1
    assert shown['convoy_threads{pool="session"}'] == sum(
        value for key, value in shown.items() if key.startswith("convoy_sessions")
    )
    assert shown['convoy_model_load_seconds{model="colours",version="1"}'] > 0
    assert shown['convoy_inflight_limit{resource="images"}'] == 256
    assert any(key.startswith("convoy_build_info") for key in shown)


def test_predictions_are_looked_at(server, models):
    before = server.metrics()["convoy_prediction_confidence_count" + '{model="other",version="1"}']
    image = (models / "other/1/golden/red.png").read_bytes()
    time.sleep(0.11)
    server.client.post("/models/other/predict", content=image)
    after = server.metrics()
    assert after['convoy_prediction_confidence_count{model="other",version="1"}'] == before + 1
    assert after['convoy_image_size_bytes_sum{model="other",version="1"}'] >= len(image)
