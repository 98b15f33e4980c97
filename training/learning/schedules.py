"""Schedules: how large a step is at each moment of a training, as a share of the recipe's rate."""

import math

from training.recipes import Recipe


def rate_at(step: int, steps: int, recipe: Recipe) -> float:
    """Return the factor on every learning rate at a step.

    Args:
        step: from 0 to `steps` - 1.
        steps: how many there are in the whole run.
        recipe: `schedule` and `warmup` are read.

    Returns:
        1 for `constant`. For the others a straight line from nearly 0 to 1 over the first `warmup` of the steps, and
        then down to nearly 0: a straight line for `one-cycle` (Smith & Topin 2017), half a cosine for `cosine`
        (Loshchilov & Hutter 2016).
    """
    if recipe.schedule == "constant":
        return 1.0
    rising = round(recipe.warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    left = 1 - (step - rising) / (steps - rising)
    return left if recipe.schedule == "one-cycle" else (1 - math.cos(math.pi * left)) / 2
