"""Q1_0 and Q2_0: one or two bits a weight and one scale.

    Q1_0, 128 weights in 18 bytes (1.125 bits a weight)     Q2_0, 64 weights in 18 bytes (2.25 bits a weight)
    byte 0    2                  17                         byte 0    2                  17
         | d  | qs[0] .. qs[15]   |                              | d  | qs[0] .. qs[15]   |
          f16   weight 8 i + j is bit j of qs[i]                  f16   weight 4 i + j is bits 2 j + 1, 2 j of qs[i]

Formula: Q1_0  w = d where the bit is set, else -d           Q2_0  w = d * (q - 1): -d, 0, d, 2 d
Source: block_q1_0, block_q2_0 (ggml-common.h); dequantize_row_q1_0, dequantize_row_q2_0 (ggml-quants.c).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, fields_of, rows_of, unpack


def dequantize_q1_0(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 18) -> float32 (*lead, n_blocks * 128). Exact."""
    blocks = fields_of(raw, BLOCKS["Q1_0"])
    q = unpack(blocks["qs"], n_bits=1, group=1).astype(np.float32)
    return rows_of(blocks["d"].astype(np.float32)[..., None] * (np.float32(2) * q - np.float32(1)))


def dequantize_q2_0(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 18) -> float32 (*lead, n_blocks * 64). Exact."""
    blocks = fields_of(raw, BLOCKS["Q2_0"])
    q = unpack(blocks["qs"], n_bits=2, group=1).astype(np.float32)
    return rows_of(blocks["d"].astype(np.float32)[..., None] * (q - np.float32(1)))
