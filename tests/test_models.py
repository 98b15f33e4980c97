"""The models that come along: whole, proved, small enough, and what the README says of them is what they say."""

import json
import re
from pathlib import Path

import pytest

from app.errors import BundleError
from app.golden import prove
from app.loading import check_graph
from app.manifest import Bundle, read_bundle, verify_files
from app.sessions import ClassifierSession
from app.versions import Shelf, find_models
from benchmarks import models
from benchmarks.models import BEGIN, END
from tests.servers import convoy
from training.golden import wrong_recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "models/README.md").read_text()
TABLE = README.partition(BEGIN)[2].partition(END)[0]
ROWS = dict(re.findall(r"^\| `([a-z0-9-]+/\d+)` \| (.*) \|$", TABLE, re.MULTILINE))
NAMES = {name.partition("/")[0] for name in ROWS}
SHIPPED = [entry for entry in find_models(Shelf(ROOT / "models")) if entry.name in NAMES]


@pytest.fixture(params=SHIPPED, ids=lambda entry: entry.name)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return read_bundle(request.param.directory)


def test_a_shipped_bundle_is_whole_and_proves_itself(bundle):
    verify_files(bundle)
    session = ClassifierSession(bundle.model_path, "cpu", 1)
    check_graph(bundle, session)
    assert prove(bundle, session.classify) < 1e-5


def test_every_wrong_recipe_would_be_noticed(bundle):
    session = ClassifierSession(bundle.model_path, "cpu", 1)
    tolerance, told = bundle.manifest.golden.tolerance, bundle.manifest.evaluation["golden_detects"]
    assert isinstance(told, dict)
    for what, wrong in wrong_recipes(bundle.manifest.pixels):
        # What an 8-bit model may round elsewhere can be more than the mildest wrong recipe changes: then that is told.
        if (change := told[what]) <= tolerance:
            assert bundle.manifest.parent is not None, f"{what} changes {change}"
            continue
        altered = Bundle(bundle.directory, bundle.manifest.model_copy(update={"pixels": wrong}))
        with pytest.raises(BundleError, match="does not reproduce its golden answers"):
            prove(altered, session.classify)
            pytest.fail(f"{what} went unnoticed")
    assert sum(change > tolerance for change in told.values()) > len(told) / 2


def test_a_shipped_bundle_says_where_it_comes_from_and_holds_no_path_of_a_machine(bundle):
    manifest = bundle.manifest
    assert manifest.provenance.source and manifest.provenance.licence and manifest.provenance.command
    assert manifest.evaluation["accuracy"] > 0.6
    for path in bundle.directory.rglob("*"):
        if path.is_file():
            assert not re.search(rb"/(work|root|home|tmp)/", path.read_bytes()), path


def test_the_table_names_the_models_that_are_there():
    assert {entry.name for entry in SHIPPED} == NAMES >= {"imagenet", "cifar10-article"}
    assert list(ROWS) == [models.name_of(bundle) for bundle in models.read_bundles(ROOT / "models")]


def test_the_table_tells_what_manifests_graphs_and_the_last_measurement_hold():
    """After a change of a model: python -m benchmarks.models."""
    result = json.loads(models.RESULT.read_text())
    bundles = models.read_bundles(ROOT / "models")
    assert f"\n{models.table(bundles, result)}" == TABLE
    for bundle in bundles:
        cells = ROWS[models.name_of(bundle)].split(" | ")
        assert cells[0] == f"{bundle.manifest.evaluation['accuracy'] * 100:.2f} %"
        assert cells[5] == f"{bundle.model_path.stat().st_size / 1e6:.2f} MB"
        assert models.NOTHING not in cells[6:9], "its speed was measured on another file"


def test_all_models_together_are_small_enough_for_a_repository():
    files = [path for entry in SHIPPED for path in entry.directory.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40_000_000


def test_the_readme_s_curl_gets_the_readme_s_answer(tmp_path):
    readme = (ROOT / "README.md").read_text()
    example = r"curl --data-binary @(\S+) 'localhost:8000(\S+)'\n```\n\n```json\n(.*?)```"
    photo, path, shown = re.search(example, readme, re.DOTALL).groups()
    with convoy(ROOT / "models", tmp_path / "log") as server:
        answer = server.client.post(path, content=(ROOT / photo).read_bytes()).json()
    expected = json.loads(shown)
    for wanted in expected["results"][0]["top"]:
        wanted["probability"] = pytest.approx(wanted["probability"], abs=1e-4)
    assert answer == expected
