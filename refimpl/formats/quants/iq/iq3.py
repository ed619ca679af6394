"""IQ3_XXS and IQ3_S: 256 weights as 64 vectors of 4: an index into a codebook (codebooks.py) each, signs for every two, a step for 32.

    IQ3_XXS, 98 bytes (3.0625 bits a weight)
    byte 0    2                   66                           97
         | d  | qs[0] .. qs[63]   | signs[0] .. signs[7]        |
          f16   index (256 vectors)  u32, one for 32 weights
    signs[g]     bits 31..28   27..21   20..14   13..7   6..0
                    | s      | n3     | n2     | n1    | n0 |    the step's integer; 7 signs each, the eighth is their parity

    IQ3_S, 110 bytes (3.4375 bits)
    byte 0    2                   66               74                     106                     109
         | d  | qs[0] .. qs[63]   | qh[0] .. qh[7] | signs[0] .. [31]     | scales[0] .. scales[3] |
          f16   index, bits 7..0    bit 8 of it      all 8 signs            s of group 2k in bits 3..0, of 2k + 1 in 7..4
    qh[g], bits  7                ..  0
               | of qs[8 g + 7]      | of qs[8 g] |

Formula: IQ3_XXS  w = d * (2 s + 1) / 4 * magnitude * sign, magnitudes 4, 12, 20, 28, 36, 44, 52, 62
         IQ3_S    w = d * (2 s + 1) * magnitude * sign, magnitudes 1, 3, 5, 7, 9, 11, 13, 15
Source: block_iq3_xxs, block_iq3_s (ggml-common.h); dequantize_row_iq3_* (ggml-quants.c).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, fields_of, unpack
from refimpl.formats.quants.iq.codebooks import bits_of, codebook, signed_steps, with_parity

MAGNITUDES_XXS = (4, 12, 20, 28, 36, 44, 52, 62)
MAGNITUDES_S = (1, 3, 5, 7, 9, 11, 13, 15)
_F32 = np.float32


def dequantize_iq3_xxs(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 98) -> float32 (*lead, n_blocks * 256). Bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["IQ3_XXS"])
    vectors = codebook("IQ3_XXS", MAGNITUDES_XXS)[blocks["qs"]]
    signs = with_parity(bits_of(blocks["signs"], (0, 7, 14, 21), 7)).reshape(*blocks.shape, 32)
    s = (blocks["signs"] >> np.uint32(28)).astype(_F32)
    return signed_steps(blocks["d"].astype(_F32)[..., None] * ((_F32(2) * s + _F32(1)) * _F32(0.25)), vectors, signs)


def dequantize_iq3_s(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 110) -> float32 (*lead, n_blocks * 256). Bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["IQ3_S"])
    high = unpack(blocks["qh"], n_bits=1, group=1).astype(np.uint16)
    vectors = codebook("IQ3_S", MAGNITUDES_S)[blocks["qs"] | (high << np.uint16(8))]
    s = unpack(blocks["scales"], n_bits=4, group=1).astype(_F32)
    return signed_steps(blocks["d"].astype(_F32)[..., None] * (_F32(2) * s + _F32(1)), vectors, blocks["signs"])
