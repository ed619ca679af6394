"""Mixture of experts: a router picks a few of many small feed-forward networks for each token (Shazeer et al. 2017, arXiv:1701.06538).

Picking experts (`route`) is apart from running them (`run_experts`), so that each can be checked alone.
"""

import numpy as np

from refimpl.formats.matrix import Matrix
from refimpl.reference.matmul import MATMUL
from refimpl.reference.ops import gelu, softmax


def route(logit_TE: np.ndarray, n_used: int, expert_scale_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Router logits -> (expert ids (T, X), weights (T, X)).

    Softmax over all experts, the X most probable, renormalised to sum 1, and only then each scaled by its expert's own factor
    (so the weights need not sum to 1). Ties: the lower id wins. transformers: Gemma4TextRouter.
    """
    probability_TE = softmax(logit_TE)
    id_TX = np.argsort(-probability_TE, axis=-1, kind="stable")[:, :n_used]
    weight_TX = np.take_along_axis(probability_TE, id_TX, axis=-1)
    weight_TX = weight_TX / weight_TX.sum(axis=-1, keepdims=True, dtype=np.float32)
    return id_TX, weight_TX * expert_scale_E[id_TX]


def run_experts(arithmetic: str, x_TD: np.ndarray, id_TX: np.ndarray, weight_TX: np.ndarray,
                gate_EMD: Matrix, up_EMD: Matrix, down_EDM: Matrix) -> np.ndarray:
    """y[t] = sum over picks x of weight[t, x] * expert_e(x[t]), e = id[t, x], in "exact" or "q8" arithmetic. float32 (T, D).

    An expert runs once, for all tokens that picked it. A token's experts are added in order of their ids.
    """
    matmul = MATMUL[arithmetic]

    def expert(e: int, x_TD: np.ndarray) -> np.ndarray:
        hidden_TM = gelu(matmul(x_TD, gate_EMD.expert(e))) * matmul(x_TD, up_EMD.expert(e))
        return matmul(hidden_TM, down_EDM.expert(e))

    y_TD = np.zeros_like(x_TD)
    for e in np.unique(id_TX):
        token, pick = np.nonzero(id_TX == e)
        y_TD[token] += weight_TX[token, pick, None] * expert(e, x_TD[token])
    return y_TD
