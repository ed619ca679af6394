"""What the innermost loops (tile_product.py, tile_pairs.py) do for every row of activations: functions of tuples that name the rows."""

from typing import NamedTuple

import numpy as np

from refimpl.kernels.machine.intrinsics import (
    add_i32,
    at,
    dot2,
    fma,
    mul_f32,
    mul_i32,
    prefetch,
    splat_f32,
    store_f32,
    to_f32,
)
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.jit import inline, per_row
from refimpl.kernels.machine.unpack import block_scale, dot_of_codes, load_half, splat_float, splat_int, sub_minimum_pair

ZERO_I, ZERO_F = np.int32(0), np.float32(0)


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
def along(place, n_bytes):
    """The address `n_bytes` further on in every row."""
    return at(place, n_bytes)


@per_row
def zeros(r, zero):
    """Zero for every row."""
    return zero


@per_row
def initial_dot(fmt, x, r, s):
    """Where row r's dot product over sub-block s (counted through the row) starts: at what the zero point has to contribute."""
    return splat_int(fmt, x.sum_TS[r, s] if fmt.zero_point and not fmt.signed and not fmt.zero_in_pairs else ZERO_I)


@per_row
def add_dot(fmt, total, w0, w1, w2, w3, q, c):
    """Adds the products of 16 codes with columns c, c + 1, ... of the row at q."""
    return dot_of_codes(fmt, total, w0, w1, w2, w3, at(q, c))


@per_row
def scale_add(total, scale, dots):
    """total + scale * dots."""
    return add_i32(total, mul_i32(scale, dots))


@per_row
def add_sum_pair(fmt, total, factors, x, r, pair):
    """Adds the factors (minimums or scales) of two sub-blocks, times the sums of row r's activations there."""
    return dot2(total, factors, splat_int(fmt, x.sum_TS[r, pair]))


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


@inline
def add_superblock(fmt, x, r, b, block, scaled, total):
    """Adds superblock b: the integer sum of its sub-blocks, times their scale, and the minimums."""
    total = add_block(fmt, x, r, b, block_scale(fmt, block), scaled, total)
    if fmt.has_minimum:
        minimums = zeros(r, splat_int(fmt, ZERO_I))
        for pair in range(fmt.n_sub // 2):
            minimums = add_sum_pair(fmt, minimums, sub_minimum_pair(fmt, block, 2 * pair), x, r, fmt.n_sub // 2 * b + pair)
        total = subtract_minimums(fmt, x, r, b, load_half(fmt, at(block, fmt.minimum)), minimums, total)
    return total


@per_row
def add_column(x, r, c, weights, total):
    """Adds column c."""
    return fma(weights, splat_f32(x.x_TD[r, c]), total)


@inline
def store_totals(out, total):
    """Writes the totals of all rows, 16 lanes apart."""
    for i in range(len(total)):
        store_f32(at(out, 4 * LANES * i), total[i])
