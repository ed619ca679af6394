"""How far every position of the answers is from ours, beside how far rounding goes there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.lab.evaluate.divergence import keep, log_sum_exp
from refimpl.lab.judge.ask import Asked
from refimpl.lab.judge.bounds import as_line, listed_bounds
from refimpl.lab.judge.vocabulary import Vocabulary
from refimpl.lab.judge.yardstick import Yardstick
from refimpl.progress import Progress, silent


@dataclass(frozen=True)
class Position:
    """One position of one answer. `low`, `high`: between which KL(endpoint || ours) lies, nats. `noise`: the lower bound of each of our own
    runs that round. `line`: (slope, shift, rest) of bounds.as_line. `n_listed`: tokens that are compared.
    """

    asked: Asked
    at: int                     # of the last token that it sees, counted from 0
    n: int                      # of the answer's token that it gives
    low: float
    high: float
    noise: tuple[float, ...]
    line: tuple[float, float, float]
    n_listed: int
    same_top: bool

    @property
    def distance(self) -> float:
        """sqrt(2 KL): the size of differences of log-probabilities."""
        return (2 * self.low) ** 0.5

    @property
    def rounding(self) -> float:
        """The same of our runs, their root mean square."""
        return (2 * float(np.mean(self.noise))) ** 0.5


def measure(asked: Sequence[Asked], yardstick: Yardstick, vocabulary: Vocabulary, progress: Progress = silent) -> list[Position]:
    """All positions with probabilities."""
    found, computed = [], {}
    with progress("answers judged", len(asked)) as advance:
        for each in asked:
            found += _positions(each, yardstick, vocabulary, computed)
            advance(1)
    return found


def _positions(asked: Asked, yardstick: Yardstick, vocabulary: Vocabulary, computed: dict) -> list[Position]:
    steps = asked.answer.steps
    n_steps = next((n for n, step in enumerate(steps) if not step.top), len(steps))
    if not n_steps:
        return []
    chosen, unsure = vocabulary.chosen(steps, n_steps - 1)
    ids, first = [*asked.ids, *chosen], len(asked.ids) - 1
    n_top = max(len(step.top) for step in steps[:n_steps])
    key = (tuple(ids), n_top)
    if key not in computed:
        exact_RV = yardstick.exact(ids, first)
        noise = [[keep(row_V, n_top) for row_V in rows_RV] for rows_RV in yardstick.rounded(ids, first)]
        bounds = [[listed_bounds(kept.id_K, kept.logit_K.astype(np.float64) - kept.log_sum, exact_RV[r])[0] for r, kept in enumerate(run)]
                  for run in noise]
        computed[key] = exact_RV, list(zip(*bounds))
    exact_RV, noise = computed[key]
    found = []
    for n in range(len(exact_RV)):
        logit_V = exact_RV[n]
        log_p_V = logit_V.astype(np.float64) - log_sum_exp(logit_V)
        id_K, logprob_K, whole = vocabulary.listing(steps[n].top, log_p_V)
        if len(id_K):
            low, high = listed_bounds(id_K, logprob_K, logit_V, whole)
            found.append(Position(asked, first + n, n, low, high, noise[n], as_line(logprob_K, log_p_V[id_K]), len(id_K),
                                  int(np.argmax(log_p_V)) == int(id_K[0])))
        if n in unsure and not vocabulary.is_sure(steps[n], chosen[n], log_p_V):
            break
    return found
