"""How the K types and IQ4 choose scales: searches for the codes, scales and minimums of a superblock with the least squared error.

No formula gives them, and the rounding interacts with the scale it depends on. All searches go in two steps: the best real scale of each
sub-block (try a few, keep the codes, solve for the scale by least squares), then the best integers for these scales under a float16.

    affine_search       w = scale * q - minimum      Q2_K, Q4_K, Q5_K
    symmetric_search    w = scale * q                Q3_K, Q6_K
    fit, nearest_scales: its two steps               IQ4_NL, IQ4_XS, whose values are uneven
"""

from collections.abc import Callable

import numpy as np

from refimpl.formats.quants.floats import reciprocal, to_half

_F32 = np.float32
Nearest = Callable[[np.ndarray], np.ndarray]        # numbers -> the representable values nearest to them, float32


def affine_search(x: np.ndarray, max_code: int, n_sub: int, max_scale: int
                  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Quantize superblocks with codes 0 .. max_code, in `n_sub` sub-blocks with scales and minimums 0 .. max_scale.

    x (..., 256) -> d, dmin float16 (...); s, m uint8 (..., n_sub); q uint8 (..., 256).
    Two steps, both minimising sum v * (x - w)**2 over a sub-block with v = rms(x) + |x| (large weights count for more):
    the best real scale and minimum of each sub-block; then, with d and dmin fixed by the largest of them and rounded to
    float16, the best pair of integers next to the rounded ones. Blocks of zeros come back as zeros.
    """
    parts = x.reshape(*x.shape[:-1], n_sub, x.shape[-1] // n_sub)
    v = np.sqrt(np.mean(parts * parts, axis=-1, keepdims=True)) + np.abs(parts)
    scale, minimum = _fit_affine(parts, v, max_code)
    d, inverse_d = half_scale(scale.max(axis=-1, keepdims=True) / _F32(max_scale))
    dmin, inverse_dmin = half_scale(minimum.max(axis=-1, keepdims=True) / _F32(max_scale))
    s0, m0 = np.rint(scale * inverse_d), np.rint(minimum * inverse_dmin)

    best = np.full(scale.shape, np.inf, _F32)
    best_s, best_m, best_q = np.zeros_like(s0), np.zeros_like(m0), np.zeros_like(parts)
    for ds in (0, -1, 1):
        for dm in (0, -1, 1):
            s, m = (s0 + _F32(ds)).clip(0, max_scale), (m0 + _F32(dm)).clip(0, max_scale)
            step, offset = (d.astype(_F32) * s)[..., None], (dmin.astype(_F32) * m)[..., None]
            q = np.rint((parts + offset) * reciprocal(step)).clip(0, max_code)
            error = _weighted_square(step * q - offset - parts, v)
            better = error < best
            best = np.where(better, error, best)
            best_s, best_m = np.where(better, s, best_s), np.where(better, m, best_m)
            best_q = np.where(better[..., None], q, best_q)
    q = best_q.astype(np.uint8).reshape(x.shape)
    return d[..., 0], dmin[..., 0], best_s.astype(np.uint8), best_m.astype(np.uint8), q


def _fit_affine(x: np.ndarray, v: np.ndarray, max_code: int) -> tuple[np.ndarray, np.ndarray]:
    """Real scale and minimum of sub-blocks (..., n), both (...) and >= 0, for x ~ scale * q - minimum.

    Stretching the range a little moves weights between codes; for each stretch the codes are held fixed and the line through
    (q, x) is solved by weighted least squares. The stored minimum cannot be negative: then the line goes through zero.
    """
    low = np.minimum(x.min(axis=-1, keepdims=True), _F32(0))
    span = x.max(axis=-1, keepdims=True) - low
    inverse_span = reciprocal(span)
    # The answer to beat, and the one that stays where all codes are equal and no line is defined.
    best_scale, best_low = span[..., 0] / _F32(max_code), low[..., 0]
    q = np.rint((x - low) * (_F32(max_code) * inverse_span))
    best = _weighted_square(best_scale[..., None] * q + low - x, v)
    sum_v, sum_vx = v.sum(axis=-1), _dot(v, x)
    for steps in np.linspace(max_code - 1, max_code + 1, 21, dtype=_F32):
        q = np.rint((x - low) * (steps * inverse_span)).clip(0, max_code)
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


def symmetric_search(x: np.ndarray, half: int, lowest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize superblocks in sub-blocks of 16 with codes -half .. half - 1 and scales lowest .. -lowest - 1.

    x (..., 256) -> d float16 (...), s int8 (..., 16), q + half uint8 (..., 256). As in Q4_K: the best real scale of each sub-block, then
    integers.
    """
    def nearest(ratio: np.ndarray) -> np.ndarray:
        return np.rint(ratio).clip(-half, half - 1)
    parts = x.reshape(*x.shape[:-1], 16, 16)
    scale = fit(parts, -np.linspace(half - 1, half + 1, 21, dtype=_F32), nearest)             # the largest weight near -half
    d, s, q = nearest_scales(parts, scale, lowest, nearest)
    return d, s, (q + _F32(half)).astype(np.uint8).reshape(x.shape)


def nearest_scales(parts: np.ndarray, scale: np.ndarray, lowest: int, nearest: Nearest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sub-blocks (..., n_sub, n), their real scales (..., n_sub) -> d float16 (...), s int8 (..., n_sub), q float32 (..., n_sub, n).

    d comes from the largest scale, which becomes `lowest`, and is rounded to float16; then each s is the best integer next to the rounded
    one. `nearest` rounds x / (d * s) to q.
    """
    furthest = np.take_along_axis(scale, np.abs(scale).argmax(axis=-1, keepdims=True), axis=-1)
    d, inverse_d = half_scale(furthest / _F32(lowest))
    s0 = np.rint(scale * inverse_d)

    best = np.full(scale.shape, np.inf, _F32)
    best_s, best_q = np.zeros_like(s0), np.zeros_like(parts)
    for ds in (0, -1, 1):
        s = (s0 + _F32(ds)).clip(lowest, -lowest - 1)
        step = (d.astype(_F32) * s)[..., None]
        q = nearest(parts * reciprocal(step))
        difference = step * q - parts
        error = _dot(difference, difference)
        better = error < best
        best, best_s, best_q = np.where(better, error, best), np.where(better, s, best_s), np.where(better[..., None], q, best_q)
    return d[..., 0], best_s.astype(np.int8), best_q


def fit(x: np.ndarray, targets: np.ndarray, nearest: Nearest) -> np.ndarray:
    """Real scale (...) of sub-blocks (..., n), of either sign, for x ~ scale * q.

    `nearest` rounds a number to q; the weight of largest magnitude is sent to each of `targets` in turn. The scale that fits
    the codes q best is sum(xq) / sum(qq), and it takes sum(xq)**2 / sum(qq) off the squared error.
    """
    furthest = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    inverse = reciprocal(furthest)
    best_scale = best_gain = np.zeros(x.shape[:-1], _F32)
    for target in targets:
        q = nearest(x * (target * inverse))
        sum_xq, sum_qq = _dot(x, q), _dot(q, q)
        scale = sum_xq * reciprocal(sum_qq)
        gain = scale * sum_xq
        better = gain > best_gain
        best_gain, best_scale = np.where(better, gain, best_gain), np.where(better, scale, best_scale)
    return best_scale


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
