"""What the deployment files say, read once: each fixture is one file, parsed by its own rules."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Instruction:
    stage: str
    name: str
    text: str


class Dockerfile(list[Instruction]):
    def find(self, name: str, stage: str | None = None) -> list[str]:
        return [line.text for line in self if line.name == name and stage in (None, line.stage)]

    def environment(self, *stages: str) -> dict[str, str]:
        texts = [text for stage in stages for text in self.find("ENV", stage)]
        return dict(word.split("=", 1) for text in texts for word in shlex.split(text))


def _instructions(source: str) -> Iterator[Instruction]:
    lines = (line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    stage = ""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, text = line.split(maxsplit=1)
        if name == "FROM":
            stage = text.split()[-1]
        yield Instruction(stage, name, text.strip())


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def dockerfile() -> Dockerfile:
    return Dockerfile(_instructions((ROOT / "Dockerfile").read_text()))


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return document


@pytest.fixture(scope="session")
def prometheus_config() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    return config


@pytest.fixture(scope="session")
def dashboards() -> dict[str, dict[str, Any]]:
    """Every dashboard that Grafana finds, by its uid."""
    documents = [json.loads(path.read_text()) for path in (ROOT / "deploy" / "grafana" / "dashboards").glob("*.json")]
    return {document["uid"]: document for document in documents}


@pytest.fixture(scope="session")
def rules() -> list[dict[str, Any]]:
    """Every rule that Prometheus has, in order."""
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules" / "convoy.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]
