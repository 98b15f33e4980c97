"""The run directory: `runs/<name>/` with the recipe, the history and the last checkpoint.

Owns what is on disk between two epochs. Each file is replaced whole, the checkpoint first, so a kill at any moment
costs the running epoch and no more. Knows nothing of how an epoch is trained.
"""

import csv
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.atomic import replacing
from training.data.listing import Listing
from training.errors import RunError
from training.recipes import Recipe, flag, make_recipe

FORMAT = 2
CHECKPOINT_FILE = "checkpoint.pt"
RECIPE_FILE = "recipe.json"
HISTORY_FILE = "history.csv"
CURVES_FILE, CONFUSION_FILE, MISTAKES_FILE = "curves.png", "confusion.png", "mistakes.png"
REPORT_FILE = "report.html"
LOCK_FILE = ".lock"


@dataclass(frozen=True, slots=True)
class Epoch:
    """One row of the history; losses in nats, accuracies from 0 to 1.

    The train figures are running means over the epoch, with augmentation and dropout, as Keras reports them; the test
    figures are of the weights at its end.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float
    images_per_s: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    """Of the part of the training images that was held out, if one was; after an epoch, as the test figures."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that a later start needs: to resume, to evaluate, to export."""

    recipe: Recipe
    classes: tuple[str, ...]
    data: str
    """The path that was trained on, as it was given."""
    data_digest: str
    command: str
    hardware: str
    history: tuple[Epoch, ...]
    network: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Any]
    """The moving average and its age; empty without one."""
    scaler: dict[str, Any]
    """Of half-precision gradients; empty without."""
    best: dict[str, Tensor]
    """The weights that were best on the validation part, if that decides; empty otherwise."""
    begun_from: str = ""
    """What its first weights were taken from; empty where they were drawn."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that answer: the best, the moving average or the last, as the recipe has it."""
        return self.best or self.average.get("weights") or self.network

    @property
    def is_finished(self) -> bool:
        """Whether the run would not go on if it were resumed."""
        return len(self.history) >= self.recipe.epochs or in_vain(self.history, self.recipe)

    @property
    def weights_in_words(self) -> str:
        """Say which weights answer: `those after the last epoch`."""
        finished, epochs = len(self.history), self.recipe.epochs
        which = "the moving average" if self.average else "those"
        if self.best:
            return f"{which} after epoch {best_epoch(self.history)}, the best of {finished} on the validation part"
        return f"{which} after the last epoch" if finished == epochs else f"{which} after epoch {finished} of {epochs}"


def best_epoch(history: tuple[Epoch, ...]) -> int:
    """Return the number of the epoch with the least validation loss, the first of equals."""
    return min(history, key=lambda epoch: (epoch.validation_loss or 0.0, epoch.epoch)).epoch


def in_vain(history: tuple[Epoch, ...], recipe: Recipe) -> bool:
    """Say whether the last `patience` epochs have brought no better validation loss."""
    return bool(recipe.patience and history) and history[-1].epoch - best_epoch(history) >= recipe.patience


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint, then the files for people that follow from it.

    A run's first checkpoint is what takes the place of an earlier run in the directory; until then that run is whole.
    """
    if len(checkpoint.history) == 1:
        _discard_files_for_people(directory)
    record = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    record |= {
        "format": FORMAT,
        "recipe": checkpoint.recipe.model_dump(),
        "classes": list(checkpoint.classes),
        "history": [asdict(epoch) for epoch in checkpoint.history],
    }
    with replacing(directory / CHECKPOINT_FILE) as file:
        try:
            torch.save(record, file)
        except RuntimeError as error:  # PyTorch hides a full disk behind its own complaint at closing the archive
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    with replacing(directory / RECIPE_FILE) as file:
        file.write(f"{checkpoint.recipe.model_dump_json(indent=2)}\n".encode())
    with replacing(directory / HISTORY_FILE) as file:
        file.write(_csv(checkpoint.history).encode())


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read a run's checkpoint; nothing in it is executed.

    Raises:
        RunError: it is missing, damaged, or of another format.
    """
    path = directory / CHECKPOINT_FILE
    if not path.is_file():
        raise RunError(f"{path} does not exist: no epoch of this run was finished.")
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is damaged may raise anything, an IndexError too
        raise RunError(f"{path} is damaged and cannot be read: restore it, or train anew with --force.") from error
    if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
        raise RunError(f"{path} is not a checkpoint of this version of convoy-train: train anew with --force.")
    try:
        record["recipe"] = make_recipe(**record["recipe"])
        record["classes"] = tuple(record["classes"])
        record["history"] = tuple(Epoch(**epoch) for epoch in record["history"])
        return Checkpoint(**record)
    except (KeyError, TypeError) as error:
        raise RunError(f"{path} lacks a field of a checkpoint ({error}): train anew with --force.") from error


def open_run(directory: Path, *, resume: bool, force: bool) -> Checkpoint | None:
    """Return the checkpoint to continue from, or None where a run starts anew.

    Raises:
        RunError: a run is there and nothing says what to do with it, or there is none to resume.
    """
    if resume:
        return read_checkpoint(directory)
    if is_run(directory) and not force:
        raise RunError(
            f"{directory} already holds a run: continue it with --resume, discard it with --force, "
            "or choose another --name."
        )
    return None


def match_run(directory: Path, checkpoint: Checkpoint, recipe: Recipe, listing: Listing) -> None:
    """Check that a resumed run would go on as it began; only `epochs` may differ, where no schedule depends on it.

    Raises:
        RunError: recipe, classes or data are not those of the run.
    """
    for knob, before in checkpoint.recipe.model_dump().items():
        now = getattr(recipe, knob)
        if now != before and (knob != "epochs" or recipe.schedule != "constant"):
            raise RunError(
                f"{directory} was begun with {flag(knob)} {before}, not {now}: leave {flag(knob)} out to resume it."
            )
    if listing.classes != checkpoint.classes:
        changed = min(set(listing.classes) ^ set(checkpoint.classes))
        raise RunError(f"{directory} was begun with other classes ('{changed}' differs): resume it with its own data.")
    if listing.digest != checkpoint.data_digest:
        raise RunError(
            f"{directory} was begun with other images in {checkpoint.data}: resume it with the same files, "
            "or train anew with --force."
        )
    if len(checkpoint.history) > recipe.epochs:
        raise RunError(
            f"{directory} has finished {len(checkpoint.history)} epochs, more than --epochs {recipe.epochs}: "
            "ask for more, or train anew with --force."
        )


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep a run directory, made if need be, to this process; what was made and stays empty is removed.

    Raises:
        RunError: another process trains into it, or it cannot be written.
    """
    try:
        made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        descriptor = _take_lock(directory)
    except BlockingIOError:
        raise RunError(
            f"{directory} is being trained into by another process: wait for it, or choose another --name."
        ) from None
    except OSError as error:
        raise RunError(
            f"{directory} cannot be written ({error.strerror}): name another folder by --runs-dir."
        ) from error
    try:
        yield
    finally:
        (directory / LOCK_FILE).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _take_lock(directory: Path) -> int:
    path = directory / LOCK_FILE
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file since it was opened here: then the lock is on nothing.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _discard_files_for_people(directory: Path) -> None:
    """Delete what tells of an earlier run; its checkpoint is replaced whole."""
    for name in (RECIPE_FILE, HISTORY_FILE, CURVES_FILE, CONFUSION_FILE, MISTAKES_FILE, REPORT_FILE):
        (directory / name).unlink(missing_ok=True)


def is_run(directory: Path) -> bool:
    """Say whether a directory holds the checkpoint of a run."""
    return (directory / CHECKPOINT_FILE).is_file()


def _csv(history: tuple[Epoch, ...]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Epoch)])
    for epoch in history:
        writer.writerow(["" if value is None else f"{value:.6g}" for value in astuple(epoch)])
    return text.getvalue()
