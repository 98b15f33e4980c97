"""ONNX Runtime's Linux wheels report to their maker unless told not to before they are imported.

The telemetry hides when CI is set, so these processes run without it, and a control shows that the method sees it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundles import plain_image

ROOT = Path(__file__).parent.parent
# Wide enough that a new way of naming CI is still caught by the control.
HIDING = ("CI", "ORT_DISABLE_TELEMETRY", "TF_BUILD", "GITHUB_ACTIONS", "GITLAB_CI", "JENKINS_URL", "BUILD_ID")


# The control must not tell anybody anything: it runs without a network.
ISOLATED = ("unshare", "--map-root-user", "--net")


def can_isolate() -> bool:
    return (
        shutil.which("unshare") is not None and subprocess.run([*ISOLATED, "true"], capture_output=True).returncode == 0
    )


def files_written_at_home(home: Path, *command: str) -> list[str]:
    """Run a command as a user with an empty home and return what it left there."""
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in HIDING}
    environment = {name: value for name, value in environment.items() if not name.startswith("XDG_")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


@pytest.mark.skipif(not can_isolate(), reason="no network namespace to be had: the control would really report")
def test_the_control_sees_the_telemetry_of_a_bare_import(tmp_path, models):
    path = models / "colours/1/model.onnx"
    script = f"import onnxruntime; onnxruntime.InferenceSession({str(path)!r})"
    written = files_written_at_home(tmp_path / "home", *ISOLATED, sys.executable, "-c", script)
    assert any("Microsoft" in name for name in written), "the telemetry has moved: find it, or this test is blind"


def test_a_session_of_ours_reports_nothing(tmp_path, models):
    script = (
        "from pathlib import Path; from app.sessions import ClassifierSession; "
        f"ClassifierSession(Path({str(models / 'colours/1/model.onnx')!r}), 'auto', 1)"
    )
    assert files_written_at_home(tmp_path / "home", sys.executable, "-c", script) == []


def test_the_command_reports_nothing(tmp_path, models):
    image = tmp_path / "red.png"
    image.write_bytes(plain_image("red"))
    command = (sys.executable, "-m", "app.cli", "predict", str(image), "--models", str(models), "--model", "colours")
    assert files_written_at_home(tmp_path / "home", *command) == []
