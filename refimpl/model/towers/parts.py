"""What several towers have: clipped matrices, rows in chunks, planes of a patch, places of patches, the projection."""

from collections.abc import Callable

import numpy as np

from refimpl.formats.matrix import Matrix
from refimpl.model.backend import Backend, Prepared
from refimpl.model.towers.weights import Clipped, Linear

CHUNK = 512             # rows whose feed-forward network, the widest part, is computed at a time


def linear(x_TD: np.ndarray, w: Linear, backend: Backend) -> np.ndarray:
    """The product with a matrix; inputs and outputs limited where it is a clipped one. transformers: Gemma4ClippableLinear."""
    if not isinstance(w, Clipped):
        return backend.matmul(x_TD, w)
    return backend.limit(backend.matmul(backend.limit(x_TD, w.in_min, w.in_max), w.matrix_OD), w.out_min, w.out_max)


def in_chunks(function: Callable[[np.ndarray], np.ndarray], x_TD: np.ndarray) -> np.ndarray:
    """`function(x_TD)` of rows that do not depend on each other, CHUNK of them at a time: takes less memory."""
    return np.concatenate([function(x_TD[first:first + CHUNK]) for first in range(0, len(x_TD), CHUNK)])


def as_planes(patches_TP: np.ndarray, side: int) -> np.ndarray:
    """Patches with their numbers in the order (channel, row, column), as in files, from (row, column, channel)."""
    n = len(patches_TP)
    return np.ascontiguousarray(patches_TP.reshape(n, side, side, 3).transpose(0, 3, 1, 2)).reshape(n, -1)


def positions_of(table_2SD: Matrix, pos_T2: np.ndarray) -> np.ndarray:
    """The row of the table for x plus the one for y."""
    return table_2SD.expert(0).take(pos_T2[:, 0]) + table_2SD.expert(1).take(pos_T2[:, 1])


def project(x_TD: np.ndarray, w_OD: Prepared, eps: float, backend: Backend) -> np.ndarray:
    """Soft tokens: a norm without weight, then a matrix. transformers: Gemma4MultimodalEmbedder."""
    return backend.matmul(backend.rms_normalise(x_TD, eps), w_OD)
