"""The innermost loops: one tile of 16 weight rows times 1, 4 or 8 rows of activations.

A lane is a weight row throughout, so nothing is summed across lanes. A row's blocks are added in order, each with one fused multiply-add
(two where the type has a minimum). So a row gets the same bits whether it is multiplied alone or together with others, which share every
load and every unpacking.
"""

from typing import NamedTuple

import numpy as np

from refimpl.kernels.machine.intrinsics import (
    add_f32,
    add_i32,
    address,
    at,
    byte_of_lane,
    dot2,
    dot4,
    dot4_i16,
    dot4_i16_signed,
    fma,
    int16_pair,
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
from refimpl.kernels.machine.jit import by_format, inline, per_row
from refimpl.kernels.machine.unpack import (
    FORMATS,
    LOWER,
    PAIRS,
    UPPER,
    block_scale,
    codes,
    load_floats,
    load_half,
    splat_float,
    splat_int,
    sub_minimum,
    sub_minimum_pair,
    sub_scale,
    sub_scale_pair,
)

F32 = FORMATS["exact"]["F32"]
ZERO_I, ZERO_F, ONE_PAIR = np.int32(0), np.float32(0), np.int32(0x10001)
SPARE = 2                           # rows of results that `multiply_tile` may write beyond the last
EIGHT = ISA == "avx512"             # sums of eight rows stay in registers; other sets have half as many registers, of half the size


class Activations(NamedTuple):
    """Rows of activations in float32, and quantized to 8 bits (see `allocate_quantized` in kernels/activations.py)."""

    x_TD: np.ndarray
    q_TD: np.ndarray
    d_TB: np.ndarray
    sum_TS: np.ndarray
    m_TB: np.ndarray


@inline
def prefetch_range(place, n_bytes, ahead):
    """Prefetches `n_bytes` that begin `ahead` bytes further on; nothing where `ahead` is 0."""
    if ahead:
        for line in range(0, n_bytes, 64):
            prefetch(at(place, ahead + line))


# ---- for every row of a tuple

@per_row
def row_address(q, width, r):
    """Where row r begins."""
    return at(q, width * r)


@per_row
def zeros(r, zero):
    """Zero for every row."""
    return zero


def _from_zero(fmt, x, r, s):
    return splat_int(fmt, ZERO_I)


def _from_zero_point(fmt, x, r, s):
    return splat_int(fmt, x.sum_TS[r, s])


@by_format(lambda fmt: _from_zero_point if fmt.zero_point and not fmt.signed else _from_zero)
def first_dot(fmt, x, r, s):
    """What the zero point contributes to the dot product of sub-block s (counted through the row) with row r."""


@per_row
def initial_dot(fmt, x, r, s):
    """Where row r's dot product over sub-block s starts."""
    return first_dot(fmt, x, r, s)


@per_row
def add_dot(total, w0, w1, w2, w3, q, c):
    """Adds the products of 16 codes with columns c, c + 1, ... of the row at q."""
    total = dot4(dot4(total, w0, at(q, c)), w1, at(q, c + 4))
    return dot4(dot4(total, w2, at(q, c + 8)), w3, at(q, c + 12))


@per_row
def add_pair_sums(fmt, total, w, q, c):
    """Adds the products of 4 codes with columns c to c + 3 of the row at q in two int16 for each lane."""
    return pair_sums(fmt, total, w, at(q, c))


def _unsigned(fmt, total, w, activations):
    return dot4_i16(total, w, activations)


def _signed(fmt, total, w, activations):
    return dot4_i16_signed(total, w, activations)


@by_format(lambda fmt: _signed if fmt.signed else _unsigned)
def pair_sums(fmt, total, w, activations):
    """Adds the products of 4 codes in two int16 for each lane."""


@per_row
def add_factor_times(factor, pairs, total):
    """Adds a factor (twice, in int16) times both int16 sums."""
    return dot2(total, factor, pairs)


@per_row
def scale_add(total, scale, dots):
    """total + scale * dots."""
    return add_i32(total, mul_i32(scale, dots))


@per_row
def add_minimum_pair(fmt, total, minimums, x, r, pair):
    """Adds the minimums of two sub-blocks, times the sums of row r's activations there."""
    return dot2(total, minimums, splat_int(fmt, x.sum_TS[r, pair]))


@per_row
def add_block(fmt, x, r, b, scale, dots, total):
    """Adds a block's integer sum, times its scale and that of row r's block b."""
    return fma(mul_f32(scale, splat_float(fmt, x.d_TB[r, b])), to_f32(dots), total)


@per_row
def add_block_minimum(fmt, x, r, b, minimum, total):
    """Adds the float minimum of block b, times the sum of row r's activations there."""
    return fma(splat_float(fmt, x.m_TB[r, b]), minimum, total)


@per_row
def subtract_minimums(fmt, x, r, b, scale, minimums, total):
    """Subtracts the integer minimums of a superblock's sub-blocks (their sum, weighted with the activations), in units of `scale`."""
    return fma(mul_f32(scale, splat_float(fmt, -x.d_TB[r, b])), to_f32(minimums), total)


@per_row
def add_column(x, r, c, weights, total):
    """Adds column c."""
    return fma(weights, splat_f32(x.x_TD[r, c]), total)


# ---- a tile times the rows in the tuple r

def _blocks(fmt, tile, n_blocks, x, r, ahead, out):
    q, total = row_address(address(x.q_TD), 32 * n_blocks, r), zeros(r, splat_float(fmt, ZERO_F))
    for b in range(n_blocks):
        block = at(tile, b * fmt.n_bytes)
        prefetch_range(block, fmt.n_bytes, ahead)
        dots = sub_block(fmt, initial_dot(fmt, x, r, b), splat_int(fmt, ONE_PAIR), block, 0, q, 32 * b)
        total = add_block(fmt, x, r, b, block_scale(fmt, block), dots, total)
        if fmt.has_minimum:
            total = add_block_minimum(fmt, x, r, b, load_half(fmt, at(block, fmt.minimum)), total)
    _store(out, total)


def _superblocks(fmt, tile, n_blocks, x, r, ahead, out):
    q, total = row_address(address(x.q_TD), 256 * n_blocks, r), zeros(r, splat_float(fmt, ZERO_F))
    for b in range(n_blocks):
        block, scaled = at(tile, b * fmt.n_bytes), zeros(r, splat_int(fmt, ZERO_I))
        for s in range(fmt.n_sub):
            prefetch_range(at(block, s * (fmt.n_bytes // fmt.n_sub)), fmt.n_bytes // fmt.n_sub, ahead)
            scaled = add_scaled(fmt, scaled, block, b, s, x, r, q)
        scaled = subtract_zero_points(fmt, scaled, block, b, x, r)
        total = add_block(fmt, x, r, b, block_scale(fmt, block), scaled, total)
        if fmt.has_minimum:
            minimums = zeros(r, splat_int(fmt, ZERO_I))
            for pair in range(fmt.n_sub // 2):
                minimums = add_minimum_pair(fmt, minimums, sub_minimum_pair(fmt, block, 2 * pair), x, r, fmt.n_sub // 2 * b + pair)
            total = subtract_minimums(fmt, x, r, b, load_half(fmt, at(block, fmt.minimum)), minimums, total)
    _store(out, total)


def _dots(fmt, dots, factor, block, s, q, c):
    for g in range(0, fmt.per_sub // 4, 4):
        dots = add_dot(dots, codes(fmt, block, s, g), codes(fmt, block, s, g + 1), codes(fmt, block, s, g + 2), codes(fmt, block, s, g + 3),
                       q, c + 4 * g)
    return dots


def _pairs(fmt, dots, factor, block, s, q, c):
    """`fmt.run` groups of codes are summed in 16 bits, then multiplied by the factor and added up in 32."""
    for first in range(0, fmt.per_sub // 4, fmt.run):
        pairs = zeros(q, splat_int(fmt, ZERO_I))
        for g in range(first, first + fmt.run):
            pairs = add_pair_sums(fmt, pairs, codes(fmt, block, s, g), q, c + 4 * g)
        dots = add_factor_times(factor, pairs, dots)
    return dots


def _pairs_of_8(fmt, dots, factor, block, s, q, c):
    """The same for all eight groups, those whose nibbles share bytes one after the other."""
    pairs = zeros(q, splat_int(fmt, ZERO_I))
    for g in range(4):
        pairs = add_pair_sums(fmt, pairs, codes(fmt, block, s, g), q, c + 4 * g)
        pairs = add_pair_sums(fmt, pairs, codes(fmt, block, s, g + 4), q, c + 4 * g + 16)
    return add_factor_times(factor, pairs, dots)


@by_format(lambda fmt: (_pairs_of_8 if fmt.run == 8 else _pairs) if PAIRS else _dots)
def sub_block(fmt, dots, factor, block, s, q, c):
    """Adds the dot products of sub-block s with the columns from c on (times a factor, where PAIRS: as two int16)."""


def _scale_after(fmt, scaled, block, b, s, x, r, q):
    dots = sub_block(fmt, initial_dot(fmt, x, r, fmt.n_sub * b + s), ZERO_I, block, s, q, 256 * b + fmt.per_sub * s)
    return scale_add(scaled, sub_scale(fmt, block, s), dots)


def _scale_within(fmt, scaled, block, b, s, x, r, q):
    return sub_block(fmt, scaled, int16_pair(sub_scale(fmt, block, s)), block, s, q, 256 * b + fmt.per_sub * s)


@by_format(lambda fmt: _scale_within if PAIRS else _scale_after)
def add_scaled(fmt, scaled, block, b, s, x, r, q):
    """Adds the dot products of sub-block s of block b, times its integer scales."""


def _subtracted_already(fmt, scaled, block, b, x, r):
    return scaled


def _subtract(fmt, scaled, block, b, x, r):
    """All sub-blocks together: their scales, times the sums of the activations there, times the zero point."""
    total = zeros(r, splat_int(fmt, ZERO_I))
    for pair in range(fmt.n_sub // 2):
        total = add_minimum_pair(fmt, total, sub_scale_pair(fmt, block, 2 * pair), x, r, fmt.n_sub // 2 * b + pair)
    return scale_add(scaled, splat_int(fmt, np.int32(-fmt.zero_point)), total)


@by_format(lambda fmt: _subtract if fmt.paired_sums and not fmt.has_minimum else _subtracted_already)
def subtract_zero_points(fmt, scaled, block, b, x, r):
    """Subtracts what the zero point contributes to a superblock's sums, where dot products do not start from it."""


def _floats(fmt, tile, n_blocks, x, r, ahead, out):
    """A block is one column."""
    total = zeros(r, splat_f32(ZERO_F))
    for c in range(n_blocks):
        prefetch_range(at(tile, c * fmt.n_bytes), fmt.n_bytes, ahead)
        total = add_column(x, r, c, load_floats(fmt, at(tile, c * fmt.n_bytes)), total)
    _store(out, total)


@inline
def _store(out, total):
    for i in range(len(total)):
        store_f32(at(out, 4 * LANES * i), total[i])


TIMES = {"block": _blocks, "superblock": _superblocks, "float": _floats}


@by_format(lambda fmt: TIMES[fmt.family])
def tile_times_rows(fmt, tile, n_blocks, x, r, ahead, out):
    """A tile times the rows of x (Activations) that the tuple r names: 16 float32 for each to `out`."""


# ---- exact arithmetic with quantized weights: a tile is dequantized before it is multiplied

def _dequantize_block(fmt, block, out):
    scale = block_scale(fmt, block)
    for g in range(8):
        w = codes(fmt, block, 0, g)
        for j in range(4):
            value = mul_f32(scale, to_f32(sub_i32(byte_of_lane(w, j), splat_i32(np.int32(fmt.zero_point)))))
            if fmt.has_minimum:
                value = add_f32(value, load_half(fmt, at(block, fmt.minimum)))
            store_f32(at(out, 64 * (4 * g + j)), value)


def _dequantize_superblock(fmt, block, out):
    for s in range(fmt.n_sub):
        scale = mul_f32(block_scale(fmt, block), to_f32(sub_scale(fmt, block, s)))
        for g in range(fmt.per_sub // 4):
            w = codes(fmt, block, s, g)
            for j in range(4):
                value = mul_f32(scale, to_f32(sub_i32(byte_of_lane(w, j), splat_i32(np.int32(fmt.zero_point)))))
                if fmt.has_minimum:
                    value = sub_f32(value, mul_f32(load_half(fmt, at(block, fmt.minimum)), to_f32(sub_minimum(fmt, block, s))))
                store_f32(at(out, 64 * (fmt.per_sub * s + 4 * g + j)), value)


DEQUANTIZE = {"block": _dequantize_block, "superblock": _dequantize_superblock}


@by_format(lambda fmt: DEQUANTIZE[fmt.family])
def dequantize_block(fmt, block, out):
    """A block of 16 rows as float32, column after column of 64 bytes: the values of formats/quants, bit for bit."""


# ---- a tile times any number of rows

def _batches_of_8(fmt, tile, n_blocks, x, row_P, first, end, ahead, out):
    p = first
    while p + 7 <= end:
        r = (row_P[p], row_P[p + 1], row_P[p + 2], row_P[p + 3], row_P[p + 4], row_P[p + 5], row_P[p + 6], row_P[min(p + 7, end - 1)])
        tile_times_rows(fmt, tile, n_blocks, x, r, ahead, at(out, 4 * LANES * (p - first)))
        p, ahead = p + 8, 0
    return p


def _no_batches(fmt, tile, n_blocks, x, row_P, first, end, ahead, out):
    return first


@by_format(lambda fmt: _batches_of_8 if EIGHT and fmt.integer else _no_batches)
def batches_of_8(fmt, tile, n_blocks, x, row_P, first, end, ahead, out):
    """Multiplies rows eight at a time where that is faster, and returns the first row that is left."""


def _in_halves(fmt):
    """A body for a format: half of the tile's lanes after the other. The sums of four rows then stay in registers."""
    lower, upper = fmt.half(LOWER), fmt.half(UPPER)

    def halves(fmt, tile, n_blocks, x, r, ahead, out):
        tile_times_rows(lower, tile, n_blocks, x, r, ahead, out)
        tile_times_rows(upper, tile, n_blocks, x, r, 0, at(out, 2 * LANES))
    return halves


def _whole(fmt, tile, n_blocks, x, r, ahead, out):
    tile_times_rows(fmt, tile, n_blocks, x, r, ahead, out)


@by_format(lambda fmt: _in_halves(fmt) if PAIRS and fmt.integer else _whole)
def tile_times_4(fmt, tile, n_blocks, x, r, ahead, out):
    """A tile times the four rows in r."""


@inline
def _multiply_stored(fmt, tile, n_blocks, x, row_P, first, end, floats, out):
    """The first pass over the tile prefetches the next tile, which has arrived when the last pass ends. A single pass leaves that to the
    processor, unless the fields of a block are scattered, a pattern that the processor does not recognise.
    """
    ahead = n_blocks * fmt.n_bytes if end - first > 1 or fmt.scattered else 0
    p = batches_of_8(fmt, tile, n_blocks, x, row_P, first, end, ahead, out)
    if p > first:
        ahead = 0
    while p + 2 <= end:
        r = (row_P[p], row_P[p + 1], row_P[min(p + 2, end - 1)], row_P[min(p + 3, end - 1)])
        tile_times_4(fmt, tile, n_blocks, x, r, ahead, at(out, 4 * LANES * (p - first)))
        p, ahead = p + 4, 0
    if p < end:
        tile_times_rows(fmt, tile, n_blocks, x, (row_P[p],), ahead, at(out, 4 * LANES * (p - first)))


def _multiply_dequantized(fmt, tile, n_blocks, x, row_P, first, end, floats, out):
    for b in range(n_blocks):
        dequantize_block(fmt, at(tile, b * fmt.n_bytes), at(floats, 64 * fmt.elements * b))
    _multiply_stored(F32, floats, n_blocks * fmt.elements, x, row_P, first, end, floats, out)


@by_format(lambda fmt: _multiply_dequantized if fmt.dequantized else _multiply_stored)
def multiply_tile(fmt, tile, n_blocks, x, row_P, first, end, floats, out):
    """A tile times rows row_P[first..end-1] of x: 16 float32 for each to `out`, one after the other.

    `out` needs space for SPARE more rows: where two, three or seven are left, the last is computed again, which costs less than another
    pass over the tile. `floats` is space for the tile in float32 (used where `fmt.dequantized`).
    """
