"""The rules, without a socket or a clock: what is sent, what is tried again and when, and what an answer means."""

import io
import itertools
import json
import pickle
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import convoy
from app.http.bodies import _form_files
from convoy.core import (
    LONGEST_PAUSE_S,
    MAX_BODY_BYTES,
    Core,
    Lost,
    Reply,
    Send,
    base_headers,
    from_environment,
    is_loopback,
)
from convoy.images import Part
from tests.convoy.scripted import prediction

ALL_FAULTS = (400, 401, 403, 404, 405, 413, 415, 422, 429, 500, 502, 503, 504)


class World:
    """A clock that only moves when somebody sends or sleeps, and outcomes that come in turn."""

    def __init__(self, *outcomes, took_s=0.0, **options):
        self.now = 1000.0
        self.outcomes = list(outcomes)
        self.took_s = took_s
        self.sent, self.slept, self.order = [], [], []
        self.core = Core(**{"clock": lambda: self.now, "jitter": lambda: 0.5} | options)

    def run(self, steps):
        outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as stop:
                return stop.value
            if isinstance(step, Send):
                assert step.timeout_s > 0
                self.sent.append(step)
                self.order.append("send")
                outcome = self.outcomes.pop(0)
                took_s, outcome = outcome if isinstance(outcome, tuple) else (self.took_s, outcome)
                self.now += min(took_s, step.timeout_s)
            else:
                self.slept.append(step.seconds)
                self.order.append("sleep")
                self.now += step.seconds
                outcome = None

    def predict(self, **options):
        top_k = options.pop("top_k", None)
        return self.run(self.core.predict(b"image", self.core.ask(top_k, **options)))


def reply(status=200, content=None, **headers):
    if content is None:
        content = prediction("cat") if status == 200 else {"error": "A sentence.", "code": "a_code"}
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Reply(status, {name.replace("_", "-"): str(value) for name, value in headers.items()}, body)


def test_a_full_service_is_asked_again_when_it_said_so_and_not_before():
    world = World(reply(429, retry_after=2), reply(503, retry_after=7), reply())
    assert world.predict().label == "cat"
    assert world.order == ["send", "sleep", "send", "sleep", "send"]
    assert 2 <= world.slept[0] <= 2.1 and 7 <= world.slept[1] <= 7.2


def test_pauses_double_up_to_the_longest_and_are_jittered():
    def slept(jitter):
        world = World(*[Lost("reset")] * 9, reply(), retries=9, timeout_s=1000, jitter=lambda: jitter)
        world.predict()
        return world.slept

    assert slept(1.0) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert slept(0.0) == [pause / 2 for pause in slept(1.0)]


def test_a_pause_that_would_pass_the_deadline_is_not_taken():
    world = World(reply(429, retry_after=5))
    with pytest.raises(convoy.OverloadedError) as caught:
        world.predict(deadline_s=4)
    assert caught.value.retry_after_s == 5 and not world.slept


def test_the_service_is_told_what_is_left_of_the_deadline():
    world = World((1.0, reply(503, retry_after=2)), reply(), jitter=lambda: 0.0)
    world.predict(deadline_s=10)
    assert [step.request.headers["Timeout-Ms"] for step in world.sent] == ["10000", "7000"]
    assert [step.timeout_s for step in world.sent] == [10, 7]


def test_the_deadline_of_a_call_is_no_longer_than_the_clients_time_and_spans_its_requests():
    world = World((4.0, reply()), reply(), timeout_s=5)
    ask = world.core.ask(deadline_s=6)
    for index in range(2):
        world.run(world.core.predict_part(Part([(index, b"image")]), ask, keep_faults=False))
    assert [step.timeout_s for step in world.sent] == [5, 2]


def test_a_deadline_that_has_passed_sends_nothing():
    world = World()
    ask = world.core.ask(deadline_s=1)
    world.now += 1
    with pytest.raises(convoy.DeadlineError, match="before the deadline"):
        world.run(world.core.predict(b"image", ask))
    assert not world.sent


def test_late_is_final_and_lost_is_not():
    world = World((9.0, Lost("", late=True)))
    with pytest.raises(convoy.DeadlineError) as caught:
        world.predict(deadline_s=9)
    assert (caught.value.status, caught.value.code, len(world.sent)) == (None, "deadline", 1)
    world = World(*[Lost("connection reset")] * 4)
    with pytest.raises(convoy.UnreachableError, match="does not answer: connection reset") as caught:
        world.predict()
    assert (caught.value.code, len(world.sent)) == ("unreachable", 4)


def outcomes():
    statuses = st.sampled_from((200, *ALL_FAULTS))
    after = st.one_of(st.none(), st.integers(0, 40))
    replies = st.builds(lambda status, after: reply(status, **({} if after is None else {"retry_after": after})),
                        statuses, after)  # fmt: skip
    return st.tuples(st.floats(0, 20), st.one_of(replies, st.just(Lost("reset"))))


@given(
    script=st.lists(outcomes(), min_size=6, max_size=6),
    retries=st.integers(0, 5),
    timeout_s=st.floats(0.01, 100),
    deadline_s=st.one_of(st.none(), st.floats(0.01, 100)),
    jitter=st.floats(0, 1),
)
def test_whatever_happens_the_rules_hold(script, retries, timeout_s, deadline_s, jitter):
    world = World(*script, retries=retries, timeout_s=timeout_s, jitter=lambda: jitter)
    fault = None
    try:
        world.predict(deadline_s=deadline_s)
    except convoy.ConvoyError as error:
        fault = error
    limit = min(timeout_s, deadline_s or timeout_s)
    seen = [outcome for _, outcome in script[: len(world.sent)]]
    assert 1 <= len(world.sent) <= retries + 1
    assert world.now - 1000 <= limit + 1e-6
    for before, pause in zip(seen, world.slept, strict=False):
        assert isinstance(before, Lost) or before.status in (429, 502, 503)
        if isinstance(before, Reply) and "retry-after" in before.headers:
            assert pause >= int(before.headers["retry-after"])
    for step in world.sent:
        assert int(step.request.headers["Timeout-Ms"]) <= max(1, step.timeout_s * 1000)
    last = seen[-1]
    assert (fault is None) == (isinstance(last, Reply) and last.status == 200)
    if fault is not None:
        assert fault.status == (None if isinstance(last, Lost) else last.status)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, convoy.RequestError),
        (401, convoy.AuthenticationError),
        (403, convoy.AuthenticationError),
        (404, convoy.UnknownModelError),
        (405, convoy.RequestError),
        (413, convoy.TooLargeError),
        (415, convoy.RequestError),
        (422, convoy.BadImageError),
        (429, convoy.OverloadedError),
        (500, convoy.ServerError),
        (502, convoy.UnavailableError),
        (503, convoy.UnavailableError),
        (504, convoy.DeadlineError),
        (302, convoy.BadAnswerError),
    ],
)
def test_each_status_has_its_class_and_brings_the_services_words(status, kind):
    world = World(reply(status, x_request_id="abc"), retries=0)
    with pytest.raises(convoy.ConvoyError) as caught:
        world.predict()
    fault = caught.value
    assert type(fault) is kind
    assert (fault.status, fault.code, fault.sentence, fault.request_id) == (status, "a_code", "A sentence.", "abc")
    assert str(fault) == "A sentence."
    copy = pickle.loads(pickle.dumps(fault))
    assert type(copy) is kind and vars(copy) == vars(fault)


@pytest.mark.parametrize("status", ALL_FAULTS)
def test_what_is_tried_again(status):
    world = World(reply(status), reply())
    if status in (429, 502, 503):
        assert world.predict().label == "cat"
    else:
        with pytest.raises(convoy.ConvoyError):
            world.predict()
    assert len(world.sent) == (2 if status in (429, 502, 503) else 1)


@pytest.mark.parametrize("content", [b"<html>Bad Gateway</html>", {"error": ""}, {"error": {"message": "x"}}, ["x"]])
def test_what_a_proxy_says_is_told_as_what_it_is(content):
    world = World(reply(502, content), retries=0)
    with pytest.raises(convoy.UnavailableError, match=r"answered 502 Bad Gateway without a sentence") as caught:
        world.predict()
    assert (caught.value.status, caught.value.code) == (502, "")


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["model", "version", "results", "top", "label", "index", "error"]), inner, max_size=4
        )
    ),
)


@given(status=st.sampled_from((200, 299, 302, *ALL_FAULTS)), content=st.binary(max_size=30) | json_values)
def test_any_answer_is_a_prediction_or_an_error_of_ours(status, content):
    world = World(reply(status, content if isinstance(content, bytes) else json.dumps(content).encode()), retries=0)
    with pytest.raises(convoy.ConvoyError) as caught:
        world.predict()
    assert caught.value.status == status and caught.value.sentence
    if status == 200:
        assert type(caught.value) is convoy.BadAnswerError


def test_numbers_that_are_none_are_no_answer():
    content = prediction("cat")
    content["results"][0]["top"][0]["index"] = float("inf")
    with pytest.raises(convoy.BadAnswerError):
        World(reply(200, content)).predict()


@pytest.mark.parametrize("labels", [(), ("cat", "dog")])
def test_an_answer_to_another_number_of_images_is_no_answer(labels):
    with pytest.raises(convoy.BadAnswerError, match="200 OK with something that is not Convoy's"):
        World(reply(200, prediction(*labels))).predict()


def test_deeply_nested_json_is_no_answer():
    with pytest.raises(convoy.BadAnswerError):
        World(reply(200, b"[" * 100_000)).predict()


def test_a_prediction_carries_what_the_headers_say():
    headers = {"x_model_digest": "d1", "x_provider": "cuda", "x_request_id": "r1"}
    found = World(reply(server_timing="decode;dur=0.10, queue;dur=2, proxy, x;dur=?;desc=y", **headers)).predict()
    assert (found.model, found.version, found.label, found.probability) == ("scripted", "1", "cat", 0.5)
    assert (found.digest, found.provider, found.request_id) == ("d1", "cuda", "r1")
    assert found.server_ms == {"decode": 0.1, "queue": 2.0}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:10 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 10.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:10 GMT", "date": "Wed, 21 Oct 2026 07:29:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:10 GMT"}, None),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:10 GMT", "date": "Wed, 21 Oct 2026 07:29:00 -0000"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "²"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_in_seconds_and_as_a_date(headers, seconds):
    world = World(Reply(429, headers, b"{}"), retries=0)
    with pytest.raises(convoy.OverloadedError) as caught:
        world.predict()
    assert caught.value.retry_after_s == seconds


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, "/predict"),
        ({"top_k": 3}, "/predict?top_k=3"),
        ({"model": "pets"}, "/models/pets/predict"),
        ({"model": "a/b?c é"}, "/models/a%2Fb%3Fc%20%C3%A9/predict"),
        ({"model": "pets", "version": "2"}, "/models/pets/versions/2/predict"),
    ],
)
def test_where_a_prediction_is_asked_for(options, path):
    world = World(reply())
    world.predict(**options)
    (step,) = world.sent
    assert (step.request.method, step.request.path, step.request.body) == ("POST", path, b"image")
    assert "Priority" not in step.request.headers


def test_the_clients_model_answers_where_a_call_names_none():
    world = World(reply(), reply(), model="pets")
    world.predict()
    world.predict(model="birds", version="1", priority=0)
    assert [step.request.path for step in world.sent] == [
        "/models/pets/predict",
        "/models/birds/versions/1/predict",
    ]
    assert world.sent[1].request.headers["Priority"] == "u=0"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_k": 0}, "top_k cannot be 0"),
        ({"version": "1"}, "version = '1' needs a model"),
        ({"deadline_s": 0}, "deadline_s cannot be 0"),
        ({"deadline_s": float("nan")}, "deadline_s cannot be nan"),
        ({"priority": 8}, "priority cannot be 8"),
    ],
)
def test_an_impossible_argument_is_told_before_anything_is_sent(options, sentence):
    world = World()
    with pytest.raises(ValueError, match=sentence):
        world.predict(**options)


def test_an_unknown_option_is_no_option():
    with pytest.raises(TypeError, match="There is no option timeout: there are model, version, deadline_s, priority"):
        World().predict(timeout=3)


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://host", "http://", "http://host:x", "http://host:99999", "http://host/?a=1",
     "http://ho st", "http://host/#x", "http://host\n"],
)  # fmt: skip
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="is no address of a service"):
        Core(url)


@pytest.mark.parametrize(
    "options", [{"retries": -1}, {"timeout_s": 0}, {"max_images_per_request": 0}, {"max_body_bytes": 0}]
)
def test_an_impossible_limit_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Core(**options)


@pytest.mark.parametrize("key", ["a b", "a\r\nX-Evil: 1", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key):
    with pytest.raises(ValueError, match="api_key") as caught:
        base_headers(key)
    assert key not in str(caught.value)


def test_the_environment_is_two_variables():
    assert from_environment({"CONVOY_URL": "http://a", "CONVOY_API_KEY": "k", "CONVOY_PORT": "1"}) == {
        "url": "http://a",
        "api_key": "k",
    }
    assert from_environment({"CONVOY_URL": "", "HOME": "/"}) == {}


def test_proxies_have_no_part_on_the_way_to_this_machine():
    assert all(map(is_loopback, ("http://127.0.0.1:8000", "http://localhost", "http://[::1]:80", "http://127.1.2.3")))
    assert not any(map(is_loopback, ("http://10.0.0.1", "http://convoy.example", "http://localhost.example")))


@given(st.lists(st.binary(min_size=1, max_size=200), min_size=2, max_size=20))
def test_a_form_is_what_the_service_reads(images):
    world = World(reply(200, prediction(*["cat"] * len(images))))
    part = Part(list(enumerate(images)))
    found = world.run(world.core.predict_part(part, world.core.ask(), keep_faults=False))
    (step,) = world.sent
    kind, _, boundary = step.request.headers["Content-Type"].partition("; boundary=")
    assert kind == "multipart/form-data" and len(found) == len(images)
    assert _form_files(step.request.body, boundary.encode()) == images


class Service(World):
    """Answers forms as the service does: refuses too many images, and those that begin with X."""

    def __init__(self, limit, **options):
        super().__init__(**options)
        self.limit = limit
        self.outcomes = self

    def pop(self, _):
        request = self.sent[-1].request
        _kind, _, boundary = request.headers["Content-Type"].partition("; boundary=")
        images = _form_files(request.body, boundary.encode()) if boundary else [request.body]
        if len(images) > self.limit or len(request.body) > self.core._max_bytes:
            return reply(413, {"error": "Too many.", "code": "too_large"})
        for index, image in enumerate(images):
            if image.startswith(b"X"):
                place = f"images[{index}]: " if len(images) > 1 else ""
                return reply(422, {"error": f"{place}No image.", "code": "bad_image"})
        return reply(200, prediction(*(image.decode() for image in images)))

    def many(self, images, *, keep_faults):
        found = {}
        for part in self.core.parts(images, keep_faults=keep_faults):
            found |= self.run(self.core.predict_part(part, self.core.ask(), keep_faults=keep_faults))
        return [found[index] for index in range(len(images))]


words = st.lists(st.text(string.ascii_letters, min_size=1, max_size=300).map(str.encode), max_size=40)


@given(images=words, limit=st.integers(1, 50), max_images=st.integers(1, 50), max_bytes=st.integers(600, 5000))
def test_every_image_gets_its_own_answer_or_its_own_error(images, limit, max_images, max_bytes):
    service = Service(limit, max_images_per_request=max_images, max_body_bytes=max_bytes)
    found = service.many(images, keep_faults=True)
    assert len(found) == len(images)
    for index, (image, one) in enumerate(zip(images, found, strict=True)):
        if image.startswith(b"X"):
            assert (type(one), one.index, one.sentence) == (convoy.BadImageError, index, f"images[{index}]: No image.")
        else:
            assert one.label == image.decode()
    assert all(len(step.request.body) <= max_bytes for step in service.sent)


@given(images=words, limit=st.integers(1, 50))
def test_the_first_error_that_ends_a_call_names_the_image_by_its_place_in_the_call(images, limit):
    service = Service(limit, max_images_per_request=8)
    bad = [index for index, image in enumerate(images) if image.startswith(b"X")]
    if not bad:
        assert [one.label for one in service.many(images, keep_faults=False)] == [image.decode() for image in images]
        return
    with pytest.raises(convoy.BadImageError) as caught:
        service.many(images, keep_faults=False)
    assert (caught.value.index, caught.value.sentence) == (bad[0], f"images[{bad[0]}]: No image.")


def test_what_is_not_about_one_image_ends_the_call_even_where_errors_are_kept():
    world = World(reply(401))
    with pytest.raises(convoy.AuthenticationError):
        world.run(world.core.predict_part(Part([(0, b"a"), (1, b"b")]), world.core.ask(), keep_faults=True))


def test_one_image_is_not_a_list_of_images():
    for single in ("cat.jpg", b"bytes", Path("cat.jpg"), io.BytesIO(b"bytes"), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(TypeError, match="Several images are a list"):
            Core().parts(single, keep_faults=False)
    (part,) = Core().parts(np.zeros((2, 4, 4, 3), np.uint8), keep_faults=False)
    assert len(part.images) == 2


def test_models_and_probes_are_read():
    entry = {"name": "a b", "version": "1", "state": "failed", "reason": "Why.", "later": {"field": 1}}
    world = World(
        reply(200, {"default": "a b", "models": [entry, entry | {"name": "c", "state": "ready"}]}),
        reply(200, entry | {"manifest": {"labels": ["x"]}}),
        reply(503, {"ready": False, "reason": "Loading.", "models": {"c": "loading"}}),
        reply(200, {"live": True}),
    )
    first, second = world.run(world.core.models())
    assert (first.default, first.ready, first.reason) == (True, False, "Why.")
    assert (second.default, second.ready) == (False, True)
    assert world.run(world.core.model("a b")).manifest == {"labels": ["x"]}
    ready = world.run(world.core.ready())
    assert not ready and (ready.reason, ready.models) == ("Loading.", {"c": "loading"})
    assert world.run(world.core.live()) is True
    assert [step.request.path for step in world.sent] == ["/models", "/models/a%20b", "/readyz", "/livez"]


@pytest.mark.parametrize("outcome", [Lost("refused"), reply(404), reply(200, b"hello"), reply(503, b"<html>")])
def test_a_probe_tells_and_never_raises(outcome):
    world = World(*itertools.repeat(outcome, 2))
    ready = world.run(world.core.ready())
    assert not ready and ready.reason
    assert world.run(world.core.live()) is (isinstance(outcome, Reply) and outcome.status == 200)
    assert len(world.sent) == 2


def test_the_clients_limits_are_the_services_defaults():
    from app.settings import Settings
    from convoy.core import DEFAULT_TIMEOUT_S, DEFAULT_URL, MAX_IMAGES_PER_REQUEST

    settings = Settings()
    assert settings.max_images_per_request == MAX_IMAGES_PER_REQUEST
    assert settings.max_body_bytes == MAX_BODY_BYTES
    assert settings.request_timeout_ms == DEFAULT_TIMEOUT_S * 1000
    assert settings.local_url() == DEFAULT_URL
