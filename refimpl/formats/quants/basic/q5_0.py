"""Q5_0 and Q5_1: as Q4_0 and Q4_1 with a fifth bit for every weight, kept in a word of its own.

    Q5_0, 22 bytes (5.5 bits a weight)                Q5_1, 24 bytes (6 bits a weight)
    byte 0    2         6                  21         byte 0    2    4         8                  23
         | d  | qh      | qs[0] .. qs[15]   |              | d  | m  | qh      | qs[0] .. qs[15]   |
          f16   32 bits   two weights a byte                f16  f16   32 bits

    q[j] = nibble(j) + 16 * bit j of qh       nibbles as in Q4_0: qs[j] holds j (low) and j + 16 (high)

Formula: Q5_0  w[j] = d * (q[j] - 16)                 Q5_1  w[j] = d * q[j] + m
Source: block_q5_0, block_q5_1 (ggml-common.h).
"""

import numpy as np

from refimpl.formats.quants.basic.q4_0 import affine_codes, symmetric_codes
from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of, pack, rows_of, unpack
from refimpl.formats.quants.floats import to_half

_BIT = np.arange(32, dtype=np.uint32)


def codes_q5_0(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> q - 16 of Q5_0, int8 (*lead, n_blocks, 32)."""
    return codes_q5_1(blocks).astype(np.int8) - np.int8(16)


def codes_q5_1(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> q of Q5_1 (and of Q5_0, before its 16 is taken off), uint8 (*lead, n_blocks, 32)."""
    high = (blocks["qh"][..., None] >> _BIT).astype(np.uint8) & np.uint8(1)
    return unpack(blocks["qs"], n_bits=4, group=16) | (high << np.uint8(4))


def dequantize_q5_0(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 22) -> float32 (*lead, n_blocks * 32). w = d * (q - 16); bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["Q5_0"])
    d = blocks["d"].astype(np.float32)[..., None]
    return rows_of(d * codes_q5_0(blocks).astype(np.float32))


def dequantize_q5_1(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 24) -> float32 (*lead, n_blocks * 32). w = d * q + m; bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["Q5_1"])
    d = blocks["d"].astype(np.float32)[..., None]
    m = blocks["m"].astype(np.float32)[..., None]
    return rows_of(d * codes_q5_1(blocks).astype(np.float32) + m)


def quantize_q5_0(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 32 * 22). The weight of largest magnitude becomes q = 0; bit-equal to gguf-py."""
    d, q = symmetric_codes(blocks_of(x, BLOCKS["Q5_0"]), half=16)
    qs, qh = _split(q)
    return bytes_of(BLOCKS["Q5_0"], d=to_half(d), qh=qh, qs=qs)


def quantize_q5_1(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 32 * 24). Minimum to maximum in 31 steps; bit-equal to gguf-py."""
    d, m, q = affine_codes(blocks_of(x, BLOCKS["Q5_1"]), max_code=31)
    qs, qh = _split(q)
    return bytes_of(BLOCKS["Q5_1"], d=to_half(d), m=to_half(m), qh=qh, qs=qs)


def _split(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (*lead, n_blocks, 32) -> nibble bytes qs (*lead, n_blocks, 16), high bits qh uint32 (*lead, n_blocks)."""
    high = (q >> np.uint8(4)).astype(np.uint32) << _BIT
    return pack(q & np.uint8(0x0F), n_bits=4, group=16), np.bitwise_or.reduce(high, axis=-1)
