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
from refimpl.formats.quants.floats import reciprocal
from refimpl.formats.quants.k.q4_k import half_scale

_F32 = np.float32


def levels_q6_k(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> q - 32, int8 (*lead, n_blocks, 256)."""
    low = unpack(blocks["ql"], n_bits=4, group=64)
    high = unpack(blocks["qh"], n_bits=2, group=32)
    return (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)


def dequantize_q6_k(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 210) -> float32 (*lead, n_blocks * 256). w = (d*s) * (q - 32); bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["Q6_K"])
    return restore_signed(blocks, levels_q6_k(blocks), blocks["scales"])


def restore_signed(blocks: np.ndarray, q: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks), levels (*lead, n_blocks, 256) with their zero taken off, scales of sub-blocks -> float32 rows."""
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


def symmetric_search(x: np.ndarray, half: int, lowest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize superblocks in sub-blocks of 16 with levels -half .. half - 1 and scales lowest .. -lowest - 1.

    x (..., 256) -> d float16 (...), s int8 (..., 16), q + half uint8 (..., 256). As in Q4_K: the best real scale of each sub-block, then
    integers.
    """
    def level(ratio: np.ndarray) -> np.ndarray:
        return np.rint(ratio).clip(-half, half - 1)
    parts = x.reshape(*x.shape[:-1], 16, 16)
    scale = fit(parts, -np.linspace(half - 1, half + 1, 21, dtype=_F32), level)             # the largest weight near -half
    d, s, q = nearest_scales(parts, scale, lowest, level)
    return d, s, (q + _F32(half)).astype(np.uint8).reshape(x.shape)


def nearest_scales(parts: np.ndarray, scale: np.ndarray, lowest: int, level) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sub-blocks (..., n_sub, n), their real scales (..., n_sub) -> d float16 (...), s int8 (..., n_sub), levels float32 (..., n_sub, n).

    d comes from the largest scale, which becomes `lowest`, and is rounded to float16; then each s is the best integer next to the rounded
    one. `level` gives the level nearest to x / (d * s).
    """
    furthest = np.take_along_axis(scale, np.abs(scale).argmax(axis=-1, keepdims=True), axis=-1)
    d, inverse_d = half_scale(furthest / _F32(lowest))
    s0 = np.rint(scale * inverse_d)

    best = np.full(scale.shape, np.inf, _F32)
    best_s, best_q = np.zeros_like(s0), np.zeros_like(parts)
    for ds in (0, -1, 1):
        s = (s0 + _F32(ds)).clip(lowest, -lowest - 1)
        step = (d.astype(_F32) * s)[..., None]
        q = level(parts * reciprocal(step))
        difference = step * q - parts
        error = np.einsum("...j,...j->...", difference, difference)
        better = error < best
        best, best_s, best_q = np.where(better, error, best), np.where(better, s, best_s), np.where(better[..., None], q, best_q)
    return d[..., 0], best_s.astype(np.int8), best_q


def fit(x: np.ndarray, targets: np.ndarray, level) -> np.ndarray:
    """Real scale (...) of sub-blocks (..., n), of either sign, for x ~ scale * level.

    `level` gives the level nearest to a number; the weight of largest magnitude is sent to each of `targets` in turn. The scale that fits
    the levels q best is sum(xq) / sum(qq), and it takes sum(xq)**2 / sum(qq) off the squared error.
    """
    furthest = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    inverse = reciprocal(furthest)
    best_scale = best_gain = np.zeros(x.shape[:-1], _F32)
    for target in targets:
        q = level(x * (target * inverse))
        sum_xq, sum_qq = np.einsum("...j,...j->...", x, q), np.einsum("...j,...j->...", q, q)
        scale = sum_xq * reciprocal(sum_qq)
        gain = scale * sum_xq
        better = gain > best_gain
        best_gain, best_scale = np.where(better, gain, best_gain), np.where(better, scale, best_scale)
    return best_scale
