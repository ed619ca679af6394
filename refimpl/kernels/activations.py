"""Activations rounded to 8 bits, row by row, as ggml does it: 32 under a float16 scale (Q8_0, Q8_1), or 256 under a float32 scale (Q8_K).

Beside the integers go the sums that zero points and minimums are multiplied with. Source: quantize_row_q8_0, quantize_row_q8_1
(ggml-cpu/arch), quantize_row_q8_K_ref (ggml-quants.c).
"""

import numpy as np
from numba.extending import overload

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
    round_f16,
    round_to_i32,
    splat_f32,
    store_f32_part,
    store_i8,
    sum_i32,
)
from refimpl.kernels.machine.jit import INLINE, inline

ALONE = 8           # so many rows one thread has rounded before others have been woken


@inline
def space(kind, n_tok, width):
    """Room for `n_tok` rounded rows: q int8 (T, D), scales float32 (T, B), sums int32 (T, sub-blocks), Q8_1's products float32 (T, B).

    A sum is that of a sub-block's integers, times -zero where the kind has a zero point: what is to be added to a dot product. Where
    sub-blocks have minimums, the sums of two neighbours lie in one int32, as int16: in the first half of a row.
    """
    width = width if kind.integer else 0
    n_blocks, n_sums = width // kind.elements, width // kind.per_sub
    return (np.empty((n_tok, width), np.int8), np.empty((n_tok, n_blocks), np.float32), np.empty((n_tok, n_sums), np.int32),
            np.empty((n_tok, n_blocks), np.float32))


def _round_small(kind, x_TD, t, q_TD, d_TB, sum_TS, m_TB):
    """Scale: largest magnitude / 127, rounded to float16, but the integers by the unrounded one."""
    n_blocks = d_TB.shape[1]
    source, to = at(address(x_TD), 4 * t * x_TD.shape[1]), at(address(q_TD), t * q_TD.shape[1])
    for b in range(n_blocks):
        low, high = load_f32(at(source, 128 * b)), load_f32(at(source, 128 * b + 64))
        largest = largest_f32(max_f32(abs_f32(low), abs_f32(high)))
        inverse = np.float32(127) / largest if largest != np.float32(0) else np.float32(0)
        q_low, q_high = round_to_i32(mul_f32(low, splat_f32(inverse))), round_to_i32(mul_f32(high, splat_f32(inverse)))
        store_i8(at(to, 32 * b), q_low)
        store_i8(at(to, 32 * b + 16), q_high)
        d_TB[t, b] = largest / np.float32(127)
        total = sum_i32(add_i32(q_low, q_high))
        sum_TS[t, b] = np.int32(-kind.zero * total if kind.zero else total)
        m_TB[t, b] = d_TB[t, b] * np.float32(total)
    scales, products = at(address(d_TB), 4 * t * n_blocks), at(address(m_TB), 4 * t * n_blocks)
    for b in range(0, n_blocks, 16):
        n = min(16, n_blocks - b)
        store_f32_part(at(scales, 4 * b), round_f16(load_f32_part(at(scales, 4 * b), n)), n)
        store_f32_part(at(products, 4 * b), round_f16(load_f32_part(at(products, 4 * b), n)), n)


def _round_large(kind, x_TD, t, q_TD, d_TB, sum_TS, m_TB):
    """Scale: the value of largest magnitude, the first of them, with its sign, / -127, in float32."""
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
        for s in range(kind.n_sub):
            sum_TS[t, kind.n_sub * b + s] = np.int32(0)
        for j in range(16):
            product = mul_f32(load_f32(at(source, 1024 * b + 64 * j)), splat_f32(inverse))
            q = round_to_i32(min_f32(product, splat_f32(np.float32(127))))
            store_i8(at(to, 256 * b + 16 * j), q)
            s = kind.n_sub * b + 16 * j // kind.per_sub
            sum_TS[t, s] += np.int32(-kind.zero * sum_i32(q) if kind.zero else sum_i32(q))
        d_TB[t, b] = np.float32(1) / inverse if inverse != np.float32(0) else np.float32(0)
        if kind.has_minimum:
            for s in range(kind.n_sub * b, kind.n_sub * (b + 1), 2):
                sum_TS[t, s // 2] = np.int32((sum_TS[t, s] & 0xFFFF) + (sum_TS[t, s + 1] << 16))


def _round_nothing(kind, x_TD, t, q_TD, d_TB, sum_TS, m_TB):
    pass


ROUND = {"small": _round_small, "large": _round_large}


def round_row(kind, x_TD, t, q_TD, d_TB, sum_TS, m_TB):
    """Rounds row t of float32 activations for weights of this kind into `space`; nothing to do for a kind of exact arithmetic."""
    (ROUND[kind.family] if kind.integer else _round_nothing)(kind, x_TD, t, q_TD, d_TB, sum_TS, m_TB)


@overload(round_row, jit_options=INLINE)
def _round_row(kind, x_TD, t, q_TD, d_TB, sum_TS, m_TB):
    return ROUND[kind.kind.family] if kind.integer else _round_nothing


@inline
def round_rows(kind, x_TD, q_TD, d_TB, sum_TS, m_TB, first, end):
    """Rounds rows first..end-1 on the calling thread."""
    for t in range(first, end):
        round_row(kind, x_TD, t, q_TD, d_TB, sum_TS, m_TB)
