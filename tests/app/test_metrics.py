import os
import shutil
import subprocess

import pytest
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as text_families

from app.metrics import BATCH_BUCKETS, Metrics
from app.pages import create_shared, open_shared
from tests.bundles import plain_image


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed")
def test_promtool_accepts_the_metrics_of_a_used_service(server):
    server.client.post("/predict", content=plain_image("red"))
    server.client.post("/predict", content=b"bad")
    text = server.client.get("/metrics").text
    result = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_a_request_moves_every_series_it_should(server):
    before = server.metrics()
    server.client.post("/models/other/predict", files=[("f", plain_image("red")), ("f", plain_image("blue"))])
    after = server.metrics()

    def grown(key: str) -> float:
        return after[key] - before.get(key, 0)

    route = "/models/{model}/predict"
    assert grown(f'convoy_requests_total{{code="200",model="other",route="{route}",version="1"}}') == 1
    assert grown('convoy_images_total{model="other",version="1"}') == 2
    assert grown(f'convoy_request_duration_seconds_count{{model="other",route="{route}"}}') == 1
    for stage in ("decode", "queue", "infer", "post"):
        assert grown(f'convoy_stage_duration_seconds_count{{model="other",stage="{stage}"}}') == 1
        assert grown(f'convoy_stage_duration_seconds_sum{{model="other",stage="{stage}"}}') > 0
    assert grown('convoy_batch_size_sum{model="other"}') == 2
    busy = sum(
        grown(key) for key in after if key.startswith('convoy_session_busy_seconds_total{device="cpu",model="other"')
    )
    assert busy > 0
    for gauge in (
        'convoy_queue_rows{model="other"}',
        'convoy_inflight_requests{model="other"}',
        "convoy_inflight_bytes",
    ):
        assert after[gauge] == 0


def test_model_info_names_digest_provider_and_state(server):
    (key,) = [key for key in server.metrics() if key.startswith("convoy_model_info") and 'model="other"' in key]
    digest = server.client.get("/models/other").json()["digest"]
    assert f'digest="{digest}"' in key and 'provider="cpu"' in key and 'state="ready"' in key


def test_unknown_names_make_no_new_series(server):
    for number in range(5):
        server.client.post(f"/models/invented-{number}/predict", content=b"x")
        server.client.get(f"/invented/{number}")
    assert not [key for key in server.metrics() if "invented" in key]


def test_the_text_is_what_prometheus_client_writes():
    registry = CollectorRegistry()
    disable_created_metrics()
    theirs_requests = Counter("convoy_requests_total", "Requests answered.", ["model", "version", "route", "code"])
    theirs_rows = Gauge("convoy_inflight_requests", "Requests being worked on.", ["model"])
    theirs_info = Gauge(
        "convoy_model_info", "1 for the state that a model is in.", ["model", "version", "digest", "provider", "state"]
    )
    theirs_batch = Histogram("convoy_batch_size", "Images per session run.", ["model"], buckets=BATCH_BUCKETS)
    for collector in (theirs_requests, theirs_batch, theirs_rows, theirs_info):
        REGISTRY.unregister(collector)
        registry.register(collector)
    ours = Metrics()
    for requests, batch, rows, info in (
        (theirs_requests, theirs_batch, theirs_rows, theirs_info),
        (ours.requests, ours.batch_size, ours.inflight_requests, ours.model_info),
    ):
        requests.labels('quote"d\n\\', "1", "/predict", 200).inc()
        requests.labels("ü", "1", "/predict", 429).inc(2.5)
        rows.labels("m").set(-3)
        info.labels("m", "1", "", "", "loading").set(1)
        info.remove("m", "1", "", "", "loading")
        info.labels("m", "1", "d", "cpu", "ready").set(1)
        for value in (0, 1, 1.5, 2, 256, 257, 1e9):
            batch.labels("m").observe(value)
    names = ("convoy_requests", "convoy_batch_size", "convoy_inflight_requests", "convoy_model_info")
    own_lines = [line for line in ours.render().decode().splitlines() if any(name in line for name in names)]
    assert own_lines == generate_latest(registry).decode().splitlines()


def test_openmetrics_says_what_the_text_says(server):
    server.client.post("/predict", content=plain_image("red"))
    answer = server.client.get("/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0,*/*;q=0.1"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert server.client.get("/metrics").headers["content-type"].startswith("text/plain")
    strict = {
        sample.name + str(sorted(sample.labels.items()))
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    plain = {
        sample.name + str(sorted(sample.labels.items()))
        for family in text_families(server.client.get("/metrics").text)
        for sample in family.samples
    }
    assert strict == plain
    assert "trace_id" not in answer.text


def test_of_several_processes_a_bucket_shows_the_latest_exemplar(monkeypatch):
    descriptor = create_shared(2)
    pages = open_shared(descriptor)
    os.close(descriptor)
    for page in pages:
        page.take_over(os.getpid())
    one, other = (Metrics(page, pages) for page in pages)

    def keep(metrics: Metrics, at: float, trace_id: str, version: str = "1", seconds: float = 0.004) -> None:
        monkeypatch.setattr("app.families.time.time", lambda: at)
        metrics.request_duration.labels("m", "/predict", version, 200).observe(seconds)
        metrics.keep_exemplars(trace_id, ("m", "/predict", version, 200), seconds, {"infer": seconds})

    def shown() -> dict[str, str]:
        text = one.render(openmetrics=True).decode()
        return {
            sample.labels["le"]: sample.exemplar.labels["trace_id"]
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.exemplar and sample.name == "convoy_request_duration_seconds_bucket"
        }

    first, second, third = "f" * 32, "0123456789abcdef" * 2, f"{1:032x}"
    keep(one, 100.0, first)
    keep(other, 101.0, second)
    assert shown() == {"0.005": second}
    keep(other, 101.1, third)
    assert shown() == {"0.005": second}, "one so young is kept"
    keep(one, 103.0, third, version="2")
    keep(one, 103.0, first, version="2", seconds=60)
    assert shown() == {"0.005": third, "+Inf": first}
    one.forget("m", "2")
    assert shown() == {"0.005": second}
    pages[1].release()
    assert shown() == {"0.005": first}


def test_processes_are_told_apart_where_there_are_several():
    descriptor = create_shared(3)
    pages = open_shared(descriptor)
    os.close(descriptor)
    for page in pages[:2]:
        page.take_over(os.getpid())
        page.beat()
    metrics = Metrics(pages[0], pages)
    lines = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    keys = [line.rsplit(" ", 1)[0] for line in lines]
    assert len(keys) == len(set(keys))
    assert {'process_cpu_seconds_total{worker="1"}', 'process_cpu_seconds_total{worker="2"}'} <= set(keys)
    assert 'python_gc_collections_total{generation="0",worker="2"}' in keys
    assert not [key for key in keys if 'worker="3"' in key]
