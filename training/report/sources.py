"""What a run's checkpoint and a bundle's manifest tell of a model, for its report."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app.manifest import Manifest, read_bundle
from training.costs import Costs, costs_of
from training.progress import duration
from training.report.page import Told
from training.runs import Checkpoint, Epoch, is_run, read_checkpoint


def told_of(model: Path, *, data: Path, measured: str, command: str) -> Told:
    """Tell of a run or of a bundle.

    Args:
        model: the directory of either.
        data: what it was measured on.
        measured: which part of it, in words.
        command: what the user typed.

    Raises:
        RunError: the checkpoint cannot be read.
        BundleError: the manifest cannot be read.
    """
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    about = {"measured on": f"{data}, {measured}", "command": command, "written": now}
    if is_run(model):
        return _told_of_run(model.resolve().name, read_checkpoint(model), about)
    bundle = read_bundle(model)
    return _told_of_bundle(bundle.manifest, costs_of(bundle.model_path), about)


def _told_of_run(name: str, checkpoint: Checkpoint, about: Mapping[str, str]) -> Told:
    recipe, history = checkpoint.recipe, checkpoint.history
    done = f"{len(history)} epochs" if len(history) == recipe.epochs else f"{len(history)} of {recipe.epochs} epochs"
    return Told(
        title=name,
        lede=f"{recipe.network}, {done} on {Path(checkpoint.data).name}, {len(checkpoint.classes)} classes.",
        history=history,
        recipe=recipe.model_dump(mode="json"),
        tiles=_training_tiles(history),
        origin={
            "hardware": checkpoint.hardware,
            "training command": checkpoint.command,
            "trained on": checkpoint.data,
            "data digest": checkpoint.data_digest,
        }
        | dict(about),
    )


def _told_of_bundle(manifest: Manifest, costs: Costs, about: Mapping[str, str]) -> Told:
    training = manifest.training
    history = _history(training.get("history"))
    knobs = training.get("recipe")
    return Told(
        title=f"{manifest.name}/{manifest.version}",
        lede=manifest.description,
        history=history,
        recipe=knobs if isinstance(knobs, dict) else {},
        tiles={
            "parameters": counted(costs.parameters),
            "multiply-adds": counted(costs.multiply_adds),
            "size": f"{manifest.model.size_bytes / 1e6:.2f} MB",
        }
        | _training_tiles(history),
        origin={
            "weights": str(training.get("weights", "")),
            "source": manifest.provenance.source,
            "licence": manifest.provenance.licence,
            "hardware": str(training.get("hardware", "")),
            "training command": str(training.get("command", "")),
            "bundle command": manifest.provenance.command,
            "data digest": str(training.get("data_digest", "")),
            "graph's digest": manifest.model.sha256,
        }
        | dict(about),
    )


def _history(rows: Any) -> Sequence[Epoch]:
    """Read the history that a manifest keeps for people; none where another version of training wrote it."""
    try:
        return tuple(Epoch(**row) for row in rows or ())
    except TypeError:
        return ()


def _training_tiles(history: Sequence[Epoch]) -> dict[str, str]:
    if not history:
        return {}
    seconds = sum(epoch.seconds for epoch in history)
    speed = sum(epoch.images_per_s * epoch.seconds for epoch in history) / seconds
    return {"training time": duration(seconds), "images/s in training": f"{speed:,.0f}"}


def counted(number: int) -> str:
    """Write a count as people say it: `4.63 M`, `385 M`."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            value = number / unit
            return f"{value:.0f} {name}" if value >= 100 else f"{value:.3g} {name}"
    return str(number)
