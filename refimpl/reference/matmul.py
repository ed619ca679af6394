"""The product of activations with a weight matrix: where nearly all the time and all the bytes go."""

import numpy as np

from refimpl.formats.matrix import Matrix


def matmul(x_TD: np.ndarray, w_OD: Matrix) -> np.ndarray:
    """y[t, o] = sum over d of x[t, d] * w[o, d]. float32 (T, D) and a Matrix of (O, D) -> float32 (T, O).

    The weights are dequantized chunk by chunk and forgotten again, so that a matrix larger than memory could be used.
    einsum without `optimize` adds each row up in the same order however many rows there are; BLAS does not.
    """
    y_TO = np.empty((x_TD.shape[0], w_OD.shape[0]), np.float32)
    for first, end, w in w_OD.chunks():
        y_TO[:, first:end] = np.einsum("TD,OD->TO", x_TD, w)
    return y_TO
