"""The same tensor of two traces, in the rows, columns and layout that both have."""

from dataclasses import dataclass

import numpy as np

from refimpl.lab.compare import top_logits
from refimpl.lab.compare.names import place_of
from refimpl.lab.compare.trace import Trace, Value


@dataclass(frozen=True)
class Pair:
    """A tensor of both traces: (rows, ...) each, and the rows' positions. The shapes differ where one cannot be read as the other."""

    ours: np.ndarray
    theirs: np.ndarray
    positions: np.ndarray

    @property
    def fits(self) -> bool:
        """Are there as many elements in each row?"""
        return self.ours.shape == self.theirs.shape

    def rows(self, which: np.ndarray) -> "Pair":
        """Some rows, by a mask."""
        return Pair(self.ours[which], self.theirs[which], self.positions[which])


class Pairs:
    """All pairs of two traces. The last one is kept: it is read again and may be large."""

    def __init__(self, a: Trace, b: Trace):
        self.a, self.b, self._last = a, b, ("", None)

    def has(self, name: str) -> bool:
        """Is it in both traces?"""
        return name in self.a.names() and name in self.b.names()

    def of(self, name: str) -> Pair:
        """A tensor that is in both traces (of the largest logits, in one: see top_logits.py)."""
        if self._last[0] != name:
            top = name.endswith(f"{top_logits.FULL}.top")
            self._last = name, Pair(*top_logits.pair(self.a, self.b, name)) if top else self._read(name)
        return self._last[1]

    def at(self, name: str, positions: np.ndarray) -> Pair | None:
        """A tensor at exactly these positions, None where one trace lacks it or its shapes differ."""
        if not self.has(name):
            return None
        pair = self.of(name)
        pair = pair.rows(np.isin(pair.positions, positions))
        return pair if pair.fits and len(pair.positions) == len(positions) else None

    def by_expert(self, name: str, pair: Pair) -> Pair:
        """Weights of experts in the order of the experts' ids, as engines list them in different orders; of rows with the same experts."""
        ids = name.replace("weights", "topk")
        if not self.has(ids):
            return pair
        chosen = self.of(ids)
        chosen = chosen.rows(np.isin(chosen.positions, pair.positions))
        order_a, order_b = np.argsort(chosen.ours, axis=1), np.argsort(chosen.theirs, axis=1)
        same = (np.take_along_axis(chosen.ours, order_a, 1) == np.take_along_axis(chosen.theirs, order_b, 1)).all(axis=1)
        ours, theirs = np.take_along_axis(pair.ours, order_a, 1), np.take_along_axis(pair.theirs, order_b, 1)
        return Pair(ours, theirs, pair.positions).rows(same)

    def _read(self, name: str) -> Pair:
        a, b = self.a.value(name), self.b.value(name)
        if place_of(name).tower and len(a.array) != len(b.array) and name in self.a.arrays and name in self.b.arrays:
            return Pair(a.array, b.array, a.positions)
        positions, rows_a, rows_b = np.intersect1d(a.positions, b.positions, return_indices=True)
        ours, theirs = a.array[rows_a], b.array[rows_b]
        ours, theirs = _columns(ours, b), _columns(theirs, a)
        if ours.shape != theirs.shape and ours.size == theirs.size:
            theirs = theirs.reshape(ours.shape)
        return Pair(ours, theirs, positions)


def _columns(array: np.ndarray, other: Value) -> np.ndarray:
    """The columns of `array` that `other` has, where it has not all."""
    if not other.index or array[0].size != np.prod(other.shape):
        return array
    return array.reshape(len(array), *other.shape)[np.ix_(np.arange(len(array)), *other.index)]
