"""What checkov says of every variant of the manifests and of the Dockerfiles, but for what we mean to be so.

    make policies

Not part of the suite: checkov is 290 MB, and takes longer than all other tests of the deployment.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from tests.deploy.kustomize import K8S, ROOT, VARIANTS, render

DOCKERFILES = (ROOT / "Dockerfile", K8S / "overlays/gpu-tensorrt/Dockerfile")

MEANT = {
    # Kubernetes
    "CKV_K8S_43": "a digest is a release's to set (`images:`); a tag is what a checkout can know",
    "CKV_K8S_15": "IfNotPresent: a tag here is a version, and without the registry pods must still start",
    # Dockerfile
    "CKV_DOCKER_7": "the base is an argument, given by digest in a release build",
}
"""Rule → why it does not hold here."""


def findings(checkov: str, path: Path, framework: str) -> list[dict[str, str]]:
    """Return the checks that failed on a file, or below a directory."""
    command = [checkov, "--compact", "--quiet", "--output", "json", "--framework", framework]
    place = ["--directory", str(path)] if path.is_dir() else ["--file", str(path)]
    ran = subprocess.run([*command, *place], capture_output=True, text=True, timeout=600)
    # Without a connection it complains at length on standard error, and judges all the same.
    answer = json.loads(ran.stdout)
    if not answer.get("summary", {}).get("resource_count"):
        raise SystemExit(f"checkov has judged nothing in {path}.")
    return list(answer["results"]["failed_checks"])


def main() -> int:
    """Print what is left; 1 where something is."""
    checkov = sys.argv[1]
    with tempfile.TemporaryDirectory() as scratch:
        for variant in VARIANTS:
            file = Path(scratch) / ("+".join(variant) + ".yaml")
            file.write_text(yaml.safe_dump_all(render(variant)))
        found = [(check["check_id"], check) for check in findings(checkov, Path(scratch), "kubernetes")]
    for file in DOCKERFILES:
        found += [(check["check_id"], check) for check in findings(checkov, file, "dockerfile")]
    left = [check for rule, check in found if rule not in MEANT]
    lines = [
        f"{check['check_id']} {check['check_name']}: {Path(check['file_path']).name} {check['resource']}"
        for check in left
    ]
    idle = sorted(set(MEANT) - {rule for rule, _ in found})
    lines.append(f"{len(found)} findings, {len(left)} not meant; exceptions that nothing needs: {idle or 'none'}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if left or idle else 0


if __name__ == "__main__":
    sys.exit(main())
