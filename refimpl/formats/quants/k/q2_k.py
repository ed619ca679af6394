"""Q2_K: 256 weights, 2 bits each, in 16 sub-blocks of 16 with a 4-bit scale and a 4-bit minimum each.

    84 bytes (2.625 bits a weight); the two halves come last
    byte 0            16                80   82    83
         | scales[16] | qs[0] .. qs[63] | d  | dmin |
           4 + 4 bits   four a byte       f16  f16

    scales[i], bits  7..4   3..0
                   | m[i] | s[i] |

    The block goes in two halves of 128 weights, 32 bytes of qs each:
    qs[32 h + i], bits  7 6         5 4         3 2         1 0         i = 0 .. 31
                      | q[i + 96] | q[i + 64] | q[i + 32] | q[i] |

Formula: w = (d * s) * q - (dmin * m), with s and m of the sub-block. Source: block_q2_K (ggml-common.h).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of, pack, unpack
from refimpl.formats.quants.k.q4_k import restore
from refimpl.formats.quants.search import affine_search


def codes_q2_k(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> q, uint8 (*lead, n_blocks, 256)."""
    return unpack(blocks["qs"], n_bits=2, group=32)


def scales_q2_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Records (*lead, n_blocks) -> scales s, minimums m, both uint8 (*lead, n_blocks, 16) below 16."""
    return blocks["scales"] & np.uint8(0x0F), blocks["scales"] >> np.uint8(4)


def dequantize_q2_k(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 84) -> float32 (*lead, n_blocks * 256). w = (d*s) * q - (dmin*m); bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["Q2_K"])
    return restore(blocks, codes_q2_k(blocks), *scales_q2_k(blocks))


def quantize_q2_k(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 256 * 84). The search of Q4_K with 4 codes, in sub-blocks of 16."""
    d, dmin, s, m, q = affine_search(blocks_of(x, BLOCKS["Q2_K"]), max_code=3, n_sub=16, max_scale=15)
    return bytes_of(BLOCKS["Q2_K"], scales=s | (m << np.uint8(4)), qs=pack(q, n_bits=2, group=32), d=d, dmin=dmin)
