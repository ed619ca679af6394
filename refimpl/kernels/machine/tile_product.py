"""The innermost loops: one tile of 16 weight rows times 1, 4, 6 or 8 rows of activations.

A lane is a weight row throughout, so nothing is summed across lanes. A row's blocks are added in order, each with one fused multiply-add
(two where the type has a minimum). So a row gets the same bits whether it is multiplied alone or together with others, which share every
load and every unpacking.
"""

import numpy as np

from refimpl.kernels.machine.intrinsics import (
    add_f32,
    address,
    at,
    byte_of_lane,
    mul_f32,
    splat_f32,
    splat_i32,
    store_f32,
    sub_f32,
    sub_i32,
    to_f32,
)
from refimpl.kernels.machine.isa import HALF_TILES, ISA, LANES
from refimpl.kernels.machine.jit import by_format, inline
from refimpl.kernels.machine.tile_pairs import pairs_times
from refimpl.kernels.machine.tile_rows import (
    ZERO_F,
    ZERO_I,
    add_block,
    add_block_minimum,
    add_column,
    add_dot,
    add_superblock,
    initial_dot,
    prefetch_range,
    row_address,
    scale_add,
    store_totals,
    zeros,
)
from refimpl.kernels.machine.tile_shorts import FEWEST, shorts_times_rows, unpack_to_shorts
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
    sub_scale,
)

F32 = FORMATS["exact"]["F32"]
SPARE = 2                           # rows of results that `multiply_tile` may write beyond the last
# Bytes. One row from memory on AVX2 (Zen 1, 2048 against 0): Q4_0 1.27 and Q4_K 1.56 times as fast on one thread, 1.15 and 1.37 on two;
# 1024 and 4096 are alike. Without effect for IQ4_NL, whose arithmetic is the limit. Not measured on other sets.
AHEAD = 2048 if ISA == "avx2" else 0
SIX = ISA in ("avx2", "avxvnni")     # float sums of six rows, 12 registers
EIGHT = ISA == "avx512"             # sums of eight rows stay in registers; other sets have half as many registers, of half the size


# ---- a tile times the rows in the tuple r

def _blocks(fmt, tile, n_blocks, x, r, ahead, out):
    q, total = row_address(address(x.q_TD), x.q_TD.shape[1], r), zeros(r, splat_float(fmt, ZERO_F))
    for b in range(n_blocks):
        block = at(tile, b * fmt.n_bytes)
        prefetch_range(block, fmt.n_bytes, ahead)
        dots = initial_dot(fmt, x, r, b)
        for g in range(0, 8, 4):
            dots = add_dot(fmt, dots, codes(fmt, block, 0, g), codes(fmt, block, 0, g + 1), codes(fmt, block, 0, g + 2),
                           codes(fmt, block, 0, g + 3), q, 32 * b + 4 * g)
        total = add_block(fmt, x, r, b, block_scale(fmt, block), dots, total)
        if fmt.has_minimum:
            total = add_block_minimum(fmt, x, r, b, load_half(fmt, at(block, fmt.minimum)), total)
    store_totals(out, total)


def _superblocks(fmt, tile, n_blocks, x, r, ahead, out):
    q, total = row_address(address(x.q_TD), 256 * n_blocks, r), zeros(r, splat_float(fmt, ZERO_F))
    for b in range(n_blocks):
        block, scaled = at(tile, b * fmt.n_bytes), zeros(r, splat_int(fmt, ZERO_I))
        for s in range(fmt.n_sub):
            prefetch_range(at(block, s * (fmt.n_bytes // fmt.n_sub)), fmt.n_bytes // fmt.n_sub, ahead)
            dots = initial_dot(fmt, x, r, fmt.n_sub * b + s)
            for g in range(0, fmt.per_sub // 4, 4):
                dots = add_dot(fmt, dots, codes(fmt, block, s, g), codes(fmt, block, s, g + 1), codes(fmt, block, s, g + 2),
                               codes(fmt, block, s, g + 3), q, 256 * b + fmt.per_sub * s + 4 * g)
            scaled = scale_add(scaled, sub_scale(fmt, block, s), dots)
        total = add_superblock(fmt, x, r, b, block, scaled, total)
    store_totals(out, total)


def _floats(fmt, tile, n_blocks, x, r, ahead, out):
    """A block is one column."""
    total = zeros(r, splat_f32(ZERO_F))
    for c in range(n_blocks):
        prefetch_range(at(tile, c * fmt.n_bytes), fmt.n_bytes, ahead)
        total = add_column(x, r, c, load_floats(fmt, at(tile, c * fmt.n_bytes)), total)
    store_totals(out, total)


def _times(fmt):
    return pairs_times(fmt) if PAIRS and fmt.integer else {"block": _blocks, "superblock": _superblocks, "float": _floats}[fmt.family]


@by_format(_times)
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


def _batches_of_6(fmt, tile, n_blocks, x, row_P, first, end, ahead, out):
    p = first
    while p + 6 <= end:
        r = (row_P[p], row_P[p + 1], row_P[p + 2], row_P[p + 3], row_P[p + 4], row_P[p + 5])
        tile_times_rows(fmt, tile, n_blocks, x, r, ahead, at(out, 4 * LANES * (p - first)))
        p, ahead = p + 6, 0
    return p


def _no_batches(fmt, tile, n_blocks, x, row_P, first, end, ahead, out):
    return first


@by_format(lambda fmt: _batches_of_8 if EIGHT and fmt.integer else _batches_of_6 if SIX and fmt.family == "float" else _no_batches)
def larger_batches(fmt, tile, n_blocks, x, row_P, first, end, ahead, out):
    """Multiplies rows eight or six at a time where that is faster, and returns the first row that is left."""


def _in_halves(fmt):
    """A body for a format: half of the tile's lanes after the other. The sums of four rows then stay in registers."""
    lower, upper = fmt.half(LOWER), fmt.half(UPPER)

    def halves(fmt, tile, n_blocks, x, r, ahead, out):
        tile_times_rows(lower, tile, n_blocks, x, r, ahead, out)
        tile_times_rows(upper, tile, n_blocks, x, r, 0, at(out, 2 * LANES))
    return halves


@by_format(lambda fmt: _in_halves(fmt) if HALF_TILES and fmt.integer else _times(fmt))
def tile_times_4(fmt, tile, n_blocks, x, r, ahead, out):
    """A tile times the four rows in r."""


@inline
def _multiply_stored(fmt, tile, n_blocks, x, row_P, first, end, floats, out):
    """The first pass over the tile prefetches the next tile, which has arrived when the last pass ends. A single pass prefetches AHEAD, or
    the next tile too where the fields of a block are scattered, a pattern that the processor does not recognise.
    """
    ahead = n_blocks * fmt.n_bytes if end - first > 1 or fmt.scattered else AHEAD
    p = larger_batches(fmt, tile, n_blocks, x, row_P, first, end, ahead, out)
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


def _multiply_widened(fmt, tile, n_blocks, x, row_P, first, end, floats, out):
    if end - first < FEWEST:
        _multiply_stored(fmt, tile, n_blocks, x, row_P, first, end, floats, out)
        return
    unpack_to_shorts(fmt, tile, n_blocks, n_blocks * fmt.n_bytes, floats)
    p = first
    while p + 2 <= end:
        r = (row_P[p], row_P[p + 1], row_P[min(p + 2, end - 1)], row_P[min(p + 3, end - 1)])
        shorts_times_rows(fmt, tile, floats, n_blocks, x, r, at(out, 4 * LANES * (p - first)))
        p += 4
    if p < end:
        shorts_times_rows(fmt, tile, floats, n_blocks, x, (row_P[p],), at(out, 4 * LANES * (p - first)))


@by_format(lambda fmt: _multiply_dequantized if fmt.dequantized else _multiply_widened if fmt.widened else _multiply_stored)
def multiply_tile(fmt, tile, n_blocks, x, row_P, first, end, floats, out):
    """A tile times rows row_P[first..end-1] of x: 16 float32 for each to `out`, one after the other.

    `out` needs space for SPARE more rows: where two, three or seven are left, the last is computed again, which costs less than another
    pass over the tile. `floats` is space for the unpacked tile: 64 bytes a column (used where `fmt.unpacked`).
    """
