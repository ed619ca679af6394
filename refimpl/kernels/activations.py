"""Activations quantized to 8 bits, as ggml does it: blocks of 32 with a float16 scale (Q8_0, Q8_1), or 256 with a float32 scale (Q8_K).

Next to the integers are the sums that zero points and minimums are multiplied with. Source: quantize_row_q8_0, quantize_row_q8_1
(ggml-cpu/arch), quantize_row_q8_K_ref (ggml-quants.c). These functions are parts of the kernels that multiply; Python calls none of them.
"""

import numpy as np

from refimpl.kernels.machine.intrinsics import (
    abs_f32,
    add_i32,
    address,
    at,
    largest_f32,
    load_f32,
    load_f32_part,
    max_f32,
    min_f32,
    mul_f32,
    mul_i32,
    round_f16,
    round_to_i32,
    splat_f32,
    splat_i32,
    store_f32_part,
    store_i8,
    store_i16,
    sum_i32,
    sum_pairs_i32,
)
from refimpl.kernels.machine.jit import by_format, inline

SERIAL = 8          # rows that one thread quantizes sooner than other threads wake up


@inline
def allocate_quantized(fmt, n_tok, width):
    """Memory for `n_tok` quantized rows: q int8 (T, D), scales float32 (T, B), sums int32 (T, sub-blocks), Q8_1's products float32 (T, B).

    A sum is that of a sub-block's integers, times -zero_point if there is one: what is to be added to a dot product. Where `paired_sums`,
    it is the plain sum, and those of two neighbours share one int32 as two int16, in the first half of a row. Where `zero_in_pairs`, it is
    two int16 as well: of the first two of every four integers, and of the others. Where `widened`, a row of q has its integers once more,
    as int16 behind the int8.
    """
    width = width if fmt.integer else 0
    n_blocks, n_sums = width // fmt.elements, width // fmt.per_sub
    return (np.empty((n_tok, 3 * width if fmt.widened else width), np.int8), np.empty((n_tok, n_blocks), np.float32),
            np.empty((n_tok, n_sums), np.int32), np.empty((n_tok, n_blocks), np.float32))


def _zero_points_in_pairs(fmt, q):
    return sum_pairs_i32(mul_i32(q, splat_i32(np.int32(-fmt.zero_point))))


def _zero_points(fmt, q):
    return np.int32(-fmt.zero_point * sum_i32(q))


@by_format(lambda fmt: _zero_points_in_pairs if fmt.zero_in_pairs else _zero_points)
def zero_points(fmt, q):
    """What the zero points of 16 codes contribute to a dot product with these 16 integers (lanes), as in `sum_TS`."""


def _quantize_blocks(fmt, x_TD, t, q_TD, d_TB, sum_TS, m_TB):
    """Scale: largest magnitude / 127, stored as float16, but the integers use the unrounded one."""
    n_blocks = d_TB.shape[1]
    source, to = at(address(x_TD), 4 * t * x_TD.shape[1]), at(address(q_TD), t * q_TD.shape[1])
    for b in range(n_blocks):
        low, high = load_f32(at(source, 128 * b)), load_f32(at(source, 128 * b + 64))
        largest = largest_f32(max_f32(abs_f32(low), abs_f32(high)))
        inverse = np.float32(127) / largest if largest != np.float32(0) else np.float32(0)
        q_low, q_high = round_to_i32(mul_f32(low, splat_f32(inverse))), round_to_i32(mul_f32(high, splat_f32(inverse)))
        store_i8(at(to, 32 * b), q_low)
        store_i8(at(to, 32 * b + 16), q_high)
        if fmt.widened:
            store_i16(at(to, 32 * n_blocks + 64 * b), q_low)
            store_i16(at(to, 32 * n_blocks + 64 * b + 32), q_high)
        d_TB[t, b] = largest / np.float32(127)
        both = add_i32(q_low, q_high)
        total = sum_i32(both)
        sum_TS[t, b] = zero_points(fmt, both) if fmt.zero_point else total
        m_TB[t, b] = d_TB[t, b] * np.float32(total)
    scales, products = at(address(d_TB), 4 * t * n_blocks), at(address(m_TB), 4 * t * n_blocks)
    for b in range(0, n_blocks, 16):
        n = min(16, n_blocks - b)
        store_f32_part(at(scales, 4 * b), round_f16(load_f32_part(at(scales, 4 * b), n)), n)
        store_f32_part(at(products, 4 * b), round_f16(load_f32_part(at(products, 4 * b), n)), n)


def _quantize_superblocks(fmt, x_TD, t, q_TD, d_TB, sum_TS, m_TB):
    """Scale: the first value of the largest magnitude, with its sign, / -127, in float32."""
    source, to = at(address(x_TD), 4 * t * x_TD.shape[1]), at(address(q_TD), t * q_TD.shape[1])
    for b in range(d_TB.shape[1]):
        highest = abs_f32(load_f32(at(source, 1024 * b)))
        for j in range(1, 16):
            highest = max_f32(highest, abs_f32(load_f32(at(source, 1024 * b + 64 * j))))
        largest = largest_f32(highest)
        i = 256 * b
        while i < 256 * b + 255 and abs(x_TD[t, i]) != largest:
            i += 1
        inverse = np.float32(-127) / x_TD[t, i] if largest != np.float32(0) else np.float32(0)
        for s in range(fmt.n_sub):
            sum_TS[t, fmt.n_sub * b + s] = np.int32(0)
        for j in range(16):
            product = mul_f32(load_f32(at(source, 1024 * b + 64 * j)), splat_f32(inverse))
            q = round_to_i32(min_f32(product, splat_f32(np.float32(127))))
            store_i8(at(to, 256 * b + 16 * j), q)
            s = fmt.n_sub * b + 16 * j // fmt.per_sub
            sum_TS[t, s] += zero_points(fmt, q) if fmt.zero_point else sum_i32(q)       # of two int16: where a sub-block is 16 wide
        d_TB[t, b] = np.float32(1) / inverse if inverse != np.float32(0) else np.float32(0)
        if fmt.paired_sums:
            for s in range(fmt.n_sub * b, fmt.n_sub * (b + 1), 2):
                sum_TS[t, s // 2] = np.int32((sum_TS[t, s] & 0xFFFF) + (sum_TS[t, s + 1] << 16))


def _keep_float32(fmt, x_TD, t, q_TD, d_TB, sum_TS, m_TB):
    pass


QUANTIZE = {"block": _quantize_blocks, "superblock": _quantize_superblocks}


@by_format(lambda fmt: QUANTIZE[fmt.family] if fmt.integer else _keep_float32)
def quantize_row(fmt, x_TD, t, q_TD, d_TB, sum_TS, m_TB):
    """Quantizes row t of float32 activations into the arrays of `allocate_quantized`; does nothing in exact arithmetic."""


@inline
def quantize_rows(fmt, x_TD, q_TD, d_TB, sum_TS, m_TB, first, end):
    """Quantizes rows first..end-1 on the calling thread."""
    for t in range(first, end):
        quantize_row(fmt, x_TD, t, q_TD, d_TB, sum_TS, m_TB)
