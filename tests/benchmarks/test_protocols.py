"""The same question in every form gets the same answer, and ratios are of one turn."""

import httpx
import pytest

from benchmarks.peers.scenarios import IMAGES
from benchmarks.protocols import forms, ratios_of
from benchmarks.server import serving
from convoy.tensors import LENGTH_HEADER, unpack


def test_a_ratio_is_of_one_turn():
    """The machine halves its speed twice: medians of the rates would say 0.5."""
    found = ratios_of({"/predict": [400.0, 200.0, 100.0], "other": [360.0, 100.0, 100.0]})
    assert found == {"/predict": 1.0, "other": 0.9}


def test_each_form_asks_the_same():
    asked = forms("cifar10-article", IMAGES["small.jpg"]())
    with serving(default_model="cifar10-article") as service, httpx.Client(base_url=service.url) as client:
        answers = {
            form: client.post(path, content=body, headers=headers) for form, (path, body, headers) in asked.items()
        }
    assert [answer.status_code for answer in answers.values()] == [200] * 3
    best = answers.pop("/predict").json()["results"][0]["top"][0]
    for answer in answers.values():
        (probabilities,) = unpack(answer.content, int(answer.headers[LENGTH_HEADER])).values()
        assert probabilities.argmax() == best["index"]
        assert float(probabilities.max()) == pytest.approx(best["probability"], abs=1e-6)
