"""Mixture of experts on tiles: tokens are grouped by expert, so that an expert's weights are read once for all tokens of a call.

Every thread works on every expert, on its own share of the expert's rows. So the work is even however unevenly the tokens fall, a single
token's 8 experts keep all threads busy, and a thread never adds to what another one writes.
"""

import numpy as np
from numba import prange

from refimpl.kernels.activations import ALONE, round_row, round_rows, space
from refimpl.kernels.machine.intrinsics import address, at, fma, load_f32, load_f32_part, mul_f32, splat_f32, store_f32_part, sub_f32
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.jit import inline, kernel
from refimpl.kernels.machine.threads import current
from refimpl.kernels.machine.tile_product import SPARE, Rounded, rows
from refimpl.kernels.machine.tiles import Tiles
from refimpl.kernels.machine.unpack import EXACT, Q8
from refimpl.kernels.machine.vecmath import exp16, gelu16
from refimpl.kernels.matmul import checked, matmul, matmul_q8

KINDS = {matmul: EXACT, matmul_q8: Q8}


def choose(logit_TE: np.ndarray, n_used: int, expert_scale_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Router logits -> (expert ids int64 (T, X), weights float32 (T, X)): the X most probable, by softmax renormalised over them, times
    their own factors. Ties: the lower id wins.
    """
    n_tok, n_expert = logit_TE.shape
    if not 1 <= n_used <= n_expert or expert_scale_E.shape != (n_expert,):
        raise ValueError(f"expected 1 to {n_expert} experts and as many factors, got {n_used} and {expert_scale_E.shape}")
    id_TX, weight_TX = np.empty((n_tok, n_used), np.int64), np.empty((n_tok, n_used), np.float32)
    pick(checked(logit_TE, n_expert), np.ascontiguousarray(expert_scale_E, np.float32), id_TX, weight_TX)
    return id_TX, weight_TX


@kernel()
def pick(logit_TE, scale_E, id_TX, weight_TX):
    """Fills the ids and weights of every token. Dividing by the sum over all experts first, as the reference does, cancels."""
    n_tok, n_expert = logit_TE.shape
    taken_E, e_X = np.empty(n_expert, np.bool_), np.zeros(LANES * (id_TX.shape[1] // LANES + 1), np.float32)
    for t in range(n_tok):
        taken_E[:] = False
        for x in range(id_TX.shape[1]):
            best = -1
            for e in range(n_expert):
                if not taken_E[e] and (best < 0 or logit_TE[t, e] > logit_TE[t, best]):
                    best = e
            taken_E[best] = True
            id_TX[t, x], e_X[x] = best, logit_TE[t, best]
        largest, values = splat_f32(e_X[0]), address(e_X)
        for x in range(0, id_TX.shape[1], LANES):
            n = min(LANES, id_TX.shape[1] - x)
            store_f32_part(at(values, 4 * x), exp16(sub_f32(load_f32_part(at(values, 4 * x), n), largest)), n)
        total = np.float32(0)
        for x in range(id_TX.shape[1]):
            total += e_X[x]
        for x in range(id_TX.shape[1]):
            weight_TX[t, x] = e_X[x] / total * scale_E[id_TX[t, x]]


def run_experts(matmul, x_TD: np.ndarray, id_TX: np.ndarray, weight_TX: np.ndarray,
                gate_EMD: Tiles, up_EMD: Tiles, down_EDM: Tiles) -> np.ndarray:
    """y[t] = sum over picks x of weight[t, x] * down_e @ (gelu(gate_e @ x[t]) * (up_e @ x[t])), e = id[t, x]. float32 (T, D).

    `matmul` names the arithmetic: this module's `matmul` or `matmul_q8`. A token's experts are added up in order of their ids.
    """
    kinds = KINDS[matmul]
    n_expert, n_hidden, width = gate_EMD.shape
    if up_EMD.shape != gate_EMD.shape or down_EDM.shape != (n_expert, width, n_hidden):
        raise ValueError(f"experts of shapes {gate_EMD.shape}, {up_EMD.shape} and {down_EDM.shape} do not fit together")
    x_TD = checked(x_TD, width)
    if id_TX.shape != weight_TX.shape or len(id_TX) != len(x_TD) or id_TX.dtype != np.int64 or weight_TX.dtype != np.float32:
        raise ValueError(f"expected int64 ids and float32 weights of {len(x_TD)} tokens, got {id_TX.shape} and {weight_TX.shape}")
    if len(x_TD) and not 0 <= id_TX.min() <= id_TX.max() < n_expert:
        raise ValueError(f"expert ids must be 0 to {n_expert - 1}, got {id_TX.min()} to {id_TX.max()}")
    y_TD = np.zeros_like(x_TD)
    if len(x_TD):
        used = kinds[gate_EMD.type], kinds[up_EMD.type], kinds[down_EDM.type]
        mix(*used, gate_EMD.raw, up_EMD.raw, down_EDM.raw, n_hidden, x_TD, np.ascontiguousarray(id_TX), np.ascontiguousarray(weight_TX),
            y_TD, current())
    return y_TD


@inline
def group(id_TX, n_expert):
    """Sorts all picks by expert, tokens in order within: (first pick of each expert and the end, token of each pick, its column)."""
    first_E, next_E = np.zeros(n_expert + 1, np.int64), np.empty(n_expert, np.int64)
    token_P, column_P = np.empty(id_TX.size, np.int64), np.empty(id_TX.size, np.int64)
    for t in range(id_TX.shape[0]):
        for x in range(id_TX.shape[1]):
            first_E[id_TX[t, x] + 1] += 1
    for e in range(n_expert):
        first_E[e + 1] += first_E[e]
        next_E[e] = first_E[e]
    for t in range(id_TX.shape[0]):
        for x in range(id_TX.shape[1]):
            p = next_E[id_TX[t, x]]
            token_P[p], column_P[p] = t, x
            next_E[id_TX[t, x]] = p + 1
    return first_E, token_P, column_P


@kernel(parallel=True)
def mix(gate_kind, up_kind, down_kind, gate, up, down, n_hidden, x_TD, id_TX, weight_TX, y_TD, n):
    """Adds the experts' outputs into y, on n threads. Tiles: uint8 (E, tiles, bytes)."""
    n_tok, width = x_TD.shape
    n_expert, n_up, up_bytes = up.shape
    gate_bytes, n_down, down_bytes = gate.shape[2], down.shape[1], down.shape[2]
    first_E, token_P, column_P = group(id_TX, n_expert)
    n_pick, most = len(token_P), 0
    for e in range(n_expert):
        most = max(most, first_E[e + 1] - first_E[e])
    gate_q, gate_d, gate_sum, gate_m = space(gate_kind, n_tok, width)
    up_q, up_d, up_sum, up_m = space(up_kind, n_tok, width)
    round_rows(gate_kind, x_TD, gate_q, gate_d, gate_sum, gate_m, 0, min(n_tok, ALONE))
    round_rows(up_kind, x_TD, up_q, up_d, up_sum, up_m, 0, min(n_tok, ALONE))
    if n_tok > ALONE:
        for t in prange(ALONE, n_tok):
            round_row(gate_kind, x_TD, t, gate_q, gate_d, gate_sum, gate_m)
            round_row(up_kind, x_TD, t, up_q, up_d, up_sum, up_m)

    wide_NW = np.empty((n, LANES * max(width, n_hidden) if gate_kind.widened or up_kind.widened or down_kind.widened else 0), np.float32)
    hidden_PM, result_NR = np.empty((n_pick, n_hidden), np.float32), np.empty((n, LANES * (2 * most + SPARE)), np.float32)
    for thread in prange(n):
        x_gate, x_up = Rounded(x_TD, gate_q, gate_d, gate_sum, gate_m), Rounded(x_TD, up_q, up_d, up_sum, up_m)
        gates, ups, hiddens = address(gate), address(up), address(hidden_PM)
        g, wide = at(address(result_NR), thread * 4 * result_NR.shape[1]), at(address(wide_NW), thread * 4 * wide_NW.shape[1])
        u = at(g, 4 * LANES * most)
        for e in range(n_expert):
            first, end = first_E[e], first_E[e + 1]
            if first == end:
                continue
            for tile in range(thread * n_up // n, (thread + 1) * n_up // n):
                w = at(gates, (e * n_up + tile) * gate_bytes)
                rows(gate_kind, w, width // gate_kind.elements, x_gate, token_P, first, end, wide, g)
                w = at(ups, (e * n_up + tile) * up_bytes)
                rows(up_kind, w, width // up_kind.elements, x_up, token_P, first, end, wide, u)
                here = min(LANES, n_hidden - LANES * tile)
                for p in range(end - first):
                    h = mul_f32(gelu16(load_f32(at(g, 4 * LANES * p))), load_f32(at(u, 4 * LANES * p)))
                    store_f32_part(at(hiddens, 4 * ((first + p) * n_hidden + LANES * tile)), h, here)

    down_q, down_d, down_sum, down_m = space(down_kind, n_pick, n_hidden)
    round_rows(down_kind, hidden_PM, down_q, down_d, down_sum, down_m, 0, min(n_pick, ALONE))
    if n_pick > ALONE:
        for p in prange(ALONE, n_pick):
            round_row(down_kind, hidden_PM, p, down_q, down_d, down_sum, down_m)
    pick_P = np.arange(n_pick)
    for thread in prange(n):
        x_down = Rounded(hidden_PM, down_q, down_d, down_sum, down_m)
        downs, to = address(down), address(y_TD)
        result, wide = at(address(result_NR), thread * 4 * result_NR.shape[1]), at(address(wide_NW), thread * 4 * wide_NW.shape[1])
        for e in range(n_expert):
            first, end = first_E[e], first_E[e + 1]
            if first == end:
                continue
            for tile in range(thread * n_down // n, (thread + 1) * n_down // n):
                rows(down_kind, at(downs, (e * n_down + tile) * down_bytes), n_hidden // down_kind.elements, x_down, pick_P, first, end,
                     wide, result)
                here = min(LANES, width - LANES * tile)
                for p in range(first, end):
                    place = at(to, 4 * (token_P[p] * width + LANES * tile))
                    w = splat_f32(weight_TX[token_P[p], column_P[p]])
                    total = fma(w, load_f32(at(result, 4 * LANES * (p - first))), load_f32_part(place, here))
                    store_f32_part(place, total, here)


def matmul_chosen(matmul, x_TD: np.ndarray, id_TX: np.ndarray, w_EOD: Tiles) -> np.ndarray:
    """y[t, x] = w[id[t, x]] @ x[t]: products with a few of many matrices, float32 (T, X, O). `matmul` as in `run_experts`."""
    n_expert, n_out, width = w_EOD.shape
    x_TD = checked(x_TD, width)
    if id_TX.ndim != 2 or len(id_TX) != len(x_TD) or id_TX.dtype != np.int64:
        raise ValueError(f"expected int64 ids of {len(x_TD)} rows, got {id_TX.dtype} of shape {id_TX.shape}")
    if id_TX.size and not 0 <= id_TX.min() <= id_TX.max() < n_expert:
        raise ValueError(f"ids must be 0 to {n_expert - 1}, got {id_TX.min()} to {id_TX.max()}")
    y_TXO = np.empty((*id_TX.shape, n_out), np.float32)
    if id_TX.size:
        multiply_chosen(KINDS[matmul][w_EOD.type], w_EOD.raw, x_TD, np.ascontiguousarray(id_TX), y_TXO, current())
    return y_TXO


@kernel(parallel=True)
def multiply_chosen(kind, tiles, x_TD, id_TX, y_TXO, n):
    """Fills y, on n threads: each takes its share of the tiles of all products. Tiles: uint8 (E, tiles, bytes)."""
    n_tok, width = x_TD.shape
    n_tiles, tile_bytes = tiles.shape[1:]
    n_pick, n_out = id_TX.shape[1], y_TXO.shape[2]
    q_TD, d_TB, sum_TS, m_TB = space(kind, n_tok, width)
    round_rows(kind, x_TD, q_TD, d_TB, sum_TS, m_TB, 0, n_tok)
    row_T, result_NR = np.arange(n_tok), np.empty((n, LANES), np.float32)
    wide_NW = np.empty((n, LANES * width if kind.widened else 0), np.float32)
    n_unit = n_tok * n_pick * n_tiles
    for thread in prange(n):
        x = Rounded(x_TD, q_TD, d_TB, sum_TS, m_TB)
        weights, to = address(tiles), address(y_TXO)
        result, wide = at(address(result_NR), thread * 4 * LANES), at(address(wide_NW), thread * 4 * wide_NW.shape[1])
        for unit in range(thread * n_unit // n, (thread + 1) * n_unit // n):
            product, tile = unit // n_tiles, unit % n_tiles
            t, pick = product // n_pick, product % n_pick
            w = at(weights, (id_TX[t, pick] * n_tiles + tile) * tile_bytes)
            rows(kind, w, width // kind.elements, x, row_T, t, t + 1, wide, result)
            here = min(LANES, n_out - LANES * tile)
            store_f32_part(at(to, 4 * (product * n_out + LANES * tile)), load_f32(result), here)
