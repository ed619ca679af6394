"""Attention of the towers: every patch of an image sees all others, a frame of sound the latest dozen."""

import numpy as np

from refimpl.reference.attention import attend_one
from refimpl.reference.ops import softcap, softmax


def attend_all(q_TNH: np.ndarray, k_TNH: np.ndarray, v_TNH: np.ndarray) -> np.ndarray:
    """softmax(q k) v over all T rows, float32 (T, N, H); scores are not scaled. transformers: Gemma4VisionAttention.

    One query at a time: all scores together would be T x T for each head.
    """
    out_TNH = np.empty_like(q_TNH)
    for t, q_NH in enumerate(q_TNH):
        out_TNH[t] = attend_one(q_NH[:, None], k_TNH, v_TNH)[:, 0]
    return out_TNH


def attend_band(q_TNH: np.ndarray, k_TNH: np.ndarray, v_TNH: np.ndarray, relative_SNH: np.ndarray, cap: float) -> np.ndarray:
    """Attention to the latest S rows with relative positions (Dai et al. 2019, arXiv:1901.02860), float32 (T, N, H).

    Row t sees rows t - S + 1 to t. The score of row t - d is q (k + relative_SNH[d]), soft-capped. transformers: Gemma4AudioAttention,
    whose chunks are a way to compute the same.
    """
    out_TNH = np.empty_like(q_TNH)
    for t, q_NH in enumerate(q_TNH):
        first = max(0, t + 1 - len(relative_SNH))
        relative = relative_SNH[t - first::-1]
        score_NS = np.einsum("NH,SNH->NS", q_NH, k_TNH[first:t + 1]) + np.einsum("NH,SNH->NS", q_NH, relative)
        out_TNH[t] = np.einsum("NS,SNH->NH", softmax(softcap(score_NS, cap)), v_TNH[first:t + 1])
    return out_TNH
