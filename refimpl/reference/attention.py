"""Attention: every query scores the keys it may see, and takes the mean of their values, weighted by a softmax of the scores."""

import numpy as np

from refimpl.reference.ops import softmax


def attend(q_TNH: np.ndarray, k_SKH: np.ndarray, v_SKH: np.ndarray, first_T: np.ndarray, end_T: np.ndarray) -> np.ndarray:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245). Returns float32 (T, N, H).

    Query head n = k * G + g reads key/value head k. Row t sees positions first_T[t]..end_T[t]-1 and nothing else: a sliding window, a
    causal mask and a drafter's fixed view are all such ranges. One query at a time, so that a row's result does not depend on the others.
    """
    n_tok, n_head, head_dim = q_TNH.shape
    n_slots, n_kv, _ = k_SKH.shape
    q_TKGH = q_TNH.reshape(n_tok, n_kv, n_head // n_kv, head_dim)
    out_TKGH = np.empty_like(q_TKGH)
    for t in range(n_tok):
        visible = visible_slots(first_T[t], end_T[t], n_slots)
        out_TKGH[t] = attend_one(q_TKGH[t], k_SKH[visible].astype(np.float32), v_SKH[visible].astype(np.float32))
    return out_TKGH.reshape(n_tok, n_head, head_dim)


def visible_slots(first: int, end: int, n_slots: int) -> np.ndarray:
    """Where positions first..end-1 are kept. The cache is a ring: position p is in slot p % n_slots."""
    return np.arange(first, end) % n_slots


def attend_one(q_KGH: np.ndarray, k_SKH: np.ndarray, v_SKH: np.ndarray) -> np.ndarray:
    """softmax(q k) v, for all heads of one query. Gemma 4 does not divide the scores by sqrt(H)."""
    score_KGS = np.einsum("KGH,SKH->KGS", q_KGH, k_SKH)
    return np.einsum("KGS,SKH->KGH", softmax(score_KGS), v_SKH)
