"""Q8_K: 256 weights as signed bytes under a float32 scale, with their sums: how ggml quantizes activations for products with the K types.

    292 bytes (9.125 bits a weight); not meant for files, but it has a number as a type of tensors
    byte 0    4                   260                      291
         | d  | qs[0] .. qs[255]  | bsums[0] .. bsums[15]   |
          f32   int8                int16, the sum of 16 qs each: what a minimum is multiplied with

Formula: w = d * qs (rounded once: a float32 has 24 bits of its own).
Source: block_q8_K (ggml-common.h), quantize_row_q8_K_ref (ggml-quants.c).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of, rows_of
from refimpl.formats.quants.floats import reciprocal


def dequantize_q8_k(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 292) -> float32 (*lead, n_blocks * 256). w = d * q; the sums are not read."""
    blocks = fields_of(raw, BLOCKS["Q8_K"])
    return rows_of(blocks["d"].astype(np.float32)[..., None] * blocks["qs"].astype(np.float32))


def quantize_q8_k(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 256 * 292). The weight of largest magnitude (the first of equals) becomes -127.

    Bit-equal to ggml; in a block of zeros, where ggml leaves the sums as they were, ours are zero.
    """
    x = blocks_of(x, BLOCKS["Q8_K"])
    furthest = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    reciprocal(furthest)  # refuses NaN and infinity
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(-127) / furthest
    inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))
    q = np.rint(inverse * x).astype(np.int8)
    sums = q.reshape(*q.shape[:-1], 16, 16).sum(axis=-1, dtype=np.int16)
    return bytes_of(BLOCKS["Q8_K"], d=reciprocal(inverse[..., 0]), qs=q, bsums=sums)
