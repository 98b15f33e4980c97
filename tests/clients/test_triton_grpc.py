import pytest

from tests.clients.serving import checks_of, outcomes_of


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    return outcomes_of("triton", "triton_grpc", tmp_path_factory.mktemp("clients"))


@pytest.mark.parametrize("check", checks_of("triton_grpc"))
def test_the_real_client_passes(outcomes, check):
    assert outcomes[check] == "", outcomes[check]
