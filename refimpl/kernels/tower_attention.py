"""Attention of the towers: every patch of an image sees all others, a frame of sound the latest dozen.

The first goes head by head through the attention of the text model, which holds at most 64 scores of a query at a time; each head has its
keys and values in blocks of their own, padded with zeros to whole vectors. The second has all scores of a query in one vector.
"""

from typing import NamedTuple

import numpy as np
from numba import prange

from refimpl.kernels.attention import CHUNK, attend
from refimpl.kernels.cores.threads import threads_for
from refimpl.kernels.machine.checks import mismatch
from refimpl.kernels.machine.intrinsics import (
    address,
    at,
    div_f32,
    fma,
    largest_f32,
    load_f32,
    load_f32_part,
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
from refimpl.kernels.machine.vecmath import exp16, tanh16

ZERO, ONE, NEVER = np.float32(0), np.float32(1), np.float32(-np.inf)


class _Blocks(NamedTuple):
    """The keys and values of one head, as `attend` takes them."""

    shape: tuple[int, int, int]
    dtype: np.dtype
    origin: np.ndarray
    offset_B: np.ndarray
    k_offset: int
    v_offset: int


def attend_all(q_TNH: np.ndarray, k_TNH: np.ndarray, v_TNH: np.ndarray) -> np.ndarray:
    """softmax(q k) v over all T rows, float32 (T, N, H); scores are not scaled. transformers: Gemma4VisionAttention."""
    if any(a.dtype != np.float32 or a.ndim != 3 or a.shape != q_TNH.shape for a in (q_TNH, k_TNH, v_TNH)):
        raise mismatch(q_TNH, k_TNH, v_TNH)
    n_tok, n_head, head_dim = q_TNH.shape
    width, n_blocks = -(-head_dim // LANES) * LANES, -(-n_tok // CHUNK)
    out_TNH = np.empty_like(q_TNH)
    q_TH, kv_B = np.zeros((n_tok, width), np.float32), np.zeros((n_blocks, 2, CHUNK, width), np.float32)
    head_bytes = 4 * CHUNK * width
    blocks = _Blocks((CHUNK, 1, width), kv_B.dtype, kv_B.reshape(-1).view(np.uint8), 2 * head_bytes * np.arange(n_blocks), 0, head_bytes)
    first_T, end_T = np.zeros(n_tok, np.int64), np.full(n_tok, n_tok, np.int64)
    for n in range(n_head):
        q_TH[:, :head_dim] = q_TNH[:, n]
        for i, rows_TNH in enumerate((k_TNH, v_TNH)):
            for b in range(n_blocks):
                part = rows_TNH[CHUNK * b:CHUNK * (b + 1), n]
                kv_B[b, i, :len(part), :head_dim] = part
        out_TNH[:, n] = attend(q_TH[:, None], blocks, first_T, end_T)[:, 0, :head_dim]
    return out_TNH


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
def _load(pointer, n):
    return load_f32(pointer) if n == LANES else load_f32_part(pointer, n)


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
