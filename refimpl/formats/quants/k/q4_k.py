"""Q4_K: 256 weights, 4 bits each, in 8 sub-blocks of 32 with a 6-bit scale and a 6-bit minimum each.

    144 bytes (4.5 bits a weight)
    byte 0    2      4            16                     143
         | d  | dmin | scales[12] | qs[0] ..... qs[127]   |
          f16   f16    8 + 8 of 6 bits

    qs goes in 4 groups of 32 bytes; the group holds two sub-blocks:
    qs[32 g + j], bits  7..4                     3..0
                      | sub-block 2g+1, q[j]   | sub-block 2g, q[j] |

    scales, bits      7 6   5 4 3 2 1 0          s0 .. s7 the scales, m0 .. m7 the minimums;
    byte  0 ..  3   | s4' | s0          |  .. s3   s' and m' the upper two of their bits,
    byte  4 ..  7   | m4' | m0          |  .. m3   s" and m" the lower four
    byte  8 .. 11   | m4"     | s4"     |  .. m7, s7

Formula: w = (d * s) * q - (dmin * m), with s and m of the sub-block. Source: block_q4_K (ggml-common.h).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of, pack, rows_of, unpack
from refimpl.formats.quants.floats import reciprocal, to_half

_F32 = np.float32


def levels_q4_k(blocks: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks) -> q, uint8 (*lead, n_blocks, 256)."""
    return unpack(blocks["qs"], n_bits=4, group=32)


def dequantize_q4_k(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 144) -> float32 (*lead, n_blocks * 256). w = (d*s) * q - (dmin*m); bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["Q4_K"])
    return restore(blocks, levels_q4_k(blocks), *unpack_scales(blocks["scales"]))


def quantize_q4_k(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 256 * 144). A search, see `affine_search`; raises where float16 cannot hold d."""
    d, dmin, s, m, q = affine_search(blocks_of(x, BLOCKS["Q4_K"]), top=15, n_sub=8, most=63)
    return bytes_of(BLOCKS["Q4_K"], d=d, dmin=dmin, scales=pack_scales(s, m), qs=pack(q, n_bits=4, group=32))


def restore(blocks: np.ndarray, q: np.ndarray, s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Records (*lead, n_blocks), levels (*lead, n_blocks, 256), scales and minimums of sub-blocks -> float32 rows."""
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


def affine_search(x: np.ndarray, top: int, n_sub: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Quantize superblocks with levels 0 .. top, in `n_sub` sub-blocks with scales and minimums 0 .. most.

    x (..., 256) -> d, dmin float16 (...); s, m uint8 (..., n_sub); q uint8 (..., 256).
    Two steps, both minimising sum v * (x - w)**2 over a sub-block with v = rms(x) + |x| (large weights count for more):
    the best real scale and minimum of each sub-block; then, with d and dmin fixed by the largest of them and rounded to
    float16, the best pair of integers next to the rounded ones. Blocks of zeros come back as zeros.
    """
    parts = x.reshape(*x.shape[:-1], n_sub, x.shape[-1] // n_sub)
    v = np.sqrt(np.mean(parts * parts, axis=-1, keepdims=True)) + np.abs(parts)
    scale, minimum = _fit(parts, v, top)
    d, inverse_d = half_scale(scale.max(axis=-1, keepdims=True) / _F32(most))
    dmin, inverse_dmin = half_scale(minimum.max(axis=-1, keepdims=True) / _F32(most))
    s0, m0 = np.rint(scale * inverse_d), np.rint(minimum * inverse_dmin)

    best = np.full(scale.shape, np.inf, _F32)
    best_s, best_m, best_q = np.zeros_like(s0), np.zeros_like(m0), np.zeros_like(parts)
    for ds in (0, -1, 1):
        for dm in (0, -1, 1):
            s, m = (s0 + _F32(ds)).clip(0, most), (m0 + _F32(dm)).clip(0, most)
            step, offset = (d.astype(_F32) * s)[..., None], (dmin.astype(_F32) * m)[..., None]
            q = np.rint((parts + offset) * reciprocal(step)).clip(0, top)
            error = _weighted_square(step * q - offset - parts, v)
            better = error < best
            best = np.where(better, error, best)
            best_s, best_m = np.where(better, s, best_s), np.where(better, m, best_m)
            best_q = np.where(better[..., None], q, best_q)
    q = best_q.astype(np.uint8).reshape(x.shape)
    return d[..., 0], dmin[..., 0], best_s.astype(np.uint8), best_m.astype(np.uint8), q


def _fit(x: np.ndarray, v: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Real scale and minimum of sub-blocks (..., n), both (...) and >= 0, for x ~ scale * q - minimum.

    Stretching the range a little moves weights between levels; for each stretch the levels are held and the line through
    (q, x) is solved by weighted least squares. The stored minimum cannot be negative: then the line goes through zero.
    """
    low = np.minimum(x.min(axis=-1, keepdims=True), _F32(0))
    span = x.max(axis=-1, keepdims=True) - low
    inverse_span = reciprocal(span)
    # The answer to beat, and the one that stays where all levels are equal and no line is defined.
    best_scale, best_low = span[..., 0] / _F32(top), low[..., 0]
    q = np.rint((x - low) * (_F32(top) * inverse_span))
    best = _weighted_square(best_scale[..., None] * q + low - x, v)
    sum_v, sum_vx = v.sum(axis=-1), _dot(v, x)
    for steps in np.linspace(top - 1, top + 1, 21, dtype=_F32):
        q = np.rint((x - low) * (steps * inverse_span)).clip(0, top)
        vq = v * q
        sum_vq, sum_vqq, sum_vxq = vq.sum(axis=-1), _dot(vq, q), _dot(vq, x)
        determinant = sum_v * sum_vqq - sum_vq * sum_vq
        scale = (sum_v * sum_vxq - sum_vx * sum_vq) * reciprocal(determinant)
        offset = (sum_vqq * sum_vx - sum_vq * sum_vxq) * reciprocal(determinant)
        above = offset > 0
        scale = np.where(above, sum_vxq * reciprocal(sum_vqq), scale)
        offset = np.where(above, _F32(0), offset)
        error = _weighted_square(scale[..., None] * q + offset[..., None] - x, v)
        better = (error < best) & (determinant > 0) & (scale > 0)
        best = np.where(better, error, best)
        best_scale, best_low = np.where(better, scale, best_scale), np.where(better, offset, best_low)
    return best_scale, -best_low


def half_scale(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a superblock scale to float16; return it and the float32 reciprocal of what was stored."""
    half = to_half(d)
    if not np.isfinite(half).all():
        raise ValueError("cannot quantize: the weights are not finite, or too large for a float16 scale")
    return half, reciprocal(half.astype(_F32))


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...j,...j->...", a, b)


def _weighted_square(difference: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.einsum("...j,...j,...j->...", v, difference, difference)
