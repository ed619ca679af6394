"""Recovers the scales of weights that are on a quantization grid already, so that Q4_0 holds them without loss.

Quantization-aware training ends with weights w = d * q, but a release may hold only the products, as float32, float16 or bfloat16 numbers.
llama.cpp's rule for ordinary weights, d = (signed largest) / -8, is wrong for every block whose largest code is not -8: its codes -7 .. 7
fall between those of the new scale. Here the scale is recovered from the numbers themselves:

    try code m = 1 .. 8 for the largest magnitude (coarsest grid first)   d ~ |x|max / m,   q = round(x / d)
    d * q must round to x (h: half a unit in the last place of x)         max (|x_j| - h_j) / |q_j|  <=  d  <=  min (|x_j| + h_j) / |q_j|
    if that interval is not empty, the block is on this grid              d = least squares, moved to the shortest number in the interval

Two grids that explain the same numbers (codes 2, 4, 6 of d are 1, 2, 3 of 2d) restore the same numbers; the coarser one is taken. All other
pairs of grids differ by more than bfloat16's rounding: two fractions of integers up to 8 differ by at least 1/56, the rounding of two
numbers by at most 2/256. Blocks on no grid get a least-squares scale, by a search as in ggml's make_qx_quants, never worse than the rule.
"""

from typing import NamedTuple

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, pack
from refimpl.formats.quants.codecs import quantize_by
from refimpl.formats.quants.floats import dequantize_bf16, quantize_bf16, reciprocal, to_half

_F32 = np.float32
STEPS = np.array([-7, -7.25, -7.5, -7.75, -8, -8.25, -8.5, -8.75, 6.75, 7, 7.25, 7.5], _F32)    # what the largest weight is divided by
CHUNK = 8192                    # blocks at a time: all temporaries stay in the CPU cache
FEW = 8                         # weights of a block that are tested first: they rule out most candidates
TINY = np.finfo(_F32).tiny
SLACK = _F32(2.0 ** -6.9)       # the largest weight and another one may each be off by 2**-8


class Grid(NamedTuple):
    """Blocks as x ~ d * q. `exact`: to their format's precision, the numbers are products of d, or of a scale that float16 rounds to d."""

    d: np.ndarray               # float16 (n,)
    q: np.ndarray               # int8 (n, 32), -8 .. 7
    exact: np.ndarray           # bool (n,)

    @classmethod
    def empty(cls) -> "Grid":
        """Of no blocks."""
        return cls(np.zeros(0, np.float16), np.zeros((0, 32), np.int8), np.zeros(0, bool))

    def restored(self) -> np.ndarray:
        """d * q as Q4_0 gives it back, float32 (n, 32)."""
        return self.d.astype(_F32)[:, None] * self.q.astype(_F32)


def recover_grid(x: np.ndarray) -> Grid:
    """Blocks float32 (n, 32) -> their Grid. Raises ValueError for NaN, infinities, and weights too large for a float16 scale."""
    parts = [_find(np.ascontiguousarray(x[lo:lo + CHUNK].T)) for lo in range(0, len(x), CHUNK)]
    return Grid(*(np.concatenate(field) for field in zip(*parts, Grid.empty())))


def _find(x: np.ndarray) -> Grid:
    """`recover_grid` for blocks as columns, (32, n), where sums and maxima over a block are faster."""
    largest = np.abs(x).max(axis=0)
    if not np.isfinite(largest).all():
        raise ValueError("cannot quantize: a block holds NaN or an infinity")
    d, q = np.zeros(x.shape[1], _F32), np.zeros(x.shape, np.int8)
    exact = largest == 0                                            # zeros are on every grid
    left = np.flatnonzero(~exact)                                   # blocks whose grid is not found yet
    for m in range(1, 9):
        per_step = _F32(m) * reciprocal(largest[left])
        maybe = np.flatnonzero(_near(x[:FEW].take(left, axis=1) * per_step))
        u = x.take(left[maybe], axis=1) * per_step[maybe]
        maybe, q_maybe = maybe[near := _near(u)], np.rint(u[:, near])
        at = left[maybe]
        found, d_found, q_found = _on_grid(x.take(at, axis=1), q_maybe)
        at = at[found]
        d[at], q[:, at], exact[at] = d_found, q_found, True
        left = np.delete(left, maybe[found])
    if len(left):
        d[left], q[:, left] = _best_fit(x.take(left, axis=1))
    half = to_half(d)
    if not np.isfinite(half).all():
        raise ValueError("cannot quantize: the weights are too large for a float16 scale")
    exact &= (half != 0) | (largest == 0)
    return Grid(half, q.T, exact)


def quantize_q4_0_on_grid(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> Q4_0 bytes, uint8 (*lead, D // 32 * 18): `quantize_q4_0` for weights that may be on a grid already.

    Those come back as they were trained, within the rounding of the format they were stored in. For all others the squared error of
    a block is at most that of `quantize_q4_0`. Raises ValueError for NaN, infinities, and weights too large for a float16 scale.
    """
    return quantize_by(_grid_bytes, x, "Q4_0")


def _grid_bytes(x: np.ndarray) -> np.ndarray:
    blocks = blocks_of(x, BLOCKS["Q4_0"])
    found = recover_grid(blocks.reshape(-1, 32))
    q = (found.q + np.int8(8)).astype(np.uint8).reshape(blocks.shape)
    return bytes_of(BLOCKS["Q4_0"], d=found.d.reshape(blocks.shape[:-1]), qs=pack(q, n_bits=4, group=16))


def _near(u: np.ndarray) -> np.ndarray:
    """Which columns of u are integers, as far as rounding allows?"""
    q = np.rint(u)
    difference = u - q
    np.abs(difference, out=difference)
    np.abs(q, out=q)
    q *= SLACK
    return (difference <= q).all(axis=0)


def _on_grid(x: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The exact test. Blocks (32, n), candidate codes -> (which columns pass, their d with sign, their q int8)."""
    size, code = np.abs(x), np.abs(q)
    least, greatest = _rounding_interval(x, size)
    with np.errstate(divide="ignore"):                              # a zero does not bound d: -inf and inf
        low = (least / code).max(axis=0, initial=0)
        high = (greatest / code).min(axis=0, initial=np.inf)
    top, bottom = q.max(axis=0, initial=0), q.min(axis=0, initial=0)
    passes = (low <= high) & ~((top == 8) & (bottom == -8))
    size, code, q = size[:, passes], code[:, passes], q[:, passes]
    low, high = low[passes], high[passes]
    best = np.einsum("jn,jn->n", size, code) / np.einsum("jn,jn->n", code, code)
    d = _shortest(best.clip(low, high), low, high)
    sign = np.where(top[passes] == 8, _F32(-1), _F32(1))            # the side that reaches 8 is the negative one
    return passes, d * sign, (q * sign).astype(np.int8)


class Precision(NamedTuple):
    """The number format that each of n blocks was stored in."""

    half_unit: np.ndarray       # half a unit in the last place, relative to the number's power of two; float32 (n,)
    least: np.ndarray           # the same in absolute terms where numbers are subnormal; float32 (n,)
    last_bit: np.ndarray        # the last bit that the format keeps of a float32; uint32 (n,)


def _stored_precision(x: np.ndarray) -> Precision:
    """Of blocks (32, n): bfloat16, float16 or float32, the narrowest that holds all numbers of a block."""
    n = x.shape[1]
    # float32: four units, because the product d * q was rounded too, and so are the quotients of the caller
    found = Precision(np.full(n, 2.0 ** -21, _F32), np.full(n, TINY), np.zeros(n, np.uint32))
    is_bf16 = (np.bitwise_or.reduce(x.view(np.uint32), axis=0) & np.uint32(0xFFFF)) == 0
    found.half_unit[is_bf16], found.last_bit[is_bf16] = 2.0 ** -8, 1 << 16
    others = np.flatnonzero(~is_bf16)
    rest = x.take(others, axis=1)
    is_f16 = others[(to_half(rest).astype(_F32) == rest).all(axis=0)]
    found.half_unit[is_f16], found.least[is_f16], found.last_bit[is_f16] = 2.0 ** -11, 2.0 ** -25, 1 << 13
    return found


def _rounding_interval(x: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest magnitude that rounds to each x (32, n), of magnitude `size`, in the format of its block."""
    bits = x.view(np.uint32)
    power = (bits & np.uint32(0x7F800000)).view(_F32)               # 2**exponent: the number without its fraction
    half_unit, least, last_bit = _stored_precision(x)
    reach = np.maximum(power * half_unit, least)
    # ties round to even: the interval of an even number includes its ends, that of an odd one does not
    odd = (bits & last_bit) != 0
    reach *= _F32(1 + 2.0 ** -10) - odd * _F32(2.0 ** -9)
    greatest = size + reach
    reach *= _F32(1) - (size == power) * _F32(0.5)                  # just below a power of two, numbers are twice as dense
    return size - reach, greatest


def _shortest(d: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """A number between low and high, near d: a bfloat16 one if there is one, else a float16 one, else the float16 one nearest to d.

    W4A16 releases keep bfloat16 scales, Q4_0 files float16 ones.
    """
    short = dequantize_bf16(quantize_bf16(d[:, None]))[:, 0]
    half = to_half(d)
    up, down = np.nextafter(half, np.float16(np.inf)), np.nextafter(half, np.float16(0))
    answer = half.astype(_F32)
    for other in (down, up, half, short):
        other = other.astype(_F32)
        answer = np.where((low <= other) & (other <= high) & (to_half(other).astype(_F32) == other), other, answer)
    return answer


def _best_fit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks (32, n) -> float16's d (as float32) and q int8 of least squared error among the candidates, the one by the rule included."""
    furthest = _furthest(x)
    inverse = reciprocal(furthest)
    best_gain, best_d = np.full(len(furthest), -1, _F32), np.zeros(len(furthest), _F32)
    u = x * inverse                                                 # -1 .. 1, and 1 at the largest weight
    q = np.empty_like(u)
    for step in STEPS:
        np.multiply(u, step, out=q)
        _to_codes(q)
        xq, qq = np.einsum("jn,jn->n", u, q), np.einsum("jn,jn->n", q, q)
        d = xq * reciprocal(qq)
        gain = d * xq                                               # the squared error is sum u**2 - gain
        better = gain > best_gain
        best_gain, best_d = np.where(better, gain, best_gain), np.where(better, d, best_d)
    d, q, error = _nearest(x, best_d * furthest)
    d_rule, q_rule, error_of_rule = _nearest(x, furthest / _F32(-8))
    rule_wins = error_of_rule < error
    q[:, rule_wins] = q_rule[:, rule_wins]
    return np.where(rule_wins, d_rule, d), q.astype(np.int8)


def _furthest(x: np.ndarray) -> np.ndarray:
    """The first of the largest magnitudes of every column, with its sign."""
    top, bottom = x.max(axis=0), x.min(axis=0)
    furthest = np.where(top > -bottom, top, bottom)
    equal = np.flatnonzero(top == -bottom)
    tied = x.take(equal, axis=1)
    furthest[equal] = tied[np.abs(tied).argmax(axis=0), np.arange(len(equal))]
    return furthest


def _nearest(x: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d as float16 holds it, the nearest codes, and the squared error."""
    d = to_half(d).astype(_F32)
    q = _to_codes(x * reciprocal(d))
    difference = d * q
    difference -= x
    return d, q, np.einsum("jn,jn->n", difference, difference)


def _to_codes(u: np.ndarray) -> np.ndarray:
    """Rounds to codes -8 .. 7, in place."""
    np.rint(u, out=u)
    return np.clip(u, -8, 7, out=u)
