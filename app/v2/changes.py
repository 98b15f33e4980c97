"""Loading and unloading as the protocol's clients ask for it: from the models directory, and from nowhere else."""

from collections.abc import Iterable

from app.errors import BadRequestError
from app.operations import Operations


async def load(operations: Operations, name: str, parameters: Iterable[str]) -> None:
    """Look at a model's folder again, in every process, and serve what it says.

    Raises:
        BadRequestError: a parameter brings a model or its configuration along; or the name is none.
        UnknownModelError, LoadFailedError, UnavailableError: as `Operations.load`.
    """
    for parameter in parameters:
        if parameter == "config" or parameter.startswith("file:"):
            raise BadRequestError(
                f"The parameter '{parameter[:80]}' is refused: models come from the models directory alone."
            )
    await operations.load(name)


async def unload(operations: Operations, name: str) -> None:
    """Take a model from service, in every process.

    Raises:
        BadRequestError, UnknownModelError, UnavailableError: as `Operations.unload`.
    """
    await operations.unload(name)
