"""Q6_K: 256 weights, 6 bits each, in 16 sub-blocks of 16 with an 8-bit scale each and no minimum.

    210 bytes (6.5625 bits a weight); the scale comes last
    byte 0                    128               192          208  209
         | ql[0] ... ql[127]  | qh[0] .. qh[63] | scales[16] | d   |
           lower 4 bits         upper 2 bits      int8         f16

    The block goes in two halves of 128 weights: 64 bytes of ql and 32 bytes of qh each.
    ql[64 h + i], bits  7..4          3..0                 i = 0 .. 63
                      | q[i + 64]   | q[i]         |
    qh[32 h + i], bits  7 6         5 4         3 2         1 0         i = 0 .. 31
                      | q[i + 96] | q[i + 64] | q[i + 32] | q[i] |

Formula: w = (d * s) * (q - 32), q = lower + 16 * upper, s of the sub-block. Source: block_q6_K (ggml-common.h).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of, pack, rows_of, unpack
from refimpl.formats.quants.search import symmetric_search

_F32 = np.float32


def codes_q6_k(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> q - 32, int8 (*lead, n_blocks, 256)."""
    low = unpack(blocks["ql"], n_bits=4, group=64)
    high = unpack(blocks["qh"], n_bits=2, group=32)
    return (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)


def dequantize_q6_k(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 210) -> float32 (*lead, n_blocks * 256). w = (d*s) * (q - 32); bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["Q6_K"])
    return restore_signed(blocks, codes_q6_k(blocks), blocks["scales"])


def restore_signed(blocks: np.ndarray, q: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks), codes (*lead, n_blocks, 256) less their zero point, scales of sub-blocks -> float32 rows."""
    scale = blocks["d"].astype(_F32)[..., None] * s.astype(_F32)
    w = scale[..., None] * q.reshape(*s.shape, q.shape[-1] // s.shape[-1]).astype(_F32)
    return rows_of(w.reshape(q.shape))


def quantize_q6_k(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 256 * 210). Least squares; raises where float16 cannot hold d."""
    d, s, q = symmetric_search(blocks_of(x, BLOCKS["Q6_K"]), half=32, lowest=-128)
    return bytes_of(
        BLOCKS["Q6_K"],
        ql=pack(q & np.uint8(0x0F), n_bits=4, group=64),
        qh=pack(q >> np.uint8(4), n_bits=2, group=32),
        scales=s,
        d=d,
    )
