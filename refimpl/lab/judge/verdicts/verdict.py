"""What a verdict is, and the level that those about probabilities rest on.

A level is the median of the distances of many positions over that of what rounding does there (yardstick.py). The median, because a
mixture of experts makes both heavy-tailed: where two experts score alike a right engine may take either, and is far off at that position.
An engine with our own rounding is at a level of about 1, one in exact arithmetic at 0. What right engines reached is in README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from refimpl.lab.judge.ask import Answers
from refimpl.lab.judge.endpoint import Endpoint
from refimpl.lab.judge.measure import Position

RIGHT, DEPARTS, UNKNOWN = "right", "departs", "cannot tell"
LIMIT = 3.0                 # less than `compare` allows to the largest row of a tensor: a median of many positions varies less
LEAST = 8                   # positions that a level needs
FLOOR = 1e-5                # of a distance: log-probabilities come in float32
STEP, STEP_Z = 2.5, 4.5     # by how much a level rises, and how surely (normal quantile of the rank-sum test)
RISEN = 0.1                 # of rounding: what it has to reach
QUANTILE = 3.3              # of the normal distribution: 99.9 % of a median's confidence interval


@dataclass(frozen=True)
class Verdict:
    """`answer`: RIGHT, DEPARTS or UNKNOWN. `basis`: what it rests on, such as "ids compared" or "384 positions"."""

    question: str
    answer: str
    evidence: str
    basis: str = ""
    figures: dict[str, object] = field(default_factory=dict)


def level(positions: Sequence[Position]) -> float:
    """Distance over rounding, of medians or of lower quartiles, whichever is less; NaN for too few positions. Of quartiles too because an
    engine that rounds a little more may choose other experts at more than half of the positions, which makes the median alone jump.
    """
    if len(positions) < LEAST:
        return float("nan")
    theirs, ours = (np.quantile(sizes, (0.25, 0.5)) for sizes in zip(*((p.distance, p.rounding) for p in positions)))
    return float((theirs / np.maximum(ours, FLOOR)).min())


def distance(positions: Sequence[Position]) -> float:
    """The median."""
    return float(np.median([p.distance for p in positions]))


def rounding(positions: Sequence[Position]) -> float:
    """The median."""
    return max(float(np.median([p.rounding for p in positions])), FLOOR)


def surely_above(positions: Sequence[Position]) -> bool:
    """Is the level above LIMIT by the lower end of the median's confidence interval too? (David & Nagaraja, Order Statistics, 7.1.)"""
    n, ordered = len(positions), sorted(p.distance for p in positions)
    lower = max(0, int(np.floor((n - QUANTILE * np.sqrt(n)) / 2)))
    return n >= LEAST and level(positions) > LIMIT and ordered[lower] > LIMIT * rounding(positions)


def rises(before: Sequence[Position], after: Sequence[Position]) -> bool:
    """Is the level of `after` above that of `before`, whatever both are? By STEP at least, to RISEN at least, and by a rank-sum test."""
    if len(before) < LEAST or len(after) < LEAST:
        return False
    return level(after) >= max(RISEN, STEP * level(before)) and _rank_sum(ratios(before), ratios(after)) > STEP_Z


def ratios(positions: Sequence[Position]) -> list[float]:
    """Distance over rounding of each."""
    return [max(p.distance, FLOOR) / max(p.rounding, FLOOR) for p in positions]


def _rank_sum(a: Sequence[float], b: Sequence[float]) -> float:
    """How many standard deviations the ranks of `b` are above what chance makes of them (Mann & Whitney 1947, normal approximation)."""
    n, m = len(a), len(b)
    rank = np.concatenate([a, b]).argsort(kind="stable").argsort(kind="stable")
    return float((rank[n:].sum() - m * (n + m - 1) / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def reason(end: Endpoint, found: Answers, what: str, otherwise: str) -> str:
    """Why something cannot be told: what the endpoint said about `what`, why nothing more was asked, or `otherwise`."""
    return end.why.get(what) or (found.failed[-1] if found.stopped else otherwise)
