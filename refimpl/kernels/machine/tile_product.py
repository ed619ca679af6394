"""The innermost loops: one tile of 16 weight rows times 1, 4 or 8 rows of activations.

A lane is a weight row throughout, so nothing is ever summed across lanes. A row's blocks are added in order, each with one fused
multiply-add (two where the type has a minimum): the same bits for one row as for several, which share every load and every unpacking.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import overload

from refimpl.kernels.machine.intrinsics import (
    add_f32,
    add_i32,
    address,
    at,
    byte_of_lane,
    dot2,
    dot4,
    dot4_wide,
    dot16,
    fma,
    load_f16,
    mul_f32,
    mul_i32,
    prefetch,
    splat_f32,
    splat_i32,
    store_f32,
    sub_f32,
    sub_i32,
    to_f32,
)
from refimpl.kernels.machine.isa import ISA, LANES
from refimpl.kernels.machine.jit import INLINE, inline, per_row
from refimpl.kernels.machine.unpack import EXACT, column_of, levels, low_of, lows_of, scale_of, scale_of_block

FLOATS = EXACT["F32"]
ZERO_I, ZERO_F = np.int32(0), np.float32(0)
SPARE = 2                           # rows of results that `rows` may write beyond the last
EIGHT = ISA == "avx512"             # sums of eight rows stay in registers: others have half as many, of half the size


class Rounded(NamedTuple):
    """Rows of activations as the kernels take them: in float32, and rounded to 8 bits (see activations.py `space`)."""

    x_TD: np.ndarray
    q_TD: np.ndarray
    d_TB: np.ndarray
    sum_TS: np.ndarray
    m_TB: np.ndarray


def _dot_small(kind, total, w0, w1, w2, w3, activations):
    return dot16(total, w0, w1, w2, w3, activations)


def _dot_middle(kind, total, w0, w1, w2, w3, activations):
    total = dot4(dot4(total, w0, activations), w1, at(activations, 4))
    return dot4(dot4(total, w2, at(activations, 8)), w3, at(activations, 12))


def _dot_large(kind, total, w0, w1, w2, w3, activations):
    total = dot4_wide(dot4_wide(total, w0, activations), w1, at(activations, 4))
    return dot4_wide(dot4_wide(total, w2, at(activations, 8)), w3, at(activations, 12))


def _dot_for(kind):
    return _dot_small if kind.top <= 31 else _dot_middle if kind.top <= 128 else _dot_large


def dot(kind, total, w0, w1, w2, w3, activations):
    """Adds the products of 16 weights with 16 activations; how, depends on how large the kind's integers are."""
    return _dot_for(kind)(kind, total, w0, w1, w2, w3, activations)


@overload(dot, jit_options=INLINE)
def _dot(kind, total, w0, w1, w2, w3, activations):
    return _dot_for(kind.kind)


@inline
def fetch(place, n_bytes, ahead):
    """Asks for `n_bytes` that lie `ahead` bytes further on; for nothing where `ahead` is 0."""
    if ahead:
        for line in range(0, n_bytes, 64):
            prefetch(at(place, ahead + line))


# ---- what a row needs of its own

@per_row
def row_of(q, width, r):
    """Where row r begins."""
    return at(q, width * r)


@per_row
def nothing(r, zero):
    """Zero for every row."""
    return zero


@per_row
def zero_of(kind, x, r, s):
    """What the dot product of row r over sub-block s (counted through the row) starts from, to take the zero point out."""
    return splat_i32(x.sum_TS[r, s]) if kind.zero else splat_i32(ZERO_I)


@per_row
def dots(kind, n, w0, w1, w2, w3, q, c):
    """Adds the products of 16 weights with columns c.. of the row at q."""
    return dot(kind, n, w0, w1, w2, w3, at(q, c))


@per_row
def times(n, scale, dots):
    """n + scale * dots."""
    return add_i32(n, mul_i32(scale, dots))


@per_row
def times_sums(n, lows, x, r, pair):
    """Adds the minimums of two sub-blocks, times the sums of row r's numbers there."""
    return dot2(n, lows, splat_i32(x.sum_TS[r, pair]))


@per_row
def scaled(x, r, b, d, n, total):
    """Adds a block's integers, times its scale and that of row r's block b, to the row's sum."""
    return fma(mul_f32(d, splat_f32(x.d_TB[r, b])), to_f32(n), total)


@per_row
def minimum_small(x, r, b, m, total):
    """Adds the minimum of block b, times the sum of the row's numbers there."""
    return fma(splat_f32(x.m_TB[r, b]), m, total)


@per_row
def minimum_large(x, r, b, m, low, total):
    """Takes off the minimums of block b's sub-blocks: `low` of them, in units of m."""
    return fma(mul_f32(m, splat_f32(-x.d_TB[r, b])), to_f32(low), total)


@per_row
def column(x, r, c, weights, total):
    """Adds column c."""
    return fma(weights, splat_f32(x.x_TD[r, c]), total)


# ---- a tile times the rows in the tuple r

def _small(kind, tile, n_blocks, x, r, ahead, out):
    """Blocks of 32 under one scale."""
    q, total = row_of(address(x.q_TD), 32 * n_blocks, r), nothing(r, splat_f32(ZERO_F))
    for b in range(n_blocks):
        block = at(tile, b * kind.n_bytes)
        fetch(block, kind.n_bytes, ahead)
        n = zero_of(kind, x, r, b)
        for g in range(0, 8, 4):
            n = dots(kind, n, levels(kind, block, 0, g), levels(kind, block, 0, g + 1), levels(kind, block, 0, g + 2),
                     levels(kind, block, 0, g + 3), q, 32 * b + 4 * g)
        total = scaled(x, r, b, scale_of_block(kind, block), n, total)
        if kind.has_minimum:
            total = minimum_small(x, r, b, load_f16(at(block, kind.minimum)), total)
    _store(out, total)


def _large(kind, tile, n_blocks, x, r, ahead, out):
    """Blocks of 256 with integer scales in their sub-blocks."""
    q, total = row_of(address(x.q_TD), 256 * n_blocks, r), nothing(r, splat_f32(ZERO_F))
    for b in range(n_blocks):
        block, n = at(tile, b * kind.n_bytes), nothing(r, splat_i32(ZERO_I))
        for s in range(kind.n_sub):
            fetch(at(block, s * (kind.n_bytes // kind.n_sub)), kind.n_bytes // kind.n_sub, ahead)
            found = zero_of(kind, x, r, kind.n_sub * b + s)
            for g in range(0, kind.per_sub // 4, 4):
                found = dots(kind, found, levels(kind, block, s, g), levels(kind, block, s, g + 1), levels(kind, block, s, g + 2),
                             levels(kind, block, s, g + 3), q, 256 * b + kind.per_sub * s + 4 * g)
            n = times(n, scale_of(kind, block, s), found)
        total = scaled(x, r, b, scale_of_block(kind, block), n, total)
        if kind.has_minimum:
            low = nothing(r, splat_i32(ZERO_I))
            for pair in range(kind.n_sub // 2):
                low = times_sums(low, lows_of(kind, block, 2 * pair), x, r, kind.n_sub // 2 * b + pair)
            total = minimum_large(x, r, b, load_f16(at(block, kind.minimum)), low, total)
    _store(out, total)


def _plain(kind, tile, n_blocks, x, r, ahead, out):
    """Floats: a block is one column."""
    total = nothing(r, splat_f32(ZERO_F))
    for c in range(n_blocks):
        fetch(at(tile, c * kind.n_bytes), kind.n_bytes, ahead)
        total = column(x, r, c, column_of(kind, at(tile, c * kind.n_bytes)), total)
    _store(out, total)


@inline
def _store(out, total):
    for i in range(len(total)):
        store_f32(at(out, 4 * LANES * i), total[i])


# ---- quantized weights in exact arithmetic: made float32 first, a tile at a time

def _widen_small(kind, block, out):
    d = scale_of_block(kind, block)
    for g in range(8):
        w = levels(kind, block, 0, g)
        for j in range(4):
            value = mul_f32(d, to_f32(sub_i32(byte_of_lane(w, j), splat_i32(np.int32(kind.zero)))))
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

SOME = {"small": _small, "large": _large, "plain": _plain}


def some(kind, tile, n_blocks, x, r, ahead, out):
    """The rows of the activations `x` (a Rounded) that the tuple r names, times a tile: 16 float32 for each to `out`."""
    SOME[kind.family](kind, tile, n_blocks, x, r, ahead, out)


@overload(some, jit_options=INLINE)
def _some(kind, tile, n_blocks, x, r, ahead, out):
    return SOME[kind.kind.family]


def _eights(kind, tile, n_blocks, x, row_P, first, end, ahead, out):
    p = first
    while p + 7 <= end:
        r = (row_P[p], row_P[p + 1], row_P[p + 2], row_P[p + 3], row_P[p + 4], row_P[p + 5], row_P[p + 6], row_P[min(p + 7, end - 1)])
        some(kind, tile, n_blocks, x, r, ahead, at(out, 4 * LANES * (p - first)))
        p, ahead = p + 8, 0
    return p


def _no_eights(kind, tile, n_blocks, x, row_P, first, end, ahead, out):
    return first


def eights(kind, tile, n_blocks, x, row_P, first, end, ahead, out):
    """As many rows as can be taken in eights; returns the first of the others. None where registers are few, or eight win nothing."""
    return (_eights if EIGHT and kind.integer else _no_eights)(kind, tile, n_blocks, x, row_P, first, end, ahead, out)


@overload(eights, jit_options=INLINE)
def _eights_of(kind, tile, n_blocks, x, row_P, first, end, ahead, out):
    return _eights if EIGHT and kind.kind.integer else _no_eights


@inline
def _rows_as_stored(kind, tile, n_blocks, x, row_P, first, end, wide, out):
    """The first pass over the tile asks for the next one, which has come when the last is done. A single pass leaves that to the processor,
    but where the fields of a block are read here and there it does not see the pattern.
    """
    ahead = n_blocks * kind.n_bytes if end - first > 1 or kind.scattered else 0
    p = eights(kind, tile, n_blocks, x, row_P, first, end, ahead, out)
    if p > first:
        ahead = 0
    while p + 2 <= end:
        r = (row_P[p], row_P[p + 1], row_P[min(p + 2, end - 1)], row_P[min(p + 3, end - 1)])
        some(kind, tile, n_blocks, x, r, ahead, at(out, 4 * LANES * (p - first)))
        p, ahead = p + 4, 0
    if p < end:
        some(kind, tile, n_blocks, x, (row_P[p],), ahead, at(out, 4 * LANES * (p - first)))


def _rows_widened(kind, tile, n_blocks, x, row_P, first, end, wide, out):
    for b in range(n_blocks):
        widen(kind, at(tile, b * kind.n_bytes), at(wide, 64 * kind.elements * b))
    _rows_as_stored(FLOATS, wide, n_blocks * kind.elements, x, row_P, first, end, wide, out)


def rows(kind, tile, n_blocks, x, row_P, first, end, wide, out):
    """Rows row_P[first..end-1] of the activations times a tile: 16 float32 for each to `out`, one after the other. There must be room for
    SPARE more: where two, three or seven are left, the last is computed again, which costs less than another pass over the tile.

    `wide` is room for the tile as float32 (where arithmetic is exact and the weights are quantized).
    """
    (_rows_widened if kind.widened else _rows_as_stored)(kind, tile, n_blocks, x, row_P, first, end, wide, out)


@overload(rows, jit_options=INLINE)
def _rows(kind, tile, n_blocks, x, row_P, first, end, wide, out):
    return _rows_widened if kind.kind.widened else _rows_as_stored
