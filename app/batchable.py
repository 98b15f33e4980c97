"""Whether rows of different requests may share a run of a graph: read from its dimensions, then tried.

A dimension's name proves nothing: a recurrent network exported with time first has a variable first dimension too, and
rows joined along it would answer for each other. So rows run alone and together, and must answer the same: small ones
and large ones, since a maximum, a threshold or a saturated score shows its neighbours only for some.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from app.sessions import OnnxSession
from app.tensors import VARIABLE, Array, TensorSpec

LENGTHS = (8, 32, 128, 224, 16000)
"""Tried in turn for variable dimensions beyond the first, until the graph takes one: tokens, frames, pixels, sound."""
MAX_ELEMENTS = 10_000_000
"""Of a row that is tried: an image of 16,000 × 16,000 pixels would take gigabytes."""
RELATIVE, ABSOLUTE = 1e-3, 1e-4
"""How far answers may differ, of a number and of the row's largest: a batch is summed in another order than a row."""
COARSER = 10
"""How much further those of FP16 may, and those of large inputs, whose rounding an exponential enlarges."""
SMALL = ((1, 3), (0, 2), (0, 1))
"""Whole numbers that are tried, up to the second: they may be indices, lengths, or one of only two or one kinds."""
WIDE = (0, 256)
WIDE_SCALE = 100.0
WIDE_INPUTS = 8
"""How many inputs are tried with large numbers each while the others stay small."""


@dataclass(frozen=True, slots=True)
class _Style:
    """Which numbers an input is made of: whole ones from `low`, below `high`; others around 0, of size `scale`."""

    low: int = SMALL[0][0]
    high: int = SMALL[0][1]
    scale: float = 1.0


_WIDE = _Style(*WIDE, WIDE_SCALE)


@dataclass(frozen=True, slots=True)
class Fit:
    """What a graph runs with: the length of its variable dimensions, and small whole numbers."""

    length: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class _Row:
    """One row that was run alone."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    coarse: bool


@dataclass(frozen=True, slots=True)
class _Answer:
    """One output for one row: alone and together with others, and the first row's own."""

    name: str
    first: Array
    alone: Array
    together: Array
    coarse: bool

    def is_alike(self, other: Array, absolute: float) -> bool:
        """Tell whether another answer is the one that the row has alone, but for rounding."""
        if self.alone.dtype.kind != "f":
            return bool(np.array_equal(self.alone, other))
        numbers = np.abs(self.alone.astype(np.float64))
        largest = float(np.max(numbers, initial=0.0, where=np.isfinite(numbers)))
        slack = COARSER if self.coarse or self.alone.dtype.itemsize == 2 else 1
        return np.allclose(self.alone, other, slack * RELATIVE, slack * absolute * largest, equal_nan=True)


def why_rows_run_alone(session: OnnxSession) -> str:
    """Return why rows of different requests must not share a run, in one sentence; empty: they may."""
    for spec in (*session.inputs, *session.outputs):
        if not spec.shape:
            return f"'{spec.name}' is a single value, so there are no rows to batch."
        if spec.shape[0] not in (VARIABLE, 1):
            return f"The first dimension of '{spec.name}' is fixed at {spec.shape[0]}: requests come in just that size."
    if all(spec.shape[0] == 1 for spec in session.inputs):
        return _gives_one_row(session)
    for spec in (*session.inputs, *session.outputs):
        if spec.shape[0] == 1:
            return f"The first dimension of '{spec.name}' is fixed at 1, that of others is not."
    firsts = {symbols[0] for symbols in session.symbols}
    names = {name for name in firsts if isinstance(name, str)}
    if len(names) > 1:
        return f"The inputs' first dimensions are called {' and '.join(sorted(names))}: they are not the same rows."
    return _tried(session)


def sample(specs: Sequence[TensorSpec], rows: int, fit: Fit, seed: int = 0) -> tuple[Array, ...]:
    """Return inputs that a graph of these specs takes."""
    return _draw_all(specs, rows, fit.length, [_Style(fit.low, fit.high)] * len(specs), seed)


def fit_of(session: OnnxSession) -> Fit | None:
    """Return what the graph runs with, and gives something for; None: nothing that was tried."""
    for low, high in SMALL:
        for length in LENGTHS:
            if _elements(session.inputs, length) > MAX_ELEMENTS:
                continue
            fit = Fit(length, low, high)
            outputs = _run(session, sample(session.inputs, 1, fit))
            if outputs is not None and all(array.size for array in outputs):
                return fit
    return None


def _elements(specs: Sequence[TensorSpec], length: int) -> int:
    return sum(math.prod(length if size == VARIABLE else size for size in spec.shape[1:]) for spec in specs)


def _draw_all(
    specs: Sequence[TensorSpec], rows: int, length: int, styles: Sequence[_Style], seed: int
) -> tuple[Array, ...]:
    rng = np.random.default_rng(seed)
    return tuple(_draw(spec, rows, length, style, rng) for spec, style in zip(specs, styles, strict=True))


def _draw(spec: TensorSpec, rows: int, length: int, style: _Style, rng: np.random.Generator) -> Array:
    sizes = [length if size == VARIABLE else size for size in spec.shape[1:]]
    shape = (rows, *sizes) if spec.shape else ()
    if spec.shape and spec.shape[0] != VARIABLE:
        shape = (spec.shape[0], *sizes)
    if spec.datatype == "BYTES":
        return rng.choice(np.array(["a", "b"], np.object_), shape)
    if spec.dtype.kind == "f":
        return (rng.standard_normal(shape, np.float32) * np.float32(style.scale)).astype(spec.dtype)
    low, high = (0, 2) if spec.dtype.kind == "b" else (style.low, style.high)
    if spec.dtype.itemsize == 1:
        high = min(high, int(np.iinfo(np.int8 if spec.dtype.kind == "i" else np.uint8).max) + 1)
    return rng.integers(low, high, shape).astype(spec.dtype)


def _run(session: OnnxSession, inputs: Sequence[Array]) -> tuple[Array, ...] | None:
    """Return what a graph gives; None: it does not take these inputs."""
    try:
        return session.run(*inputs)
    except Exception:  # ONNX Runtime raises a dozen unrelated classes
        return None


def _gives_one_row(session: OnnxSession) -> str:
    """Return why the answers to single rows cannot be told apart again, of a graph whose inputs are single rows."""
    open_ones = [place for place, spec in enumerate(session.outputs) if spec.shape[0] != 1]
    if not open_ones:
        return ""
    fit = fit_of(session)
    outputs = None if fit is None else _run(session, sample(session.inputs, 1, fit))
    for place in open_ones:
        if outputs is None or len(outputs[place]) != 1:
            return f"The first dimension of '{session.outputs[place].name}' is not that of the inputs, fixed at 1."
    return ""


def _tried(session: OnnxSession) -> str:
    fit = fit_of(session)
    if fit is None:
        return "No input that was tried ran through it, so it could not be shown that rows may share a run."
    rows = list(_rows(session, fit))
    answers = []
    for ordered in (rows, rows[::-1]):  # what is carried from row to row reaches only those after it
        inputs = [np.concatenate(arrays) for arrays in zip(*[row.inputs for row in ordered], strict=True)]
        try:
            together = session.run(*inputs)
        except Exception as error:
            return f"Several rows together do not run through it: {str(error).strip().splitlines()[0][:200]}."
        for spec, both, *alone in zip(session.outputs, together, *[row.outputs for row in ordered], strict=True):
            shape = (1, *alone[0].shape[1:])
            for one in alone:
                if one.shape != shape or both.shape != (len(rows), *shape[1:]):
                    return f"{len(rows)} rows give '{spec.name}' in shape {list(both.shape)}, one in {list(one.shape)}."
            answers += [
                _Answer(spec.name, alone[0], one, both[index : index + 1], row.coarse)
                for index, (row, one) in enumerate(zip(ordered, alone, strict=True))
            ]
    for answer in answers:
        if not answer.is_alike(answer.together, ABSOLUTE):
            return f"Rows together answer differently in '{answer.name}' than each alone."
    # Scores that are saturated for every row differ only in those near 0, which must then be alike by themselves.
    for absolute in (ABSOLUTE, 0.0):
        tells = any(not answer.is_alike(answer.first, absolute) for answer in answers)
        if tells and all(answer.is_alike(answer.together, absolute) for answer in answers):
            return ""
    return "Every row that was tried has the same answer, so it could not be shown that rows may share a run."


def _rows(session: OnnxSession, fit: Fit) -> Iterator[_Row]:
    """Run rows alone: some of small numbers; where the graph takes them some of large ones, in all inputs and in one.

    Raises whatever the graph raises of small numbers, which it took before.
    """
    specs, small = session.inputs, _Style(fit.low, fit.high)
    for seed in (1, 2, 3):
        inputs = _draw_all(specs, 1, fit.length, [small] * len(specs), seed)
        if (outputs := _run(session, inputs)) is not None:
            yield _Row(inputs, outputs, coarse=False)
    wide = [[_WIDE] * len(specs)] * 3
    wide += [
        [_WIDE if place == chosen else small for place in range(len(specs))]
        for chosen in range(min(len(specs), WIDE_INPUTS) if len(specs) > 1 else 0)
    ]
    for seed, styles in enumerate(wide, 4):
        # Where large indices are out of range, the usual small ones may not be.
        for narrowed in (styles, [replace(style, low=0, high=SMALL[0][1]) for style in styles]):
            inputs = _draw_all(specs, 1, fit.length, narrowed, seed)
            if (outputs := _run(session, inputs)) is not None:
                yield _Row(inputs, outputs, coarse=True)
                break
