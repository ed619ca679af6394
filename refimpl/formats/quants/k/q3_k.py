"""Q3_K: 256 weights, 3 bits each, in 16 sub-blocks of 16 with a 6-bit scale each and no minimum.

    110 bytes (3.4375 bits a weight); the scale comes last
    byte 0                    32                96           108  109
         | hmask[0] .. [31]   | qs[0] .. qs[63] | scales[12] | d   |
           the third bits       lower 2 bits      16 of 6      f16

    hmask[i], bits  7             6           ...   0                   i = 0 .. 31
                  | q[i + 224]  | q[i + 192]      | q[i] |
    qs as in Q2_K.

    scales, bit 7 first; A .. P are the bits of the scales s[0] .. s[15]:
    byte 0  IIIIAAAA     byte 4  MMMMEEEE     byte  8  MMIIEEAA
         1  JJJJBBBB          5  NNNNFFFF           9  NNJJFFBB
         2  KKKKCCCC          6  OOOOGGGG          10  OOKKGGCC
         3  LLLLDDDD          7  PPPPHHHH          11  PPLLHHDD     (lower four bits in bytes 0 .. 7, upper two in 8 .. 11)

Formula: w = (d * (s - 32)) * (q - 4), q = lower + 4 * third bit, s of the sub-block. Source: block_q3_K (ggml-common.h).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of, pack, unpack
from refimpl.formats.quants.k.q6_k import restore_signed
from refimpl.formats.quants.search import symmetric_search


def codes_q3_k(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> q - 4, int8 (*lead, n_blocks, 256)."""
    third = unpack(blocks["hmask"], n_bits=1, group=32)
    return (unpack(blocks["qs"], n_bits=2, group=32) | (third << np.uint8(2))).astype(np.int8) - np.int8(4)


def scales_q3_k(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> s - 32, int8 (*lead, n_blocks, 16)."""
    lower = unpack(blocks["scales"][..., :8], n_bits=4, group=8)
    upper = unpack(blocks["scales"][..., 8:], n_bits=2, group=4)
    return (lower | (upper << np.uint8(4))).astype(np.int8) - np.int8(32)


def dequantize_q3_k(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 110) -> float32 (*lead, n_blocks * 256). w = (d*(s-32)) * (q-4); bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["Q3_K"])
    return restore_signed(blocks, codes_q3_k(blocks), scales_q3_k(blocks))


def quantize_q3_k(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 256 * 110). The search of Q6_K with 8 codes and 6-bit scales."""
    d, s, q = symmetric_search(blocks_of(x, BLOCKS["Q3_K"]), half=4, lowest=-32)
    s = (s + np.int8(32)).view(np.uint8)
    packed = np.concatenate([pack(s & np.uint8(0x0F), n_bits=4, group=8), pack(s >> np.uint8(4), n_bits=2, group=4)], axis=-1)
    return bytes_of(
        BLOCKS["Q3_K"],
        hmask=pack(q >> np.uint8(2), n_bits=1, group=32),
        qs=pack(q & np.uint8(3), n_bits=2, group=32),
        scales=packed,
        d=d,
    )
