"""How far a model's answers can be trusted: what a bundle's manifest says of its probabilities.

Four records, measured once on images that the model was not trained on: calibration, label sets with a promised
coverage, a threshold for images unlike all classes, and what the model's inputs and answers look like when all is
well. Only records: `training/trust/fitted.py` computes them, and nothing here sees a model or an image.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

BINS = 15
"""Of both calibration errors."""


class Record(BaseModel):
    """Immutable, and an unknown field is an error: a misspelt promise is no promise."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ProbabilityFigures(Record):
    """How far probabilities are from what happened, on labelled images."""

    calibration_error: float = Field(
        ge=0,
        le=1,
        description="Expected calibration error: images fall into 15 bins of equal width by the probability of their "
        "likeliest label; the mean over images of |accuracy - mean probability| of their bin.",
    )
    adaptive_error: float = Field(ge=0, le=1, description="The same with 15 bins of equally many images.")
    chance_error: float = Field(
        ge=0,
        le=1,
        description="Mean calibration_error that a perfectly calibrated model with these very probabilities shows on "
        "so many images: what is below or about it is as good as none.",
    )
    chance_error_95: float = Field(ge=0, le=1, description="95 % quantile of the same.")
    negative_log_likelihood: float = Field(ge=0, description="Mean of -log(probability of the true label), nats.")
    brier_score: float = Field(
        ge=0, le=2, description="Mean squared distance from the true label's one-hot vector, summed over classes."
    )


class Calibration(Record):
    """The temperature T of `softmax(logits / T)`, a constant of the graph, and what it is good for."""

    temperature: float = Field(gt=0, description="T in the graph; 1 leaves the network's own probabilities.")
    fitted_temperature: float = Field(gt=0, description="T with the least negative log-likelihood on `fitted_on`.")
    standard_error: float | None = Field(
        default=None, ge=0, description="Of fitted_temperature; null where the images do not tell."
    )
    note: str = Field(default="", description="Why `temperature` is not the fitted one, if it is not.")
    fitted_on: str = Field(description="Which images, for people.")
    fitted_images: int = Field(ge=1)
    measured_on: str = Field(
        description="Which images `before` and `after` are of; no T met the images it was fitted on."
    )
    measured_images: int = Field(ge=1)
    before: ProbabilityFigures = Field(description="At T = 1.")
    after: ProbabilityFigures = Field(description="At the temperature.")


class LabelSet(Record):
    """The rule for a set of labels which holds the true one with a promised probability, and how it did."""

    coverage: float = Field(gt=0, lt=1, description="The promised share of images whose set holds the true label.")
    threshold: float = Field(
        ge=0,
        le=1,
        description="The set: every label at least this probable, and the likeliest in any case. 0 where there were "
        "too few images for the promise: then all labels.",
    )
    measured_coverage: float = Field(ge=0, le=1, description="Share of the measured images whose set held it.")
    mean_size: float = Field(ge=1, description="Labels in a set, mean over the measured images.")


class Conformal(Record):
    """Split conformal prediction with the score 1 - p(true label) (Sadinle, Lei, Wasserman 2019).

    The promise holds on average over images like those of `fitted_on`, in any order; not for each class or image.
    """

    score: Literal["one-minus-probability"] = "one-minus-probability"
    fitted_on: str
    fitted_images: int = Field(ge=1)
    measured_on: str = Field(description="No threshold met the images it was fitted on.")
    measured_images: int = Field(ge=1)
    sets: tuple[LabelSet, ...] = Field(min_length=1, description="By rising coverage.")


class EnergyThreshold(Record):
    """A bound on the energy: above it an image is taken for none of the classes."""

    kept: float = Field(gt=0, lt=1, description="Share of images of the classes that are to stay below.")
    energy: float = Field(description="The bound, nats.")
    measured_kept: float = Field(ge=0, le=1, description="Share of the measured images that did.")


class Unfamiliar(Record):
    """How well images that are none of the classes were told apart from those of the test."""

    data: str
    images: int = Field(ge=1)
    auroc: float = Field(
        ge=0, le=1, description="Probability that one of them has the higher energy than an image of the classes."
    )
    auroc_of_probability: float = Field(
        ge=0, le=1, description="The same with the likeliest label's probability, lower for unfamiliar, as score."
    )
    noticed: tuple[float, ...] = Field(description="Share of them above each threshold, in the order of those.")


class OutOfDistribution(Record):
    """The energy score, `-T * logsumexp(logits / T)` (Liu et al. 2020), nats: low for what the model knows."""

    score: Literal["energy"] = "energy"
    output: Literal["energy"] = Field(default="energy", description="The graph's output with it, float32 [N].")
    fitted_on: str
    fitted_images: int = Field(ge=1)
    thresholds: tuple[EnergyThreshold, ...] = Field(min_length=1, description="By rising share kept.")
    unfamiliar: tuple[Unfamiliar, ...] = ()


class Histogram(Record):
    """Counts of a quantity between edges; a bin holds its lower edge, and the outer ones all that lies beyond them."""

    edges: tuple[float, ...] = Field(min_length=2, description="Rising, one more than counts.")
    counts: tuple[int, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _edges_fit(self) -> Self:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.counts)} counts need {len(self.counts) + 1} edges, not {len(self.edges)}")
        if any(low >= high for low, high in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError("edges must rise")
        if min(self.counts) < 0:
            raise ValueError("a count is negative")
        return self


class Reference(Record):
    """What goes in and comes out when all is well, to compare the traffic with.

    Brightness and contrast are of the uint8 pixels that the graph takes; luma is 0.299 R + 0.587 G + 0.114 B.
    """

    data: str
    images: int = Field(ge=1)
    confidence: Histogram = Field(description="Probability of the likeliest label, 0-1, at the graph's temperature.")
    entropy: Histogram = Field(description="Entropy of the probabilities as a share of log(classes), 0-1.")
    predicted: tuple[int, ...] = Field(description="How often each label was the likeliest, in the labels' order.")
    brightness: Histogram = Field(description="Mean luma of an image, 0-255.")
    contrast: Histogram = Field(description="Standard deviation of an image's luma, 0-127.5.")
    width: Histogram | None = Field(default=None, description="Upright width of the encoded image, pixels.")
    height: Histogram | None = Field(default=None, description="Upright height of the encoded image, pixels.")
    size_bytes: Histogram | None = Field(
        default=None, description="Bytes of the encoded image; null where the data came as pixels, not as files."
    )
