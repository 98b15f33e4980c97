"""Ask a Convoy service from Python: `convoy.Client`, and `convoy.AsyncClient` for asyncio.

`convoy.Client("http://127.0.0.1:8000").predict("cat.jpg").label` is all it takes; docs/client.md has the rest.
"""

from convoy.aio import AsyncClient
from convoy.client import Client
from convoy.errors import (
    AuthenticationError,
    BadAnswerError,
    BadImageError,
    ConvoyError,
    DeadlineError,
    OverloadedError,
    RequestError,
    ServerError,
    TooLargeError,
    UnavailableError,
    UnknownModelError,
    UnreachableError,
)
from convoy.images import ImageLike
from convoy.results import Label, Model, Prediction, Readiness

__all__ = [
    "AsyncClient",
    "AuthenticationError",
    "BadAnswerError",
    "BadImageError",
    "Client",
    "ConvoyError",
    "DeadlineError",
    "ImageLike",
    "Label",
    "Model",
    "OverloadedError",
    "Prediction",
    "Readiness",
    "RequestError",
    "ServerError",
    "TooLargeError",
    "UnavailableError",
    "UnknownModelError",
    "UnreachableError",
]
