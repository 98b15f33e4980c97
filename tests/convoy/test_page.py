"""What docs/client.md shows is run as it stands there, and prints what it says there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import convoy
from convoy import errors
from convoy.core import DEFAULT_URL, Options
from tests.servers import convoy as service

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/client.md").read_text()
MOVED = """import convoy
for kind in convoy.Client, convoy.AsyncClient:
    kind.__init__.__defaults__ = ("{url}",)
"""
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    with service(ROOT / "models", tmp_path_factory.mktemp("page") / "log") as process:
        yield process


def test_every_example_says_what_it_prints():
    assert len(EXAMPLES) == PAGE.count("```python") >= 7


@pytest.mark.parametrize(("code", "printed"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_prints_what_the_page_says(real, code, printed):
    """Port 8000 of this machine may be somebody else's, so the address is changed, and nothing else."""
    program = MOVED.format(url=real.url) + code.replace(DEFAULT_URL, real.url)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == (printed, "")


def test_every_error_has_its_row():
    kinds = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, convoy.ConvoyError) and name != "ConvoyError"
    }
    assert set(re.findall(r"^\| `(\w+Error)` \|", PAGE, re.MULTILINE)) == kinds == kinds & set(convoy.__all__)


def test_every_option_of_a_prediction_has_its_row():
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \|", PAGE, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"\w+", row)} == {"top_k", *Options.__annotations__}
