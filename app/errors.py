"""Every way a request or a start can fail, with the HTTP status and the code a client sees.

Owns the sentences' shape (one sentence, naming the thing and what to do) and nothing else: whoever detects a fault
raises one of these, and `app/http/errors.py` alone turns them into responses.
"""

from typing import ClassVar


class ConvoyError(Exception):
    """A fault with one sentence for a person; `status` and `code` say what an HTTP client gets."""

    status: ClassVar[int] = 500
    closes: ClassVar[bool] = False
    """Whether the connection must end with the answer, because what is left of the request cannot be read."""
    code: str = "internal"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code

    def prefixed(self, where: str) -> "ConvoyError":
        """Return the same fault, its sentence led by the place where it happened (`images[3]: …`)."""
        return type(self)(f"{where}: {self.message}", code=self.code)


class AbandonedError(Exception):
    """The client left before its body was read or its answer was ready; there is nobody to tell."""


class BadRequestError(ConvoyError):
    """The request is malformed: wrong JSON, form, parameter or header."""

    status = 400
    code = "bad_request"


class UnauthorizedError(ConvoyError):
    """The request needs a key, and brings none or an unknown one."""

    status = 401
    code = "auth"


class ForbiddenError(ConvoyError):
    """The request's key is known, and not for this."""

    status = 403
    code = "auth"


class UnknownModelError(ConvoyError):
    """No model, or no version of it, has that name."""

    status = 404
    code = "unknown_model"


class TooLargeError(ConvoyError):
    """An image, or the number of images, is beyond a limit of the service."""

    status = 413
    code = "too_large"


class BodyTooLargeError(TooLargeError):
    """The body is beyond the limit, and not all of it was read."""

    closes = True
    code = "body_too_large"


class UnsupportedMediaTypeError(ConvoyError):
    """The Content-Type or Content-Encoding is not one that the route takes."""

    status = 415
    code = "unsupported_media_type"


class BadImageError(ConvoyError):
    """The bytes are not an image that can be decoded."""

    status = 422
    code = "bad_image"


class QueueFullError(ConvoyError):
    """The service holds as much work as it may; `retry_after_s` says when to come back."""

    status = 429
    code = "queue_full"

    def __init__(self, message: str, *, code: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class NotOfferedError(ConvoyError):
    """The protocol has it, this service does not."""

    status = 501
    code = "not_offered"


class UnavailableError(ConvoyError):
    """The model is loading or failed, or the service is draining."""

    status = 503
    code = "unavailable"


class DeviceLostError(UnavailableError):
    """The device that a model runs on is gone for this process, which has to be replaced."""

    code = "device_lost"


class LoadFailedError(ConvoyError):
    """A version that somebody asked for could not be loaded; what was served before still is."""

    status = 409
    code = "load_failed"


class DeadlineError(ConvoyError):
    """The request's deadline passed before its answer was ready."""

    status = 504
    code = "deadline"


class InferenceError(ConvoyError):
    """The session failed on this request's rows."""

    status = 500
    code = "inference_failed"


class BundleError(ConvoyError):
    """A bundle on disk is incomplete, altered, or does not reproduce its golden answers."""

    code = "bad_bundle"


class SettingsError(ConvoyError):
    """A setting is unknown or has an impossible value."""

    code = "bad_setting"


class RuntimeMissingError(ConvoyError):
    """The environment lacks a usable ONNX Runtime."""

    code = "no_runtime"
