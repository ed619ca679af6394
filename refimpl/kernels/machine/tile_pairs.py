"""The innermost loops for AVX2 and NEON, which have no dot product of bytes: products are added up in pairs, in 16 bits.

As many of these as are sure to fit are added up there (`WeightFormat.run`), and zero points subtracted. `dot2` then takes them to 32
bits, multiplied by the integer scale of their sub-block where there is one. The integers, and so the bits, are those of tile_product.py.
"""

from collections.abc import Callable

import numpy as np

from refimpl.kernels.machine.intrinsics import add_i32, address, at, dot2, dot4_i16, dot4_i16_signed, int16_pair
from refimpl.kernels.machine.jit import by_format, inline, per_row
from refimpl.kernels.machine.tile_rows import (
    ZERO_F,
    ZERO_I,
    add_block,
    add_block_minimum,
    add_superblock,
    initial_dot,
    prefetch_range,
    row_address,
    store_totals,
    zeros,
)
from refimpl.kernels.machine.unpack import (
    ALL,
    WeightFormat,
    block_scale,
    codes,
    load_half,
    splat_float,
    splat_int,
    sub_scale,
)

ONE_PAIR = np.int32(0x10001)
IN_FOURS = ("Q3_K", "Q6_K")         # multiplied with one row four sub-blocks at a time. Q2_K shares bytes too, and gains nothing


@inline
def first_column(fmt, b, s):
    """Where sub-block s of block b begins in a row."""
    return fmt.elements * b + fmt.per_sub * s


@per_row
def initial_pairs(fmt, x, r, b, s):
    """Where the sums of pairs begin, for row r and sub-block s of block b: at what the zero points contribute."""
    return splat_int(fmt, x.sum_TS[r, fmt.n_sub * b + s] if fmt.zero_in_pairs else ZERO_I)


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


# ---- a sub-block times several rows

def _pairs(fmt, dots, factor, block, b, s, q, x, r):
    """`fmt.run` groups of codes are summed in 16 bits, then multiplied by the factor and added up in 32."""
    for first in range(0, fmt.per_sub // 4, fmt.run):
        pairs = initial_pairs(fmt, x, r, b, s)
        for g in range(first, first + fmt.run):
            pairs = add_pair_sums(fmt, pairs, codes(fmt, block, s, g), q, first_column(fmt, b, s) + 4 * g)
        dots = add_factor_times(factor, pairs, dots)
    return dots


def _pairs_of_8(fmt, dots, factor, block, b, s, q, x, r):
    """The same for all eight groups, those whose nibbles share bytes one after the other."""
    pairs, c = initial_pairs(fmt, x, r, b, s), first_column(fmt, b, s)
    for g in range(4):
        pairs = add_pair_sums(fmt, pairs, codes(fmt, block, s, g), q, c + 4 * g)
        pairs = add_pair_sums(fmt, pairs, codes(fmt, block, s, g + 4), q, c + 4 * g + 16)
    return add_factor_times(factor, pairs, dots)


@by_format(lambda fmt: _pairs_of_8 if fmt.run == 8 else _pairs)
def sub_block(fmt, dots, factor, block, b, s, q, x, r):
    """Adds the dot products of sub-block s of block b, times a factor (twice, in int16)."""


# ---- sub-blocks of the types IN_FOURS times one row

@per_row
def add_group(fmt, total, block, b, s, g, q):
    """Adds the products of group g of sub-block s in two int16 for each lane."""
    return pair_sums(fmt, total, codes(fmt, block, s, g), at(q, first_column(fmt, b, s) + 4 * g))


@per_row
def times_scale(fmt, block, s, pairs):
    """The sum of both int16, times the integer scale of sub-block s."""
    return dot2(splat_int(fmt, ZERO_I), int16_pair(sub_scale(fmt, block, s)), pairs)


@inline
def four_sub_blocks(fmt, scaled, block, b, q, x, r, s):
    """Adds the sub-blocks that the tuple s names, times their scales."""
    pairs = initial_pairs(fmt, x, r, b, s)
    for g in range(fmt.per_sub // 4):
        pairs = add_group(fmt, pairs, block, b, s, g, q)
    scaled_S = times_scale(fmt, block, s, pairs)
    return add_i32(add_i32(scaled, add_i32(scaled_S[0], scaled_S[1])), add_i32(scaled_S[2], scaled_S[3]))


# ---- a tile, or half of it, times the rows in the tuple r

def _blocks(fmt, tile, n_blocks, x, r, ahead, out):
    q, total = row_address(address(x.q_TD), x.q_TD.shape[1], r), zeros(r, splat_float(fmt, ZERO_F))
    for b in range(n_blocks):
        block = at(tile, b * fmt.n_bytes)
        prefetch_range(block, fmt.n_bytes, ahead)
        dots = sub_block(fmt, initial_dot(fmt, x, r, b), splat_int(fmt, ONE_PAIR), block, b, 0, q, x, r)
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
            scaled = sub_block(fmt, scaled, int16_pair(sub_scale(fmt, block, s)), block, b, s, q, x, r)
        total = add_superblock(fmt, x, r, b, block, scaled, total)
    store_totals(out, total)


def _one_row(fmt, tile, n_blocks, x, r, ahead, out):
    """For the types IN_FOURS, of whose sub-blocks four, two apart, share bytes: they are loaded once, and the shifts that unpack them are
    constants. With one row unpacking is most of the work. (With all 16 written out it is half as fast from memory: all loads come first.)
    """
    q, total = at(address(x.q_TD), 256 * n_blocks * r[0]), zeros(r, splat_float(fmt, ZERO_F))
    for b in range(n_blocks):
        block, scaled = at(tile, b * fmt.n_bytes), splat_int(fmt, ZERO_I)
        for turn in range(4):
            prefetch_range(at(block, turn * (fmt.n_bytes // 4)), fmt.n_bytes // 4, ahead)
            first = 8 * (turn >> 1) + (turn & 1)
            scaled = four_sub_blocks(fmt, scaled, block, b, q, x, r[0], (first, first + 2, first + 4, first + 6))
        total = add_superblock(fmt, x, r, b, block, (scaled,), total)
    store_totals(out, total)


def pairs_times(fmt: WeightFormat) -> Callable:
    """The body of `tile_times_rows` for a format."""
    if fmt.family == "block":
        return _blocks
    return _one_row if fmt.lanes == ALL and fmt.type in IN_FOURS else _superblocks
