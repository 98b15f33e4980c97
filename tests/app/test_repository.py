import numpy as np
import pytest

from app.repository import warm_up
from tests.bundles import RECIPE, make_bundle


class RecordingSession:
    def __init__(self, provider):
        self.provider = provider
        self.shapes = []

    def run(self, pixels):
        assert pixels.dtype == np.uint8
        self.shapes.append(pixels.shape)
        return np.zeros((len(pixels), 6), np.float32)


@pytest.mark.parametrize(
    ("provider", "max_batch", "sizes"),
    [("cpu", 16, [16]), ("cpu", 1, [1]), ("cuda", 16, [1, 2, 4, 8, 16]), ("cuda", 12, [1, 2, 4, 8, 12])],
)
def test_warm_up_runs_what_a_first_request_would_pay_for(tmp_path, provider, max_batch, sizes):
    session = RecordingSession(provider)
    warm_up(make_bundle(tmp_path / "models"), session, max_batch)
    assert session.shapes == [(size, RECIPE.height, RECIPE.width, 3) for size in sizes]
