from collections.abc import Iterator
from pathlib import Path

import pytest

from app.cpus import usable_cpus
from tests.bundles import make_bundle
from tests.servers import ConvoyProcess, convoy


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory with two good bundles; read only."""
    root = tmp_path_factory.mktemp("repository") / "models"
    make_bundle(root, "colours")
    make_bundle(root, "other", labels=("rot", "grün", "blau", "weiß", "schwarz", "grau"), golden_labels=other_labels())
    return root


def other_labels() -> list[str]:
    return ["rot", "blau", "weiß", "grau"]


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConvoyProcess]:
    """A running service over `models`, shared by the tests of one worker: leave it as you found it."""
    log = tmp_path_factory.mktemp("server") / "log"
    with convoy(models, log, default_model="colours", max_body_bytes=2_000_000, max_images_per_request=40) as process:
        yield process


def pytest_xdist_auto_num_workers(config):
    """One more than there are processors: many tests wait for a server to start, to drain or to look at a file."""
    return usable_cpus() + 1
