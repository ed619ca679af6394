"""The product of activations with a weight matrix in tiles: nearly all the time, nearly all the bytes.

A thread owns tiles, that is output rows, and never part of a sum; so the result has the same bits for any number of threads, and, as
each row of activations goes its own way through rows.py, for any number of rows.
"""

import numpy as np
from numba import prange

from refimpl.kernels.activations import ALONE, round_row, round_rows, space
from refimpl.kernels.machine.intrinsics import address, at, load_f32, store_f32_part
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.jit import kernel
from refimpl.kernels.machine.threads import current
from refimpl.kernels.machine.tile_product import SPARE, Rounded, rows
from refimpl.kernels.machine.tiles import Tiles
from refimpl.kernels.machine.unpack import EXACT, Q8, Kind

BESIDE = 4          # tiles whose results are written together: a row of a large product lies far from the next, in another page of memory


def matmul(x_TD: np.ndarray, w_OD: Tiles) -> np.ndarray:
    """y[t, o] = sum over d of x[t, d] * w[o, d], in float32. float32 (T, D) and Tiles of (O, D) -> float32 (T, O)."""
    return product(x_TD, w_OD, EXACT)


def matmul_q8(x_TD: np.ndarray, w_OD: Tiles) -> np.ndarray:
    """The same product with activations rounded to 8 bits; weights of F16, BF16 and F32 stay with float32 activations (among them what
    tiles.py holds as F32 for want of kernels).
    """
    return product(x_TD, w_OD, Q8)


def product(x_TD: np.ndarray, w_OD: Tiles, kinds: dict[str, Kind]) -> np.ndarray:
    """Checks what compiled code does not, then runs the kernel."""
    kind = kinds[w_OD.type]
    if len(w_OD.shape) != 2:
        raise ValueError(f"expected one matrix, got weights of shape {w_OD.shape}")
    x_TD = checked(x_TD, w_OD.shape[1])
    y_TO = np.empty((len(x_TD), w_OD.shape[0]), np.float32)
    if len(x_TD):
        multiply(kind, w_OD.raw[0], x_TD, y_TO, current())
    return y_TO


def checked(x_TD: np.ndarray, width: int) -> np.ndarray:
    """Activations as the kernels take them: contiguous float32 rows of `width`. Raises ValueError for others."""
    if x_TD.dtype != np.float32 or x_TD.ndim != 2 or x_TD.shape[1] != width:
        raise ValueError(f"expected float32 rows of {width}, got {x_TD.dtype} of shape {x_TD.shape}")
    return np.ascontiguousarray(x_TD)


@kernel(parallel=True)
def multiply(kind, tiles, x_TD, y_TO, n):
    """y = x times the matrix in `tiles` (uint8 (tiles, bytes)), on n threads."""
    n_tok, width = x_TD.shape
    n_tiles, tile_bytes = tiles.shape
    n_out = y_TO.shape[1]
    q_TD, d_TB, sum_TS, m_TB = space(kind, n_tok, width)
    round_rows(kind, x_TD, q_TD, d_TB, sum_TS, m_TB, 0, min(n_tok, ALONE))
    if n_tok > ALONE:
        for t in prange(ALONE, n_tok):
            round_row(kind, x_TD, t, q_TD, d_TB, sum_TS, m_TB)
    row_P, result_NR = np.arange(n_tok), np.empty((n, LANES * (BESIDE * n_tok + SPARE)), np.float32)
    wide_NW = np.empty((n, LANES * width if kind.widened else 0), np.float32)
    for thread in prange(n):
        x = Rounded(x_TD, q_TD, d_TB, sum_TS, m_TB)
        weights, to = address(tiles), address(y_TO)
        result, wide = at(address(result_NR), thread * 4 * result_NR.shape[1]), at(address(wide_NW), thread * 4 * wide_NW.shape[1])
        end = (thread + 1) * n_tiles // n
        for first in range(thread * n_tiles // n, end, BESIDE):
            last = min(first + BESIDE, end)
            for tile in range(first, last):
                rows(kind, at(weights, tile * tile_bytes), width // kind.elements, x, row_P, 0, n_tok, wide,
                     at(result, 4 * LANES * n_tok * (tile - first)))
            for t in range(n_tok):
                for tile in range(first, last):
                    y = load_f32(at(result, 4 * LANES * (n_tok * (tile - first) + t)))
                    store_f32_part(at(to, 4 * (t * n_out + LANES * tile)), y, min(LANES, n_out - LANES * tile))
