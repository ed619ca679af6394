"""Products with a few of many matrices, chosen for each row: the drafter's logits over the token clusters it has picked."""

import numpy as np
from numba import prange

from refimpl.kernels.activations import allocate_quantized, quantize_rows
from refimpl.kernels.cores.threads import current
from refimpl.kernels.machine.checks import expert_ids, float_rows
from refimpl.kernels.machine.intrinsics import address, at, load_f32, store_f32_part
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.jit import kernel
from refimpl.kernels.machine.pieces import next_piece, share_end, shares
from refimpl.kernels.machine.tile_product import multiply_tile
from refimpl.kernels.machine.tile_rows import Activations
from refimpl.kernels.machine.tiles import Tiles
from refimpl.kernels.machine.unpack import FORMATS

PIECE = 8           # tiles: a cluster of the drafter's has 8, of 2 KB each


def matmul_chosen(arithmetic: str, x_TD: np.ndarray, id_TX: np.ndarray, w_EOD: Tiles) -> np.ndarray:
    """y[t, x] = w[id[t, x]] @ x[t], in "exact" or "q8" arithmetic, float32 (T, X, O). Raises ValueError where shapes, types or ids do not
    fit.
    """
    n_expert, n_out, width = w_EOD.shape
    x_TD = float_rows(x_TD, width)
    id_TX = expert_ids(id_TX, len(x_TD), n_expert)
    y_TXO = np.empty((*id_TX.shape, n_out), np.float32)
    if id_TX.size:
        multiply_chosen(FORMATS[arithmetic][w_EOD.type], w_EOD.raw, x_TD, id_TX, y_TXO, current())
    return y_TXO


@kernel(parallel=True)
def multiply_chosen(fmt, tiles, x_TD, id_TX, y_TXO, n):
    """Fills y, on n threads, a unit of work being a tile of a product. Tiles: uint8 (E, tiles, bytes)."""
    n_tok, width = x_TD.shape
    n_tiles, tile_bytes = tiles.shape[1:]
    n_pick, n_out = id_TX.shape[1], y_TXO.shape[2]
    q_TD, d_TB, sum_TS, m_TB = allocate_quantized(fmt, n_tok, width)
    quantize_rows(fmt, x_TD, q_TD, d_TB, sum_TS, m_TB, 0, n_tok)
    row_T, result_NR = np.arange(n_tok), np.empty((n, LANES), np.float32)
    float_NW = np.empty((n, LANES * width if fmt.unpacked else 0), np.float32)
    n_unit = n_tok * n_pick * n_tiles
    next_NL = shares(n_unit, n)
    for part in prange(n):
        thread = np.int64(part)         # prange counts without a sign
        x = Activations(x_TD, q_TD, d_TB, sum_TS, m_TB)
        weights, to = address(tiles), address(y_TXO)
        result, floats = at(address(result_NR), thread * 4 * LANES), at(address(float_NW), thread * 4 * float_NW.shape[1])
        for turn in range(n):
            owner = (thread + turn) % n
            end, first = share_end(n_unit, n, owner), next_piece(next_NL, owner, PIECE)
            while first < end:
                for unit in range(first, min(first + PIECE, end)):
                    product, tile = unit // n_tiles, unit % n_tiles
                    t, pick = product // n_pick, product % n_pick
                    w = at(weights, (id_TX[t, pick] * n_tiles + tile) * tile_bytes)
                    multiply_tile(fmt, w, width // fmt.elements, x, row_T, t, t + 1, floats, result)
                    here = min(LANES, n_out - LANES * tile)
                    store_f32_part(at(to, 4 * (product * n_out + LANES * tile)), load_f32(result), here)
                first = next_piece(next_NL, owner, PIECE)
