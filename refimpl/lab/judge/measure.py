"""How far every position of the answers is from ours, beside how far rounding goes there."""

from __future__ import annotations

from collections import defaultdict
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
    """All positions with probabilities. Answers of the same tokens are computed once."""
    tokens = defaultdict(list)
    for each in asked:
        n_steps = next((n for n, step in enumerate(each.answer.steps) if not step.top), len(each.answer.steps))
        if n_steps:
            chosen, unsure = vocabulary.chosen(each.answer.steps, n_steps - 1)
            tokens[(*each.ids, *chosen), len(each.ids) - 1].append((each, unsure))
    found = []
    with progress("answers computed", len(tokens)) as advance:
        for (ids, first), same in tokens.items():
            exact_RV, rounded = yardstick.exact(ids, first), yardstick.rounded(ids, first)
            for each, unsure in same:
                found += _positions(each, ids, unsure, exact_RV, rounded, vocabulary)
            advance(1)
    return found


def _positions(asked: Asked, ids: Sequence[int], unsure: Sequence[int], exact_RV: np.ndarray, rounded: Sequence[np.ndarray],
               vocabulary: Vocabulary) -> list[Position]:
    first, found = len(asked.ids) - 1, []
    for n, (logit_V, step) in enumerate(zip(exact_RV, asked.answer.steps)):
        log_p_V = logit_V.astype(np.float64) - log_sum_exp(logit_V)
        id_K, logprob_K, whole = vocabulary.listing(step.top, log_p_V)
        if len(id_K):
            low, high = listed_bounds(id_K, logprob_K, logit_V, whole)
            noise = tuple(_seen_alike(run_RV[n], len(id_K), logit_V) for run_RV in rounded)
            found.append(Position(asked, first + n, n, low, high, noise, as_line(logprob_K, log_p_V[id_K]), len(id_K),
                                  int(np.argmax(log_p_V)) == int(id_K[0])))
        if n in unsure and not vocabulary.is_sure(step, ids[first + 1 + n], log_p_V):
            break                   # what follows was perhaps computed from another token
    return found


def _seen_alike(logit_V: np.ndarray, n_top: int, exact_V: np.ndarray) -> float:
    """The lower bound of a run of ours, by its `n_top` most probable tokens."""
    kept = keep(logit_V, n_top)
    return listed_bounds(kept.id_K, kept.logit_K.astype(np.float64) - kept.log_sum, exact_V)[0]
