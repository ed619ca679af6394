"""IQ4_NL and IQ4_XS: 4 bits a weight that choose among 16 values of uneven distance, dense around zero where most weights are.

    VALUES  -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113

    IQ4_NL, 18 bytes (4.5 bits a weight)           IQ4_XS, 136 bytes (4.25 bits a weight)
    byte 0    2                  17                byte 0    2          4             8                   135
         | d  | qs[0] .. qs[15]   |                     | d  | scales_h | scales_l[4] | qs[0] .. qs[127]   |
          f16   two weights a byte                       f16   8 of 2     8 of 4        8 times 16 bytes

    qs[j], bits  7..4        3..0                  IQ4_XS has 8 sub-blocks of 32 weights. Its qs are theirs one after
               | q[j + 16] | q[j] |                the other, each as in IQ4_NL.

    scales_l[i], bits  7..4          3..0          scales_h, bits  15 14         ...  1 0
                     | s[2i+1]"    | s[2i]" |                    | s[7]'   |        | s[0]' |        s = s" + 16 * s'

Formula: IQ4_NL  w[j] = d * VALUES[q[j]]           IQ4_XS  w = (d * (s - 32)) * VALUES[q], s of the sub-block
Source: block_iq4_nl, block_iq4_xs, kvalues_iq4nl (ggml-common.h).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of, pack, rows_of, unpack
from refimpl.formats.quants.k.q6_k import restore_signed
from refimpl.formats.quants.search import fit, half_scale, nearest_scales

_F32 = np.float32
VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_TABLE = VALUES.astype(_F32)
_BETWEEN = (_TABLE[1:] + _TABLE[:-1]) / _F32(2)
_TARGETS = np.concatenate([np.arange(-142, -111, 3), np.arange(98, 129, 3)]).astype(_F32)       # around -127 and around 113
_SHIFTS = np.arange(0, 16, 2, dtype=np.uint16)


def values_iq4(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) of either type -> VALUES[q], int8 (*lead, n_blocks, 32 or 256)."""
    return VALUES[unpack(blocks["qs"], n_bits=4, group=16)]


def scales_iq4_xs(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> s - 32, int8 (*lead, n_blocks, 8)."""
    upper = (blocks["scales_h"][..., None] >> _SHIFTS).astype(np.uint8) & np.uint8(3)
    return (unpack(blocks["scales_l"], n_bits=4, group=1) | (upper << np.uint8(4))).astype(np.int8) - np.int8(32)


def dequantize_iq4_nl(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 18) -> float32 (*lead, n_blocks * 32). w = d * VALUES[q]; bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["IQ4_NL"])
    return rows_of(blocks["d"].astype(_F32)[..., None] * values_iq4(blocks).astype(_F32))


def dequantize_iq4_xs(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 136) -> float32 (*lead, n_blocks * 256). w = (d*(s-32)) * VALUES[q]; bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["IQ4_XS"])
    return restore_signed(blocks, values_iq4(blocks), scales_iq4_xs(blocks))


def quantize_iq4_nl(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 32 * 18). Least squares; raises where float16 cannot hold d."""
    x = blocks_of(x, BLOCKS["IQ4_NL"])
    d, inverse_d = half_scale(_fit(x))
    return bytes_of(BLOCKS["IQ4_NL"], d=d, qs=pack(_index(x * inverse_d[..., None]), n_bits=4, group=16))


def quantize_iq4_xs(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 256 * 136). The scales of IQ4_NL, then as in Q6_K; raises where float16 cannot hold d."""
    x = blocks_of(x, BLOCKS["IQ4_XS"])
    parts = x.reshape(*x.shape[:-1], 8, 32)
    d, s, values = nearest_scales(parts, _fit(parts), -32, _nearest)
    s = (s + np.int8(32)).view(np.uint8)
    upper = np.bitwise_or.reduce((s >> np.uint8(4)).astype(np.uint16) << _SHIFTS, axis=-1)
    q = _index(values).reshape(x.shape)
    return bytes_of(
        BLOCKS["IQ4_XS"],
        d=d,
        scales_h=upper,
        scales_l=pack(s & np.uint8(0x0F), n_bits=4, group=1),
        qs=pack(q, n_bits=4, group=16),
    )


def _index(x: np.ndarray) -> np.ndarray:
    """The index of the value nearest to x, of two equally near the upper: float32 (...) -> uint8 (...)."""
    return np.searchsorted(_BETWEEN, x, side="right").astype(np.uint8)


def _nearest(x: np.ndarray) -> np.ndarray:
    """The value nearest to x."""
    return _TABLE[_index(x)]


def _fit(x: np.ndarray) -> np.ndarray:
    """Real scale (...) of sub-blocks (..., 32), for x ~ scale * VALUES[q].

    The weight of largest magnitude goes near -127 or near 113, which are not the same: the values are lopsided.
    """
    return fit(x, _TARGETS, _nearest)
