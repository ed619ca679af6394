"""Attention: every query scores the keys it may see, and takes the mean of their values, weighted by a softmax of the scores."""

import numpy as np

from refimpl.reference.ops import softmax


def attend(q_TNH: np.ndarray, kept, first_T: np.ndarray, end_T: np.ndarray) -> np.ndarray:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245). Returns float32 (T, N, H).

    Query head n = k * G + g reads key/value head k. Row t sees positions first_T[t]..end_T[t]-1 and nothing else: a sliding window, a
    causal mask and a drafter's fixed view are all such ranges. `kept.read(first, end)` gives their keys and values, (S, K, H) each
    (model/blocks.py). One query at a time, so that a row's result does not depend on the others.
    """
    n_tok, n_head, head_dim = q_TNH.shape
    n_kv = kept.shape[-2]
    q_TKGH = q_TNH.reshape(n_tok, n_kv, n_head // n_kv, head_dim)
    out_TKGH = np.empty_like(q_TKGH)
    for t in range(n_tok):
        k_SKH, v_SKH = kept.read(first_T[t], end_T[t])
        out_TKGH[t] = attend_one(q_TKGH[t], k_SKH.astype(np.float32), v_SKH.astype(np.float32))
    return out_TKGH.reshape(n_tok, n_head, head_dim)


def attend_one(q_KGH: np.ndarray, k_SKH: np.ndarray, v_SKH: np.ndarray) -> np.ndarray:
    """softmax(q k) v, for all heads of one query. Gemma 4 does not divide the scores by sqrt(H)."""
    score_KGS = np.einsum("KGH,SKH->KGS", q_KGH, k_SKH)
    return np.einsum("KGS,SKH->KGH", softmax(score_KGS), v_SKH)
