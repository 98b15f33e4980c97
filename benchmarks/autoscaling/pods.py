"""What a pod would do at any rate of requests, drawn from what a real one did at some.

The capacity model: the recorded stair of rates, second by second. A pod that is offered a rate between two of its steps
lives through recorded seconds of the one or the other, as often as the rate is near to it, in their order: so a queue
that wanders near saturation wanders here, and one that is held short by refusals is held short. Nothing of a queue's
theory is assumed, but that pods do not disturb each other.
"""

import bisect
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

SETTLE_S = 5
"""Of each step of the stair these first seconds are left out."""


class Moment(NamedTuple):
    """One recorded second of a pod at a steady rate.

    Attributes:
        inflight: the gauge at its end.
        busy_s: seconds that the requests which ended in it had been inside, together.
        offered, refused: requests.
    """

    inflight: float
    busy_s: float
    offered: float
    refused: float


@dataclass(frozen=True)
class Level:
    """A step of the stair: a rate, requests a second, and its seconds."""

    rate: float
    moments: tuple[Moment, ...]

    @property
    def inside(self) -> float:
        """Requests inside on average, by Little's law: what the queries measure while nobody is refused."""
        return sum(moment.busy_s for moment in self.moments) / len(self.moments)

    @property
    def gauge(self) -> float:
        """Requests inside at the moments of scrapes, on average."""
        return sum(moment.inflight for moment in self.moments) / len(self.moments)

    @property
    def refused(self) -> float:
        """Share of the requests that were turned away."""
        return sum(moment.refused for moment in self.moments) / max(1e-9, sum(each.offered for each in self.moments))


def read_levels(recording: Mapping[str, Any]) -> list[Level]:
    """Return the stair of a recording, the lowest rate first."""
    columns = recording["stair"]["seconds"]
    levels = []
    for step in recording["stair"]["sent"]:
        begin, end = int(step["at_s"]) + SETTLE_S, int(step["at_s"] + step["seconds"])
        moments = []
        for second in range(begin, end):
            busy, ran, refused = (
                columns[name][second] - columns[name][second - 1] for name in ("busy_s", "ran", "refused")
            )
            moments.append(Moment(columns["inflight"][second], busy, ran + refused, refused))
        levels.append(Level(step["offered_per_s"], tuple(moments)))
    return levels


class Pod:
    """One that is ready: its counters, as they would be, and what scrapes have seen of them."""

    def __init__(self, levels: Sequence[Level], chance: random.Random, scrape_s: float) -> None:
        self._levels = levels
        self._rates = [level.rate for level in levels]
        self._chance = chance
        self._cursor = chance.randrange(10_000)
        self._scrape_s = scrape_s
        self._next_scrape = chance.uniform(0, scrape_s)
        self._age = 0.0
        self._counters = (0.0, 0.0, 0.0)
        self.samples: list[Sample] = []
        self.offered = self.refused = self.inflight = 0.0

    def live(self, now: float, rate: float) -> None:
        """Live one second, which ends `now`, offered so many requests."""
        moment, share = self._moment(rate), 1.0
        share = rate / moment.offered if moment.offered else 0.0
        self.offered = rate
        refused = moment.refused / moment.offered if moment.offered else 0.0
        if rate > self._rates[-1]:
            # Beyond the stair what runs stays, and all that is more is refused.
            ran = self._rates[-1] * (1 - self._levels[-1].refused)
            refused, share = 1 - ran / rate, 1.0
        self.refused = rate * refused
        self.inflight = moment.inflight if rate >= self._rates[0] else moment.inflight * rate / self._rates[0]
        busy, ran_before, refused_before = self._counters
        self._counters = (
            busy + moment.busy_s * share,
            ran_before + self.offered - self.refused,
            refused_before + self.refused,
        )
        self._age += 1
        if self._age >= self._next_scrape:
            self._next_scrape += self._scrape_s
            self.samples.append(Sample(now, self.inflight, *self._counters))

    def _moment(self, rate: float) -> Moment:
        """Return a recorded second at about a rate."""
        above = min(bisect.bisect_left(self._rates, rate), len(self._rates) - 1)
        level = self._levels[above]
        if above and rate < level.rate:
            below = self._levels[above - 1]
            # For a while the one, for a while the other, so that seconds stay in their order.
            nearness = (rate - below.rate) / (level.rate - below.rate)
            level = level if self._chance.random() < nearness else below
        self._cursor += 1
        return level.moments[self._cursor % len(level.moments)]


class Sample(NamedTuple):
    """What one scrape of a pod sees: the gauge, and the counters of the queries."""

    at: float
    inflight: float
    busy_s: float
    ran: float
    refused: float


class Rates(NamedTuple):
    """What the queries' parts are for one pod: `rate(…[1m])` of the counters, and the gauge, now and on average."""

    busy_s: float
    ran: float
    refused: float
    inflight: float
    mean_inflight: float


WINDOW_S = 60.0


def rates(samples: Sequence[Sample], now: float) -> Rates | None:
    """Return the queries' parts as Prometheus has them; None: it has not two scrapes within the window.

    Prometheus also extrapolates to the window's ends, which for scrapes at even intervals is the same rate.
    """
    within = list(itertools.takewhile(lambda sample: sample.at > now - WINDOW_S, reversed(samples)))
    if len(within) < 2:
        return None
    last, first = within[0], within[-1]
    span = last.at - first.at
    return Rates(
        (last.busy_s - first.busy_s) / span,
        (last.ran - first.ran) / span,
        (last.refused - first.refused) / span,
        last.inflight,
        sum(sample.inflight for sample in within) / len(within),
    )
