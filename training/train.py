"""Train a network by a recipe.

The article's network and recipe attain 65.01 % on the 10,000 test images of CIFAR-10 after 10 epochs on its 50,000
training images (JPEG copies at quality 75; n=1, seed 0, three runs bit for bit alike), in 5.4 minutes on 2 CPU cores
that other work shared, using torch==2.13.0. The fastest epoch took 20.8 s, 2,400 images/s.

Reads from top to bottom: the run, what learns, one epoch, one batch, the measurement. Everything random comes from
(seed, epoch), so a resumed run needs no generator's state to end in the same weights. Which weights are kept is never
chosen by the test images, which would spoil them as a measurement: the last ones are, or those that were best on a
validation part of the training images.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, one_hot

from training.data.arrays import Split
from training.data.augment import alternate, blend, draw_blends, draw_moves, move
from training.data.balance import class_weights, epoch_order
from training.errors import DivergedError, RecipeError
from training.learning.averages import Average
from training.learning.devices import deterministic, keep_memory
from training.learning.freezing import prepare
from training.learning.optimizers import make_optimizer
from training.learning.ranks import ALONE, Ranks
from training.learning.schedules import rate_at
from training.nets import build
from training.progress import counting
from training.recipes import Recipe
from training.runs import Checkpoint, Epoch, best_epoch, in_vain, write_checkpoint
from training.servable import Normalise

MEASURE_BATCH = 500
MEASURE_PIXELS = MEASURE_BATCH * 64 * 64
"""Of a batch at most: 500 images of 224×224 would take 6 GB for one layer of VGG."""
NOTE_EVERY_S = 0.5
"""A note asks the device for a number, and so waits for all that was given it to do: not at every step."""
FIRST_LOOK = 5000
"""Images that a network may set its first weights by; airbench's number."""
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Start:
    """What a run starts from: fresh, from given weights, or with the checkpoint of its last finished epoch."""

    recipe: Recipe
    classes: tuple[str, ...]
    data: str
    data_digest: str
    command: str
    hardware: str
    checkpoint: Checkpoint | None = None
    weights: dict[str, Tensor] | None = None
    """A state of the recipe's network to begin with, instead of a fresh draw."""
    begun_from: str = ""
    """Where these are from, for people."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """Another classifier whose answers are learnt beside the labels (Hinton et al. 2015)."""

    probabilities: Callable[[Tensor], Tensor]
    """From planes, float32 `[n, 3, size, size]` in 0-255, to float32 `[n, classes]`."""
    weight: float = 0.9
    """Of the teacher's answers in the loss; the labels have the rest."""
    temperature: float = 4.0


@runtime_checkable
class SetByData(Protocol):
    """A network whose first weights depend on what it will see."""

    def initialise(self, images: Tensor) -> None:
        """Look at float32 `[n, 3, size, size]`, normalised training images."""


# ---------------------------------------------------------------- the run


def check_network(recipe: Recipe, classes: int) -> None:
    """Build the recipe's network once, without memory for its weights, before anything is decoded for it.

    Raises:
        RecipeError: there is no such network, or it cannot be trained by this recipe.
    """
    with torch.device("meta"):
        network = build(recipe.network, classes=classes, size=recipe.size, dropout=recipe.dropout)
    if recipe.batch_size // recipe.accumulate == 1 and any(
        isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules()
    ):
        raise RecipeError(
            f"--batch-size {recipe.batch_size}: {recipe.network} normalises over each batch, and needs two images or "
            "more in it."
        )


def train(
    directory: Path,
    start: Start,
    train_split: Split,
    test_split: Split,
    device: torch.device,
    validation_split: Split | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Epoch]:
    """Train to the recipe's last epoch, or until it has gone on in vain for long enough.

    After each epoch a checkpoint is written and then the epoch's figures are yielded.

    Raises:
        DivergedError: the loss is no longer a number; the checkpoint of the epoch before is left as it is.
    """
    recipe = start.recipe
    deterministic()
    keep_memory()
    network = fresh_network(recipe, len(start.classes), train_split)
    if start.weights is not None:
        network.load_state_dict(start.weights)
    learner = Learner(network.to(device), len(start.classes), recipe, device, ranks=ranks)
    history: tuple[Epoch, ...] = ()
    best: dict[str, Tensor] = {}
    if start.checkpoint is not None:
        learner.restore(start.checkpoint)
        history, best = start.checkpoint.history, start.checkpoint.best
    while len(history) < recipe.epochs and not in_vain(history, recipe):
        # Each process has measured, and rounding may differ: one that stopped while the others go on would hold them.
        epoch = ranks.share(learner.epoch(len(history) + 1, train_split, test_split, validation_split))
        history = (*history, epoch)
        if recipe.patience and best_epoch(history) == epoch.epoch:
            best = {name: value.detach().clone() for name, value in learner.answering().state_dict().items()}
        if ranks.first:
            write_checkpoint(
                directory,
                Checkpoint(
                    recipe=recipe,
                    classes=start.classes,
                    data=start.data,
                    data_digest=start.data_digest,
                    command=start.command,
                    hardware=start.hardware,
                    begun_from=start.begun_from,
                    history=history,
                    best=best,
                    **learner.state(),
                ),
            )
        yield epoch


def fit(
    network: nn.Module,
    classes: int,
    recipe: Recipe,
    train_split: Split,
    test_split: Split,
    device: torch.device,
    *,
    teacher: Teacher | None = None,
) -> Iterator[Epoch]:
    """Train a network that is there already, in place and without a run directory.

    The moving average, if the recipe has one, is what the network holds when the iterator is exhausted.

    Raises:
        DivergedError: the loss is no longer a number.
    """
    deterministic()
    keep_memory()
    torch.manual_seed(recipe.seed)
    learner = Learner(network.to(device), classes, recipe, device, teacher=teacher)
    for number in range(1, recipe.epochs + 1):
        yield learner.epoch(number, train_split, test_split)
    if learner.average is not None:
        network.load_state_dict(learner.average.network.state_dict())


def fresh_network(recipe: Recipe, classes: int, split: Split) -> nn.Module:
    """Build the recipe's network with weights drawn by its seed, and where it wants to see images first, show it some.

    Raises:
        RecipeError: there is no such network, or the image is too small for it.
    """
    torch.manual_seed(recipe.seed)
    network = build(recipe.network, classes=classes, size=recipe.size, dropout=recipe.dropout)
    if isinstance(network, SetByData):
        network.initialise(first_look(split, recipe))
    return network


def first_look(split: Split, recipe: Recipe) -> Tensor:
    """Return images spread over a split, normalised: float32 `[n, 3, size, size]`."""
    places = np.linspace(0, len(split.images) - 1, min(FIRST_LOOK, len(split.images))).round().astype(int)
    images: Tensor = Normalise(recipe)(torch.from_numpy(split.images[places]).permute(0, 3, 1, 2).float())
    return images


# ---------------------------------------------------------------- what learns


@dataclass(slots=True)
class Learner:
    """A network on its way: with its optimizer, the moving average, and what scales half-precision gradients."""

    network: nn.Module
    classes: int
    recipe: Recipe
    device: torch.device
    teacher: Teacher | None = None
    ranks: Ranks = ALONE
    optimizer: torch.optim.Optimizer = field(init=False)
    average: Average | None = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    normalise: Normalise = field(init=False)
    trained: nn.Module = field(init=False)
    """The network as gradients pass it: wrapped where other processes train with it."""
    base_rates: list[float] = field(init=False)

    def __post_init__(self) -> None:
        if self.recipe.precision == "fp16" and self.device.type == "cpu":
            raise RecipeError("--precision fp16: only a GPU computes in it; use bf16 on a CPU.")
        if self.recipe.frozen_epochs and self.ranks.size > 1:
            raise RecipeError("--frozen-epochs: what learns cannot change where several processes train; use one.")
        if self.recipe.batch_size < 2 * self.ranks.size * self.recipe.accumulate and self.ranks.size > 1:
            raise RecipeError(
                f"--batch-size {self.recipe.batch_size}: {self.ranks.size} processes need two images or more each"
                + (f" for each of {self.recipe.accumulate} parts" if self.recipe.accumulate > 1 else "")
                + ", so give a larger one."
            )
        if self.recipe.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(self.network, self.recipe)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = Average(self.network, self.recipe.ema) if self.recipe.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.recipe.precision == "fp16")
        self.normalise = Normalise(self.recipe).to(self.device)
        self.trained = self.ranks.wrap(self.network)

    def state(self) -> dict[str, Any]:
        """Return the checkpoint's fields that hold what was learnt."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": {} if self.average is None else self.average.state(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint was written."""
        self.network.load_state_dict(checkpoint.network)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.scaler.load_state_dict(checkpoint.scaler)
        if self.average is not None:
            self.average.restore(checkpoint.average)

    def answering(self) -> nn.Module:
        """Return the network that would be served: the moving average where there is one."""
        return self.network if self.average is None else self.average.network

    def set_rate(self, factor: float) -> None:
        """Let the next step be this share of each group's own rate."""
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

    def normalised(self, planes: Tensor) -> Tensor:
        """Bring planes in 0-255 into the network's range and layout."""
        ready: Tensor = self.normalise(planes)
        return ready.contiguous(memory_format=torch.channels_last) if self.recipe.channels_last else ready

    def autocast(self) -> AbstractContextManager[None]:
        """Compute in the recipe's precision."""
        dtype = PRECISIONS.get(self.recipe.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def epoch(self, number: int, train_split: Split, test_split: Split, validation_split: Split | None = None) -> Epoch:
        """Pass over the training images once and measure."""
        begun = time.perf_counter()
        try:
            train_loss, train_accuracy = train_epoch(self, train_split, number)
        except torch.OutOfMemoryError as error:
            raise RecipeError(
                f"--batch-size {self.recipe.batch_size}: the GPU has no memory for it; give a smaller one, or "
                f"--accumulate {2 * self.recipe.accumulate} to pass it in parts."
            ) from error
        seconds = time.perf_counter() - begun
        answering = self.answering()
        test_loss, test_accuracy = measure(answering, test_split, self.recipe, self.device)
        _finite(test_loss, number)
        validation_loss = validation_accuracy = None
        if validation_split is not None:
            validation_loss, validation_accuracy = measure(answering, validation_split, self.recipe, self.device)
        return Epoch(
            epoch=number,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            seconds=seconds,
            images_per_s=len(train_split.images) / seconds,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
        )


# ---------------------------------------------------------------- one epoch


def train_epoch(learner: Learner, split: Split, number: int) -> tuple[float, float]:
    """Pass over all images once, in an order of this epoch's own.

    Returns:
        Mean loss and accuracy over the epoch, each image counted as it was met. Where images are blended, the label
        with the greater share is the one to be found.

    Raises:
        DivergedError: the loss is not a finite number.
    """
    recipe, ranks = learner.recipe, learner.ranks
    order_generator, augment_generator = epoch_generators(recipe.seed, number)
    labels = torch.from_numpy(split.labels)
    order = epoch_order(labels, recipe, order_generator)
    mirrored = alternate(len(labels), recipe, number)
    weight = class_weights(labels, learner.classes).to(learner.device) if recipe.balance == "weights" else None
    steps = batches(order, recipe.batch_size, fewest=2 * ranks.size)
    prepare(learner.network, learner.optimizer, recipe, number)
    # Summed where the network is: asking for a number at every step would make a GPU wait for it.
    totals = torch.zeros(2, device=learner.device)
    seen, mine, begun = 0, 0, time.perf_counter()
    note, next_note = "", begun
    with counting(f"Epoch {number}/{recipe.epochs}", len(order), recipe.epochs - number, shown=ranks.first) as advance:
        for step, chosen in enumerate(steps):
            learner.set_rate(rate_at((number - 1) * len(steps) + step, recipe.epochs * len(steps), recipe))
            planes, targets = make_batch(learner, split, chosen, augment_generator, mirrored)
            totals += train_step(learner, planes, targets, weight, len(chosen))
            seen, mine = seen + len(chosen), mine + len(planes)
            if time.perf_counter() >= next_note:
                # Of this process's part alone: clocks differ, and what all add up they must add up at the same step.
                loss, right = totals.tolist()
                mean_loss = _finite(loss / mine, number)
                now = time.perf_counter()
                note = f"{seen / (now - begun):,.0f} images/s  loss {mean_loss:.3f}  accuracy {right / mine:.1%}"
                next_note = now + NOTE_EVERY_S
            advance(len(chosen), note=note)
    loss, right = ranks.total(totals).tolist()
    return _finite(loss / seen, number), right / seen


def epoch_generators(seed: int, number: int) -> tuple[torch.Generator, torch.Generator]:
    """Return this epoch's generators for order and augmentation, and set PyTorch's own, which dropout draws from."""
    order, augmentation, dropout = np.random.SeedSequence([seed, number]).generate_state(3).tolist()
    torch.manual_seed(dropout)
    return torch.Generator().manual_seed(order), torch.Generator().manual_seed(augmentation)


def batches(order: Tensor, size: int, fewest: int = 2) -> list[Tensor]:
    """Cut an epoch's order, int64 `[n]`, into batches of `size`.

    Fewer than `fewest` left over join the batch before: batch normalisation cannot be trained on a single image, and
    every process needs one.
    """
    cut = list(torch.split(order, min(size, len(order))))
    if size > 1 and len(cut) > 1 and len(cut[-1]) < fewest:
        cut[-2:] = [torch.cat(cut[-2:])]
    return cut


# ---------------------------------------------------------------- one batch


def make_batch(
    learner: Learner, split: Split, chosen: Tensor, generator: torch.Generator, mirrored: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Bring this process's part of a batch to the device, and change it as the recipe says.

    Draws for the whole batch, whichever part it is: processes that train together draw alike.

    Args:
        learner: recipe, device, classes and place among the processes are read.
        split: the training images.
        chosen: int64 `[n]`, the whole batch's places in the split.
        generator: a CPU generator, the same in every process.
        mirrored: bool, one for each image of the split, where the recipe decides it; see `alternate`.

    Returns:
        Planes float32 `[part, 3, size, size]` in 0-255; labels int64 `[part]`, or where images are blended their
        targets float32 `[part, classes]`.
    """
    recipe, mine = learner.recipe, learner.ranks.part(len(chosen))
    moves = draw_moves(len(chosen), recipe, generator, None if mirrored is None else mirrored[chosen])
    images, labels = take(split, chosen[mine], learner.device)
    planes = move(images, moves.part(mine), recipe)
    if not (recipe.mixup or recipe.cutmix):
        return planes, labels
    blends = draw_blends(len(chosen), recipe.size, recipe.size, recipe, generator).part(mine)
    images, partner_labels = take(split, chosen[blends.partners], learner.device)
    partners = move(images, moves.part(blends.partners), recipe)
    targets, partner_targets = (one_hot(each, learner.classes).float() for each in (labels, partner_labels))
    return blend(planes, partners, targets, partner_targets, blends)


def take(split: Split, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bring a batch to the device: images uint8 `[n, height, width, 3]`, labels int64 `[n]`."""
    indices = chosen.numpy()
    images, labels = torch.from_numpy(split.images[indices]), torch.from_numpy(split.labels[indices])
    return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def train_step(learner: Learner, planes: Tensor, targets: Tensor, weight: Tensor | None, count: int) -> Tensor:
    """Take one step by the mean loss of a batch of `count`, of which this process has a part.

    Returns:
        float32 `[2]`: the part's sum of losses, and how many images were classified rightly.
    """
    learner.optimizer.zero_grad()
    # A last batch of few images has fewer pieces: statistics over none of them would be no numbers.
    parts = max(1, min(learner.recipe.accumulate, count * learner.recipe.accumulate // learner.recipe.batch_size))
    pieces = list(zip(*(whole.tensor_split(parts) for whole in (planes, targets)), strict=True))
    totals = torch.zeros(2, device=learner.device)
    for number, (piece, wanted) in enumerate(pieces, start=1):
        with learner.ranks.gradients(learner.trained, together=number == len(pieces)):
            with learner.autocast():
                logits = learner.trained(learner.normalised(piece)).float()
            loss = loss_of(logits, wanted, piece, weight, learner)
            # The mean over processes is what they step by, so each gives its sum times their number.
            learner.scaler.scale(loss * (learner.ranks.size / count)).backward()  # type: ignore[no-untyped-call]
        labels = wanted if wanted.ndim == 1 else wanted.argmax(dim=1)
        totals += torch.stack([loss.detach(), (logits.detach().argmax(dim=1) == labels).sum()])
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    if learner.average is not None:
        learner.average.update(learner.network)
    return totals


def loss_of(logits: Tensor, targets: Tensor, planes: Tensor, weight: Tensor | None, learner: Learner) -> Tensor:
    """Return the sum of losses in nats, float32 scalar: cross-entropy with the labels and, if there is one, a teacher.

    The teacher's part is Hinton et al.'s (2015): the divergence of answers softened by a temperature, times its square.
    """
    smoothing = learner.recipe.label_smoothing
    loss = cross_entropy(logits, targets, weight=weight, label_smoothing=smoothing, reduction="sum")
    teacher = learner.teacher
    if teacher is None:
        return loss
    softened = (teacher.probabilities(planes).clamp_min(1e-12).log() / teacher.temperature).log_softmax(dim=1)
    answers = (logits / teacher.temperature).log_softmax(dim=1)
    divergence = kl_div(answers, softened, reduction="sum", log_target=True) * teacher.temperature**2
    return (1 - teacher.weight) * loss + teacher.weight * divergence


def _finite(loss: float, epoch: int) -> float:
    if not np.isfinite(loss):
        raise DivergedError(
            f"The loss is not a number any more in epoch {epoch}: lower --learning-rate; "
            "the checkpoint of the epoch before, if any, is untouched."
        )
    return loss


# ---------------------------------------------------------------- the measurement


def measure(network: nn.Module, split: Split, recipe: Recipe, device: torch.device) -> tuple[float, float]:
    """Return mean loss and accuracy over a split, in fp32, without augmentation or dropout."""
    logits = torch.cat(list(predict_logits(network, split, recipe, device)))
    labels = torch.from_numpy(split.labels)
    return cross_entropy(logits, labels).item(), (logits.argmax(dim=1) == labels).float().mean().item()


def predict_logits(network: nn.Module, split: Split, recipe: Recipe, device: torch.device) -> Iterator[Tensor]:
    """Yield logits float32 `[n, classes]`, on the CPU, batch by batch in the split's order."""
    normalise = Normalise(recipe).to(device)
    network.eval()
    with torch.inference_mode():
        batch = max(1, min(MEASURE_BATCH, MEASURE_PIXELS // recipe.size**2))
        for chosen in torch.split(torch.arange(len(split.images)), batch):
            images, _ = take(split, chosen, device)
            yield network(normalise(images.permute(0, 3, 1, 2).float())).cpu()
