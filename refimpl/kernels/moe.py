"""Mixture of experts on tiles: tokens are grouped by expert, so that an expert's weights are read once for all tokens of a call.

Every thread works on every expert, on its own share of the expert's output rows, and then on what others have left (pieces.py). So threads
share the work evenly however the tokens are routed (even one token's 8 experts keep all of them busy), and no thread adds to what another
one writes.
"""

import numpy as np
from numba import prange

from refimpl.kernels.activations import SERIAL, allocate_quantized, quantize_row, quantize_rows
from refimpl.kernels.cores.threads import current
from refimpl.kernels.machine.checks import expert_ids, float_rows
from refimpl.kernels.machine.intrinsics import address, at, fma, load_f32, load_f32_part, mul_f32, splat_f32, store_f32_part, sub_f32
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.jit import inline, kernel
from refimpl.kernels.machine.pieces import next_piece, share_end, shares
from refimpl.kernels.machine.tile_product import SPARE, multiply_tile
from refimpl.kernels.machine.tile_rows import Activations
from refimpl.kernels.machine.tiles import Tiles
from refimpl.kernels.machine.unpack import FORMATS
from refimpl.kernels.machine.vecmath import exp16, gelu16

PIECES = 8          # of a thread's share of the outputs of all experts: more of them read activations and weights in smaller runs


def route(logit_TE: np.ndarray, n_used: int, expert_scale_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Router logits -> (expert ids int64 (T, X), weights float32 (T, X)): the X most probable experts, weighted by a softmax over them and
    each expert's own factor. Ties: the lower id wins.
    """
    n_tok, n_expert = logit_TE.shape
    if not 1 <= n_used <= n_expert or expert_scale_E.shape != (n_expert,):
        raise ValueError(f"expected 1 to {n_expert} experts and as many factors, got {n_used} and {expert_scale_E.shape}")
    id_TX, weight_TX = np.empty((n_tok, n_used), np.int64), np.empty((n_tok, n_used), np.float32)
    route_tokens(float_rows(logit_TE, n_expert), np.ascontiguousarray(expert_scale_E, np.float32), id_TX, weight_TX)
    return id_TX, weight_TX


@kernel()
def route_tokens(logit_TE, scale_E, id_TX, weight_TX):
    """Fills in the ids and weights of every token. (The reference's division by the sum over all experts cancels.)"""
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


def run_experts(arithmetic: str, x_TD: np.ndarray, id_TX: np.ndarray, weight_TX: np.ndarray,
                gate_EMD: Tiles, up_EMD: Tiles, down_EDM: Tiles) -> np.ndarray:
    """y[t] = sum over picks x of weight[t, x] * expert_e(x[t]), e = id[t, x], in "exact" or "q8" arithmetic. float32 (T, D).

    expert_e(x) = down_e @ (gelu(gate_e @ x) * (up_e @ x)). A token's experts are added in order of their ids. Raises ValueError where
    shapes, types or ids do not fit.
    """
    n_expert, n_hidden, width = gate_EMD.shape
    if up_EMD.shape != gate_EMD.shape or down_EDM.shape != (n_expert, width, n_hidden):
        raise ValueError(f"experts of shapes {gate_EMD.shape}, {up_EMD.shape} and {down_EDM.shape} do not fit together")
    x_TD = float_rows(x_TD, width)
    id_TX = expert_ids(id_TX, len(x_TD), n_expert)
    if weight_TX.shape != id_TX.shape or weight_TX.dtype != np.float32:
        raise ValueError(f"expected float32 weights of shape {id_TX.shape}, got {weight_TX.dtype} of shape {weight_TX.shape}")
    y_TD = np.zeros_like(x_TD)
    if len(x_TD):
        formats = (FORMATS[arithmetic][w.type] for w in (gate_EMD, up_EMD, down_EDM))
        mix(*formats, gate_EMD.raw, up_EMD.raw, down_EDM.raw, n_hidden, x_TD, id_TX, np.ascontiguousarray(weight_TX), y_TD, current())
    return y_TD


@inline
def group(id_TX, n_expert):
    """All picks sorted by expert, then by token: (first pick of each expert and the end, token of each pick, its column in id_TX)."""
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
def mix(gate_format, up_format, down_format, gate, up, down, n_hidden, x_TD, id_TX, weight_TX, y_TD, n):
    """Adds the experts' weighted outputs to y, on n threads. Tiles: uint8 (E, tiles, bytes). A pick is a token's x-th expert."""
    n_tok, width = x_TD.shape
    n_expert, n_up, up_bytes = up.shape
    gate_bytes, n_down, down_bytes = gate.shape[2], down.shape[1], down.shape[2]
    first_E, token_P, column_P = group(id_TX, n_expert)
    n_pick, most = len(token_P), 0
    used_E, n_used = np.empty(n_expert, np.int64), 0
    for e in range(n_expert):
        most = max(most, first_E[e + 1] - first_E[e])
        if first_E[e] < first_E[e + 1]:
            used_E[n_used] = e
            n_used += 1
    gate_q, gate_d, gate_sum, gate_m = allocate_quantized(gate_format, n_tok, width)
    up_q, up_d, up_sum, up_m = allocate_quantized(up_format, n_tok, width)
    quantize_rows(gate_format, x_TD, gate_q, gate_d, gate_sum, gate_m, 0, min(n_tok, SERIAL))
    quantize_rows(up_format, x_TD, up_q, up_d, up_sum, up_m, 0, min(n_tok, SERIAL))
    if n_tok > SERIAL:
        for t in prange(SERIAL, n_tok):
            quantize_row(gate_format, x_TD, t, gate_q, gate_d, gate_sum, gate_m)
            quantize_row(up_format, x_TD, t, up_q, up_d, up_sum, up_m)

    any_unpacked = gate_format.unpacked or up_format.unpacked or down_format.unpacked
    float_NW = np.empty((n, LANES * max(width, n_hidden) if any_unpacked else 0), np.float32)
    hidden_PM, result_NR = np.empty((n_pick, n_hidden), np.float32), np.empty((n, LANES * (2 * most + SPARE)), np.float32)
    next_NL = shares(0, n)
    for part in prange(n):
        thread = np.int64(part)         # prange counts without a sign
        x_gate, x_up = Activations(x_TD, gate_q, gate_d, gate_sum, gate_m), Activations(x_TD, up_q, up_d, up_sum, up_m)
        gates, ups, hiddens = address(gate), address(up), address(hidden_PM)
        g, floats = at(address(result_NR), thread * 4 * result_NR.shape[1]), at(address(float_NW), thread * 4 * float_NW.shape[1])
        u = at(g, 4 * LANES * most)
        for turn in range(n):
            owner = (thread + turn) % n
            tile0 = owner * n_up // n                           # the owner has these tiles of every expert
            n_own = share_end(n_up, n, owner) - tile0
            unit = next_piece(next_NL, owner, 1)
            while unit < n_used * n_own:
                e, tile = used_E[unit // n_own], tile0 + unit % n_own
                first, end = first_E[e], first_E[e + 1]
                w = at(gates, (e * n_up + tile) * gate_bytes)
                multiply_tile(gate_format, w, width // gate_format.elements, x_gate, token_P, first, end, floats, g)
                w = at(ups, (e * n_up + tile) * up_bytes)
                multiply_tile(up_format, w, width // up_format.elements, x_up, token_P, first, end, floats, u)
                here = min(LANES, n_hidden - LANES * tile)
                for p in range(end - first):
                    h = mul_f32(gelu16(load_f32(at(g, 4 * LANES * p))), load_f32(at(u, 4 * LANES * p)))
                    store_f32_part(at(hiddens, 4 * ((first + p) * n_hidden + LANES * tile)), h, here)
                unit = next_piece(next_NL, owner, 1)

    down_q, down_d, down_sum, down_m = allocate_quantized(down_format, n_pick, n_hidden)
    quantize_rows(down_format, hidden_PM, down_q, down_d, down_sum, down_m, 0, min(n_pick, SERIAL))
    if n_pick > SERIAL:
        for p in prange(SERIAL, n_pick):
            quantize_row(down_format, hidden_PM, p, down_q, down_d, down_sum, down_m)
    pick_P, next_NL, size = np.arange(n_pick), shares(n_down, n), max(1, n_down // (PIECES * n))
    for part in prange(n):
        thread = np.int64(part)
        x_down = Activations(hidden_PM, down_q, down_d, down_sum, down_m)
        downs, to = address(down), address(y_TD)
        result, floats = at(address(result_NR), thread * 4 * result_NR.shape[1]), at(address(float_NW), thread * 4 * float_NW.shape[1])
        for turn in range(n):
            owner = (thread + turn) % n
            share, tile0 = share_end(n_down, n, owner), next_piece(next_NL, owner, size)
            while tile0 < share:
                for i in range(n_used):                         # in order, because their outputs are added up
                    e = used_E[i]
                    first, end = first_E[e], first_E[e + 1]
                    for tile in range(tile0, min(tile0 + size, share)):
                        w = at(downs, (e * n_down + tile) * down_bytes)
                        multiply_tile(down_format, w, n_hidden // down_format.elements, x_down, pick_P, first, end, floats, result)
                        here = min(LANES, width - LANES * tile)
                        for p in range(first, end):
                            place = at(to, 4 * (token_P[p] * width + LANES * tile))
                            w = splat_f32(weight_TX[token_P[p], column_P[p]])
                            total = fma(w, load_f32(at(result, 4 * LANES * (p - first))), load_f32_part(place, here))
                            store_f32_part(place, total, here)
                tile0 = next_piece(next_NL, owner, size)
