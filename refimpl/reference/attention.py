"""Attention: every query looks at the keys it may see and takes a weighted mean of their values."""

import numpy as np

from refimpl.reference.ops import softmax


def attend(q_TNH: np.ndarray, k_SKH: np.ndarray, v_SKH: np.ndarray, first_T: np.ndarray, end_T: np.ndarray) -> np.ndarray:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245). Returns float32 (T, N, H).

    Query head n = k * G + g reads key/value head k. Row t sees positions first_T[t]..end_T[t]-1 and nothing else: a sliding window, a
    causal mask and a drafter's fixed view are all such a range. Position p lies in slot p % S of the keys and values. Gemma 4 does not
    divide the scores by sqrt(H).
    One query at a time, so that a row's result does not depend on which other rows were asked for.
    """
    n_tok, n_head, head_dim = q_TNH.shape
    n_kv = k_SKH.shape[1]
    q_TKGH = q_TNH.reshape(n_tok, n_kv, n_head // n_kv, head_dim)
    out_TKGH = np.empty_like(q_TKGH)
    for t in range(n_tok):
        slot = np.arange(first_T[t], end_T[t]) % len(k_SKH)
        k, v = k_SKH[slot].astype(np.float32), v_SKH[slot].astype(np.float32)
        weight_KGS = softmax(np.einsum("KGH,SKH->KGS", q_TKGH[t], k))
        out_TKGH[t] = np.einsum("KGS,SKH->KGH", weight_KGS, v)
    return out_TKGH.reshape(n_tok, n_head, head_dim)
