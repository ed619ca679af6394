"""Q8_0 and Q8_1: 32 weights as signed bytes, one scale; Q8_1 adds what a minimum is multiplied with.

    Q8_0, 34 bytes (8.5 bits a weight)         Q8_1, 36 bytes (9 bits a weight)
    byte 0    2                  33            byte 0    2    4                  35
         | d  | qs[0] .. qs[31]   |                 | d  | s  | qs[0] .. qs[31]   |
          f16   int8, one weight a byte              f16  f16

Formula: w[j] = d * qs[j]; s = d * (the sum of qs) is not needed for it. ggml quantizes activations to Q8_1; files do not use it.
Source: block_q8_0, block_q8_1 (ggml-common.h).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of, rows_of
from refimpl.formats.quants.floats import reciprocal, to_half


def dequantize_q8_0(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 34) -> float32 (*lead, n_blocks * 32). w = d * q; bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["Q8_0"])
    d = blocks["d"].astype(np.float32)[..., None]
    return rows_of(d * blocks["qs"].astype(np.float32))


def dequantize_q8_1(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 36) -> float32 (*lead, n_blocks * 32). w = d * q; s is not read."""
    blocks = fields_of(raw, BLOCKS["Q8_1"])
    return rows_of(blocks["d"].astype(np.float32)[..., None] * blocks["qs"].astype(np.float32))


def quantize_q8_0(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 32 * 34). The largest magnitude becomes 127; bit-equal to gguf-py and ggml."""
    x = blocks_of(x, BLOCKS["Q8_0"])
    d = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    q = round_half_away(x * reciprocal(d)).astype(np.int8)
    return bytes_of(BLOCKS["Q8_0"], d=to_half(d[..., 0]), qs=q)


def round_half_away(x: np.ndarray) -> np.ndarray:
    """Round to the nearest integer, halves away from zero, as C's roundf (NumPy's rint takes halves to even)."""
    # trunc(|x| + 0.5) would be wrong just below a half, where the sum itself rounds up.
    whole = np.trunc(x)
    return whole + np.trunc(np.float32(2) * (x - whole))
