"""A compressed model beside its parent: accuracy, size, work and speed in one table, and the bound that it must hold.

Owns the comparison and the refusal. Measures nothing itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from training.compress.speed import BATCH, Speed
from training.costs import Costs
from training.errors import CompressError

CLEAR = 0.05
"""A rate nearer to the parent's than this is called neither faster nor slower: rounds differ by as much."""


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table."""

    name: str
    accuracy: float
    """From 0 to 1, all rows on the same images."""
    size_bytes: int
    costs: Costs
    speed: Speed

    def record(self) -> dict[str, Any]:
        """Return the row as JSON values, for a manifest."""
        return {
            "name": self.name,
            "accuracy": round(self.accuracy, 6),
            "size_bytes": self.size_bytes,
            "parameters": self.costs.parameters,
            "multiply_adds": self.costs.multiply_adds,
            "latency_ms": float(f"{self.speed.latency_ms:.4g}"),
            "images_per_s": float(f"{self.speed.images_per_s:.4g}"),
            "provider": self.speed.provider,
        }


def check_bound(parent: float, child: float, max_loss: float) -> None:
    """Refuse a child that lost more accuracy than was allowed.

    Args:
        parent: accuracy from 0 to 1.
        child: the same, on the same images.
        max_loss: percentage points.

    Raises:
        CompressError: it lost more.
    """
    lost = points_lost(parent, child)
    if lost > max_loss:
        raise CompressError(
            f"{lost:.2f} points of accuracy would be lost ({parent:.2%} → {child:.2%}), more than --max-loss "
            f"{max_loss:g}: no bundle was written."
        )


def points_lost(parent: float, child: float) -> float:
    """Return how many percentage points the child has less; rounded where only floating point differs."""
    return round((parent - child) * 100, 6)


def comparison_table(rows: Sequence[Row]) -> Table:
    """Return a column a model, the first of which is the parent."""
    table = Table("")
    for row in rows:
        table.add_column(row.name, justify="right", overflow="fold")
    table.add_row("accuracy", *(f"{row.accuracy:.2%}" for row in rows))
    table.add_row("size", *(f"{row.size_bytes / 1e6:.2f} MB" for row in rows))
    table.add_row("parameters", *(f"{row.costs.parameters:,}" for row in rows))
    table.add_row("multiply-adds", *(f"{row.costs.multiply_adds / 1e6:,.2f} M" for row in rows))
    table.add_row("one image", *(f"{row.speed.latency_ms:.3g} ms" for row in rows))
    table.add_row(f"batches of {BATCH}, all cores", *(f"{row.speed.images_per_s:,.0f} images/s" for row in rows))
    return table


def in_words(parent: Row, child: Row) -> str:
    """Say what was won and lost, and that nothing was where it is so."""
    lost = points_lost(parent.accuracy, child.accuracy)
    change = f"{lost:.2f} points of accuracy lost" if lost > 0 else f"{-lost:.2f} points of accuracy gained"
    rate = child.speed.images_per_s / parent.speed.images_per_s
    speed = (
        f"{rate:.2f} times the images a second"
        if rate > 1 + CLEAR
        else f"no faster here ({rate:.2f} times the images a second)"
    )
    return f"{change}, {child.size_bytes / parent.size_bytes:.0%} of the size, {speed} ({child.speed.provider})."
