"""A service over the shipped models, for as long as a measurement runs."""

from contextlib import AbstractContextManager
from pathlib import Path

from app.bench import server

ROOT = Path(__file__).parent.parent


def serving(**settings: object) -> AbstractContextManager[server.Server]:
    """Run `convoy serve` on a free port until the block ends, with such settings; it is ready when the block begins."""
    return server.serving(ROOT / "models", {"access_log": False} | settings)
