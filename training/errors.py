"""Every way that training can fail through a fault a person can mend.

Each carries one sentence that names the file, folder or field and says what to do; `training/cli.py` prints it and
exits with 2. Nothing here reaches HTTP.
"""

from app.errors import ConvoyError


class DataError(ConvoyError):
    """The images on disk are not a data set that can be trained on."""

    code = "bad_data"


class FetchError(ConvoyError):
    """A download failed, or what came is not what was published."""

    code = "fetch_failed"


class RecipeError(ConvoyError):
    """A knob has an unknown name or an impossible value."""

    code = "bad_recipe"


class RunError(ConvoyError):
    """A run directory or its checkpoint cannot be used as asked."""

    code = "bad_run"


class DivergedError(ConvoyError):
    """The loss is no longer a number."""

    code = "diverged"


class WeightsError(ConvoyError):
    """Published weights do not fit the network."""

    code = "bad_weights"


class ExportError(ConvoyError):
    """The exported graph does not answer as the network does, so no bundle is written."""

    code = "export_refused"


class SurgeryError(ConvoyError):
    """A graph is not built so that its backbone can be told from its head."""

    code = "surgery_refused"


class GraphError(ConvoyError):
    """An ONNX file cannot be read, or not everything in it can be counted."""

    code = "bad_graph"


class CompressError(ConvoyError):
    """A model cannot be compressed as asked, or loses more by it than was allowed, so no bundle is written."""

    code = "compress_refused"


class ClaimError(ConvoyError):
    """Runs do not hold what a recipe claims, or cannot be compared with it."""

    code = "claim_not_held"
