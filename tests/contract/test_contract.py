from collections.abc import Iterator

import pytest

from tests.contract.running import check, installed, service
from tests.servers import ConvoyProcess


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Iterator[ConvoyProcess]:
    with service(tmp_path_factory.mktemp("contract")) as server:
        yield server


@pytest.mark.parametrize(("name", "model"), [("ours", "pair"), ("protocol", "text")])
def test_answers_are_as_documented(target, tmp_path, name, model):
    outcome = check(installed(), target, name, model, tmp_path, examples=3, seed=7)
    assert outcome.cases >= 60, outcome.report
    assert outcome.failed == 0, outcome.report
    assert [line for line in target.lines() if line["level"] in ("error", "critical")] == []
