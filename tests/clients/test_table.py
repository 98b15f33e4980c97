"""docs/clients.md lists exactly what is checked, with the versions that are installed for it."""

import re
from pathlib import Path

from tests.clients.environments import REQUIREMENTS
from tests.clients.serving import checks_of

ROOT = Path(__file__).parents[2]
CLIENTS = {
    "triton_http": ("triton", "tritonclient", "HTTP, synchronous and asyncio"),
    "triton_grpc": ("triton", "tritonclient", "gRPC, synchronous, streams and asyncio"),
    "kserve_clients": ("kserve", "kserve", "InferenceRESTClient and InferenceGRPCClient"),
    "open_inference_client": ("open-inference", "open-inference-openapi", "synchronous and asyncio"),
}


def table(script: str) -> str:
    """Return a client's heading and table, as the page has them."""
    environment, package, what = CLIENTS[script]
    version = re.search(r"==(\S+)", (REQUIREMENTS / f"{environment}.txt").read_text()).group(1)
    rows = [f"| {call} | ✓ |" for call in checks_of(script).values()]
    return "\n".join([f"## {package} {version}: {what}", "", "| call | passes |", "|---|---|", *rows, ""])


def test_every_check_says_what_it_checks_and_is_on_the_page():
    page = (ROOT / "docs" / "clients.md").read_text()
    for script in CLIENTS:
        assert all(checks_of(script).values())
        assert table(script) in page, table(script)
    assert page.count("| ✓ |") == sum(len(checks_of(script)) for script in CLIENTS)


def test_every_script_has_its_tests():
    scripts = {path.stem for path in (Path(__file__).parent / "scripts").glob("*.py")} - {"checks"}
    tested = {re.search(r'checks_of\("(\w+)"\)', path.read_text()) for path in Path(__file__).parent.glob("test_*.py")}
    assert scripts == set(CLIENTS) == {match.group(1) for match in tested if match}
