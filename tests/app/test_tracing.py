"""Traces as a collector gets them from real processes, and the rules by which requests are sampled."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from app.journal import MAX_PATH
from app.otlp import OtlpSink, create_sink
from app.tracing import (
    CHUNK,
    MAX_STATE_BYTES,
    MAX_WAITING,
    Marks,
    Parent,
    Story,
    Tracer,
    asked_by,
    is_switched_off,
    parent_of,
)
from tests.app.test_grpc import Caller, images
from tests.app.watching import free_port, logged_with, wait_for
from tests.bundles import make_bundle, plain_image
from tests.collector import Seen, collecting
from tests.servers import convoy

RED = plain_image("red")
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SERVER, INTERNAL = 2, 1
STAGES = ["body", "decode", "queue", "infer", "post"]


def length(span: Seen) -> int:
    return span.ended - span.started


def parent(number: int, *, sampled: bool = True) -> dict[str, str]:
    """Return the header of a caller whose trace has that number."""
    return {"traceparent": f"00-{number:032x}-{SPAN}-{'01' if sampled else '00'}"}


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """All that one service did in its life, as the log, the answers and a collector tell it; it samples as told to."""
    folder = tmp_path_factory.mktemp("traced")
    make_bundle(folder / "models", "colours")
    make_bundle(folder / "models", "slow", slow=True)
    port = free_port()
    settings = {"grpc_port": port, "default_model": "colours", "sessions": 1, "max_batch": 2, "trace_ratio": 0}
    with (
        collecting() as collector,
        convoy(folder / "models", folder / "log", trace_endpoint=collector.url, **settings) as server,
        Caller(port) as caller,
    ):

        def ask(number: int, path: str = "/predict", content: bytes = RED, **headers: str) -> httpx.Response:
            return server.client.post(path, content=content, headers=parent(number) | headers)

        said = {"one": ask(1, **{"X-Request-Id": "mine", "tracestate": "vendor=7"})}
        said["unsampled"] = server.client.post("/predict", content=RED, headers=parent(2, sampled=False))
        said["alone"] = server.client.post("/predict", content=RED)
        said["probe"] = server.client.get("/livez", headers=parent(3))
        said["broken"] = ask(4, content=b"no image", tracestate="no state")
        said["absent"] = ask(5, "/models/nobody/predict")
        said["unmatched"] = server.client.get(f"/nowhere{'!' * 2 * MAX_PATH}", headers=parent(6))
        form = [("file", ("a.png", RED)) for _ in range(3)]
        said["three"] = server.client.post("/predict", files=form, headers=parent(7))
        slow = "/models/slow/predict"
        with ThreadPoolExecutor(4) as pool:
            # Four batches, which keep the only session busy while the others get in line.
            form = [("file", ("a.png", RED)) for _ in range(8)]
            first = pool.submit(server.client.post, slow, files=form, headers=parent(10))
            wait_for(lambda: server.metrics().get('convoy_queue_rows{model="slow"}', 0) > 0)  # decoded, not only let in
            said["late"] = ask(13, slow, **{"Timeout-Ms": "50"})
            said["together"] = list(pool.map(lambda number: ask(number, slow), (11, 12)))
            first.result()
        metadata = tuple(parent(20).items())
        caller.infer(images(RED, RED), metadata=metadata)
        caller.refusal(images(RED, model="nobody"), metadata=tuple(parent(21).items()))
        yield_lines = logged_with(server, "mine")
        openmetrics = server.client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
        lines = server.lines()
        status = server.stop()
    yield SimpleNamespace(
        said=said,
        spans=collector.spans,
        trace=lambda number: collector.trace(f"{number:032x}"),
        collector=collector,
        mine=yield_lines,
        lines=lines,
        openmetrics=openmetrics,
        status=status,
    )


def test_a_request_is_seen_from_end_to_end(story):
    spans = story.trace(1)
    assert list(spans) == ["POST /predict", *STAGES]
    whole = spans.pop("POST /predict")
    assert (whole.parent_id, whole.kind, whole.state, whole.failed) == (SPAN, SERVER, "vendor=7", False)
    assert whole.attributes == {
        "http.request.method": "POST",
        "http.route": "/predict",
        "http.response.status_code": 200,
        "url.path": "/predict",
        "url.scheme": "http",
        "convoy.request.id": "mine",
        "convoy.model.name": "colours",
        "convoy.model.version": "1",
        "convoy.rows": 1,
    }
    assert {span.parent_id for span in spans.values()} == {whole.span_id}
    moments = [moment for name in STAGES for moment in (spans[name].started, spans[name].ended)]
    assert moments == sorted(moments), "the stages follow one another"
    assert whole.started <= moments[0] and moments[-1] <= whole.ended
    assert abs(whole.started / 1e9 - time.time()) < 120
    assert whole.resource["service.name"] == "convoy" and whole.resource["convoy.worker"] == 1


def test_its_line_in_the_log_has_the_trace_and_its_answer_says_no_more_than_before(story):
    [line] = story.mine
    assert line["trace_id"] == f"{1:032x}"
    assert {"traceparent", "tracestate"}.isdisjoint(story.said["one"].headers)
    assert story.said["one"].headers["x-request-id"] == "mine"


def test_who_is_not_sampled_leaves_no_span_but_may_be_found_in_the_log(story):
    assert story.said["unsampled"].status_code == story.said["alone"].status_code == 200
    assert story.trace(2) == {} and story.trace(3) == {}
    numbers = {*range(1, 22)} - {2, 3}
    roots = {span.trace_id for span in story.spans if span.kind == SERVER}
    assert roots == {f"{number:032x}" for number in numbers if story.trace(number)}, "nobody else began a trace"
    traced = [line.get("trace_id") for line in story.lines if line["message"] == "request"]
    assert f"{2:032x}" in traced and None in traced


def test_each_batch_is_linked_with_its_requests_both_ways(story):
    batches = {span.id: span for span in story.collector.named("batch")}
    runs = {span.id: span for span in story.collector.named("infer")}
    assert {link for batch in batches.values() for link in batch.links} == set(runs)
    assert {link for run in runs.values() for link in run.links} == set(batches)
    for batch in batches.values():
        assert (batch.kind, batch.parent_id) == (INTERNAL, "")
        assert all(batch.id in runs[link].links for link in batch.links)
        assert all(runs[link].ended - batch.started == pytest.approx(length(batch), abs=1e6) for link in batch.links)
    # Two requests came while the session was busy, and ran together.
    [shared] = [batch for batch in batches.values() if len(batch.links) == 2]
    assert {trace_id for trace_id, _ in shared.links} == {f"{number:032x}" for number in (11, 12)}
    assert shared.attributes == {
        "convoy.model.name": "slow",
        "convoy.model.version": "1",
        "convoy.batch.rows": 2,
        "convoy.batch.requests": 2,
        "convoy.provider": "cpu",
        "convoy.session": 0,
    }


def test_a_request_of_several_batches_has_a_span_for_each(story):
    of_it = [span for span in story.collector.named("infer") if span.trace_id == f"{7:032x}"]
    assert sorted(span.attributes["convoy.rows"] for span in of_it) == [1, 2]
    assert len({link for span in of_it for link in span.links}) == 2


def test_a_request_that_fails_ends_in_the_stage_that_it_came_to(story):
    broken = story.trace(4)
    assert list(broken) == ["POST /predict", "body", "decode"]
    whole = broken["POST /predict"]
    assert whole.attributes["http.response.status_code"] == 422 and not whole.failed, "the client's mistake"
    assert whole.attributes["convoy.code"] == story.said["broken"].json()["code"]
    late = story.trace(13)
    assert list(late) == ["POST /models/{model}/predict", "body", "decode", "queue"]
    whole = late["POST /models/{model}/predict"]
    assert whole.failed and whole.attributes["error.type"] == whole.attributes["convoy.code"] == "deadline"
    assert late["queue"].ended <= whole.ended
    assert list(story.trace(5)) == ["POST /models/{model}/predict"], "it was never let in"
    [(name, unmatched)] = story.trace(6).items()
    assert name == "GET" and "http.route" not in unmatched.attributes


def test_who_asks_chooses_not_how_much_is_written_down(story):
    [unmatched] = story.trace(6).values()
    [line] = [line for line in story.lines if line.get("trace_id") == f"{6:032x}"]
    assert line["path"] == unmatched.attributes["url.path"] == f"/nowhere{'!' * 2 * MAX_PATH}"[:MAX_PATH]
    assert story.trace(4)["POST /predict"].state == "", "what is no tracestate is none"
    assert {line["logger"].split(".")[0] for line in story.lines} == {"app", "convoy"}, "and nobody says so in the log"


def test_a_call_over_grpc_is_traced_alike(story):
    spans = story.trace(20)
    name = "inference.GRPCInferenceService/ModelInfer"
    assert list(spans) == [name, *STAGES]
    whole: Seen = spans[name]
    assert (whole.parent_id, whole.kind) == (SPAN, SERVER)
    assert {key: value for key, value in whole.attributes.items() if "request" not in key} == {
        "rpc.system.name": "grpc",
        "rpc.method": name,
        "rpc.response.status_code": "OK",
        "convoy.model.name": "colours",
        "convoy.model.version": "1",
        "convoy.rows": 2,
    }
    [refused] = story.trace(21).values()
    assert refused.attributes["rpc.response.status_code"] == "NOT_FOUND"


def test_the_buckets_of_slow_and_fast_lead_to_their_traces(story):
    assert story.openmetrics.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    traced = {span.trace_id for span in story.spans}
    found = {"convoy_request_duration_seconds_bucket": set(), "convoy_stage_duration_seconds_bucket": set()}
    for family in text_string_to_metric_families(story.openmetrics.text):
        for sample in family.samples:
            if sample.exemplar is not None:
                assert sample.exemplar.labels["trace_id"] in traced
                assert sample.exemplar.value <= float(sample.labels["le"])
                found[sample.name].add((sample.labels["model"], sample.labels.get("stage")))
    assert {("colours", None), ("slow", None)} <= found["convoy_request_duration_seconds_bucket"]
    stages = {(model, stage) for model in ("colours", "slow") for stage in STAGES[1:]}
    assert found["convoy_stage_duration_seconds_bucket"] == stages


def test_an_exemplar_is_of_the_request_that_it_names(story):
    family = next(
        family
        for family in text_string_to_metric_families(story.openmetrics.text)
        if family.name == "convoy_request_duration_seconds"
    )
    for sample in family.samples:
        if sample.exemplar is not None:
            spans = [span for span in story.spans if span.trace_id == sample.exemplar.labels["trace_id"]]
            whole = next(span for span in spans if span.kind == SERVER)
            assert length(whole) / 1e9 == pytest.approx(sample.exemplar.value, abs=1e-5)


def test_what_waits_is_sent_before_the_process_ends(story):
    assert story.status == 0
    assert story.trace(21), "the last request's"


def test_every_worker_traces_its_requests(models, tmp_path):
    settings = {"default_model": "colours", "workers": 2, "trace_ratio": 1, "access_log_ratio": 0}
    with (
        collecting() as collector,
        convoy(models, tmp_path / "log", trace_endpoint=collector.url, **settings) as server,
    ):
        # Two connections at once: each worker gets one.
        with httpx.Client(base_url=server.url) as one, httpx.Client(base_url=server.url) as other:
            for client in (one, other) * 3:
                assert client.post("/predict", content=RED).status_code == 200
        assert server.client.post("/predict", content=b"").status_code == 400
        assert server.stop() == 0
        asked = collector.named("POST /predict")
        assert len(asked) == len({span.trace_id for span in asked}) == 7
        assert {span.resource["convoy.worker"] for span in asked} == {1, 2}
        logged = [line["status"] for line in server.lines() if line["message"] == "request"]
    assert logged == [400], "requests that went wrong are logged whatever the share of the others"


def test_a_collector_that_never_answers_harms_no_request_and_no_drain(models, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = {"default_model": "colours", "trace_ratio": 1, "trace_endpoint": endpoint}
        with convoy(models, tmp_path / "log", **settings) as server:
            assert server.client.post("/predict", content=RED).status_code == 200
            silent.settimeout(20)
            connection, _ = silent.accept()
            statuses = [server.client.post("/predict", content=RED).status_code for _ in range(20)]
            assert statuses == [200] * 20
            assert server.stop(timeout_s=10) == 0
            connection.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01\n",
        f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
    ],
)
def test_what_is_no_traceparent_begins_a_trace(text):
    assert parent_of(text.encode()) is None
    trace_id, marks = Tracer(Sink(), 1).sample(text.encode(), b"vendor=7")
    assert marks is not None and marks.parent_id == 0 and marks.state == ""
    assert trace_id == marks.trace_id != TRACE and len(trace_id) == 32


@pytest.mark.parametrize(("length", "kept"), [(MAX_STATE_BYTES, MAX_STATE_BYTES), (MAX_STATE_BYTES + 1, 0)])
def test_a_tracestate_of_any_length_does_not_wait_for_a_collector(length, kept):
    _, marks = Tracer(Sink(), 0).sample(f"00-{TRACE}-{SPAN}-01".encode(), b"v=" + b"7" * (length - 2))
    assert marks is not None and len(marks.state) == kept


def test_a_later_version_of_traceparent_is_read_by_what_is_known_of_it():
    assert parent_of(f"01-{TRACE}-{SPAN}-03-more".encode()) == Parent(TRACE, int(SPAN, 16), True)
    assert parent_of(f"00-{TRACE}-{SPAN}-02".encode()) == Parent(TRACE, int(SPAN, 16), False)


def test_a_share_is_sampled_of_those_without_a_caller():
    tracer = Tracer(Sink(), 0.25)
    sampled = sum(tracer.sample(None, None)[1] is not None for _ in range(4000))
    assert 800 < sampled < 1200  # seven standard deviations
    assert all(Tracer(Sink(), 0).sample(None, None) == ("", None) for _ in range(100))


class Sink:
    """Takes all, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.sent: list[object] = []
        self.sizes: list[int] = []
        self.error = error
        self.closed = False

    def send(self, over) -> bool:
        if self.error is not None:
            raise self.error
        self.sent += over
        self.sizes.append(len(over))
        return True

    def close(self) -> None:
        self.closed = True


def test_more_than_may_wait_is_dropped_and_told(caplog):
    sink = Sink()
    tracer = Tracer(sink, 1)
    for number in range(MAX_WAITING + 5):
        tracer.put(number)
    tracer.start()
    tracer.close()
    assert sink.sent == list(range(MAX_WAITING)) and sink.closed and max(sink.sizes) == CHUNK
    [line] = caplog.records
    assert (line.message, line.requests_and_batches) == ("traces lost", 5)


def test_a_sink_that_breaks_is_told_of_and_the_thread_goes_on(caplog):
    tracer = Tracer(Sink(ValueError("odd")), 1)
    tracer.put(1)
    tracer.start()
    tracer.close()
    assert [record.message for record in caplog.records] == ["no spans could be made", "traces lost"]


def test_a_run_that_outlives_its_request_ends_with_it():
    tracer = Tracer(Sink(), 1)
    _, marks = tracer.sample(None, None)
    assert isinstance(marks, Marks)
    marks.admitted, marks.asked_at = True, 1.1
    marks.decode_s, marks.queued_at = 0.1, 1.2
    marks.take(None, 1.5, 1)
    exported: list = []
    exporter = SimpleNamespace(export=exported.extend)
    over = Story(marks, "POST", "/predict", "/predict", 1.0, 2.0, 504, "deadline", "id", "m", "1", 1)
    OtlpSink(exporter, None, "http").send([over])
    seconds = {span.name: ((span.end_time - exported[0].start_time) / 1e9) for span in exported}
    assert seconds == pytest.approx({"POST /predict": 1, "body": 0.1, "decode": 0.2, "queue": 0.5, "infer": 1})


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://host/otlp/v1/traces", "https://host/otlp/v1/traces"),
        ("", "http://elsewhere:4318/v1/traces"),
    ],
)
def test_the_endpoint_is_a_base_or_whole(monkeypatch, endpoint, expected):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://elsewhere:4318")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine,team=vision")
    sink = create_sink(endpoint, "http", 1)
    assert sink._exporter._endpoint == expected
    assert sink._resource.attributes["service.name"] == "mine" and sink._resource.attributes["team"] == "vision"


def test_opentelemetrys_own_variables_ask_and_forbid(caplog):
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    assert asked_by(endpoint) and asked_by({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"})
    assert not asked_by({}) and not asked_by(endpoint | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    assert "CONVOY_TRACE_ENDPOINT" in caplog.text
    assert is_switched_off({"OTEL_SDK_DISABLED": "True"}) and is_switched_off({"OTEL_TRACES_EXPORTER": "none"})
    assert not is_switched_off({}) and not is_switched_off({"OTEL_TRACES_EXPORTER": "otlp"})
