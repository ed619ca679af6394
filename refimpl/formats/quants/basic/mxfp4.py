"""MXFP4: 32 weights as 4-bit floats under a power of two, the OCP microscaling format.

    17 bytes (4.25 bits a weight)
    byte 0    1                  16
         | e  | qs[0] .. qs[15]   |
          E8M0  two weights a byte

    qs[j], bits  7..4        3..0           a nibble, bits  3       2 1       0
               | q[j + 16] | q[j] |                       | sign  | exponent | fraction |        E2M1

    E2M1 has the values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; VALUES holds their doubles, and a -0 is 0.

Formula: w[j] = 2**(e - 128) * VALUES[q[j]]; e of 255, which OCP calls NaN, is as good as any to ggml.
Source: OCP Microscaling Formats (MX) 1.0, sections 5.2, 5.3.3 and 5.4.1, 6.3; block_mxfp4 (ggml-common.h), ggml_e8m0_to_fp32_half.
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of, pack, rows_of, unpack

_F32 = np.float32
VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
_BETWEEN = (VALUES[1:8] + VALUES[:7]).astype(_F32) / _F32(2)


def values_mxfp4(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> VALUES[q], int8 (*lead, n_blocks, 32)."""
    return VALUES[unpack(blocks["qs"], n_bits=4, group=16)]


def scales_mxfp4(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> 2**(e - 128), float32 (*lead, n_blocks); the first two of them are denormal."""
    return np.ldexp(_F32(1), blocks["e"].astype(np.int32) - 128)


def dequantize_mxfp4(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 17) -> float32 (*lead, n_blocks * 32). w = 2**(e-128) * VALUES[q]; bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["MXFP4"])
    return rows_of(scales_mxfp4(blocks)[..., None] * values_mxfp4(blocks).astype(_F32))


def quantize_mxfp4(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 32 * 17). The largest magnitude gets the exponent of 4 or 6; bit-equal to gguf-py.

    The logarithm is rounded to float32, so that just below a power of two it is the power's. Below 2**-125 gguf-py casts a negative
    exponent to a byte and its blocks are lost; ours have the smallest exponent.
    """
    x = blocks_of(x, BLOCKS["MXFP4"])
    largest = np.abs(x).max(axis=-1)
    if not np.isfinite(largest).all():
        raise ValueError("cannot quantize: a block holds NaN or an infinity")
    exponent = np.floor(np.log2(largest, out=np.full_like(largest, -np.inf), where=largest > 0)) - _F32(2 - 127)
    e = exponent.clip(0, 254).astype(np.uint8)
    d = np.ldexp(_F32(1), e.astype(np.int32) - 128)[..., None]
    q = np.searchsorted(_BETWEEN, np.abs(x) / d, side="left").astype(np.uint8)         # of two equally near the one nearer to zero
    negative = (x < 0) & (q > 0)
    return bytes_of(BLOCKS["MXFP4"], e=e, qs=pack(q | (negative.astype(np.uint8) << np.uint8(3)), n_bits=4, group=16))
