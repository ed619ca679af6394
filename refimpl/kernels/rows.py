"""The innermost loops: one tile of 16 weight rows times one row of activations, or times four.

A lane is a weight row throughout, so nothing is ever summed across lanes. A row's blocks are added in order, each with one fused
multiply-add (two where the type has a minimum): the same bits for one row as for four. Four share every load and every unpacking.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import overload

from refimpl.kernels.jit import inline
from refimpl.kernels.kinds import EXACT, INLINE, column_of, levels, low_of, scale_of, scale_of_block
from refimpl.kernels.simd import (
    add_f32,
    add_i32,
    address,
    at,
    byte_of_lane,
    dot4,
    dot4_signed,
    dot4_wide,
    fma,
    load_f16,
    mul_f32,
    mul_i32,
    prefetch,
    signed_byte,
    splat_f32,
    splat_i32,
    store_f32,
    sub_f32,
    sub_i32,
    to_f32,
)
from refimpl.kernels.words import LANES

FLOATS = EXACT["F32"]
ZERO_I, ZERO_F = np.int32(0), np.float32(0)


class Rounded(NamedTuple):
    """Rows of activations as the kernels take them: in float32, and rounded to 8 bits (see activations.py `space`)."""

    x_TD: np.ndarray
    q_TD: np.ndarray
    d_TB: np.ndarray
    sum_TS: np.ndarray
    m_TB: np.ndarray


@inline
def dot(kind, total, weights, activations):
    """The integer dot product that fits the kind's weights."""
    if kind.wide:
        return dot4_wide(total, weights, activations)
    return dot4_signed(total, weights, activations) if kind.signed else dot4(total, weights, activations)


@inline
def fetch(place, n_bytes, ahead):
    """Asks for `n_bytes` that lie `ahead` bytes further on; for nothing where `ahead` is 0."""
    if ahead:
        for line in range(0, n_bytes, 64):
            prefetch(at(place, ahead + line))


@inline
def zero_of(kind, x, r, s):
    """What the dot product of row r over sub-block s (counted through the row) starts from, to take the zero point out."""
    return splat_i32(x.sum_TS[r, s]) if kind.zero else splat_i32(ZERO_I)


@inline
def scaled(x, r, b, d, n, total):
    """Adds a block's integers, times its scale and that of row r's block b, to the row's sum."""
    return fma(mul_f32(d, splat_f32(x.d_TB[r, b])), to_f32(n), total)


# ---- blocks of 32 under one scale

def _one_small(kind, tile, n_blocks, x, r, ahead, out):
    q, total = at(address(x.q_TD), 32 * n_blocks * r), splat_f32(ZERO_F)
    for b in range(n_blocks):
        block, qb = at(tile, b * kind.n_bytes), at(q, 32 * b)
        fetch(block, kind.n_bytes, ahead)
        n = zero_of(kind, x, r, b)
        for g in range(8):
            n = dot(kind, n, levels(kind, block, 0, g), at(qb, 4 * g))
        total = scaled(x, r, b, scale_of_block(kind, block), n, total)
        if kind.has_minimum:
            total = fma(splat_f32(x.m_TB[r, b]), load_f16(at(block, kind.minimum)), total)
    store_f32(out, total)


def _four_small(kind, tile, n_blocks, x, r0, r1, r2, r3, ahead, out):
    q, width = address(x.q_TD), 32 * n_blocks
    q0, q1, q2, q3 = at(q, width * r0), at(q, width * r1), at(q, width * r2), at(q, width * r3)
    t0, t1, t2, t3 = splat_f32(ZERO_F), splat_f32(ZERO_F), splat_f32(ZERO_F), splat_f32(ZERO_F)
    for b in range(n_blocks):
        block = at(tile, b * kind.n_bytes)
        fetch(block, kind.n_bytes, ahead)
        n0, n1 = zero_of(kind, x, r0, b), zero_of(kind, x, r1, b)
        n2, n3 = zero_of(kind, x, r2, b), zero_of(kind, x, r3, b)
        for g in range(8):
            w, c = levels(kind, block, 0, g), 32 * b + 4 * g
            n0, n1 = dot(kind, n0, w, at(q0, c)), dot(kind, n1, w, at(q1, c))
            n2, n3 = dot(kind, n2, w, at(q2, c)), dot(kind, n3, w, at(q3, c))
        d = scale_of_block(kind, block)
        t0, t1 = scaled(x, r0, b, d, n0, t0), scaled(x, r1, b, d, n1, t1)
        t2, t3 = scaled(x, r2, b, d, n2, t2), scaled(x, r3, b, d, n3, t3)
        if kind.has_minimum:
            m = load_f16(at(block, kind.minimum))
            t0, t1 = fma(splat_f32(x.m_TB[r0, b]), m, t0), fma(splat_f32(x.m_TB[r1, b]), m, t1)
            t2, t3 = fma(splat_f32(x.m_TB[r2, b]), m, t2), fma(splat_f32(x.m_TB[r3, b]), m, t3)
    _store_four(out, t0, t1, t2, t3)


@inline
def _store_four(out, t0, t1, t2, t3):
    store_f32(out, t0)
    store_f32(at(out, 64), t1)
    store_f32(at(out, 128), t2)
    store_f32(at(out, 192), t3)


# ---- blocks of 256 with integer scales in their sub-blocks

def _one_large(kind, tile, n_blocks, x, r, ahead, out):
    q, total = at(address(x.q_TD), 256 * n_blocks * r), splat_f32(ZERO_F)
    for b in range(n_blocks):
        block, n, low = at(tile, b * kind.n_bytes), splat_i32(ZERO_I), splat_i32(ZERO_I)
        for s in range(kind.n_sub):
            fetch(at(block, s * (kind.n_bytes // kind.n_sub)), kind.n_bytes // kind.n_sub, ahead)
            qs, dots = at(q, 256 * b + kind.per_sub * s), zero_of(kind, x, r, kind.n_sub * b + s)
            for g in range(kind.per_sub // 4):
                dots = dot(kind, dots, levels(kind, block, s, g), at(qs, 4 * g))
            n = add_i32(n, mul_i32(scale_of(kind, block, s), dots))
            if kind.has_minimum:
                low = add_i32(low, mul_i32(low_of(kind, block, s), splat_i32(x.sum_TS[r, kind.n_sub * b + s])))
        total = scaled(x, r, b, scale_of_block(kind, block), n, total)
        if kind.has_minimum:
            total = fma(mul_f32(load_f16(at(block, kind.minimum)), splat_f32(-x.d_TB[r, b])), to_f32(low), total)
    store_f32(out, total)


def _four_large(kind, tile, n_blocks, x, r0, r1, r2, r3, ahead, out):
    q, width = address(x.q_TD), 256 * n_blocks
    q0, q1, q2, q3 = at(q, width * r0), at(q, width * r1), at(q, width * r2), at(q, width * r3)
    t0, t1, t2, t3 = splat_f32(ZERO_F), splat_f32(ZERO_F), splat_f32(ZERO_F), splat_f32(ZERO_F)
    for b in range(n_blocks):
        block = at(tile, b * kind.n_bytes)
        n0, n1, n2, n3 = splat_i32(ZERO_I), splat_i32(ZERO_I), splat_i32(ZERO_I), splat_i32(ZERO_I)
        low0, low1, low2, low3 = splat_i32(ZERO_I), splat_i32(ZERO_I), splat_i32(ZERO_I), splat_i32(ZERO_I)
        for s in range(kind.n_sub):
            first = 256 * b + kind.per_sub * s
            fetch(at(block, s * (kind.n_bytes // kind.n_sub)), kind.n_bytes // kind.n_sub, ahead)
            dots0, dots1 = zero_of(kind, x, r0, kind.n_sub * b + s), zero_of(kind, x, r1, kind.n_sub * b + s)
            dots2, dots3 = zero_of(kind, x, r2, kind.n_sub * b + s), zero_of(kind, x, r3, kind.n_sub * b + s)
            for g in range(kind.per_sub // 4):
                w, c = levels(kind, block, s, g), first + 4 * g
                dots0, dots1 = dot(kind, dots0, w, at(q0, c)), dot(kind, dots1, w, at(q1, c))
                dots2, dots3 = dot(kind, dots2, w, at(q2, c)), dot(kind, dots3, w, at(q3, c))
            scale = scale_of(kind, block, s)
            n0, n1 = add_i32(n0, mul_i32(scale, dots0)), add_i32(n1, mul_i32(scale, dots1))
            n2, n3 = add_i32(n2, mul_i32(scale, dots2)), add_i32(n3, mul_i32(scale, dots3))
            if kind.has_minimum:
                m = low_of(kind, block, s)
                low0 = add_i32(low0, mul_i32(m, splat_i32(x.sum_TS[r0, kind.n_sub * b + s])))
                low1 = add_i32(low1, mul_i32(m, splat_i32(x.sum_TS[r1, kind.n_sub * b + s])))
                low2 = add_i32(low2, mul_i32(m, splat_i32(x.sum_TS[r2, kind.n_sub * b + s])))
                low3 = add_i32(low3, mul_i32(m, splat_i32(x.sum_TS[r3, kind.n_sub * b + s])))
        d = scale_of_block(kind, block)
        t0, t1 = scaled(x, r0, b, d, n0, t0), scaled(x, r1, b, d, n1, t1)
        t2, t3 = scaled(x, r2, b, d, n2, t2), scaled(x, r3, b, d, n3, t3)
        if kind.has_minimum:
            m = load_f16(at(block, kind.minimum))
            t0 = fma(mul_f32(m, splat_f32(-x.d_TB[r0, b])), to_f32(low0), t0)
            t1 = fma(mul_f32(m, splat_f32(-x.d_TB[r1, b])), to_f32(low1), t1)
            t2 = fma(mul_f32(m, splat_f32(-x.d_TB[r2, b])), to_f32(low2), t2)
            t3 = fma(mul_f32(m, splat_f32(-x.d_TB[r3, b])), to_f32(low3), t3)
    _store_four(out, t0, t1, t2, t3)


# ---- floats: a block is one column

def _one_plain(kind, tile, n_blocks, x, r, ahead, out):
    total = splat_f32(ZERO_F)
    for c in range(n_blocks):
        fetch(at(tile, c * kind.n_bytes), kind.n_bytes, ahead)
        total = fma(column_of(kind, at(tile, c * kind.n_bytes)), splat_f32(x.x_TD[r, c]), total)
    store_f32(out, total)


def _four_plain(kind, tile, n_blocks, x, r0, r1, r2, r3, ahead, out):
    t0, t1, t2, t3 = splat_f32(ZERO_F), splat_f32(ZERO_F), splat_f32(ZERO_F), splat_f32(ZERO_F)
    for c in range(n_blocks):
        fetch(at(tile, c * kind.n_bytes), kind.n_bytes, ahead)
        w = column_of(kind, at(tile, c * kind.n_bytes))
        t0, t1 = fma(w, splat_f32(x.x_TD[r0, c]), t0), fma(w, splat_f32(x.x_TD[r1, c]), t1)
        t2, t3 = fma(w, splat_f32(x.x_TD[r2, c]), t2), fma(w, splat_f32(x.x_TD[r3, c]), t3)
    _store_four(out, t0, t1, t2, t3)


# ---- quantized weights in exact arithmetic: made float32 first, a tile at a time

def _widen_small(kind, block, out):
    d = scale_of_block(kind, block)
    for g in range(8):
        w = levels(kind, block, 0, g)
        for j in range(4):
            q = byte_of_lane(w, j)
            q = signed_byte(q) if kind.signed else sub_i32(q, splat_i32(np.int32(kind.zero)))
            value = mul_f32(d, to_f32(q))
            if kind.has_minimum:
                value = add_f32(value, load_f16(at(block, kind.minimum)))
            store_f32(at(out, 64 * (4 * g + j)), value)


def _widen_large(kind, block, out):
    for s in range(kind.n_sub):
        scale = mul_f32(scale_of_block(kind, block), to_f32(scale_of(kind, block, s)))
        for g in range(kind.per_sub // 4):
            w = levels(kind, block, s, g)
            for j in range(4):
                value = mul_f32(scale, to_f32(sub_i32(byte_of_lane(w, j), splat_i32(np.int32(kind.zero)))))
                if kind.has_minimum:
                    value = sub_f32(value, mul_f32(load_f16(at(block, kind.minimum)), to_f32(low_of(kind, block, s))))
                store_f32(at(out, 64 * (kind.per_sub * s + 4 * g + j)), value)


WIDEN = {"small": _widen_small, "large": _widen_large}


def widen(kind, block, out):
    """A block of 16 rows as float32, column after column of 64 bytes: the values of formats/, bit for bit."""
    WIDEN[kind.family](kind, block, out)


@overload(widen, jit_options=INLINE)
def _widen(kind, block, out):
    return WIDEN[kind.kind.family]


# ---- a tile times any rows

ONE = {"small": _one_small, "large": _one_large, "plain": _one_plain}
FOUR = {"small": _four_small, "large": _four_large, "plain": _four_plain}


def one(kind, tile, n_blocks, x, r, ahead, out):
    """Row r of the activations `x` (a Rounded) times a tile: 16 float32 to `out`."""
    ONE[kind.family](kind, tile, n_blocks, x, r, ahead, out)


@overload(one, jit_options=INLINE)
def _one(kind, tile, n_blocks, x, r, ahead, out):
    return ONE[kind.kind.family]


def four(kind, tile, n_blocks, x, r0, r1, r2, r3, ahead, out):
    """Four rows of the activations times a tile: 4 times 16 float32 to `out`."""
    FOUR[kind.family](kind, tile, n_blocks, x, r0, r1, r2, r3, ahead, out)


@overload(four, jit_options=INLINE)
def _four(kind, tile, n_blocks, x, r0, r1, r2, r3, ahead, out):
    return FOUR[kind.kind.family]


@inline
def _rows_as_stored(kind, tile, n_blocks, x, row_P, first, end, wide, out):
    """The first pass over the tile asks for the next one, which has come when the last is done. A single pass leaves that to the processor,
    but where the fields of a block are read here and there it does not see the pattern.
    """
    p, ahead = first, n_blocks * kind.n_bytes if end - first > 1 or kind.scattered else 0
    while p + 4 <= end:
        four(kind, tile, n_blocks, x, row_P[p], row_P[p + 1], row_P[p + 2], row_P[p + 3], ahead, at(out, 4 * LANES * (p - first)))
        p, ahead = p + 4, 0
    while p < end:
        one(kind, tile, n_blocks, x, row_P[p], ahead, at(out, 4 * LANES * (p - first)))
        p, ahead = p + 1, 0


def _rows_widened(kind, tile, n_blocks, x, row_P, first, end, wide, out):
    for b in range(n_blocks):
        widen(kind, at(tile, b * kind.n_bytes), at(wide, 64 * kind.elements * b))
    _rows_as_stored(FLOATS, wide, n_blocks * kind.elements, x, row_P, first, end, wide, out)


def rows(kind, tile, n_blocks, x, row_P, first, end, wide, out):
    """Rows row_P[first..end-1] of the activations times a tile: 16 float32 for each to `out`, one after the other.

    `wide` is room for the tile as float32 (where arithmetic is exact and the weights are quantized).
    """
    (_rows_widened if kind.widened else _rows_as_stored)(kind, tile, n_blocks, x, row_P, first, end, wide, out)


@overload(rows, jit_options=INLINE)
def _rows(kind, tile, n_blocks, x, row_P, first, end, wide, out):
    return _rows_widened if kind.kind.widened else _rows_as_stored
