"""Train a network by a recipe.

The article's network and recipe attain 65.01 % on the 10,000 test images of CIFAR-10 after 10 epochs on its 50,000
training images (JPEG copies at quality 75; n=1, seed 0, three runs bit for bit alike), in 5.4 minutes on 2 CPU cores
that other work shared, using torch==2.13.0. The fastest epoch took 20.8 s, 2,400 images/s.

Reads from top to bottom: what a run starts from, the epochs, one epoch, the measurement. Everything random comes from
(seed, epoch), so a resumed run needs no generator's state to end in the same weights. The last weights are kept, not
the best on the test images, as in the article: choosing by test accuracy would spoil it as a measurement.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from training.augment import augment
from training.data import Split
from training.devices import deterministic
from training.errors import DivergedError, RecipeError
from training.nets import build
from training.progress import counting
from training.recipes import Recipe
from training.runs import Checkpoint, Epoch, write_checkpoint
from training.servable import Normalise

MEASURE_BATCH = 500
STEPS_BETWEEN_NOTES = 20
SGD_MOMENTUM = 0.9
ADAM_EPSILON = 1e-7
"""Keras' value; PyTorch's is 1e-8. Keras applies it without PyTorch's bias correction: early steps differ a little."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a run starts from: fresh, or with the checkpoint of its last finished epoch."""

    recipe: Recipe
    classes: tuple[str, ...]
    data: str
    data_digest: str
    command: str
    hardware: str
    checkpoint: Checkpoint | None = None


# ---------------------------------------------------------------- the run


def check_network(recipe: Recipe, classes: int) -> None:
    """Build the recipe's network once, without memory for its weights, before anything is decoded for it.

    Raises:
        RecipeError: there is no such network, or it cannot be trained by this recipe.
    """
    with torch.device("meta"):
        network = build(recipe.network, classes=classes, size=recipe.size, dropout=recipe.dropout)
    if recipe.batch_size == 1 and any(
        isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules()
    ):
        raise RecipeError(
            f"--batch-size 1: {recipe.network} normalises over each batch, and needs two images or more in it."
        )


def train(
    directory: Path, start: Start, train_split: Split, test_split: Split, device: torch.device
) -> Iterator[Epoch]:
    """Train to the recipe's last epoch, writing a checkpoint after each and then yielding its figures.

    Raises:
        DivergedError: the loss is no longer a number; the checkpoint of the epoch before is left as it is.
    """
    recipe = start.recipe
    deterministic()
    torch.manual_seed(recipe.seed)
    network = build(recipe.network, classes=len(start.classes), size=recipe.size, dropout=recipe.dropout).to(device)
    optimizer = make_optimizer(network, recipe)
    history: tuple[Epoch, ...] = ()
    if start.checkpoint is not None:
        network.load_state_dict(start.checkpoint.network)
        optimizer.load_state_dict(start.checkpoint.optimizer)
        history = start.checkpoint.history
    for number in range(len(history) + 1, recipe.epochs + 1):
        begun = time.perf_counter()
        train_loss, train_accuracy = train_epoch(network, optimizer, train_split, recipe, number, device)
        seconds = time.perf_counter() - begun
        test_loss, test_accuracy = measure(network, test_split, recipe, device)
        _finite(test_loss, number)
        images_per_s = len(train_split.images) / seconds
        epoch = Epoch(number, train_loss, train_accuracy, test_loss, test_accuracy, seconds, images_per_s)
        history = (*history, epoch)
        write_checkpoint(
            directory,
            Checkpoint(
                recipe=recipe,
                classes=start.classes,
                data=start.data,
                data_digest=start.data_digest,
                command=start.command,
                hardware=start.hardware,
                history=history,
                network=network.state_dict(),
                optimizer=optimizer.state_dict(),
            ),
        )
        yield epoch


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the recipe's optimizer."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), lr=recipe.learning_rate, momentum=SGD_MOMENTUM)
    return torch.optim.Adam(network.parameters(), lr=recipe.learning_rate, eps=ADAM_EPSILON)


# ---------------------------------------------------------------- one epoch


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    recipe: Recipe,
    number: int,
    device: torch.device,
) -> tuple[float, float]:
    """Pass over all images once, in an order of this epoch's own.

    Returns:
        Mean loss and accuracy over the epoch, each image counted as it was met.

    Raises:
        DivergedError: the loss is not a finite number.
    """
    order_generator, augment_generator = epoch_generators(recipe.seed, number)
    order = torch.randperm(len(split.images), generator=order_generator)
    normalise = Normalise(recipe).to(device)
    network.train()
    # Summed where the network is: asking for a number at every step would make a GPU wait for it.
    total_loss, total_right = torch.zeros((), device=device), torch.zeros((), device=device)
    seen, begun = 0, time.perf_counter()
    with counting(f"Epoch {number}/{recipe.epochs}", len(order), recipe.epochs - number) as advance:
        for step, chosen in enumerate(batches(order, recipe.batch_size)):
            images, labels = take(split, chosen, device)
            logits = network(normalise(augment(images, recipe, augment_generator)))
            loss = cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total_loss += loss.detach() * len(chosen)
            total_right += (logits.detach().argmax(dim=1) == labels).sum()
            seen += len(chosen)
            if step % STEPS_BETWEEN_NOTES == 0 or seen == len(order):
                mean_loss = _finite(total_loss.item() / seen, number)
                rate = seen / (time.perf_counter() - begun)
                note = f"{rate:,.0f} images/s  loss {mean_loss:.3f}  accuracy {total_right.item() / seen:.1%}"
            advance(len(chosen), note=note)
    return mean_loss, total_right.item() / seen


def epoch_generators(seed: int, number: int) -> tuple[torch.Generator, torch.Generator]:
    """Return this epoch's generators for order and augmentation, and set PyTorch's own, which dropout draws from."""
    order, augmentation, dropout = np.random.SeedSequence([seed, number]).generate_state(3).tolist()
    torch.manual_seed(dropout)
    return torch.Generator().manual_seed(order), torch.Generator().manual_seed(augmentation)


def batches(order: Tensor, size: int) -> list[Tensor]:
    """Cut an epoch's order, int64 `[n]`, into batches of `size`.

    A single image left over joins the batch before it: batch normalisation cannot be trained on one.
    """
    cut = list(torch.split(order, min(size, len(order))))
    if size > 1 and len(cut) > 1 and len(cut[-1]) == 1:
        cut[-2:] = [torch.cat(cut[-2:])]
    return cut


def take(split: Split, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bring a batch to the device: images uint8 `[n, height, width, 3]`, labels int64 `[n]`."""
    indices = chosen.numpy()
    images, labels = torch.from_numpy(split.images[indices]), torch.from_numpy(split.labels[indices])
    return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _finite(loss: float, epoch: int) -> float:
    if not np.isfinite(loss):
        raise DivergedError(
            f"The loss is not a number any more in epoch {epoch}: lower --learning-rate; "
            "the checkpoint of the epoch before, if any, is untouched."
        )
    return loss


# ---------------------------------------------------------------- the measurement


def measure(network: nn.Module, split: Split, recipe: Recipe, device: torch.device) -> tuple[float, float]:
    """Return mean loss and accuracy over a split, without augmentation or dropout."""
    logits = torch.cat(list(predict_logits(network, split, recipe, device)))
    labels = torch.from_numpy(split.labels)
    return cross_entropy(logits, labels).item(), (logits.argmax(dim=1) == labels).float().mean().item()


def predict_logits(network: nn.Module, split: Split, recipe: Recipe, device: torch.device) -> Iterator[Tensor]:
    """Yield logits float32 `[n, classes]`, on the CPU, batch by batch in the split's order."""
    normalise = Normalise(recipe).to(device)
    network.eval()
    with torch.inference_mode():
        for chosen in torch.split(torch.arange(len(split.images)), MEASURE_BATCH):
            images, _ = take(split, chosen, device)
            yield network(normalise(images.permute(0, 3, 1, 2).float())).cpu()
