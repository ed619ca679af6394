"""The largest logits of a row in two traces, which may list other tokens: brought to the same ones."""

from collections.abc import Iterable

import numpy as np

from refimpl.lab.compare.trace import Trace, TraceError

FULL = "result_output"


def comparable(a: Trace, b: Trace) -> set[str]:
    """Names that both traces have, with `.top` also where one of them has all logits; without `.ids`, which are no quantities."""
    of_a, of_b = set(a.names()), set(b.names())
    half = {name for name in of_a | of_b if name.endswith(f"{FULL}.top") and all(_has(names, name) for names in (of_a, of_b))}
    return {name for name in of_a & of_b if not name.endswith(f"{FULL}.ids")} | half


def _has(names: Iterable[str], top: str) -> bool:
    full = top.removesuffix(".top")
    return full in names or {top, f"{full}.ids"} <= set(names)


def pair(a: Trace, b: Trace, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ours, theirs, positions) of `name`, a `.top`: the logits of the tokens that `a` lists, or `b` where `a` has all.

    A token that `b` does not list is below those that it does: it counts as the least of them, or as ours where that is less.
    """
    full = name.removesuffix(".top")
    listing = a if name in a.names() else b
    tokens = listing.value(f"{full}.ids")
    values = [t.value(name if name in t.names() else full) for t in (a, b)]
    positions = np.array([p for p in tokens.positions if all(p in value.positions for value in values)], int)
    id_TK = tokens.array[np.searchsorted(tokens.positions, positions)]
    ours, theirs = (_logits_of(t, name, positions, id_TK) for t in (a, b))
    below = np.minimum(ours, _least(b, name, positions))
    return np.where(np.isnan(ours), theirs, ours), np.where(np.isnan(theirs), below, theirs), positions


def _rows(trace: Trace, name: str, positions: np.ndarray) -> np.ndarray:
    value = trace.value(name)
    return value.array[np.searchsorted(value.positions, positions)]


def _least(trace: Trace, name: str, positions: np.ndarray) -> np.ndarray:
    return _rows(trace, name, positions).min(axis=1, keepdims=True) if name in trace.names() else np.float32(np.inf)


def _logits_of(trace: Trace, name: str, positions: np.ndarray, id_TK: np.ndarray) -> np.ndarray:
    """The logits of these tokens, NaN for those that the trace does not list."""
    full = name.removesuffix(".top")
    if name not in trace.names():
        logit_TV = _rows(trace, full, positions)
        if id_TK.size and not 0 <= id_TK.min() <= id_TK.max() < logit_TV.shape[1]:
            raise TraceError(f"{name}: token {id_TK.max()} is outside of the vocabulary of {trace.where}, {logit_TV.shape[1]}")
        return np.take_along_axis(logit_TV, id_TK, axis=1)
    found = np.full(id_TK.shape, np.nan, np.float32)
    for t, (ids, top) in enumerate(zip(_rows(trace, f"{full}.ids", positions), _rows(trace, name, positions))):
        listed = dict(zip(ids.tolist(), top.tolist()))
        found[t] = [listed.get(token, np.nan) for token in id_TK[t].tolist()]
    return found
