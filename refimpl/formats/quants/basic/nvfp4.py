"""NVFP4: 64 weights as 4-bit floats, with an 8-bit float as scale for every 16.

    36 bytes (4.5 bits a weight)
    byte 0              4                  35
         | d[0] .. d[3] | qs[0] .. qs[31]   |
           UE4M3          two weights a byte

    d[s], bits 7          6..3     2..0        d = (1 + f / 8) * 2**(e - 7), and f / 8 * 2**-6 where e = 0;
             | not read | e      | f |          all ones (a NaN elsewhere) is 0
    qs[8 s + j], bits  7..4              3..0          the low nibbles are the first half of the 16
                     | q[16 s + j + 8] | q[16 s + j] |
    q: sign, exponent of 2 bits, fraction of 1 bit (E2M1): 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same negative

Formula: w = d * value(q). (ggml keeps twice the value and half the scale, for the sake of integers.)
Source: block_nvfp4 (ggml-common.h), ggml_ue4m3_to_fp32 (ggml-impl.h).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, fields_of, rows_of, unpack

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def dequantize_nvfp4(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 36) -> float32 (*lead, n_blocks * 64). Exact; bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["NVFP4"])
    q = unpack(blocks["qs"], n_bits=4, group=8)
    w = scale_of(blocks["d"])[..., None] * VALUES[q].reshape(*blocks.shape, 4, 16)
    return rows_of(w.reshape(q.shape))


def scale_of(code: np.ndarray) -> np.ndarray:
    """Unsigned E4M3, uint8 (...) -> float32 (...)."""
    e, f = ((code >> np.uint8(3)) & np.uint8(15)).astype(np.int32), (code & np.uint8(7)).astype(np.float32) / np.float32(8)
    value = np.where(e == 0, np.ldexp(f, -6), np.ldexp(f + np.float32(1), e - 7))
    return np.where(code == 0x7F, np.float32(0), value)
