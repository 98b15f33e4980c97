"""The soak, with two workers."""

from benchmarks.survival import soak
from benchmarks.survival.rows import Finding


def run(seconds: float = 900.0) -> Finding:
    """See `soak.run`."""
    return soak.run(seconds, workers=2)
