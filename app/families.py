"""Kinds of series, over the slots of a page (`app/pages.py`): how they count, how processes are joined, how they look.

Counting is one addition in memory. Whoever has the pages of all processes shows the sum of counters, and of gauges what
their kind says. Knows nothing of what is counted.
"""

import json
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from math import inf, isnan
from types import MappingProxyType
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from app.pages import NO_VALUE, WASTE, Page

BATCH_SIZES = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Rows of a run that are counted apart; a number between two of them counts as the larger."""
MAX_BINS = 24
_EXEMPLAR = 5
# Prometheus comes every few seconds and sees the last one only: with each request traced, the others cost for nothing.
_NEW_S = 0.5
# A double holds 53 bits exactly, so a trace id's 128 go into three.
_PARTS = ((0, 11), (11, 22), (22, 32))


class Number:
    """One counter or gauge. One writer at a time: the event loop, or whoever holds the lock that guards it."""

    __slots__ = ("_at", "_slots")

    def __init__(self, page: Page, at: int) -> None:
        self._slots, self._at = page.slots, at

    def inc(self, amount: float = 1.0) -> None:
        """Add to it."""
        self._slots[self._at] += amount

    def set(self, value: float) -> None:
        """Replace it (gauges only)."""
        self._slots[self._at] = value

    def get(self) -> float:
        """Return what this process has counted, and its page's writers before it."""
        return self._slots[self._at]

    def let_go(self) -> None:
        """Count where nobody reads from now on: its place is about to be another's."""
        self._at = WASTE


class Distribution:
    """One histogram: a slot for each bucket, not cumulated, one for what is above them all, and one for the sum."""

    __slots__ = ("_bounds", "_first", "_slots", "_sum")

    def __init__(self, page: Page, first: int, bounds: Sequence[float]) -> None:
        self._slots, self._first, self._bounds = page.slots, first, bounds
        self._sum = first + len(bounds) + 1

    def observe(self, value: float) -> None:
        """Count one value."""
        slots = self._slots
        slots[self._first + bisect_left(self._bounds, value)] += 1
        slots[self._sum] += value

    def let_go(self) -> None:
        """See `Number.let_go`."""
        self._first = self._sum = WASTE


class Steps:
    """A counter for each size of `BATCH_SIZES`, in adjacent slots."""

    __slots__ = ("_first", "_slots")

    def __init__(self, page: Page, first: int) -> None:
        self._slots, self._first = page.slots, first

    def inc(self, size: int, amount: float = 1.0) -> None:
        """Add to the counter of a size; what is above them all counts as the largest."""
        self._slots[self._first + min(bisect_left(BATCH_SIZES, size), len(BATCH_SIZES) - 1)] += amount

    def let_go(self) -> None:
        """See `Number.let_go`."""
        self._first = WASTE


class Slots:
    """A few numbers in adjacent slots."""

    __slots__ = ("_first", "_slots")

    def __init__(self, page: Page, first: int) -> None:
        self._slots, self._first = page.slots, first

    def inc(self, place: int) -> None:
        """Add one to the number at a place."""
        self._slots[self._first + place] += 1

    def set(self, place: int, value: float) -> None:
        """Replace the number at a place."""
        self._slots[self._first + place] = value

    def get(self, place: int) -> float:
        """Return the number at a place."""
        return self._slots[self._first + place]

    def let_go(self) -> None:
        """See `Number.let_go`."""
        self._first = WASTE


Child = TypeVar("Child", Number, Distribution, Steps, Slots)


class Family(Generic[Child]):
    """All series of one name: a child for each set of label values.

    The last `hidden` labels are not shown: Prometheus sees the sums over them, statistics of one version see them.
    """

    kind = ""
    width = 1

    def __init__(self, page: Page, name: str, help_text: str, labels: Sequence[str] = (), *, hidden: int = 0) -> None:
        self.name, self.help_text, self.label_names = name, help_text, tuple(labels)
        self.shown = len(self.label_names) - hidden
        self._page = page
        self._children: dict[tuple[object, ...], Child] = {}

    @property
    def sample_labels(self) -> tuple[str, ...]:
        """The labels of a sample, as Prometheus sees it; buckets have `le` besides."""
        return self.label_names[: self.shown]

    def labels(self, *values: object) -> Child:
        """Return the child with these label values, in the order of the declaration; it is shown from now on."""
        child = self._children.get(values)
        if child is None:
            assert len(values) == len(self.label_names), f"{self.name} has the labels {self.label_names}"
            with self._page.lock:  # others may be forgetting
                child = self._children.get(values)  # or have just made it: of two, one would never be let go
                if child is None:
                    child = self._children[values] = self._make(tuple(map(str, values)))
        return child

    def bears(self, values: Sequence[object], wanted: Mapping[str, str]) -> bool:
        """Tell whether some label values are of this family, and among them are those wanted, by label."""
        names = self.label_names
        if len(values) != len(names):
            return False
        return all(label in names and str(values[names.index(label)]) == value for label, value in wanted.items())

    def forget(self, wanted: Mapping[str, str]) -> None:
        """Forget the children that bear some labels, whose places in the page are others' now.

        Whoever holds one may go on counting there, for nobody.
        """
        for known in [known for known in list(self._children) if self.bears(known, wanted)]:
            self._children.pop(known).let_go()

    def _make(self, values: tuple[str, ...]) -> Child:
        raise NotImplementedError

    def join(self, one: list[float], other: list[float]) -> list[float]:
        """Return what two processes, or two hidden label values, make together."""
        return [mine + yours for mine, yours in zip(one, other, strict=True)]

    def expose(self, totals: dict[tuple[str, ...], list[float]]) -> Metric:
        """Return the family as Prometheus sees it, from each child's slots."""
        raise NotImplementedError


class Counter(Family[Number]):
    """Numbers that only grow."""

    kind = "counter"

    def _make(self, values: tuple[str, ...]) -> Number:
        return Number(self._page, self._page.place(self.name, values, 1))

    def expose(self, totals: dict[tuple[str, ...], list[float]]) -> Metric:
        """See `Family.expose`."""
        family = CounterMetricFamily(self.name.removesuffix("_total"), self.help_text, labels=self.label_names)
        for values, (total,) in totals.items():
            family.add_metric(values, total)
        return family


class Gauge(Family[Number]):
    """Numbers that rise and fall, and are gone with the process that set them."""

    kind = "gauge"

    def _make(self, values: tuple[str, ...]) -> Number:
        number = Number(self._page, self._page.place(self.name, values, 1, gauge=True))
        number.set(0)
        return number

    def remove(self, *values: object) -> None:
        """Show the child with these label values no longer."""
        self.labels(*values).set(NO_VALUE)
        del self._children[values]

    def expose(self, totals: dict[tuple[str, ...], list[float]]) -> Metric:
        """See `Family.expose`."""
        family = GaugeMetricFamily(self.name, self.help_text, labels=self.label_names[: self.shown])
        for values, (total,) in totals.items():
            family.add_metric(values, total)
        return family


class Largest(Gauge):
    """Numbers of which the largest counts: moments, states, and what several processes see of one thing."""

    def join(self, one: list[float], other: list[float]) -> list[float]:
        """See `Family.join`."""
        return max(one, other)


class Smallest(Gauge):
    """Numbers of which the smallest counts: what is true only when it is in every process."""

    def join(self, one: list[float], other: list[float]) -> list[float]:
        """See `Family.join`."""
        return min(one, other)


class Age(Gauge):
    """How long ago the earliest of some moments was: a slot holds a moment of `time.monotonic()`, or 0 for none.

    That clock is the machine's, the same for all its processes, and goes on while the one that set the slot is stuck.
    """

    def join(self, one: list[float], other: list[float]) -> list[float]:
        """See `Family.join`."""
        return min(one, other) if one[0] and other[0] else max(one, other)

    def expose(self, totals: dict[tuple[str, ...], list[float]]) -> Metric:
        """See `Family.expose`."""
        now = time.monotonic()
        return super().expose({values: [now - since if since else 0.0] for values, (since,) in totals.items()})


class BatchCounter(Family[Steps]):
    """Numbers that only grow, one for each batch size, which is the last label, `rows`."""

    kind = "counter"
    width = len(BATCH_SIZES)

    @property
    def sample_labels(self) -> tuple[str, ...]:
        """See `Family.sample_labels`."""
        return (*self.label_names, "rows")

    def _make(self, values: tuple[str, ...]) -> Steps:
        return Steps(self._page, self._page.place(self.name, values, self.width))

    def expose(self, totals: dict[tuple[str, ...], list[float]]) -> Metric:
        """See `Family.expose`; sizes that never were are left out."""
        family = CounterMetricFamily(self.name.removesuffix("_total"), self.help_text, labels=self.sample_labels)
        for values, by_size in totals.items():
            for size, total in zip(BATCH_SIZES, by_size, strict=True):
                if total:
                    family.add_metric((*values, str(size)), total)
        return family


class Bins(Family[Slots]):
    """Numbers that only grow, one for each of a few named bins.

    The last label of the declaration, `bins`, holds their names as JSON, so that whoever reads the page knows them;
    Prometheus sees a label `bin` with one of them.
    """

    kind = "counter"
    width = MAX_BINS

    @property
    def sample_labels(self) -> tuple[str, ...]:
        """See `Family.sample_labels`."""
        return (*self.label_names[:-1], "bin")

    def _make(self, values: tuple[str, ...]) -> Slots:
        return Slots(self._page, self._page.place(self.name, values, self.width, gauge=self.kind == "gauge"))

    def expose(self, totals: dict[tuple[str, ...], list[float]]) -> Metric:
        """See `Family.expose`. Other bins of the same labels, of a bundle that was replaced in place, add up."""
        sums: dict[tuple[str, ...], float] = {}
        for values, by_bin in totals.items():
            for name, number in zip(json.loads(values[-1]), by_bin, strict=False):
                labels = (*values[:-1], name)
                sums[labels] = sums.get(labels, 0.0) + number
        family = self._family()
        for labels, total in sums.items():
            family.add_metric(labels, total)
        return family

    def _family(self) -> CounterMetricFamily | GaugeMetricFamily:
        return CounterMetricFamily(self.name.removesuffix("_total"), self.help_text, labels=self.sample_labels)


class Shares(Bins):
    """What each bin should hold, as a share of all; every process says the same."""

    kind = "gauge"

    def replace(self, values: tuple[str, ...], shares: Sequence[float]) -> None:
        """Show these shares, and none of other bins that the same labels had."""
        for known, child in list(self._children.items()):  # an engine forgets on another thread
            if known[:-1] == values[:-1]:
                child.set(0, NO_VALUE)
        child = self.labels(*values)
        for place, share in enumerate(shares):
            child.set(place, share)

    def join(self, one: list[float], other: list[float]) -> list[float]:
        """See `Family.join`."""
        return max(one, other)

    def _family(self) -> CounterMetricFamily | GaugeMetricFamily:
        return GaugeMetricFamily(self.name, self.help_text, labels=self.sample_labels)


class Exemplars(Family[Slots]):
    """Of each bucket of a histogram the latest value that belongs to a trace, with the trace's id.

    Five slots each: the id in three parts, the value, and the time, 0 where there is none. Shown with the histogram
    only; gone with the process that set them, as gauges are.
    """

    kind = "exemplars"

    def __init__(self, page: Page, name: str, labels: Sequence[str], bounds: Sequence[float], hidden: int) -> None:
        super().__init__(page, name, "", labels, hidden=hidden)
        self._bounds = bounds
        self.width = _EXEMPLAR * (len(bounds) + 1)

    def keep(self, values: tuple[object, ...], value: float, trace_id: str) -> None:
        """Keep a value with its trace id, 32 hexadecimal digits, where the bucket's former one is no longer new."""
        child = self.labels(*values)
        first = _EXEMPLAR * bisect_left(self._bounds, value)
        now = time.time()
        if 0 <= now - child.get(first + 4) < _NEW_S:
            return
        # A reader that comes in between finds none: the time is taken away first and written last.
        child.set(first + 4, 0.0)
        for part, (start, end) in enumerate(_PARTS):
            child.set(first + part, float(int(trace_id[start:end], 16)))
        child.set(first + 3, value)
        child.set(first + 4, now)

    def join(self, one: list[float], other: list[float]) -> list[float]:
        """See `Family.join`; of each bucket the later one."""
        later: list[float] = []
        for first in range(0, len(one), _EXEMPLAR):
            mine, yours = one[first : first + _EXEMPLAR], other[first : first + _EXEMPLAR]
            later += mine if mine[4] >= yours[4] else yours
        return later

    def of_buckets(self, slots: list[float]) -> list[Exemplar | None]:
        """Return what is kept for each bucket, from a child's slots."""
        found: list[Exemplar | None] = []
        for first in range(0, len(slots), _EXEMPLAR):
            *parts, value, at = slots[first : first + _EXEMPLAR]
            digits = [f"{int(part):0{end - start}x}" for part, (start, end) in zip(parts, _PARTS, strict=True)]
            found.append(Exemplar({"trace_id": "".join(digits)}, value, at) if at else None)
        return found

    def _make(self, values: tuple[str, ...]) -> Slots:
        slots = Slots(self._page, self._page.place(self.name, values, self.width, gauge=True))
        for place in range(self.width):
            slots.set(place, 0.0)
        return slots


class Histogram(Family[Distribution]):
    """Numbers of values by size.

    Attributes:
        exemplars: the traces that some of its values belong to.
    """

    kind = "histogram"

    def __init__(
        self,
        page: Page,
        name: str,
        help_text: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        hidden: int = 0,
    ) -> None:
        super().__init__(page, name, help_text, labels, hidden=hidden)
        self._bounds = tuple(map(float, buckets))
        self.width = len(buckets) + 2
        self.exemplars = Exemplars(page, f"{name} exemplars", labels, self._bounds, hidden)

    def _make(self, values: tuple[str, ...]) -> Distribution:
        return Distribution(self._page, self._page.place(self.name, values, self.width), self._bounds)

    def expose(
        self,
        totals: dict[tuple[str, ...], list[float]],
        exemplars: Mapping[tuple[str, ...], list[float]] = MappingProxyType({}),
    ) -> Metric:
        """See `Family.expose`; with the slots of the exemplars, for formats that have them."""
        family = HistogramMetricFamily(self.name, self.help_text, labels=self.label_names[: self.shown])
        names = [floatToGoString(bound) for bound in (*self._bounds, inf)]  # type: ignore[no-untyped-call]
        for values, total in totals.items():
            kept = self.exemplars.of_buckets(exemplars[values]) if values in exemplars else [None] * len(names)
            count = 0.0
            buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
            for name, in_bucket, exemplar in zip(names, total, kept, strict=False):
                count += in_bucket
                buckets.append((name, count, exemplar) if exemplar else (name, count))
            family.add_metric(values, buckets, sum_value=total[-1])
        return family


AnyFamily = Family[Number] | Family[Distribution] | Family[Steps] | Family[Slots]


def joined(families: Mapping[str, AnyFamily], pages: Sequence[Page]) -> dict[str, dict[tuple[str, ...], list[float]]]:
    """Return the slots of every series of some families, joined over pages."""
    joined: dict[str, dict[tuple[str, ...], list[float]]] = {name: {} for name in families}
    for page in pages:
        for name, labels, width, _, first in page.series():
            family = families.get(name)
            # A page may hold what another version of this program has left there.
            if family is None or family.width != width or len(family.label_names) != len(labels):
                continue
            values = [page.slots[at] for at in range(first, first + width)]
            if isnan(values[0]):  # a gauge that is not shown
                continue
            so_far = joined[name].get(labels)
            joined[name][labels] = values if so_far is None else family.join(so_far, values)
    return joined


def shown(family: AnyFamily, by_labels: Mapping[tuple[str, ...], list[float]]) -> dict[tuple[str, ...], list[float]]:
    """Return the slots of a family's series by the labels that are shown."""
    totals: dict[tuple[str, ...], list[float]] = {}
    for labels, values in by_labels.items():
        key = labels[: family.shown]
        totals[key] = family.join(totals[key], values) if key in totals else values
    return totals
