import pytest

from tests.clients.serving import checks_of, outcomes_of


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    return outcomes_of("open-inference", "open_inference_client", tmp_path_factory.mktemp("clients"))


@pytest.mark.parametrize("check", checks_of("open_inference_client"))
def test_the_real_client_passes(outcomes, check):
    assert outcomes[check] == "", outcomes[check]
