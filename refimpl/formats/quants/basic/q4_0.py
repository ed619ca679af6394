"""Q4_0 and Q4_1: 32 weights, 4 bits each, one scale; Q4_1 adds a minimum.

    Q4_0, 18 bytes (4.5 bits a weight)         Q4_1, 20 bytes (5 bits a weight)
    byte 0    2                  17            byte 0    2    4                  19
         | d  | qs[0] .. qs[15]   |                 | d  | m  | qs[0] .. qs[15]   |
          f16   two weights a byte                   f16  f16

    qs[j], bits  7..4        3..0
               | q[j + 16] | q[j] |            the low nibbles are the first half of the block

Formula: Q4_0  w[j] = d * (q[j] - 8)           Q4_1  w[j] = d * q[j] + m
Source: block_q4_0, block_q4_1 (ggml-common.h).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of, pack, rows_of, unpack
from refimpl.formats.quants.floats import reciprocal, to_half


def codes_q4_0(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> q - 8 of Q4_0, int8 (*lead, n_blocks, 32)."""
    return unpack(blocks["qs"], n_bits=4, group=16).astype(np.int8) - np.int8(8)


def codes_q4_1(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> q of Q4_1, uint8 (*lead, n_blocks, 32)."""
    return unpack(blocks["qs"], n_bits=4, group=16)


def dequantize_q4_0(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 18) -> float32 (*lead, n_blocks * 32). w = d * (q - 8); bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["Q4_0"])
    d = blocks["d"].astype(np.float32)[..., None]
    return rows_of(d * codes_q4_0(blocks).astype(np.float32))


def dequantize_q4_1(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 20) -> float32 (*lead, n_blocks * 32). w = d * q + m; bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["Q4_1"])
    d = blocks["d"].astype(np.float32)[..., None]
    m = blocks["m"].astype(np.float32)[..., None]
    return rows_of(d * codes_q4_1(blocks).astype(np.float32) + m)


def quantize_q4_0(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 32 * 18). The weight of largest magnitude becomes q = 0; bit-equal to gguf-py."""
    d, q = symmetric_codes(blocks_of(x, BLOCKS["Q4_0"]), half=8)
    return bytes_of(BLOCKS["Q4_0"], d=to_half(d), qs=pack(q, n_bits=4, group=16))


def quantize_q4_1(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 32 * 20). Minimum to maximum in 15 steps; bit-equal to gguf-py."""
    d, m, q = affine_codes(blocks_of(x, BLOCKS["Q4_1"]), max_code=15)
    return bytes_of(BLOCKS["Q4_1"], d=to_half(d), m=to_half(m), qs=pack(q, n_bits=4, group=16))


def symmetric_codes(x: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks (..., 32) -> scale d (...), codes q (..., 32) in 0 .. 2*half-1, with x ~ d * (q - half).

    The codes reach one further down (-half) than up (half - 1). So d takes the sign that puts the weight of largest
    magnitude (the first of equals) on the far side, where it is exact.
    """
    furthest = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    d = furthest / np.float32(-half)
    # All terms are positive, so the truncation of the cast rounds to nearest, halves up.
    q = (x * reciprocal(d) + np.float32(half + 0.5)).astype(np.uint8).clip(0, 2 * half - 1)
    return d[..., 0], q


def affine_codes(x: np.ndarray, max_code: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks (..., 32) -> scale d (...), minimum m (...), codes q (..., 32) in 0 .. max_code, with x ~ d * q + m."""
    m = x.min(axis=-1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):  # reciprocal() refuses what overflows here
        d = (x.max(axis=-1, keepdims=True) - m) / np.float32(max_code)
    q = ((x - m) * reciprocal(d) + np.float32(0.5)).astype(np.uint8).clip(0, max_code)
    return d[..., 0], m[..., 0], q
