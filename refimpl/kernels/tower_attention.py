"""Attention of the towers: every patch of an image sees all others, a frame of sound the latest dozen.

The first is two products for some queries of a head at a time: all scores of all queries would not fit into memory. Keys lie in tiles, like
the weights of a matrix. The second has all scores of a query in one vector.
"""

import numpy as np
from numba import prange

from refimpl.kernels.cores.threads import current, threads_for
from refimpl.kernels.machine.checks import mismatch
from refimpl.kernels.machine.intrinsics import (
    add_f32,
    address,
    at,
    div_f32,
    fma,
    largest_f32,
    load_f32,
    load_f32_part,
    max_f32,
    mul_f32,
    splat_f32,
    splat_f32_from,
    store_f32,
    store_f32_part,
    sub_f32,
    sum_f32,
)
from refimpl.kernels.machine.isa import ISA, LANES
from refimpl.kernels.machine.jit import inline, kernel, per_row
from refimpl.kernels.machine.pieces import next_piece, share_end, shares
from refimpl.kernels.machine.tile_rows import along, row_address, store_totals, zeros
from refimpl.kernels.machine.vecmath import exp16, tanh16

NEAR = 128              # keys whose values and weights stay in the first cache while they are used
QUERIES = 24            # of a head, whose scores a thread holds; a multiple of ROWS
# queries that share what is loaded of keys and values: their sums, of 16 lanes each, stay in registers
ROWS = 8 if ISA == "avx512" else 6 if ISA == "avx2" or ISA == "avxvnni" else 4
ROW_NUMBERS = tuple(range(ROWS))
ZERO, ONE, NEVER = np.float32(0), np.float32(1), np.float32(-np.inf)


# ---- all rows see all rows

def attend_all(q_TNH: np.ndarray, k_TNH: np.ndarray, v_TNH: np.ndarray) -> np.ndarray:
    """softmax(q k) v over all T rows, float32 (T, N, H); scores are not scaled. transformers: Gemma4VisionAttention."""
    arrays = q_TNH, k_TNH, v_TNH
    if any(a.dtype != np.float32 or a.ndim != 3 or a.shape != q_TNH.shape for a in arrays):
        raise mismatch(*arrays)
    out_TNH, (n_tok, n_head, width) = np.empty(q_TNH.shape, np.float32), q_TNH.shape
    if out_TNH.size:
        n, tiles, parts = current(), -(-n_tok // LANES), -(-width // LANES)
        key_NGHR, value_NPTR = np.empty((n_head, tiles, width, LANES), np.float32), np.empty((n_head, parts, n_tok, LANES), np.float32)
        arrays = [np.ascontiguousarray(a) for a in arrays]
        lay_out(*arrays[1:], key_NGHR, value_NPTR, n)
        score_NGQR, query_NQH = np.empty((n, tiles, QUERIES, LANES), np.float32), np.empty((n, QUERIES, width), np.float32)
        head_rows(arrays[0], key_NGHR, value_NPTR, score_NGQR, query_NQH, np.empty((n, parts, QUERIES, LANES), np.float32), out_TNH, n)
    return out_TNH


@kernel(parallel=True)
def lay_out(k_TNH, v_TNH, key_NGHR, value_NPTR, n):
    """Keys in tiles of 16 rows, column after column, padded with zeros; values in parts of 16 columns, row after row, padded too."""
    n_tok, n_head, width = k_TNH.shape
    n_tiles, n_parts = key_NGHR.shape[1], value_NPTR.shape[1]
    for part in prange(n):
        thread = np.int64(part)
        for head in range(thread * n_head // n, (thread + 1) * n_head // n):
            for tile in range(n_tiles):
                for h in range(width):
                    for lane in range(LANES):
                        t = LANES * tile + lane
                        key_NGHR[head, tile, h, lane] = k_TNH[t, head, h] if t < n_tok else ZERO
            for p in range(n_parts):
                for t in range(n_tok):
                    for lane in range(LANES):
                        h = LANES * p + lane
                        value_NPTR[head, p, t, lane] = v_TNH[t, head, h] if h < width else ZERO


@per_row
def _add_product(vector, number, total):
    """Adds a vector times the number at an address."""
    return fma(vector, splat_f32_from(number), total)


@per_row
def _loaded(place):
    return load_f32(place)


@inline
def _score_part(queries, keys, n_tok, width, scores):
    """The scores of QUERIES queries for all keys: of the first 16 keys for each query, then of the next 16; beyond the last: NEVER."""
    for tile in range(0, n_tok, LANES):
        for first in range(0, QUERIES, ROWS):
            total, q = zeros(ROW_NUMBERS, splat_f32(ZERO)), row_address(at(queries, 4 * width * first), 4 * width, ROW_NUMBERS)
            for h in range(width):
                total = _add_product(load_f32(at(keys, 4 * (width * tile + LANES * h))), along(q, 4 * h), total)
            to = at(scores, 4 * (QUERIES * tile + LANES * first))
            store_totals(to, total)
            if tile + LANES > n_tok:
                here = n_tok - tile
                for i in range(ROWS):
                    store_f32_part(at(to, 4 * (LANES * i + here)), splat_f32(NEVER), LANES - here)


@per_row
def _larger(place, largest):
    return max_f32(largest, load_f32(place))


@per_row
def _in_all_lanes(largest):
    return splat_f32(largest_f32(largest))


@per_row
def _exponential(place, shift, total):
    """Puts e^(score - shift) in the place of the score."""
    weight = exp16(sub_f32(load_f32(place), shift))
    store_f32(place, weight)
    return add_f32(total, weight)


@per_row
def _inverse(total):
    return splat_f32(ONE / sum_f32(total))


@per_row
def _scale(place, factor):
    store_f32(place, mul_f32(load_f32(place), factor))
    return factor


@inline
def _softmax_part(scores, n_tok):
    """The softmax of QUERIES rows, in their place. A sum has 16 lanes, column modulo 16."""
    for first in range(0, QUERIES, ROWS):
        row = row_address(at(scores, 4 * LANES * first), 4 * LANES, ROW_NUMBERS)
        largest, total = zeros(ROW_NUMBERS, splat_f32(NEVER)), zeros(ROW_NUMBERS, splat_f32(ZERO))
        for tile in range(0, n_tok, LANES):
            largest = _larger(along(row, 4 * QUERIES * tile), largest)
        shift = _in_all_lanes(largest)
        for tile in range(0, n_tok, LANES):
            total = _exponential(along(row, 4 * QUERIES * tile), shift, total)
        factor = _inverse(total)
        for tile in range(0, n_tok, LANES):
            factor = _scale(along(row, 4 * QUERIES * tile), factor)


@inline
def _average_part(weights, values, n_tok, width, averages):
    """The averages of all values by the weights of QUERIES rows: of the first 16 columns for each row, then of the next 16."""
    for begin in range(0, n_tok, NEAR):
        for h in range(0, width, LANES):
            for first in range(0, QUERIES, ROWS):
                place = row_address(at(averages, 4 * (QUERIES * h + LANES * first)), 4 * LANES, ROW_NUMBERS)
                total = _loaded(place) if begin else zeros(ROW_NUMBERS, splat_f32(ZERO))
                for tile in range(begin, min(begin + NEAR, n_tok), LANES):
                    w = row_address(at(weights, 4 * (QUERIES * tile + LANES * first)), 4 * LANES, ROW_NUMBERS)
                    value = at(values, 4 * (n_tok * h + LANES * tile))
                    for lane in range(min(LANES, n_tok - tile)):
                        total = _add_product(load_f32(at(value, 4 * LANES * lane)), along(w, 4 * lane), total)
                store_totals(place[0], total)


@kernel(parallel=True)
def head_rows(q_TNH, key_NGHR, value_NPTR, score_NGQR, query_NQH, average_NPQR, out_TNH, n):
    """`attend_all` on n threads, QUERIES rows of a head after the other."""
    n_tok, n_head, width = q_TNH.shape
    n_blocks = (n_tok + QUERIES - 1) // QUERIES
    next_NL = shares(n_head * n_blocks, n)
    for part in prange(n):
        thread = np.int64(part)
        scores, queries = at(address(score_NGQR), score_NGQR[0].nbytes * thread), at(address(query_NQH), query_NQH[0].nbytes * thread)
        averages = at(address(average_NPQR), average_NPQR[0].nbytes * thread)
        for turn in range(n):
            owner = (thread + turn) % n
            end, piece = share_end(n_head * n_blocks, n, owner), next_piece(next_NL, owner, 1)
            while piece < end:
                head, first = piece // n_blocks, piece % n_blocks * QUERIES
                for i in range(QUERIES):                    # beyond the last row: that one again
                    for h in range(width):
                        query_NQH[thread, i, h] = q_TNH[min(first + i, n_tok - 1), head, h]
                keys, values = at(address(key_NGHR), key_NGHR[0].nbytes * head), at(address(value_NPTR), value_NPTR[0].nbytes * head)
                _score_part(queries, keys, n_tok, width, scores)
                _softmax_part(scores, n_tok)
                _average_part(scores, values, n_tok, width, averages)
                for i in range(min(QUERIES, n_tok - first)):
                    for h in range(0, width, LANES):
                        store_f32_part(at(address(out_TNH), 4 * (width * (n_head * (first + i) + head) + h)),
                                       load_f32(at(averages, 4 * (QUERIES * h + LANES * i))), min(LANES, width - h))
                piece = next_piece(next_NL, owner, 1)


# ---- a row sees the latest ones

@inline
def _load(pointer, n):
    return load_f32(pointer) if n == LANES else load_f32_part(pointer, n)


def attend_band(q_TNH: np.ndarray, k_TNH: np.ndarray, v_TNH: np.ndarray, relative_SNH: np.ndarray, cap: float) -> np.ndarray:
    """Attention to the latest S rows with relative positions (Dai et al. 2019, arXiv:1901.02860), float32 (T, N, H); S is 16 at most.

    Row t sees rows t - S + 1 to t. The score of row t - d is q (k + relative_SNH[d]), soft-capped. transformers: Gemma4AudioAttention.
    """
    arrays = q_TNH, k_TNH, v_TNH, relative_SNH
    if (any(a.dtype != np.float32 or a.ndim != 3 or a.shape[1:] != q_TNH.shape[1:] for a in arrays) or not 1 <= len(relative_SNH) <= LANES
            or not len(q_TNH) == len(k_TNH) == len(v_TNH)):
        raise mismatch(*arrays)
    out_TNH, n = np.empty(q_TNH.shape, np.float32), threads_for(q_TNH.size)
    if out_TNH.size:
        band_rows(*map(np.ascontiguousarray, arrays), float(cap), np.empty((n, LANES), np.float32), out_TNH, n)
    return out_TNH


@inline
def _band_part(q, k, v, relative, n_keys, cap, n_head, width, weights, out, first, end):
    """Heads first..end-1, counted across all rows. `weights` has a place for 16 scores; number d is that of row t - d."""
    c = splat_f32(cap)
    for i in range(first, end):
        t, head = i // n_head, i % n_head
        n, mine, row = min(n_keys, t + 1), 4 * width * i, 4 * width * n_head
        store_f32(weights, splat_f32(ZERO))
        for d in range(n):
            total = splat_f32(ZERO)
            for h in range(0, width, LANES):
                here = min(LANES, width - h)
                query = _load(at(q, mine + 4 * h), here)
                total = fma(query, _load(at(k, mine - row * d + 4 * h), here), total)
                total = fma(query, _load(at(relative, row * d + 4 * (width * head + h)), here), total)
            store_f32_part(at(weights, 4 * d), splat_f32(sum_f32(total)), 1)
        store_f32(weights, mul_f32(tanh16(div_f32(load_f32(weights), c)), c))
        if n < LANES:
            store_f32_part(at(weights, 4 * n), splat_f32(NEVER), LANES - n)
        scores = load_f32(weights)
        weight = exp16(sub_f32(scores, splat_f32(largest_f32(scores))))
        store_f32(weights, mul_f32(weight, splat_f32(ONE / sum_f32(weight))))
        for h in range(0, width, LANES):
            here, total = min(LANES, width - h), splat_f32(ZERO)
            for d in range(n):
                total = fma(splat_f32_from(at(weights, 4 * d)), _load(at(v, mine - row * d + 4 * h), here), total)
            store_f32_part(at(out, mine + 4 * h), total, here)


@kernel(parallel=True)
def band_rows(q_TNH, k_TNH, v_TNH, relative_SNH, cap, weight_NS, out_TNH, n):
    """`attend_band` on n threads."""
    q, k, v, relative, out, weights = (address(q_TNH), address(k_TNH), address(v_TNH), address(relative_SNH), address(out_TNH),
                                       address(weight_NS))
    n_tok, n_head, width = q_TNH.shape
    n_keys, size = len(relative_SNH), n_tok * n_head
    if n == 1:
        _band_part(q, k, v, relative, n_keys, np.float32(cap), n_head, width, weights, out, 0, size)
    else:
        for part in prange(n):
            thread = np.int64(part)
            _band_part(q, k, v, relative, n_keys, np.float32(cap), n_head, width, at(weights, 64 * thread), out, thread * size // n,
                       (thread + 1) * size // n)
