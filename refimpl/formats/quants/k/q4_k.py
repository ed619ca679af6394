"""Q4_K: 256 weights, 4 bits each, in 8 sub-blocks of 32 with a 6-bit scale and a 6-bit minimum each.

    144 bytes (4.5 bits a weight)
    byte 0    2      4            16                     143
         | d  | dmin | scales[12] | qs[0] ..... qs[127]   |
          f16   f16    8 + 8 of 6 bits

    qs goes in 4 groups of 32 bytes; the group holds two sub-blocks:
    qs[32 g + j], bits  7..4                     3..0
                      | sub-block 2g+1, q[j]   | sub-block 2g, q[j] |

    scales, bit 7 first; A .. H are the bits of the scales s[0] .. s[7], a .. h those of the minimums m[0] .. m[7]:
    byte 0  EEAAAAAA     byte 4  eeaaaaaa     byte  8  eeeeEEEE
         1  FFBBBBBB          5  ffbbbbbb           9  ffffFFFF
         2  GGCCCCCC          6  ggcccccc          10  ggggGGGG
         3  HHDDDDDD          7  hhdddddd          11  hhhhHHHH     (of E .. H and e .. h the upper two bits are in bytes 0 .. 7)

Formula: w = (d * s) * q - (dmin * m), with s and m of the sub-block. Source: block_q4_K (ggml-common.h).

The same for one block as a scalar loop:

    >>> import struct
    >>> def weights(block):
    ...     d, dmin = struct.unpack("<2e", block[:4])
    ...     scales, qs = block[4:16], block[16:]
    ...     for j in range(8):                              # sub-blocks
    ...         if j < 4:
    ...             s, m = scales[j] & 63, scales[j + 4] & 63
    ...         else:
    ...             s = (scales[j + 4] & 15) | (scales[j - 4] >> 6 << 4)
    ...             m = (scales[j + 4] >> 4) | (scales[j] >> 6 << 4)
    ...         for byte in qs[32 * (j // 2):32 * (j // 2) + 32]:
    ...             q = byte >> 4 if j % 2 else byte & 15
    ...             yield d * s * q - dmin * m
    >>> block = quantize_q4_k(np.random.default_rng(0).standard_normal(256, np.float32))
    >>> np.array_equal(np.float32(list(weights(block.tobytes()))), dequantize_q4_k(block))
    True
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of, pack, rows_of, unpack
from refimpl.formats.quants.search import affine_search

_F32 = np.float32


def codes_q4_k(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> q, uint8 (*lead, n_blocks, 256)."""
    return unpack(blocks["qs"], n_bits=4, group=32)


def dequantize_q4_k(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 144) -> float32 (*lead, n_blocks * 256). w = (d*s) * q - (dmin*m); bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["Q4_K"])
    return restore(blocks, codes_q4_k(blocks), *unpack_scales(blocks["scales"]))


def quantize_q4_k(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 256 * 144). Least squares, see search.py; raises where float16 cannot hold d."""
    d, dmin, s, m, q = affine_search(blocks_of(x, BLOCKS["Q4_K"]), max_code=15, n_sub=8, max_scale=63)
    return bytes_of(BLOCKS["Q4_K"], d=d, dmin=dmin, scales=pack_scales(s, m), qs=pack(q, n_bits=4, group=32))


def restore(blocks: np.ndarray, q: np.ndarray, s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks), codes (*lead, n_blocks, 256), scales and minimums of sub-blocks -> float32 rows."""
    scale = (blocks["d"].astype(_F32)[..., None] * s.astype(_F32))[..., None]
    minimum = (blocks["dmin"].astype(_F32)[..., None] * m.astype(_F32))[..., None]
    w = scale * q.reshape(*s.shape, q.shape[-1] // s.shape[-1]).astype(_F32) - minimum
    return rows_of(w.reshape(q.shape))


def unpack_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack the 6-bit fields: uint8 (..., 12) -> scales (..., 8), minimums (..., 8), both uint8 below 64. See the diagram."""
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    low6, low4, top2 = np.uint8(0x3F), np.uint8(0x0F), np.uint8(0x30)
    s = np.concatenate([first & low6, (third & low4) | ((first >> 2) & top2)], axis=-1)
    m = np.concatenate([second & low6, (third >> 4) | ((second >> 2) & top2)], axis=-1)
    return s, m


def pack_scales(s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Pack the 6-bit fields, the inverse of `unpack_scales`: two uint8 (..., 8) below 64 -> uint8 (..., 12)."""
    low4, top2 = np.uint8(0x0F), np.uint8(0x30)
    first = s[..., :4] | ((s[..., 4:] & top2) << 2)
    second = m[..., :4] | ((m[..., 4:] & top2) << 2)
    third = (s[..., 4:] & low4) | ((m[..., 4:] & low4) << 4)
    return np.concatenate([first, second, third], axis=-1)
