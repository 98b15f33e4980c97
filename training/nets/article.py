"""The article's network (its section 4.2), layer for layer, with the initial weights that Keras would draw."""

from torch import nn

from training.errors import RecipeError


def article_cnn(*, classes: int, size: int, dropout: float) -> nn.Sequential:
    """Two convolutions and two dense layers: 167,562 parameters for 32×32 images and 10 classes.

    Convolutions have no padding, as is Keras' default: 32 → 30 → 15 → 13 → 6 pixels a side.
    """
    side = ((size - 2) // 2 - 2) // 2
    if side < 1:
        raise RecipeError(f"--size: article_cnn needs at least 10 pixels a side, not {size}.")
    network = nn.Sequential(
        nn.Conv2d(3, 32, kernel_size=3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * side * side, 64),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(64, classes),
    )
    network.apply(_initialise_as_keras)
    return network


def _initialise_as_keras(module: nn.Module) -> None:
    """Glorot-uniform weights and zero biases (Glorot & Bengio 2010); PyTorch's own default is narrower."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
