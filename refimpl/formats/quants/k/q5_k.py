"""Q5_K: as Q4_K, with a fifth bit for every weight.

    176 bytes (5.5 bits a weight)
    byte 0    2      4            16                48                     175
         | d  | dmin | scales[12] | qh[0] .. qh[31] | qs[0] ..... qs[127]   |
          f16   f16    as in Q4_K   the fifth bits    nibbles, as in Q4_K

    qh[j], bits  7                  6          ...   0
               | sub-block 7, q[j] |                | sub-block 0, q[j] |

Formula: w = (d * s) * q - (dmin * m), q = nibble + 16 * bit, s and m as in Q4_K. Source: block_q5_K (ggml-common.h).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of, pack, unpack
from refimpl.formats.quants.k.q4_k import pack_scales, restore, unpack_scales
from refimpl.formats.quants.search import affine_search


def codes_q5_k(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> q, uint8 (*lead, n_blocks, 256)."""
    return unpack(blocks["qs"], n_bits=4, group=32) | (unpack(blocks["qh"], n_bits=1, group=32) << np.uint8(4))


def dequantize_q5_k(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 176) -> float32 (*lead, n_blocks * 256). w = (d*s) * q - (dmin*m); bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["Q5_K"])
    return restore(blocks, codes_q5_k(blocks), *unpack_scales(blocks["scales"]))


def quantize_q5_k(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 256 * 176). The search of Q4_K with 32 codes."""
    d, dmin, s, m, q = affine_search(blocks_of(x, BLOCKS["Q5_K"]), max_code=31, n_sub=8, max_scale=63)
    return bytes_of(
        BLOCKS["Q5_K"],
        d=d,
        dmin=dmin,
        scales=pack_scales(s, m),
        qh=pack(q >> np.uint8(4), n_bits=1, group=32),
        qs=pack(q & np.uint8(0x0F), n_bits=4, group=32),
    )
