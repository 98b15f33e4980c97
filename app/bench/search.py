"""The search for settings: which candidates there are, and which of them sustains the highest rate within a p99.

Decides only by what a `Measure` says and what a clock shows, so that it can be tested without a service. Knows nothing
of processes, HTTP or models.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from app.errors import SettingsError

Value = bool | int | float | str

HELD_SHARE = 0.99
"""Of all due requests, so many must be accepted and answered within the limit: that is what p99 ≤ limit means."""
TARGET_SHARE = 0.8
"""Of the sustainable rate, at which the concurrency for autoscaling is taken: a new replica needs time to come up."""
SURVIVING = 0.25
FINALISTS = 3
COARSE_S = 1.5
COARSE_CONNECTIONS = 16
COARSE_BUDGET = 0.45
"""Of the budget, for the ranking."""
RESERVE = 0.2
"""Of the budget, for confirming rates and for the concurrency; what is between is for the finalists' rates."""
MOST_CONFIRMATIONS = 8
STEP_DOWN = 0.95
"""Times its rate, where a finalist did not keep the limit in the longer run."""
PROBE_REQUESTS = 400
"""An open-loop probe lasts at least until so many requests were due: a p99 of fewer is chance."""
PROBE_S = (3.0, 12.0)
RUN_BUDGET = 0.05
"""Of the budget, for one run at most."""
PRECISION = 0.04
LEAST_SHARE = 0.02
"""Of its throughput: a candidate that does not keep the limit at so little never will."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """One setting of the service, and which of its values are worth trying."""

    setting: str
    values: Callable[[int], Sequence[Value]]
    """From the number of usable processors; the first value is the service's default."""
    takes_cpus: bool = False
    """Whether its values multiply into the number of processors that are kept busy."""


DIMENSIONS = (
    Dimension("sessions", lambda cpus: (cpus, cpus - 1, cpus // 2, cpus // 4, 1), takes_cpus=True),
    Dimension("workers", lambda cpus: (1, cpus), takes_cpus=True),
    Dimension("threads_per_session", lambda cpus: (1, 2, 4, cpus), takes_cpus=True),
    Dimension("max_batch", lambda cpus: (16, 1, 4, 64)),
    Dimension("linger_ms", lambda cpus: (0.0, 4.0)),
)

Candidate = Mapping[str, Value]
"""Setting name → value."""


def candidates(cpus: int, dimensions: Sequence[Dimension] = DIMENSIONS) -> list[Candidate]:
    """Return every sensible combination; the defaults first, then whatever differs from them in the fewest values."""
    choices = {each.setting: list(dict.fromkeys(each.values(cpus))) for each in dimensions}
    spread = [each.setting for each in dimensions if each.takes_cpus]
    found = []
    for values in itertools.product(*choices.values()):
        candidate = dict(zip(choices, values, strict=True))
        busy = math.prod(int(candidate[setting]) for setting in spread)
        # Fewer leave processors idle, but for one, which decoding and HTTP may need; more only take turns.
        if not max(cpus - 1, 1) <= busy <= cpus:
            continue
        if candidate.get("max_batch") == 1 and candidate.get("linger_ms"):
            continue
        found.append(candidate)
    default = {setting: values[0] for setting, values in choices.items()}
    return sorted(found, key=lambda candidate: sum(candidate[setting] != default[setting] for setting in default))


@dataclass(frozen=True, slots=True)
class Trial:
    """What one candidate did under one load."""

    candidate: Candidate
    loop: Literal["closed", "open"]
    asked: float
    """Connections of a closed loop, requests per second of an open one."""
    requests_per_s: float = 0.0
    mean_ms: float | None = None
    p99_ms: float | None = None
    share_within: float = 0.0
    """Of all due requests, those accepted and answered within the limit."""
    fault: str = ""
    """Why the service could not be measured with these settings."""

    @property
    def holds(self) -> bool:
        """Whether the limit was kept."""
        return self.share_within >= HELD_SHARE


def settings_of(candidate: Candidate, limit_ms: float) -> Candidate:
    """Return all that a service for this limit is started with: whoever would wait longer than that is turned away."""
    return {**candidate, "queue_target_ms": limit_ms}


class Measure(Protocol):
    """Puts load on the service with a candidate's settings; SettingsError where they are impossible."""

    def closed(self, candidate: Candidate, connections: int, seconds: float) -> Trial:
        """Measure with so many connections, each sending when its answer is there; however long the queue takes."""
        ...

    def open(self, candidate: Candidate, rate: float, seconds: float) -> Trial:
        """Measure at so many requests a second, with all of `settings_of`."""
        ...


@dataclass(slots=True)
class Finalist:
    """A candidate whose rate within the limit was looked for."""

    candidate: Candidate
    rate: float
    """Requests per second at which the limit was kept, as far as is known; 0: none was found."""
    confirmed: bool = False
    """Whether a second, longer run at that rate kept it too."""


@dataclass(frozen=True, slots=True)
class Concurrency:
    """Requests in flight at a comfortable load, by Little's law: rate × mean latency."""

    rate: float
    mean_ms: float

    @property
    def in_flight(self) -> float:
        """Mean number of requests inside the service."""
        return self.rate * self.mean_ms / 1000


@dataclass(slots=True)
class Search:
    """One search; `trials` grows while `run` goes, so that an interrupted one can be shown."""

    candidates: Sequence[Candidate]
    measure: Measure
    limit_ms: float
    budget_s: float
    clock: Callable[[], float] = time.monotonic
    tell: Callable[[Trial], None] = lambda trial: None
    trials: list[Trial] = field(default_factory=list)
    finalists: list[Finalist] = field(default_factory=list)
    concurrency: Concurrency | None = None
    _begun: float = 0.0

    @property
    def winner(self) -> Finalist | None:
        """The finalist of the highest rate; None while no rate was found."""
        return max((each for each in self.finalists if each.rate), key=lambda each: each.rate, default=None)

    @property
    def best(self) -> Candidate | None:
        """The winner's part of the settings that are searched."""
        return self.winner.candidate if self.winner else None

    @property
    def untried(self) -> int:
        """How many candidates the budget left out."""
        return sum(candidate not in [trial.candidate for trial in self.trials] for candidate in self.candidates)

    def run(self) -> None:
        """Rank by throughput, find the rates of the best few, confirm, and take the winner's concurrency."""
        self._begun = self.clock()
        ranked = self._ranked()
        for place, trial in enumerate(ranked, 1):
            share = COARSE_BUDGET + (1 - RESERVE - COARSE_BUDGET) * place / len(ranked)
            self.finalists.append(Finalist(trial.candidate, self._highest_rate(trial, self._at(share))))
        self._confirm()
        if (winner := self.winner) is None:
            return
        rate = TARGET_SHARE * winner.rate
        trial = self._open(winner.candidate, rate, self._probe_s(rate))
        if trial.mean_ms is not None:
            self.concurrency = Concurrency(rate, trial.mean_ms)

    def _ranked(self) -> list[Trial]:
        """Return the finalists' latest closed-loop trials, by successive halving: fewer candidates, longer runs."""
        seconds, share = min(COARSE_S, RUN_BUDGET * self.budget_s), 0.7 * COARSE_BUDGET
        first = self._closed(self.candidates[0], COARSE_CONNECTIONS, seconds)
        # So many requests are inside when the limit is just met (Little's law): that is the load to rank at.
        connections = min(max(round(first.requests_per_s * self.limit_ms / 1000), 4), 64)
        left, standing, rounds = list(self.candidates), [first] if first.requests_per_s else [], 0
        while (rounds == 0 or len(left) > FINALISTS) and self.clock() < self._at(share):
            measured: list[Trial] = []
            for candidate in left:
                if measured and self.clock() >= self._at(share):
                    break
                measured.append(self._closed(candidate, connections, seconds))
            # A round that the budget cut short leaves the others where the round before had them.
            seen = [trial.candidate for trial in measured]
            standing = measured + [
                trial for trial in standing if trial.candidate in left and trial.candidate not in seen
            ]
            standing = sorted(
                (trial for trial in standing if trial.requests_per_s), key=lambda each: -each.requests_per_s
            )
            standing = standing[: max(FINALISTS, math.ceil(len(standing) * SURVIVING))]
            left = [trial.candidate for trial in standing]
            seconds, share, rounds = seconds * 2, COARSE_BUDGET, rounds + 1
        return standing[:FINALISTS]

    def _highest_rate(self, ranked: Trial, deadline: float) -> float:
        """Return the highest rate at which the candidate keeps the limit, by bisection; 0: none was found."""
        low, high = 0.0, 1.1 * ranked.requests_per_s
        rate = 0.8 * ranked.requests_per_s
        while high - low > PRECISION * high and rate > LEAST_SHARE * ranked.requests_per_s:
            seconds = self._probe_s(rate)
            if self.clock() + seconds > deadline and low > 0:
                break
            if self.clock() > self._at(1.0):
                break
            if self._open(ranked.candidate, rate, seconds).holds:
                low = rate
            else:
                high = rate
            rate = (low + high) / 2
        return low

    def _confirm(self) -> None:
        """Measure the highest rate of all again, twice as long, until one holds; where chance had helped, it goes down.

        So the winner's rate has held twice, and no other finalist's is higher: one that was lucky falls behind them.
        """
        for _ in range(MOST_CONFIRMATIONS):
            first = self.winner
            if first is None or self.clock() > self._at(1.0):
                return
            if self._open(first.candidate, first.rate, 2 * self._probe_s(first.rate)).holds:
                first.confirmed = True
                return
            first.rate *= STEP_DOWN

    def _closed(self, candidate: Candidate, connections: int, seconds: float) -> Trial:
        try:
            trial = self.measure.closed(candidate, connections, seconds)
        except SettingsError as error:
            trial = Trial(candidate, "closed", connections, fault=error.message)
        return self._noted(trial)

    def _open(self, candidate: Candidate, rate: float, seconds: float) -> Trial:
        return self._noted(self.measure.open(candidate, rate, seconds))

    def _noted(self, trial: Trial) -> Trial:
        self.trials.append(trial)
        self.tell(trial)
        return trial

    def _at(self, share: float) -> float:
        return self._begun + share * self.budget_s

    def _probe_s(self, rate: float) -> float:
        least, most = PROBE_S
        return min(max(PROBE_REQUESTS / rate, least), most, RUN_BUDGET * self.budget_s)
