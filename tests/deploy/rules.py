"""The PrometheusRule of k8s/components/monitoring/, made from the plain rule files of deploy/prometheus/rules/.

    python -m tests.deploy.rules        # after every change of a rule

kustomize cannot put one file into another, so the rules stand twice, and a test holds one against the other.
"""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules"
MANIFEST = ROOT / "k8s" / "components" / "monitoring" / "prometheusrule.yaml"
HEAD = "# Made from deploy/prometheus/rules/ by `python -m tests.deploy.rules`: change the rules there.\n"


def prometheus_rule(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the manifest that holds groups of rules."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "convoy", "namespace": "convoy", "labels": {"app.kubernetes.io/part-of": "convoy"}},
        "spec": {"groups": groups},
    }


def groups() -> list[dict[str, Any]]:
    """Return the groups of all rule files, in the files' order."""
    return [group for file in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(file.read_text())["groups"]]


def text() -> str:
    """Return the manifest as its file should be."""
    return HEAD + yaml.safe_dump(prometheus_rule(groups()), sort_keys=False, allow_unicode=True, width=116)


if __name__ == "__main__":
    MANIFEST.write_text(text())
