"""Both clients, against a real service and against a server that does what servers should not."""

import asyncio
import io
import os

import httpx
import numpy as np
import pytest
from PIL import Image

import convoy
from app.keys import Access, append_key, make_key
from convoy.wire import CONNECT_TIMEOUT_S, Countdown
from tests.app.watching import wait_for
from tests.bundles import COLOURS, plain_image
from tests.certificates import make_pair
from tests.convoy.scripted import (
    CLOSE,
    DRIP,
    RESET,
    SILENCE,
    Looped,
    Threaded,
    answer,
    cut,
    fault,
    prediction,
    scripted,
)
from tests.servers import convoy as service

RED = plain_image("red")


@pytest.fixture(params=[Threaded, Looped], ids=["threads", "asyncio"])
def make(request):
    return request.param


@pytest.fixture
def client(make, server):
    with make(server.url) as client:
        yield client


def test_one_image_of_every_kind(client, tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(RED)
    pixels = np.asarray(Image.open(path))
    for image in (path, str(path), RED, io.BytesIO(RED), Image.open(path), pixels):
        found = client.predict(image)
        assert (found.label, found.top[0].index, len(found.top)) == ("red", 0, 5)
        assert found.probability > 0.99


def test_an_answer_says_where_it_comes_from(client, server):
    found = client.predict(RED, 2, model="colours", deadline_s=20, priority=1)
    assert (found.model, found.version, found.provider, len(found.top)) == ("colours", "1", "cpu", 2)
    assert len(found.digest) == 64 and set(found.server_ms) == {"decode", "queue", "infer"}
    assert found.request_id
    wait_for(lambda: any(line.get("request_id") == found.request_id for line in server.lines()))
    asked = httpx.post(f"{server.url}/predict?top_k=2", content=RED).json()["results"][0]["top"]
    assert [(one.label, one.index, one.probability) for one in found.top] == [tuple(one.values()) for one in asked]


def test_the_model_of_the_client_and_of_the_call(make, server):
    with make(server.url, model="other") as client:
        assert client.predict(RED).label == "rot"
        assert client.predict(RED, model="colours").label == "red"


def test_more_images_than_a_request_takes_come_back_in_order(client):
    """The service takes 40, the client sends 64 at first: what is refused as too large is halved."""
    colours = [list(COLOURS)[index % 5] for index in range(150)]
    found = client.predict_many(plain_image(colour) for colour in colours)
    assert [one.label for one in found] == colours


def test_more_bytes_than_a_request_takes_are_split(make, server):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)  # 270 kB as PNG; the limit is 2 MB
    with make(server.url, max_body_bytes=2_000_000, retries=0) as client:
        assert len(client.predict_many([noise] * 20)) == 20


def test_a_bad_image_among_many_is_named_by_its_place(client):
    with pytest.raises(convoy.BadImageError) as caught:
        client.predict_many([RED] * 100 + [b"no image"] + [RED] * 3)
    assert (caught.value.status, caught.value.code, caught.value.index) == (422, "bad_image", 100)
    assert caught.value.sentence == "images[100]: The data is not a JPEG, PNG or WebP image."


def test_each_image_for_itself(client):
    found = client.predict_each([RED, "nowhere.jpg", b"no image", plain_image("green"), b""])
    assert [getattr(one, "label", None) for one in found] == ["red", None, None, "green", None]
    assert [(one.status, one.index) for one in found if isinstance(one, convoy.ConvoyError)] == [
        (None, 1),
        (422, 2),
        (None, 4),
    ]


def test_nothing_to_predict_is_nothing(client):
    assert client.predict_many([]) == client.predict_each([]) == []


def test_faults_of_the_service_come_as_its_own_words(client):
    with pytest.raises(convoy.UnknownModelError) as caught:
        client.predict(RED, model="nobody")
    assert (caught.value.status, caught.value.code) == (404, "unknown_model")
    assert "There is no model 'nobody'" in caught.value.sentence
    with pytest.raises(convoy.RequestError, match="top_k"):
        client.predict(RED, top_k=7)
    with pytest.raises(convoy.BadImageError) as caught:
        client.predict(b"no image")
    assert caught.value.sentence == "The data is not a JPEG, PNG or WebP image."


def test_what_is_there(client):
    models = client.models()
    assert [(model.name, model.default, model.ready) for model in models] == [
        ("colours", True, True),
        ("other", False, True),
    ]
    model = client.model("other")
    assert model.manifest["labels"][0] == "rot" and model.classes == 6
    with pytest.raises(convoy.UnknownModelError):
        client.model("nobody")
    assert client.live() and client.ready() and client.ready().models == {"colours": "ready", "other": "ready"}


def test_a_deadline_of_the_services_own(make, tmp_path, models):
    """The service's Timeout-Ms and the client's deadline are one: 504 or silence, it is a DeadlineError."""
    with service(models, tmp_path / "log", default_model="colours", linger_ms=900) as slow, make(slow.url) as client:
        with pytest.raises(convoy.DeadlineError):
            client.predict(RED, deadline_s=0.2)
        assert client.predict(RED).label == "red"


def test_a_service_that_is_gone(make, models, tmp_path):
    with service(models, tmp_path / "log", default_model="colours") as gone, make(gone.url) as client:
        assert client.predict(RED).label == "red"
        gone.stop()
        with pytest.raises(convoy.UnreachableError) as caught:
            client.predict(RED)
        assert caught.value.status is None and len(client.slept) == 3
        assert not client.live()
        assert "does not answer" in client.ready().reason


def test_connections_are_kept(make):
    with scripted(*[answer(200, prediction("cat"))] * 3) as server, make(server.url) as client:
        assert [client.predict(RED).label for _ in range(3)] == ["cat"] * 3
        assert server.connections == 1


def test_a_full_service_is_asked_again(make):
    replies = fault(429, Retry_After=3), fault(503), answer(200, prediction("cat"))
    with scripted(*replies) as server, make(server.url) as client:
        assert client.predict(RED).label == "cat"
        first, second = client.slept
        assert 3 <= first <= 3.1 and 0.1 <= second <= 0.2
        assert [request[2] for request in server.requests] == [RED] * 3


@pytest.mark.parametrize(
    "how", [RESET, CLOSE, cut(b"no HTTP at all\r\n\r\n"), cut(answer(200, prediction("cat"))[:-20])]
)
def test_a_connection_that_breaks_before_the_answer_is_whole_is_tried_again(make, how):
    with scripted(how, how, answer(200, prediction("cat"))) as server, make(server.url) as client:
        assert client.predict(RED).label == "cat"
        assert len(server.requests) == 3 and len(client.slept) == 2


def test_a_refusal_is_final(make):
    with scripted(fault(400), fault(401)) as server, make(server.url) as client:
        with pytest.raises(convoy.RequestError):
            client.predict(RED)
        with pytest.raises(convoy.AuthenticationError):
            client.predict_many([RED, RED])
        assert not client.slept


@pytest.mark.parametrize("how", [SILENCE, DRIP])
def test_a_server_that_is_slow_does_not_hold_a_call_beyond_its_deadline(make, how):
    with scripted(how) as server, make(server.url) as client:
        with pytest.raises(convoy.DeadlineError, match="did not answer before the deadline"):
            client.predict(RED, deadline_s=0.3)
        assert not client.slept


def test_what_sending_took_is_not_waited_for_once_more():
    """The clock jumps by 59.8 s before the request is sent: of the minute 0.2 s are left to wait for the answer."""
    now = 0.0

    def jump(request: httpx.Request) -> None:
        nonlocal now
        now = 59.8

    with scripted(SILENCE) as server, Threaded(server.url, timeout_s=100) as client:
        client._core.clock = lambda: now
        client._http.event_hooks = {"request": [jump]}
        with pytest.raises(convoy.DeadlineError):
            client.predict(RED, deadline_s=60)


def test_the_time_to_connect_is_short_and_the_others_are_what_is_left():
    now = 10.0
    limits = Countdown(lambda: now, 40.0)
    assert [limits.get(name) for name in ("connect", "read", "write", "pool")] == [CONNECT_TIMEOUT_S, 30, 30, 30]
    now = 38.0
    assert [limits.get(name) for name in ("connect", "read")] == [2, 2]
    now = 50.0
    assert limits.get("read") > 0


def test_an_answer_that_is_not_convoys(make):
    pages = answer(200, b"<html>hello</html>"), answer(302, b"", Location="/login"), answer(200, {"results": 3})
    with scripted(*pages) as server, make(server.url) as client:
        for _ in pages:
            with pytest.raises(convoy.BadAnswerError):
                client.predict(RED)
        assert len(server.requests) == 3


def test_the_key_goes_with_every_request_and_into_no_representation(make):
    with scripted(answer(200, prediction("cat")), answer(200, {"live": True})) as server:
        with make(server.url, api_key="secret-key") as client:
            client.predict(RED)
            client.live()
            assert "secret-key" not in repr(client) + repr(vars(client))
        assert [headers["authorization"] for _, headers, _ in server.requests] == ["Bearer secret-key"] * 2


def test_a_service_that_wants_a_key(make, models, tmp_path):
    keys = tmp_path / "keys"
    key, line = make_key("tester", frozenset({Access.PREDICT}))
    append_key(keys, "tester", line)
    with service(models, tmp_path / "log", default_model="colours", keys=keys) as guarded:
        with make(guarded.url) as client:
            for ask in (lambda: client.predict(RED), client.models):
                with pytest.raises(convoy.AuthenticationError) as caught:
                    ask()
                assert caught.value.status == 401
            assert client.live() and client.ready()
        with make(guarded.url, api_key=key) as client:
            assert client.predict(RED).label == "red" and len(client.models()) == 2


def test_a_certificate_of_ones_own(make, models, tmp_path):
    pair = make_pair(tmp_path)
    options = {"tls_certificate": pair.certificate, "tls_key": pair.key, "default_model": "colours"}
    with service(models, tmp_path / "log", verify=pair.trusting(), **options) as secure:
        with make(secure.url, verify=pair.trusting()) as client:
            assert client.predict(RED).label == "red"
        with make(secure.url) as client, pytest.raises(convoy.UnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
            client.predict(RED)


def test_no_variable_is_read_unless_asked_for(monkeypatch):
    monkeypatch.setenv("CONVOY_API_KEY", "secret-key")
    with scripted(*[answer(200, prediction("cat"))] * 3) as server:
        monkeypatch.setenv("CONVOY_URL", server.url)
        with convoy.Client(server.url) as client:
            client.predict(RED)
        with convoy.Client.from_environment() as client:
            client.predict(RED)
        with convoy.Client.from_environment(api_key="other-key") as client:
            client.predict(RED)
        sent = [headers.get("authorization") for _, headers, _ in server.requests]
    assert sent == [None, "Bearer secret-key", "Bearer other-key"]


def over(handle, **options):
    return Looped("http://test", transport=httpx.MockTransport(handle), **options)


def test_asyncio_sends_several_requests_at_once_and_no_more_than_it_may():
    under_way, three = 0, asyncio.Event()

    async def handle(request: httpx.Request) -> httpx.Response:
        nonlocal under_way
        under_way += 1
        assert under_way <= 3
        if under_way == 3:
            three.set()
        await three.wait()
        await asyncio.sleep(0.02)  # long enough for a fourth to come, if it may
        under_way -= 1
        return httpx.Response(200, json=prediction("cat", "cat"))

    with over(handle, max_images_per_request=2, concurrency=3) as client:
        assert len(client.predict_many([RED] * 20)) == 20


def test_asyncio_reads_images_no_faster_than_they_are_sent():
    read, sent = 0, 0

    def images():
        nonlocal read
        for _ in range(60):
            read += 1
            assert read - sent <= (3 + 1) * 2  # those under way, and the part that is being filled
            yield RED

    async def handle(request: httpx.Request) -> httpx.Response:
        nonlocal sent
        await asyncio.sleep(0)
        sent += 2
        return httpx.Response(200, json=prediction("cat", "cat"))

    with over(handle, max_images_per_request=2, concurrency=3) as client:
        assert len(client.predict_many(images())) == 60


def test_asyncio_ends_a_call_at_its_first_error_and_leaves_nothing_under_way():
    calls = []

    async def handle(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        if len(calls) == 2:
            return httpx.Response(401, json={"error": "No key.", "code": "no_key"})
        await asyncio.sleep(60)
        raise AssertionError("not cancelled")

    async def main():
        transport = httpx.MockTransport(handle)
        async with convoy.AsyncClient("http://test", max_images_per_request=1, transport=transport) as client:
            with pytest.raises(convoy.AuthenticationError) as caught:
                await client.predict_many([RED] * 50)
            assert caught.value.__cause__ is None
            return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(main()) == set()
    assert len(calls) <= 5


def test_a_cancelled_call_is_cancelled_not_failed():
    async def handle(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        raise AssertionError("not cancelled")

    async def main():
        async with convoy.AsyncClient("http://test", transport=httpx.MockTransport(handle)) as client:
            task = asyncio.create_task(client.predict_many([RED]))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())


def test_concurrency_below_one_is_refused():
    with pytest.raises(ValueError, match="concurrency cannot be 0"):
        convoy.AsyncClient(concurrency=0)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(make, monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with scripted(answer(200, prediction("cat"))) as server, make(server.url) as client:
        assert client.predict(RED).label == "cat"
