"""Attention of the towers: every patch of an image sees all others, a frame of sound the latest dozen.

The first is two products, head by head, with keys and values in tiles like the weights of a matrix, for some hundred queries at a time: all
scores of all queries would not fit into memory. The second has all scores of a query in one vector.
"""

import numpy as np
from numba import prange

from refimpl.formats.matrix import Matrix
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
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.jit import inline, kernel
from refimpl.kernels.machine.tiles import Tiles, tiled
from refimpl.kernels.machine.vecmath import exp16, tanh16
from refimpl.kernels.matmul import matmul

TOGETHER = 256          # queries whose scores are in memory
ZERO, ONE, NEVER = np.float32(0), np.float32(1), np.float32(-np.inf)


def attend_all(q_TNH: np.ndarray, k_TNH: np.ndarray, v_TNH: np.ndarray) -> np.ndarray:
    """softmax(q k) v over all T rows, float32 (T, N, H); scores are not scaled. transformers: Gemma4VisionAttention."""
    if any(a.dtype != np.float32 or a.ndim != 3 or a.shape != q_TNH.shape for a in (q_TNH, k_TNH, v_TNH)):
        raise mismatch(q_TNH, k_TNH, v_TNH)
    out_TNH = np.empty_like(q_TNH)
    for n in range(q_TNH.shape[1]):
        k_SH, v_HS = _tiles(k_TNH[:, n]), _tiles(v_TNH[:, n].T)
        for first in range(0, len(q_TNH), TOGETHER):
            rows = slice(first, first + TOGETHER)
            weight_TS = matmul(np.ascontiguousarray(q_TNH[rows, n]), k_SH)
            softmax_rows(weight_TS, threads_for(weight_TS.size))
            out_TNH[rows, n] = matmul(weight_TS, v_HS)
    return out_TNH


def _tiles(x_OD: np.ndarray) -> Tiles:
    x_OD = np.ascontiguousarray(x_OD)
    return tiled(Matrix(x_OD.view(np.uint8), "F32"), current())


@inline
def _load(pointer, n):
    return load_f32(pointer) if n == LANES else load_f32_part(pointer, n)


@inline
def _softmax_part(rows, width, first, end):
    """Rows first..end-1. A sum has 16 lanes, column modulo 16."""
    for t in range(first, end):
        row, largest, total = at(rows, 4 * width * t), splat_f32(NEVER), splat_f32(ZERO)
        whole = width // LANES * LANES
        for c in range(0, whole, LANES):
            largest = max_f32(largest, load_f32(at(row, 4 * c)))
        for c in range(whole, width):
            largest = max_f32(largest, splat_f32_from(at(row, 4 * c)))
        shift = splat_f32(largest_f32(largest))
        for c in range(0, width, LANES):
            here = min(LANES, width - c)
            weight = exp16(sub_f32(_load(at(row, 4 * c), here), shift))
            store_f32_part(at(row, 4 * c), weight, here)
            total = add_f32(total, _load(at(row, 4 * c), here))
        factor = splat_f32(ONE / sum_f32(total))
        for c in range(0, width, LANES):
            here = min(LANES, width - c)
            store_f32_part(at(row, 4 * c), mul_f32(_load(at(row, 4 * c), here), factor), here)


@kernel(parallel=True)
def softmax_rows(x_TS, n):
    """The softmax of each row, in its place, on n threads."""
    rows, (n_rows, width) = address(x_TS), x_TS.shape
    for part in prange(n):
        thread = np.int64(part)
        _softmax_part(rows, width, thread * n_rows // n, (thread + 1) * n_rows // n)


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
