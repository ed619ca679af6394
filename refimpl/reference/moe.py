"""Mixture of experts: a router picks a few of many small feed-forward networks for each token (Shazeer et al. 2017, arXiv:1701.06538).

Deciding which experts (`choose`) is apart from running them (`run_experts`), so that each can be checked alone.
"""

import numpy as np

from refimpl.formats.matrix import Matrix
from refimpl.reference.ops import gelu, softmax


def choose(logit_TE: np.ndarray, n_used: int, expert_scale_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Router logits -> (expert ids (T, X), weights (T, X)).

    Softmax over all experts, the X most probable, renormalised to sum 1, and only then each scaled by its expert's own factor
    (so the weights need not sum to 1). Ties: the lower id wins. transformers: Gemma4TextRouter.
    """
    probability_TE = softmax(logit_TE)
    id_TX = np.argsort(-probability_TE, axis=-1, kind="stable")[:, :n_used]
    weight_TX = np.take_along_axis(probability_TE, id_TX, axis=-1)
    weight_TX = weight_TX / weight_TX.sum(axis=-1, keepdims=True, dtype=np.float32)
    return id_TX, weight_TX * expert_scale_E[id_TX]


def run_experts(matmul, x_TD: np.ndarray, id_TX: np.ndarray, weight_TX: np.ndarray,
                gate_EMD: Matrix, up_EMD: Matrix, down_EDM: Matrix) -> np.ndarray:
    """y[t] = sum over picks x of weight[t, x] * down_e @ (gelu(gate_e @ x[t]) * (up_e @ x[t])), e = id[t, x]. float32 (T, D).

    `matmul(x, matrix)` is the product to use. Each expert that was picked is dequantized once and sees all its tokens. A token adds its
    experts up in order of their ids.
    """
    y_TD = np.zeros_like(x_TD)
    for e in np.unique(id_TX):
        tok, pick = np.nonzero(id_TX == e)
        hidden = gelu(matmul(x_TD[tok], gate_EMD.expert(e))) * matmul(x_TD[tok], up_EMD.expert(e))
        y_TD[tok] += weight_TX[tok, pick, None] * matmul(hidden, down_EDM.expert(e))
    return y_TD


def matmul_chosen(matmul, x_TD: np.ndarray, id_TX: np.ndarray, w_EOD: Matrix) -> np.ndarray:
    """y[t, x] = w[id[t, x]] @ x[t]: products with a few of many matrices, float32 (T, X, O). `matmul` as in `run_experts`."""
    y_TXO = np.empty((*id_TX.shape, w_EOD.shape[1]), np.float32)
    for t, x in np.ndindex(id_TX.shape):
        y_TXO[t, x] = matmul(x_TD[t:t + 1], w_EOD.expert(id_TX[t, x]))[0]
    return y_TXO
