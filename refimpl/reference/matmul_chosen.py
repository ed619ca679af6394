"""Products with a few of many matrices, chosen for each row: the drafter's logits over the token clusters it has picked."""

import numpy as np

from refimpl.formats.matrix import Matrix
from refimpl.reference.matmul import MATMUL


def matmul_chosen(arithmetic: str, x_TD: np.ndarray, id_TX: np.ndarray, w_EOD: Matrix) -> np.ndarray:
    """y[t, x] = w[id[t, x]] @ x[t], in "exact" or "q8" arithmetic, float32 (T, X, O)."""
    matmul = MATMUL[arithmetic]
    y_TXO = np.empty((*id_TX.shape, w_EOD.shape[1]), np.float32)
    for t, x in np.ndindex(id_TX.shape):
        y_TXO[t, x] = matmul(x_TD[t:t + 1], w_EOD.expert(id_TX[t, x]))[0]
    return y_TXO
