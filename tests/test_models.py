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
from app.versions import find_models
from tests.servers import convoy
from training.golden import wrong_recipes

ROOT = Path(__file__).parent.parent
NAMES = re.findall(r"`([a-z0-9-]+)/\d+`", (ROOT / "models/README.md").read_text().partition("| network |")[0])
SHIPPED = [entry for entry in find_models(ROOT / "models") if entry.name in NAMES]


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
    for what, wrong in wrong_recipes(bundle.manifest.pixels):
        altered = Bundle(bundle.directory, bundle.manifest.model_copy(update={"pixels": wrong}))
        with pytest.raises(BundleError, match="does not reproduce its golden answers"):
            prove(altered, session.classify)
            pytest.fail(f"{what} went unnoticed")


def test_a_shipped_bundle_says_where_it_comes_from_and_holds_no_path_of_a_machine(bundle):
    manifest = bundle.manifest
    assert manifest.provenance.source and manifest.provenance.licence and manifest.provenance.command
    assert manifest.evaluation["accuracy"] > 0.6
    for path in bundle.directory.rglob("*"):
        if path.is_file():
            assert not re.search(rb"/(work|root|home|tmp)/", path.read_bytes()), path


def test_the_table_names_the_models_that_are_there():
    assert {entry.name for entry in SHIPPED} == set(NAMES) >= {"imagenet", "cifar10-article"}


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
