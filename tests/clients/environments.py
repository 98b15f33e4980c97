"""An environment of its own for each kind of client, made on demand and kept for the next run.

The clients' pins exclude ours (tritonclient wants an older protobuf than our own server), and each other's. An
environment lies in the user's cache, named by its requirements' digest; whoever comes second waits for the first.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parent / "requirements"
INSTALL_TIMEOUT_S = 240
FAILURE_COUNTS_S = 600
"""So long a failed installation is not tried again: every other test file would wait for it too."""


def python_with(name: str) -> Path:
    """Return the interpreter of an environment with `requirements/<name>.txt`; skips the test if there can be none."""
    requirements = REQUIREMENTS / f"{name}.txt"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    home = cache() / f"{name}-{version}-{digest}"
    home.parent.mkdir(parents=True, exist_ok=True)
    failed = home.with_name(f"{home.name}.failed")
    with home.with_name(f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            if not failed.exists() or time.time() - failed.stat().st_mtime > FAILURE_COUNTS_S:
                failed.unlink(missing_ok=True)
                if reason := install(home, requirements):
                    failed.write_text(reason)
            if failed.exists():
                pytest.skip(f"{name}: its clients cannot be installed here: {failed.read_text()}")
    return home / "bin" / "python"


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "convoy" / "clients"


def install(home: Path, requirements: Path) -> str:
    """Make an environment; returns why it could not be, or an empty string."""
    shutil.rmtree(home, ignore_errors=True)
    # Our own constraints are what these environments are there to get away from.
    environment = {key: value for key, value in os.environ.items() if key not in ("PIP_CONSTRAINT", "PYTHONPATH")}
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--retries", "1"]
    try:
        for command in ([sys.executable, "-m", "venv", str(home)], [*pip, "--requirement", str(requirements)]):
            subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True, timeout=INSTALL_TIMEOUT_S
            )
    except subprocess.TimeoutExpired:
        return f"pip took more than {INSTALL_TIMEOUT_S} s"
    except subprocess.CalledProcessError as error:
        return (error.stderr.strip().splitlines() or ["no reason given"])[-1]
    (home / "complete").touch()
    return ""
