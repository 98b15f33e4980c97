import base64
import http.client
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from tests.bundles import COLOURS, noise_image, plain_image

OCTETS = {"Content-Type": "application/octet-stream"}


def post(server, path="/predict", **request) -> httpx.Response:
    return server.client.post(path, **request)


def as_json(*images: bytes) -> dict:
    return {"json": {"images": [base64.b64encode(image).decode() for image in images]}}


def as_form(*images: bytes) -> dict:
    return {"files": [(f"field{index % 2}", (f"{index}.png", image)) for index, image in enumerate(images)]}


def best(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [result["top"][0]["label"] for result in response.json()["results"]]


@pytest.mark.parametrize(
    "content_type",
    ["image/png", "image/jpeg", "image/webp", "application/octet-stream", "application/x-www-form-urlencoded", None,
     "IMAGE/PNG; charset=binary"],
)  # fmt: skip
def test_one_raw_image_whatever_its_type_claims(server, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    response = post(server, content=plain_image("green"), headers=headers)
    assert best(response) == ["green"]
    body = response.json()
    assert (body["model"], body["version"]) == ("colours", "1")
    assert [set(entry) for entry in body["results"][0]["top"]] == [{"label", "index", "probability"}] * 5


def test_many_images_in_a_form_keep_their_order(server):
    assert best(post(server, **as_form(*(plain_image(colour) for colour in COLOURS)))) == list(COLOURS)


def test_many_images_in_json_keep_their_order(server):
    assert best(post(server, **as_json(*(plain_image(colour) for colour in reversed(COLOURS))))) == list(COLOURS)[::-1]


def test_form_fields_that_are_no_files_are_passed_over(server):
    response = post(server, data={"comment": "hello"}, files={"photo": plain_image("red")})
    assert best(response) == ["red"]


def test_a_model_by_name(server):
    assert best(post(server, "/models/other/predict", content=plain_image("red"))) == ["rot"]


def test_top_k(server):
    response = post(server, "/predict?top_k=2", content=plain_image("red"))
    assert len(response.json()["results"][0]["top"]) == 2
    everything = post(server, "/predict?top_k=6", content=plain_image("red")).json()["results"][0]["top"]
    assert sum(entry["probability"] for entry in everything) == pytest.approx(1, abs=1e-5)


def test_other_parameters_may_be_anything(server):
    response = post(server, "/predict?%C3%98%F1%92%AC=%C2%8B&%FF&&=&top_k=2&a=%00", content=plain_image("red"))
    assert len(response.json()["results"][0]["top"]) == 2


def test_headers_tell_where_the_answer_comes_from(server):
    response = post(server, content=plain_image("red"), headers={"X-Request-Id": "abc-123"})
    assert response.headers["x-request-id"] == "abc-123"
    assert re.fullmatch(r"decode;dur=[\d.]+, queue;dur=[\d.]+, infer;dur=[\d.]+", response.headers["server-timing"])
    assert response.headers["x-provider"] == "cpu"
    manifest = server.client.get("/models/colours").json()["manifest"]
    assert response.headers["x-model-digest"] == manifest["model"]["sha256"]


@pytest.mark.parametrize("wish", ["", "with space", "x" * 200, "ü"])
def test_a_request_id_that_could_harm_a_log_is_replaced(server, wish):
    response = post(server, content=plain_image("red"), headers={"X-Request-Id": wish.encode()})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def test_alone_in_a_batch_and_in_a_crowd_an_image_gets_the_same_probabilities(server):
    images = [noise_image(seed, "JPEG", (50, 40)) for seed in range(32)]

    def answer(image: bytes) -> list[float]:
        return scores(post(server, "/predict?top_k=6", content=image, headers=OCTETS))[0]

    alone = [answer(image) for image in images]
    together = scores(post(server, "/predict?top_k=6", **as_form(*images)))
    with ThreadPoolExecutor(50) as pool:
        crowd = list(pool.map(answer, images * 7))
    for found in (together, *(crowd[start : start + 32] for start in range(0, len(crowd), 32))):
        for one, other in zip(alone, found, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def scores(response: httpx.Response) -> list[list[float]]:
    """Return each image's probabilities in class order."""
    assert response.status_code == 200, response.text
    return [
        [entry["probability"] for entry in sorted(result["top"], key=lambda entry: entry["index"])]
        for result in response.json()["results"]
    ]


def image_of(mode: str, kind: str, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    image = Image.open(io.BytesIO(noise_image(2, size=size))).convert("RGB")
    buffer = io.BytesIO()
    (image.quantize(8) if mode == "P" else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image_of("RGB", "JPEG", exif=exif)


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(image_of("CMYK", "JPEG"), id="cmyk"),
        pytest.param(image_of("P", "PNG"), id="palette"),
        pytest.param(image_of("I;16", "PNG"), id="16-bit"),
        pytest.param(image_of("RGBA", "PNG"), id="transparent"),
        pytest.param(image_of("L", "JPEG"), id="gray"),
        pytest.param(image_of("RGB", "WEBP"), id="webp"),
        pytest.param(exif_rotated(), id="exif-rotated"),
        pytest.param(image_of("RGB", "JPEG", (1, 1)), id="one-pixel"),
    ],
)
def test_unusual_images_are_answered(server, image):
    assert len(best(post(server, content=image))) == 1


GOOD = plain_image("red")
BOMB = io.BytesIO()
Image.new("1", (9000, 9000)).save(BOMB, "PNG")
FORM = "multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="f"; filename="f.png"\r\n\r\n'
JSON = {"Content-Type": "application/json"}


def chunks(count: int, size: int = 100_000):
    for _ in range(count):
        yield b"x" * size


# fmt: off
BAD_REQUESTS = [
    # id, request, status, code, part of the sentence
    ("empty body", {"content": b""}, 400, "bad_request", "The body is empty"),
    ("text as image", {"content": b"hello", "headers": OCTETS}, 422, "bad_image", "not a JPEG, PNG or WebP"),
    ("text/plain", {"content": b"hello", "headers": {"Content-Type": "text/plain"}}, 415, "unsupported_media_type",
     "text/plain is not taken"),
    ("image/gif", {"content": image_of("P", "GIF"), "headers": {"Content-Type": "image/gif"}}, 415,
     "unsupported_media_type", "image/gif is not taken"),
    ("gif bytes", {"content": image_of("P", "GIF")}, 422, "bad_image", "not a JPEG, PNG or WebP"),
    ("tiff bytes", {"content": image_of("RGB", "TIFF")}, 422, "bad_image", "not a JPEG, PNG or WebP"),
    ("truncated jpeg", {"content": noise_image(1, "JPEG", (400, 400))[:-2000]}, 422, "bad_image",
     "damaged or incomplete"),
    ("truncated png", {"content": noise_image(1, "PNG", (640, 640))[:500]}, 422, "bad_image", "damaged"),
    ("81 megapixels in 10 kB", {"content": BOMB.getvalue()}, 413, "image_too_large", "9000×9000 pixels"),
    ("gzip body", {"content": GOOD, "headers": {"Content-Encoding": "gzip"}}, 415, "unsupported_media_type", "gzip"),
    ("body over the limit", {"content": b"x" * 2_000_001}, 413, "body_too_large", "2,000,000 bytes"),
    ("chunked body over the limit", {"content": chunks(50)}, 413, "body_too_large", "2,000,000 bytes"),
    ("endless chunked body", {"content": chunks(500)}, 413, "body_too_large", "2,000,000 bytes"),
    ("form without boundary", {"content": PART, "headers": {"Content-Type": "multipart/form-data"}}, 400,
     "bad_request", "lacks its boundary"),
    ("form with garbage", {"content": b"garbage", "headers": {"Content-Type": FORM}}, 400, "bad_request", "broken"),
    ("form cut off", {"content": PART + GOOD, "headers": {"Content-Type": FORM}}, 400, "bad_request",
     "ends before its last boundary"),
    ("form without file", {"data": {"a": "b"}, "files": {"x": (None, "text")}}, 400, "bad_request", "holds no file"),
    ("form with an empty file", {"files": {"f": b""}}, 422, "bad_image", "The image is empty"),
    ("form with one bad image", as_form(GOOD, b"bad", GOOD), 422, "bad_image", r"images[1]:"),
    ("too many images", as_form(*[GOOD] * 41), 413, "too_many_images", "more than 40 images"),
    ("broken json", {"content": b'{"images": [', "headers": JSON}, 400, "bad_request", "JSON body should be"),
    ("deep json", {"content": b"[" * 100_000, "headers": JSON}, 400, "bad_request", "JSON body should be"),
    ("json of another shape", {"json": ["a"]}, 400, "bad_request", "JSON body should be"),
    ("json with a stray field", {"json": {"images": ["aa=="], "top": 1}}, 400, "bad_request", "top"),
    ("a million numbers in json", {"content": b'{"images":[' + b"1," * 900_000 + b"1]}", "headers": JSON}, 413,
     "too_many_images", "more than 40 images"),
    ("a million fields in json", {"content": b"{" + b'"a":1,' * 300_000 + b'"images":[]}', "headers": JSON}, 413,
     "too_many_images", "more than 40 images"),
    ("another protocol's pixels", {"json": {"instances": [[[0, 0, 0]] * 1024]}}, 400, "bad_request", 'no "images"'),
    ("ten thousand parts in a form", {"content": PART * 10_000 + b"--b--", "headers": {"Content-Type": FORM}}, 413,
     "too_many_images", "more than 40 images"),
    ("json without images", {"json": {"images": []}}, 400, "bad_request", "images"),
    ("json with numbers", {"json": {"images": [1, 2]}}, 400, "bad_request", "images.0"),
    ("bad base64", {"json": {"images": [base64.b64encode(GOOD).decode(), "!!!"]}}, 400, "bad_request", "images[1]"),
    ("json with a bad image", as_json(GOOD, b"x"), 422, "bad_image", "images[1]"),
    ("top_k=0", {"content": GOOD, "params": {"top_k": "0"}}, 400, "bad_request", "top_k"),
    ("top_k=-1", {"content": GOOD, "params": {"top_k": "-1"}}, 400, "bad_request", "top_k"),
    ("top_k in other digits", {"content": GOOD, "params": {"top_k": "²"}}, 400, "bad_request", "top_k"),
    ("top_k=many", {"content": GOOD, "params": {"top_k": "many"}}, 400, "bad_request", "top_k"),
    ("top_k beyond the classes", {"content": GOOD, "params": {"top_k": "7"}}, 400, "bad_request", "6 classes"),
    ("bad timeout", {"content": GOOD, "headers": {"Timeout-Ms": "soon"}}, 400, "bad_request", "Timeout-Ms"),
    ("timeout of zero", {"content": GOOD, "headers": {"Timeout-Ms": "0"}}, 400, "bad_request", "Timeout-Ms"),
    ("unknown model", {"url": "/models/nobody/predict", "content": GOOD}, 404, "unknown_model", "colours, other"),
    ("model name from another world", {"url": "/models/..%2f..%2fetc/predict", "content": GOOD}, 404, None, ""),
    ("unknown path", {"url": "/prdict", "content": GOOD}, 404, "not_found", "/docs"),
    ("wrong method", {"method": "PUT", "content": GOOD}, 405, "method_not_allowed", "PUT"),
]
# fmt: on


@pytest.mark.parametrize(
    ("request_", "status", "code", "sentence"),
    [case[1:] for case in BAD_REQUESTS],
    ids=[case[0] for case in BAD_REQUESTS],
)
def test_a_bad_request_gets_its_status_and_sentence_and_nothing_is_lost(server, request_, status, code, sentence):
    response = server.client.request(**{"method": "POST", "url": "/predict"} | request_)
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "code"}
    assert sentence in body["error"]
    assert body["error"].endswith(".")
    assert code is None or body["code"] == code
    assert response.headers["content-type"] == "application/json"
    assert "x-request-id" in response.headers
    assert best(post(server, content=GOOD)) == ["red"], "the service no longer answers"
    assert server.metrics()["convoy_inflight_images"] == 0
    assert server.metrics()["convoy_inflight_bytes"] == 0


def test_a_client_that_sends_first_and_reads_later_reads_the_413(server):
    """`http.client` writes its whole body before it looks for an answer; a reset would hide the 413 from it."""
    for _ in range(3):
        connection = http.client.HTTPConnection(server.client.base_url.host, server.client.base_url.port, timeout=20)
        connection.request("POST", "/predict", body=b"x" * 7_000_000)
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["code"]) == (413, "body_too_large")
        connection.close()


@pytest.mark.parametrize(
    ("request_", "closes"),
    [
        ({"content": b"x" * 2_000_001}, True),
        (as_form(*[GOOD] * 41), False),
        ({"content": BOMB.getvalue()}, False),
        ({"content": b"no image"}, False),
    ],
    ids=["body too large", "too many images", "image too large", "bad image"],
)
def test_only_an_unread_body_ends_the_connection(server, request_, closes):
    response = post(server, **request_)
    assert response.status_code in (413, 422)
    assert (response.headers.get("connection") == "close") == closes


def test_head_is_answered_like_get_without_a_body(server):
    for path in ("/livez", "/readyz", "/models"):
        response = server.client.head(path)
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["content-length"] == str(len(server.client.get(path).content))


def test_nothing_redirects_to_a_host_of_the_client_s_choice(server):
    response = server.client.get("/docs/", headers={"Host": "evil.example"})
    assert response.status_code == 404 and "location" not in response.headers


def test_a_corrupt_exif_block_does_not_reach_the_log(server):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff\xff\xff\xff\xff"
    image = image_of("RGB", "JPEG", exif=exif)
    assert post(server, content=image).status_code in (200, 422)
    server.lines()  # parses every line as JSON


def test_refusals_are_counted_by_reason(server):
    key = 'convoy_rejected_total{model="colours",reason="bad_image"}'
    before = server.metrics().get(key, 0)
    post(server, content=b"nonsense")
    assert server.metrics()[key] == before + 1


def test_the_log_has_one_line_a_request(server):
    post(server, content=GOOD, headers={"X-Request-Id": "find-me"})
    # The answer is sent before its line is written; once another request is answered, the line is there.
    post(server, content=GOOD)
    (line,) = [line for line in server.lines() if line.get("request_id") == "find-me"]
    assert (line["status"], line["model"], line["images"], line["path"]) == (200, "colours", 1, "/predict")
    assert line["ms"] > 0
    assert not [line for line in server.lines() if line.get("path") == "/livez"]


def test_the_openapi_document_shows_the_three_bodies_and_every_error(server):
    document = server.client.get("/openapi.json").json()
    for path in ("/predict", "/models/{model}/predict"):
        operation = document["paths"][path]["post"]
        assert {"image/jpeg", "multipart/form-data", "application/json"} <= set(operation["requestBody"]["content"])
        assert {"200", "400", "404", "413", "415", "422", "429", "503", "504"} <= set(operation["responses"])
    assert "HTTPValidationError" not in json.dumps(document), "FastAPI promises an error shape that is not ours"


def test_the_docs_page_needs_no_other_host(server):
    page = server.client.get("/docs").text
    assert "swagger-ui" in page
    assert "http://" not in page.replace(server.url, "") and "https://" not in page
    for source in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert server.client.get(source).status_code == 200, source
    assert server.client.get("/", headers={"Accept": "text/html,*/*"}).headers["location"] == "/docs"
    assert server.client.get("/").json() == {"status": "alive"}
