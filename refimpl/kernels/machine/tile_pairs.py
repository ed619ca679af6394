"""The innermost loops for AVX2 and NEON, which have no dot product of bytes: products are added up in pairs, in 16 bits.

As many of these as are sure to fit are added up there (`WeightFormat.run`). `dot2` then takes them to 32
bits, multiplied by the integer scale of their sub-block where there is one. The integers, and so the bits, are those of tile_product.py.
"""

import numpy as np

from refimpl.kernels.machine.intrinsics import address, at, dot2, dot4_i16, dot4_i16_signed, int16_pair
from refimpl.kernels.machine.jit import by_format, inline, per_row
from refimpl.kernels.machine.tile_rows import (
    ZERO_F,
    ZERO_I,
    add_block,
    add_block_minimum,
    add_sum_pair,
    add_superblock,
    initial_dot,
    prefetch_range,
    row_address,
    scale_add,
    store_totals,
    zeros,
)
from refimpl.kernels.machine.unpack import (
    block_scale,
    codes,
    load_half,
    splat_float,
    splat_int,
    sub_scale,
    sub_scale_pair,
)

ONE_PAIR = np.int32(0x10001)


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


# ---- sub-blocks

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


@by_format(lambda fmt: _pairs_of_8 if fmt.run == 8 else _pairs)
def sub_block(fmt, dots, factor, block, s, q, c):
    """Adds the dot products of sub-block s with the columns from c on, times a factor (twice, in int16)."""


@inline
def subtract_zero_points(fmt, scaled, block, b, x, r):
    """Subtracts what the zero point contributes, of all sub-blocks: their scales, times the sums of the activations there."""
    total = zeros(r, splat_int(fmt, ZERO_I))
    for pair in range(fmt.n_sub // 2):
        total = add_sum_pair(fmt, total, sub_scale_pair(fmt, block, 2 * pair), x, r, fmt.n_sub // 2 * b + pair)
    return scale_add(scaled, splat_int(fmt, np.int32(-fmt.zero_point)), total)


# ---- a tile, or half of it, times the rows in the tuple r

def blocks_of_pairs(fmt, tile, n_blocks, x, r, ahead, out):
    """Blocks of 32."""
    q, total = row_address(address(x.q_TD), 32 * n_blocks, r), zeros(r, splat_float(fmt, ZERO_F))
    for b in range(n_blocks):
        block = at(tile, b * fmt.n_bytes)
        prefetch_range(block, fmt.n_bytes, ahead)
        dots = sub_block(fmt, initial_dot(fmt, x, r, b), splat_int(fmt, ONE_PAIR), block, 0, q, 32 * b)
        total = add_block(fmt, x, r, b, block_scale(fmt, block), dots, total)
        if fmt.has_minimum:
            total = add_block_minimum(fmt, x, r, b, load_half(fmt, at(block, fmt.minimum)), total)
    store_totals(out, total)


def superblocks_of_pairs(fmt, tile, n_blocks, x, r, ahead, out):
    """Superblocks of 256."""
    q, total = row_address(address(x.q_TD), 256 * n_blocks, r), zeros(r, splat_float(fmt, ZERO_F))
    for b in range(n_blocks):
        block, scaled = at(tile, b * fmt.n_bytes), zeros(r, splat_int(fmt, ZERO_I))
        for s in range(fmt.n_sub):
            prefetch_range(at(block, s * (fmt.n_bytes // fmt.n_sub)), fmt.n_bytes // fmt.n_sub, ahead)
            scaled = sub_block(fmt, scaled, int16_pair(sub_scale(fmt, block, s)), block, s, q, 256 * b + fmt.per_sub * s)
        if fmt.zero_point and fmt.paired_sums:
            scaled = subtract_zero_points(fmt, scaled, block, b, x, r)
        total = add_superblock(fmt, x, r, b, block, scaled, total)
    store_totals(out, total)
