"""Whether rows of different requests may share a run of a graph: read from its dimensions, then tried.

A dimension's name proves nothing: a recurrent network exported with time first has a variable first dimension too, and
rows joined along it would answer for each other. So two rows run alone and together, and must answer the same.
"""

from collections.abc import Callable, Sequence

import numpy as np

from app.sessions import OnnxSession
from app.tensors import VARIABLE, Array, TensorSpec

LENGTHS = (8, 32, 128, 224, 16000)
"""Tried in turn for variable dimensions beyond the first, until the graph takes one: tokens, frames, pixels, sound."""
RELATIVE, ABSOLUTE = 1e-3, 1e-4
"""How far answers may differ: a batch is summed in another order than a row."""

Run = Callable[..., tuple[Array, ...]]


def why_rows_run_alone(session: OnnxSession) -> str:
    """Return why rows of different requests must not share a run, in one sentence; empty: they may."""
    for spec in (*session.inputs, *session.outputs):
        if not spec.shape:
            return f"'{spec.name}' is a single value, so there are no rows to batch."
        if spec.shape[0] not in (VARIABLE, 1):
            return f"The first dimension of '{spec.name}' is fixed at {spec.shape[0]}: requests come in just that size."
    if all(spec.shape[0] == 1 for spec in session.inputs):
        return ""
    for spec in (*session.inputs, *session.outputs):
        if spec.shape[0] == 1:
            return f"The first dimension of '{spec.name}' is fixed at 1, that of others is not."
    firsts = {symbols[0] for symbols in session.symbols}
    names = {name for name in firsts if isinstance(name, str)}
    if len(names) > 1:
        return f"The inputs' first dimensions are called {' and '.join(sorted(names))}: they are not the same rows."
    return _tried(session)


def sample(specs: Sequence[TensorSpec], rows: int, length: int, seed: int = 0) -> tuple[Array, ...]:
    """Return inputs that a graph of these specs may take: small numbers, since they may be indices or lengths."""
    rng = np.random.default_rng(seed)
    return tuple(_draw(spec, rows, length, rng) for spec in specs)


def _draw(spec: TensorSpec, rows: int, length: int, rng: np.random.Generator) -> Array:
    sizes = [length if size == VARIABLE else size for size in spec.shape[1:]]
    shape = (rows, *sizes) if spec.shape else ()
    if spec.shape and spec.shape[0] != VARIABLE:
        shape = (spec.shape[0], *sizes)
    if spec.datatype == "BYTES":
        return rng.choice(np.array(["a", "b"], np.object_), shape)
    if spec.dtype.kind == "f":
        return rng.normal(size=shape).astype(spec.dtype)
    return rng.integers(1 if spec.dtype.kind in "iu" else 0, 3 if spec.dtype.kind in "iu" else 2, shape).astype(
        spec.dtype
    )


def fitting_length(session: OnnxSession) -> int | None:
    """Return a length of the variable dimensions that the graph runs with; None: none that was tried."""
    for length in LENGTHS:
        try:
            session.run(*sample(session.inputs, 1, length))
        except Exception:  # ONNX Runtime raises a dozen unrelated classes
            continue
        return length
    return None


def _tried(session: OnnxSession) -> str:
    length = fitting_length(session)
    if length is None:
        return "No input that was tried ran through it, so it could not be shown that rows may share a run."
    first, second = (sample(session.inputs, 1, length, seed) for seed in (1, 2))
    try:
        alone = [session.run(*first), session.run(*second)]
        together = session.run(*[np.concatenate(pair) for pair in zip(first, second, strict=True)])
    except Exception as error:
        return f"Two rows together do not run through it: {str(error).strip().splitlines()[0][:200]}."
    for spec, one, other, both in zip(session.outputs, *alone, together, strict=True):
        if both.shape != (2, *one.shape[1:]) or one.shape != other.shape:
            return f"Two rows give '{spec.name}' in shape {list(both.shape)}, one row in {list(one.shape)}."
        if not _same(np.concatenate([one, other]), both):
            return f"Two rows together answer differently in '{spec.name}' than each alone."
    return ""


def _same(alone: Array, together: Array) -> bool:
    if alone.dtype.kind == "f":
        return np.allclose(alone, together, RELATIVE, ABSOLUTE, equal_nan=True)
    return bool(np.array_equal(alone, together))
