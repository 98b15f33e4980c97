"""The figures of one run, computed from its samples.

Two rules, for both loops: latencies and counts are of the requests that were *due* in the measured time, whose answers
are awaited beyond it; a rate is of the answers that *arrived* in it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from app.bench.samples import UNANSWERED, Samples

BUSY_SHARE = 0.9
LAG_MS = 2.0
LAG_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Latency:
    """Quantiles in milliseconds: observed values, by nearest rank."""

    mean: float
    p50: float
    p90: float
    p99: float
    p99_9: float
    max: float

    @classmethod
    def of(cls, milliseconds: NDArray[np.float64]) -> Self | None:
        """Return the quantiles of some latencies; None of none."""
        if not milliseconds.size:
            return None
        quantiles = np.quantile(milliseconds, [0.5, 0.9, 0.99, 0.999, 1.0], method="inverted_cdf")
        return cls(*(round(float(value), 3) for value in (milliseconds.mean(), *quantiles)))


@dataclass(frozen=True, slots=True)
class Strain:
    """How hard the generator itself had it."""

    busy_share: float
    """Share of one processor that its event loop took."""
    lag_p99_ms: float
    """How late the loop came to work that was due: this much may be in the latencies."""


@dataclass(frozen=True, slots=True)
class Second:
    """What ended in one second of the measured time."""

    second: int
    accepted: int
    rejected: int
    failed: int
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class Observed:
    """Every request that was due in the measured time, in the order in which they ended."""

    due_s: NDArray[np.float64]
    """Since the measured time began."""
    latency_ms: NDArray[np.float64]
    """Until the answer was whole, or the request had failed."""
    status: NDArray[np.int16]
    """The HTTP status; 0: no answer when the run ended; below 0: the connection failed."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a run measured."""

    seconds: float
    interrupted: bool
    due: int
    accepted: int
    requests_per_s: float
    """Accepted requests whose answers arrived in the measured time, each second."""
    images_per_s: float
    latency_ms: Latency | None
    """Of accepted requests."""
    rejected: int
    """Answers 429."""
    rejected_p99_ms: float | None
    rejected_with_retry_after: int
    statuses: Mapping[int, int]
    """Answers with a status other than 200 and 429."""
    errors: Mapping[str, int]
    """Requests that ended without an answer, by reason."""
    unanswered: int
    """Requests without an answer when the run ended."""
    stages_ms: Mapping[str, float]
    """Means of the Server-Timing of accepted answers."""
    connections: int
    """Most that were open at once."""
    held_back: int
    """Requests that waited for a connection because all allowed ones were busy: the open loop was not quite open."""
    generator: Strain
    per_second: tuple[Second, ...]
    first_bodies: Mapping[int, str]
    observed: Observed = field(repr=False, compare=False)

    def share_within(self, milliseconds: float) -> float:
        """Return the share of all due requests that were accepted and answered within so many milliseconds."""
        observed = self.observed
        good = (observed.status == 200) & (observed.latency_ms <= milliseconds)
        return float(good.sum()) / self.due if self.due else 0.0

    @property
    def saturated(self) -> str:
        """A sentence on why the generator may have spoilt the figures; empty where it has not."""
        strain = self.generator
        if strain.busy_share >= BUSY_SHARE:
            return (
                f"The generator took {strain.busy_share:.0%} of a processor, about all that one event loop can: "
                "the service may be faster than these figures."
            )
        typical = self.latency_ms.p50 if self.latency_ms else 0.0
        if strain.lag_p99_ms > max(LAG_MS, LAG_SHARE * typical):
            return (
                f"The generator came up to {strain.lag_p99_ms:.1f} ms late (p99) to its own work, which is in the "
                "latencies: it needs a processor, or a machine, of its own."
            )
        return ""

    def to_json(self) -> dict[str, Any]:
        """Return everything but the single requests."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "observed"}
        plain = {
            name: asdict(value) if hasattr(value, "__dataclass_fields__") else value for name, value in fields.items()
        }
        return plain | {"per_second": [asdict(second) for second in self.per_second], "saturated": self.saturated}


def report_of(
    samples: Samples,
    *,
    begin: float,
    end: float,
    interrupted: bool,
    images_per_request: int,
    held_back: int,
    connections: int,
    strain: Strain,
) -> Report:
    """Compute the figures of the time from `begin` to `end`, seconds of the monotonic clock."""
    seconds = max(end - begin, 0.0)
    due, done, status = samples.arrays()
    arrived = (done >= begin) & (done < end)
    per_second = _per_second(done[arrived] - begin, (done - due)[arrived] * 1000, status[arrived], seconds)
    rate = int((status[arrived] == 200).sum()) / seconds if seconds else 0.0

    counted = (due >= begin) & (due < end)
    observed = Observed(due[counted] - begin, (done - due)[counted] * 1000, status[counted])
    accepted, rejected = observed.status == 200, observed.status == 429
    refusals = Latency.of(observed.latency_ms[rejected])
    count = Counter(observed.status.tolist())
    answers = max(samples.stage_answers, 1)
    return Report(
        seconds=round(seconds, 3),
        interrupted=interrupted,
        due=len(observed.status),
        accepted=int(accepted.sum()),
        requests_per_s=round(rate, 2),
        images_per_s=round(rate * images_per_request, 2),
        latency_ms=Latency.of(observed.latency_ms[accepted]),
        rejected=int(rejected.sum()),
        rejected_p99_ms=refusals.p99 if refusals else None,
        rejected_with_retry_after=samples.retry_after,
        statuses={code: count[code] for code in sorted(count) if code > 0 and code not in (200, 429)},
        errors={samples.reason(code): count[code] for code in sorted(count, reverse=True) if code < 0},
        unanswered=count[UNANSWERED],
        stages_ms={name: round(total / answers, 3) for name, total in samples.stage_sums_ms.items()},
        connections=connections,
        held_back=held_back,
        generator=Strain(round(strain.busy_share, 3), round(strain.lag_p99_ms, 3)),
        per_second=per_second,
        first_bodies=dict(samples.first_bodies),
        observed=observed,
    )


def _per_second(
    done_s: NDArray[np.float64], latency_ms: NDArray[np.float64], status: NDArray[np.int16], seconds: float
) -> tuple[Second, ...]:
    rows = []
    which = done_s.astype(np.int64)
    for second in range(int(np.ceil(seconds))):
        here = which == second
        latency = Latency.of(latency_ms[here & (status == 200)])
        accepted, rejected = int((status[here] == 200).sum()), int((status[here] == 429).sum())
        rows.append(
            Second(
                second=second,
                accepted=accepted,
                rejected=rejected,
                failed=int(here.sum()) - accepted - rejected,
                p50_ms=latency.p50 if latency else None,
                p99_ms=latency.p99 if latency else None,
            )
        )
    return tuple(rows)
