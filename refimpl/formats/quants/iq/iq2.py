"""IQ2_XXS, IQ2_XS, IQ2_S: 256 weights as 32 vectors of 8; for each an index into a codebook (codebooks.py) and signs; steps for 32 or 16.

    IQ2_XXS, 66 bytes (2.0625 bits a weight): 8 groups of 32 weights, two words each
    byte 0    2                            65
         | d  | qs[0] qs[1] .. qs[15]       |
          f16   u32
    qs[2 g]      bits 31..24   23..16   15..8    7..0          four indices (256 vectors)
                    | i3     | i2     | i1     | i0 |
    qs[2 g + 1]  bits 31..28   27..21   20..14   13..7   6..0
                    | s      | n3     | n2     | n1    | n0 |   the step's integer; 7 signs each, the eighth is their parity

    IQ2_XS, 74 bytes (2.3125 bits)
    byte 0    2                   66                      73
         | d  | qs[0] .. qs[31]   | scales[0] .. scales[7] |
          f16   u16                 s of weights 32 g .. in bits 3..0, of 32 g + 16 .. in 7..4
    qs[v]        bits 15..9   8..0
                    | n     | i |      7 signs and their parity; index (512 vectors)

    IQ2_S, 82 bytes (2.5625 bits)
    byte 0    2                  34                   66               74                      81
         | d  | qs[0] .. qs[31]  | signs[0] .. [31]   | qh[0] .. qh[7] | scales[0] .. scales[7] |
          f16   index, bits 7..0   all 8 signs          index, bits 9..8  as in IQ2_XS
    qh[g]        bits 7 6        5 4        3 2        1 0
                    | of 4g + 3 | of 4g + 2 | of 4g + 1 | of 4g |

Formula: w = d * (2 s + 1) / 8 * magnitude * sign, magnitudes 8, 25 or 43.
Source: block_iq2_xxs, block_iq2_xs, block_iq2_s (ggml-common.h); dequantize_row_iq2_* (ggml-quants.c).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, fields_of, unpack
from refimpl.formats.quants.iq.codebooks import bits_of, codebook, signed_steps, with_parity

MAGNITUDES = (8, 25, 43)


def dequantize_iq2_xxs(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 66) -> float32 (*lead, n_blocks * 256). Bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["IQ2_XXS"])
    indices, rest = blocks["qs"][..., 0::2], blocks["qs"][..., 1::2]
    vectors = codebook("IQ2_XXS", MAGNITUDES)[bits_of(indices, (0, 8, 16, 24), 8)]
    signs = with_parity(bits_of(rest, (0, 7, 14, 21), 7))
    return signed_steps(_step(blocks["d"], rest >> np.uint32(28)), vectors, signs.reshape(*blocks.shape, 32))


def dequantize_iq2_xs(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 74) -> float32 (*lead, n_blocks * 256). Bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["IQ2_XS"])
    vectors = codebook("IQ2_XS", MAGNITUDES)[blocks["qs"] & np.uint16(511)]
    s = unpack(blocks["scales"], n_bits=4, group=1)
    return signed_steps(_step(blocks["d"], s), vectors, with_parity(blocks["qs"] >> np.uint16(9)))


def dequantize_iq2_s(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 82) -> float32 (*lead, n_blocks * 256). Bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["IQ2_S"])
    high = unpack(blocks["qh"], n_bits=2, group=1).astype(np.uint16)
    vectors = codebook("IQ2_S", MAGNITUDES)[blocks["qs"] | (high << np.uint16(8))]
    s = unpack(blocks["scales"], n_bits=4, group=1)
    return signed_steps(_step(blocks["d"], s), vectors, blocks["signs"])


def _step(d: np.ndarray, s: np.ndarray) -> np.ndarray:
    """float16 (...), integers (..., G) -> d * (2 s + 1) / 8, float32 (..., G)."""
    return d.astype(np.float32)[..., None] * ((np.float32(2) * s.astype(np.float32) + np.float32(1)) * np.float32(0.125))
