"""Recipes with a claim: one module each, whose docstring says what its recipe attains, where, how fast and how often.

`convoy-train bench NAME` trains by it again and holds the claim against what comes out; `convoy-train train --recipe
NAME` begins from it. A new one is a module with `RECIPE` and `CLAIM`, and its name in `MODULES`.
"""

from training.claims import article, cifar10
from training.claims.claim import Claim
from training.errors import RecipeError
from training.recipes import Recipe

MODULES = (article, cifar10)
CLAIMED: dict[str, tuple[Recipe, Claim]] = {
    module.__name__.rpartition(".")[2].replace("_", "-"): (module.RECIPE, module.CLAIM) for module in MODULES
}


def named(name: str) -> tuple[Recipe, Claim]:
    """Return a recipe by name, with its claim.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in CLAIMED:
        raise RecipeError(f"There is no recipe '{name}': there are {', '.join(sorted(CLAIMED))}.")
    return CLAIMED[name]


def named_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        RecipeError: there is none of that name.
    """
    return named(name)[0]
