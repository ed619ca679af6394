"""The product of activations with a weight matrix in tiles: nearly all of the time and of the bytes.

A thread takes tiles, that is output rows, and never part of a sum, and each row of activations is computed on its own (tile_product.py).
So the bits of the result depend neither on the number of threads nor on the other rows of the call.
"""

import numpy as np
from numba import prange

from refimpl.kernels.activations import SERIAL, allocate_quantized, quantize_row, quantize_rows
from refimpl.kernels.cores.threads import current
from refimpl.kernels.machine.checks import float_rows
from refimpl.kernels.machine.intrinsics import address, at, load_f32, store_f32_part
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.jit import kernel
from refimpl.kernels.machine.pieces import next_piece, share_end, shares
from refimpl.kernels.machine.tile_product import SPARE, multiply_tile
from refimpl.kernels.machine.tile_rows import Activations
from refimpl.kernels.machine.tiles import Tiles
from refimpl.kernels.machine.unpack import FORMATS

MOST = 512          # rows of activations at a time: more of them, and what is multiplied by the next tile has left the cache
TOGETHER = 4        # tiles of a piece, whose results are written together: rows of a large product lie far apart, in different pages


def matmul(x_TD: np.ndarray, w_OD: Tiles) -> np.ndarray:
    """y[t, o] = sum over d of x[t, d] * w[o, d], in float32. float32 (T, D) and Tiles of (O, D) -> float32 (T, O)."""
    return _product("exact", x_TD, w_OD)


def matmul_q8(x_TD: np.ndarray, w_OD: Tiles) -> np.ndarray:
    """The same product with activations quantized to 8 bits. They stay float32 where weights are F32, F16 or BF16 (among them types without
    kernels, which tiles.py holds as F32).
    """
    return _product("q8", x_TD, w_OD)


def _product(arithmetic: str, x_TD: np.ndarray, w_OD: Tiles) -> np.ndarray:
    if len(w_OD.shape) != 2:
        raise ValueError(f"expected one matrix, got weights of shape {w_OD.shape}")
    x_TD = float_rows(x_TD, w_OD.shape[1])
    y_TO = np.empty((len(x_TD), w_OD.shape[0]), np.float32)
    for first in range(0, len(x_TD), MOST):
        rows = slice(first, first + MOST)
        multiply(FORMATS[arithmetic][w_OD.type], w_OD.raw[0], x_TD[rows], y_TO[rows], current())
    return y_TO


@kernel(parallel=True)
def multiply(fmt, tiles, x_TD, y_TO, n):
    """y = x times the matrix in `tiles` (uint8 (tiles, bytes)), on n threads."""
    n_tok, width = x_TD.shape
    n_tiles, tile_bytes = tiles.shape
    n_out = y_TO.shape[1]
    q_TD, d_TB, sum_TS, m_TB = allocate_quantized(fmt, n_tok, width)
    quantize_rows(fmt, x_TD, q_TD, d_TB, sum_TS, m_TB, 0, min(n_tok, SERIAL))
    if n_tok > SERIAL:
        for t in prange(SERIAL, n_tok):
            quantize_row(fmt, x_TD, t, q_TD, d_TB, sum_TS, m_TB)
    row_P, result_NR = np.arange(n_tok), np.empty((n, LANES * (TOGETHER * n_tok + SPARE)), np.float32)
    float_NW, next_NL = np.empty((n, LANES * width if fmt.unpacked else 0), np.float32), shares(n_tiles, n)
    for part in prange(n):
        thread = np.int64(part)         # prange counts without a sign
        x = Activations(x_TD, q_TD, d_TB, sum_TS, m_TB)
        weights, to = address(tiles), address(y_TO)
        result, floats = at(address(result_NR), thread * 4 * result_NR.shape[1]), at(address(float_NW), thread * 4 * float_NW.shape[1])
        for turn in range(n):
            owner = (thread + turn) % n
            end, first = share_end(n_tiles, n, owner), next_piece(next_NL, owner, TOGETHER)
            while first < end:
                last = min(first + TOGETHER, end)
                for tile in range(first, last):
                    multiply_tile(fmt, at(weights, tile * tile_bytes), width // fmt.elements, x, row_P, 0, n_tok, floats,
                                  at(result, 4 * LANES * n_tok * (tile - first)))
                for t in range(n_tok):
                    for tile in range(first, last):
                        y = load_f32(at(result, 4 * LANES * (n_tok * (tile - first) + t)))
                        store_f32_part(at(to, 4 * (t * n_out + LANES * tile)), y, min(LANES, n_out - LANES * tile))
                first = next_piece(next_NL, owner, TOGETHER)
