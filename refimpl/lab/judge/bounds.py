"""How far apart two distributions over a vocabulary are, where of one of them only some probabilities are known. Pure.

An endpoint lists the log-probabilities of its K most probable tokens: of its distribution p the set S and t = 1 - p(S) are known. Of ours,
q, all is known. Then KL(p || q), in nats, is at least that of the K + 1 events "token i of S" and "any other": putting tokens together
makes no two distributions easier to tell apart (log-sum inequality: Cover & Thomas 2006, theorem 2.7.1; equality where p and q are
proportional in the tail). It is at most what the worst tail makes of it. Both are derived in lab/evaluate/divergence.py. Where a token of
the listing is not known here it joins "any other": the lower bound holds, an upper one does not exist.

Log-probabilities come rounded, to float32 or to a few digits: an error e in each moves the lower bound by about e times the difference of
the log-probabilities, and t is taken as 0 where it would be negative.
"""

from __future__ import annotations

import numpy as np

from refimpl.lab.evaluate.divergence import Kept, divergence_bounds, log_sum_exp


def listed_bounds(id_K: np.ndarray, logprob_K: np.ndarray, q_logit_V: np.ndarray, whole: bool = True) -> tuple[float, float]:
    """Between which values KL(endpoint || ours) lies, in nats. `id_K`: different tokens, the most probable first, with the endpoint's
    log-probabilities; `q_logit_V`: our logits; `whole`: are these the most probable ones, none left out? Upper bound inf if not.
    """
    if not len(id_K):
        return 0.0, float("inf")
    log_sum = log_sum_exp(q_logit_V)
    if whole:
        return divergence_bounds(Kept(0.0, id_K, logprob_K), q_logit_V, log_sum)
    log_q_V = q_logit_V.astype(np.float64) - log_sum            # the tail may hold tokens more probable than those that are listed
    p_K, rest = np.exp(logprob_K), max(0.0, 1 - float(np.exp(logprob_K).sum()))
    low = float((p_K * (logprob_K - log_q_V[id_K])).sum())
    if rest > 0:
        low += rest * (np.log(rest) - np.log(np.exp(np.delete(log_q_V, id_K)).sum()))
    return max(0.0, float(low)), float("inf")


def as_line(theirs_K: np.ndarray, ours_K: np.ndarray) -> tuple[float, float, float]:
    """(slope, shift, rms of what is left) of the line theirs = slope * ours + shift through log-probabilities of the same tokens.

    A temperature T divides logits: the slope is 1 / T. A distribution that was cut to its head and renormalised has slope 1 and a shift
    above 0. Least squares; slope 1 where ours are all the same.
    """
    x, y = ours_K - ours_K.mean(), theirs_K - theirs_K.mean()
    slope = float((x * y).sum() / (x * x).sum()) if (x * x).sum() > 0 else 1.0
    shift = float(theirs_K.mean() - slope * ours_K.mean())
    return slope, shift, float(np.sqrt(np.mean((theirs_K - slope * ours_K - shift) ** 2)))
