"""IQ1_S and IQ1_M: 256 weights as 32 vectors of 8 out of -1, 0, 1, all moved by an eighth up or down; steps for 32 or 16 weights.

    IQ1_S, 50 bytes (1.5625 bits a weight)
    byte 0    2                  34                  49
         | d  | qs[0] .. qs[31]  | qh[0] .. qh[7]     |
          f16   index, bits 7..0   u16, one for 32 weights
    qh[g]        bits 15        14..12   11..9   8..6   5..3   2..0
                    | down    | s      | h3    | h2   | h1   | h0 |     bits 10..8 of the four indices (2048 vectors)

    IQ1_M, 56 bytes (1.75 bits); the scale is split over four fields
    byte 0                 32                 48                          55
         | qs[0] .. qs[31] | qh[0] .. qh[15]  | scales[0] .. scales[3]     |
           index, bits 7..0                     u16
    qh[k]        bits 7            6..4            3          2..0
                    | down, 2k + 1 | h of 2k + 1   | down, 2k | h of 2k |      of vectors 2k and 2k + 1
    scales[k]    bits 15..12       11..9       8..6        5..3        2..0
                    | d, nibble k | s, 4k + 3 | s, 4k + 2 | s, 4k + 1 | s, 4k |    of 16 weights each

Formula: w = d * (2 s + 1) * (v + shift), v of the vector, shift = -1/8 where `down` is set, else 1/8.
Source: block_iq1_s, block_iq1_m, IQ1S_DELTA, iq1s_grid (ggml-common.h); dequantize_row_iq1_* (ggml-quants.c).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, fields_of, rows_of, unpack
from refimpl.formats.quants.iq.codebooks import bits_of, codebook

MAGNITUDES = (-1, 0, 1)
SHIFT = np.float32(0.125)


def dequantize_iq1_s(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 50) -> float32 (*lead, n_blocks * 256). Bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["IQ1_S"])
    qh = blocks["qh"]
    high = bits_of(qh, (0, 3, 6, 9), 3).reshape(*blocks.shape, 32)
    s = (qh >> np.uint16(12)) & np.uint16(7)
    down = np.repeat(qh >> np.uint16(15), 4, axis=-1)
    return _restore(blocks["d"], s, blocks["qs"], high, down)


def dequantize_iq1_m(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 56) -> float32 (*lead, n_blocks * 256). Bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["IQ1_M"])
    nibbles = (blocks["scales"] >> np.uint16(12)) << np.array([0, 4, 8, 12], np.uint16)
    d = np.bitwise_or.reduce(nibbles, axis=-1).view(np.float16)
    s = bits_of(blocks["scales"], (0, 3, 6, 9), 3).reshape(*blocks.shape, 16)
    high = unpack(blocks["qh"], n_bits=4, group=1).astype(np.uint16)
    return _restore(d, s, blocks["qs"], high & np.uint16(7), high >> np.uint16(3))


def _restore(d: np.ndarray, s: np.ndarray, low: np.ndarray, high: np.ndarray, down: np.ndarray) -> np.ndarray:
    """float16 d (...), integers s (..., G), and for each of 32 vectors the index in two parts and `down` (..., 32) -> float32 rows."""
    step = d.astype(np.float32)[..., None] * (np.float32(2) * s.astype(np.float32) + np.float32(1))
    vectors = codebook("IQ1_S", MAGNITUDES)[low | (high << np.uint16(8))]
    moved = vectors + np.where(down, -SHIFT, SHIFT)[..., None]
    parts = moved.reshape(*step.shape, 256 // step.shape[-1])
    return rows_of((step[..., None] * parts).reshape(*d.shape, 256))
