"""A tensor that departs, the tensors around it, and distances: what the tests in diagnoses.py use."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refimpl.lab.compare.names import graph_order, place_of

LARGEST = 4             # the error of the largest of some hundred elements, in units of their rms


@dataclass(frozen=True)
class Mismatch:
    """A tensor that departs: ours and theirs, (rows, ...), the rows' positions, the tolerance. `beside(name)` gives another tensor of both
    traces in the same rows, or None. `ids`: of the rows, those of soft tokens below 0; empty where rows are none of the prompt.
    """

    name: str
    ours: np.ndarray
    theirs: np.ndarray
    positions: np.ndarray
    tolerance: float
    beside: Callable[[str], tuple[np.ndarray, np.ndarray] | None]
    ids: tuple[int, ...] = ()

    def near(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A tensor of the same layer and stage."""
        place = place_of(self.name)
        return self.beside(f"{place.prefix}{name}" + ("" if place.layer is None else f"-{place.layer}"))


def row_errors(a: np.ndarray, b: np.ndarray, resolution: float = 0.0) -> np.ndarray:
    """rms(a - b) / rms(a) of every row; rows much smaller than the rest are measured by a thousandth of the whole. NaN is infinite."""
    x, y = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (a, b))
    apart = np.maximum(np.abs(x - y) - resolution, 0)
    size = np.maximum(np.sqrt(np.mean(x * x, axis=1)), 1e-3 * np.sqrt(np.mean(x * x)) + 1e-30)
    errors = np.sqrt(np.mean(apart * apart, axis=1)) / size
    return np.where(np.isfinite(errors), errors, np.inf)


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """rms(x - y) / rms(y) over everything."""
    x, y = (np.asarray(v, np.result_type(v, np.float64)) for v in (x, y))
    return float(np.sqrt(np.mean(np.abs(x - y) ** 2)) / (np.sqrt(np.mean(np.abs(y) ** 2)) + 1e-30))


def fits(mismatch: Mismatch, made: np.ndarray, theirs: np.ndarray | None = None) -> bool:
    """Does `made` explain theirs: within the tolerance, or by removing all but a thirtieth of the difference? (It removes two thirds at
    least: what departs in a few elements only is less than the tolerance of the whole.)
    """
    apart = distance(mismatch.ours, mismatch.theirs)
    return distance(made, mismatch.theirs if theirs is None else theirs) <= max(min(mismatch.tolerance, apart / 3), apart / 30)


def ratio(mismatch: Mismatch) -> np.ndarray:
    """theirs / ours in float64, NaN where ours is next to nothing."""
    ours = np.asarray(mismatch.ours, np.float64)
    small = np.abs(ours) < 1e-3 * np.sqrt(np.mean(ours * ours))
    return np.where(small, np.nan, np.asarray(mismatch.theirs, np.float64) / np.where(small, 1, ours))


def median(x: np.ndarray, axis) -> np.ndarray:
    """Ignores NaN; 1 where there is nothing else. Axes are kept."""
    known = ~np.isnan(x)
    filled = np.nanmedian(np.where(known.any(axis=axis, keepdims=True), x, 1.0), axis=axis, keepdims=True)
    return filled


def departing(s: Mismatch) -> np.ndarray:
    """The rows that deviate by more than the tolerance."""
    return np.flatnonzero(row_errors(s.ours, s.theirs) > s.tolerance)


def earlier(s: Mismatch) -> list[tuple[str, np.ndarray]]:
    """Their tensors of the same size that come before it: in this layer, the output of the layer before, the input."""
    place, found = place_of(s.name), []
    output, inputs = ("layer_out", ("pos_embd", "inp")) if place.tower else ("l_out", ("inp_scaled", "pre_proj"))
    before = (output,) if place.layer != 0 else inputs
    candidates = [f"{place.prefix}{name}" + ("" if place.layer == 0 else f"-{last_layer(s) if place.layer is None else place.layer - 1}")
                  for name in before]
    candidates += [f"{place.prefix}{n.name}" + ("" if place.layer is None else f"-{place.layer}") for n in place.names
                   if n.layered == (place.layer is not None)]
    candidates = graph_order([*candidates, s.name])
    for name in candidates[:candidates.index(s.name)]:
        pair = s.beside(name)
        if pair is not None and pair[1].dtype.kind == "f" and pair[1].size == s.theirs.size:
            found.append((name, np.asarray(pair[1])))
    return found


def last_layer(s: Mismatch) -> int:
    """The last layer whose output is in both traces."""
    place, i = place_of(s.name), 0
    while s.beside(f"{place.prefix}{'layer_out' if place.tower else 'l_out'}-{i + 1}") is not None:
        i += 1
    return i
