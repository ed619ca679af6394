"""How far apart two distributions over the vocabulary are, position by position: from whole rows of logits, or from what a run has kept.

Let p be the base's distribution and q the other one, S the tokens that were kept of p (its most probable), m the least probability of
them, and t = 1 - p(S) the mass of the tail. KL(p || q) = sum of p log(p / q), in nats, is the sum over S, which is known, plus the sum over
the tail, of which t and q are known and p is not. `divergence_bounds` says between which values it lies:

- at least t log(t / q(tail)): the log-sum inequality (Cover & Thomas 2006, theorem 2.7.1), or: putting tokens together never makes two
  distributions easier to distinguish;
- at most its largest value over all tails that are possible, those with 0 <= p <= m and sum t. The sum of p log p - p log q is convex in
  p, so that it is largest in a corner of these: as many tokens at m as fit into t (n of them, n = floor(t / m)), one with the rest r, the
  others 0. The sum of p log p is then n m log m + r log r whichever tokens they are; the sum of -p log q is largest where the n that q
  holds least probable have m, and the next one r. No smaller bound follows from what was kept: the tail may be this one.

Both hold up to the rounding of float64. With the whole vocabulary kept they are equal.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Kept:
    """What is kept of a row of logits: log(sum(exp(logits))), float64, and the K most probable tokens with their logits, float32.

    The most probable comes first; of equal ones, the lower id. A log-probability is logit - log_sum.
    """

    log_sum: float
    id_K: np.ndarray
    logit_K: np.ndarray


def keep(logit_V: np.ndarray, n_top: int) -> Kept:
    """The `n_top` most probable tokens (or all, where there are fewer) of a row of logits."""
    id_K = most_probable(logit_V, n_top)
    return Kept(log_sum_exp(logit_V), id_K.astype(np.int32), logit_V[id_K])


def log_sum_exp(logit_V: np.ndarray) -> float:
    """log(sum(exp(logits))) in float64."""
    z_V = logit_V.astype(np.float64)
    top = z_V.max()
    return float(top + np.log(np.exp(z_V - top).sum()))


def most_probable(logit_V: np.ndarray, n_top: int) -> np.ndarray:
    """Ids of the `n_top` largest, the largest first; of equal ones, the lower id."""
    n_top = min(n_top, len(logit_V))
    least = np.partition(logit_V, len(logit_V) - n_top)[len(logit_V) - n_top]
    above, equal = np.flatnonzero(logit_V > least), np.flatnonzero(logit_V == least)
    ids = np.concatenate([above, equal[:n_top - len(above)]])
    return ids[np.lexsort((ids, -logit_V[ids]))]


def divergence(p_logit_V: np.ndarray, q_logit_V: np.ndarray, p_log_sum: float, q_log_sum: float) -> float:
    """KL(p || q) in nats, of two rows of logits and their `log_sum_exp`."""
    p_V = p_logit_V.astype(np.float64) - p_log_sum
    difference_V = p_V - (q_logit_V.astype(np.float64) - q_log_sum)
    return max(0.0, float((np.exp(p_V) * difference_V).sum()))


def divergence_bounds(p: Kept, q_logit_V: np.ndarray, q_log_sum: float) -> tuple[float, float]:
    """Between which values KL(p || q) lies, in nats, when only `Kept` is known of p. The derivation is at the top of the file."""
    p_K = p.logit_K.astype(np.float64) - p.log_sum
    log_q_V = q_logit_V.astype(np.float64) - q_log_sum
    known = float((np.exp(p_K) * (p_K - log_q_V[p.id_K])).sum())
    tail_V = np.ones(len(q_logit_V), bool)
    tail_V[p.id_K] = False
    log_q_tail = log_q_V[tail_V]
    mass = min(1 - float(np.exp(p_K).sum()), len(log_q_tail) * float(np.exp(p_K[-1])))
    if mass <= 0:
        return max(0.0, known), max(0.0, known)
    lowest = known + mass * (np.log(mass) - np.log(np.exp(log_q_tail).sum()))
    most = float(np.exp(p_K[-1]))
    n = min(int(mass / most), len(log_q_tail))
    rest = max(0.0, mass - n * most)
    least = np.sort(np.partition(log_q_tail, min(n, len(log_q_tail) - 1))[:n + 1])
    highest = known + n * most * p_K[-1] - most * least[:n].sum()
    if rest > 0 and n < len(least):
        highest += rest * (np.log(rest) - least[n])
    return max(0.0, float(lowest)), max(0.0, float(lowest), float(highest))
