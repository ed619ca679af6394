"""How far every position of the answers is from ours, beside how far rounding goes there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.lab.evaluate.divergence import keep, log_sum_exp
from refimpl.lab.judge.answers import Step
from refimpl.lab.judge.ask import Asked
from refimpl.lab.judge.bounds import as_line, listed_bounds
from refimpl.lab.judge.vocabulary import Vocabulary
from refimpl.lab.judge.yardstick import Yardstick


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


def together(asked: Sequence[Asked], vocabulary: Vocabulary) -> list[list[Read]]:
    """The answers that have probabilities, those of the same tokens together: they are computed once."""
    same = defaultdict(list)
    for each in asked:
        if (read := _read(each, vocabulary)) is not None:
            same[read.ids, each.name if each.media else None].append(read)
    return list(same.values())


@dataclass(frozen=True)
class Read:
    """An answer by its tokens: `ids`, of prompt and answer, as far as they are seen by a position with probabilities. `steps`: those that
    have them, by their number. `unsure`: numbers of the tokens that may be other ones.
    """

    asked: Asked
    ids: tuple[int, ...]
    steps: Mapping[int, Step]
    unsure: Sequence[int]

    def at(self, n: int) -> int:
        """The position that gives token `n` of the answer."""
        return len(self.asked.ids) - 1 + n


def _read(asked: Asked, vocabulary: Vocabulary) -> Read | None:
    steps = vocabulary.known(asked.answer)
    steps = steps[:next((n for n, step in enumerate(steps) if not step.top and step.chosen.id is None), len(steps))]
    last = max((n for n, step in enumerate(steps) if step.top), default=None)
    if last is None:
        return None
    chosen, unsure = vocabulary.chosen(steps, last)
    return Read(asked, (*asked.ids, *chosen), {n: step for n, step in enumerate(steps[:len(chosen) + 1]) if step.top}, unsure)


def measured(reads: Sequence[Read], yardstick: Yardstick, vocabulary: Vocabulary) -> list[Position]:
    """The positions of answers that have the same tokens."""
    ids, at = reads[0].ids, sorted({read.at(n) for read in reads for n in read.steps})
    media, found = reads[0].asked.media, []
    exact_RV, rounded = yardstick.exact(ids, at, media), yardstick.rounded(ids, at, media)
    row = {position: r for r, position in enumerate(at)}
    for read in reads:
        for n, step in read.steps.items():
            here = row[read.at(n)]
            log_p_V = exact_RV[here].astype(np.float64) - log_sum_exp(exact_RV[here])
            id_K, logprob_K, whole = vocabulary.listing(step.top, log_p_V)
            if len(id_K):
                low, high = listed_bounds(id_K, logprob_K, exact_RV[here], whole)
                noise = tuple(_seen_alike(run_RV[here], len(id_K), exact_RV[here]) for run_RV in rounded)
                found.append(Position(read.asked, read.at(n), n, low, high, noise, as_line(logprob_K, log_p_V[id_K]), len(id_K),
                                      int(np.argmax(log_p_V)) == int(id_K[0])))
            if n in read.unsure and not vocabulary.is_sure(step, ids[read.at(n) + 1], log_p_V):
                break                   # what follows was perhaps computed from another token
    return found


def _seen_alike(logit_V: np.ndarray, n_top: int, exact_V: np.ndarray) -> float:
    """The lower bound of a run of ours, by its `n_top` most probable tokens."""
    kept = keep(logit_V, n_top)
    return listed_bounds(kept.id_K, kept.logit_K.astype(np.float64) - kept.log_sum, exact_V)[0]
