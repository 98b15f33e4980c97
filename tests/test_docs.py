"""What the service has is in the documentation, and the documentation names nothing that is not there."""

import re
import tomllib
from pathlib import Path

import pytest

from app.metrics import Metrics
from app.settings import Settings, variable_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
PROTOCOLS = (ROOT / "docs/protocols.md").read_text()
METRICS = (ROOT / "docs/metrics.md").read_text()


def test_every_setting_has_its_row_with_its_default():
    rows = dict(re.findall(r"^\| `(CONVOY_\w+)` \| `?([^|`]*)`? \|", README, re.MULTILINE))
    expected = {variable_of(name): str(field.default) for name, field in Settings.model_fields.items()}
    assert rows == expected


def test_every_route_has_its_row(server):
    paths = server.client.get("/openapi.json").json()["paths"]
    documented = {
        f"{method} {path}" for path, methods in paths.items() for method in (name.upper() for name in methods)
    }
    rows = set(re.findall(r"^\| `((?:GET|POST) /[^`]*)` \|", README + PROTOCOLS, re.MULTILINE)) - {"GET /docs"}
    assert rows == documented


def test_every_series_has_its_row():
    families = {
        family.name: family.type for family in Metrics().registry.collect() if family.name.startswith("convoy_")
    }
    expected = {f"{name}_total" if kind == "counter" else name for name, kind in families.items()}
    assert set(re.findall(r"^\| `(convoy_\w+)` \|", METRICS, re.MULTILINE)) == expected


@pytest.mark.parametrize("package", ["app", "convoy", "training"])
def test_every_module_is_on_the_map(package):
    rooms = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    assert {room for room in rooms if f"`{room}`" not in ARCHITECTURE} == set()


def test_every_dependency_earns_its_place_in_a_line():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = [*project["dependencies"], *(text for extra in extras for text in extra)]
    names = {re.match(r"[A-Za-z0-9-]+", text).group() for text in declared}
    table = ARCHITECTURE.partition("## Dependencies")[2]
    assert {name for name in names if not re.search(rf"\b{re.escape(name)}\b", table)} == set()


LINKED = [
    path for path in ROOT.glob("**/*.md") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]


@pytest.mark.parametrize("page", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_no_path_of_a_machine_is_in_the_repository():
    assert not re.search(r"/(work|root|home)/", README + ARCHITECTURE + METRICS)
