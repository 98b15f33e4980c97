import shutil
import subprocess

import pytest

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
