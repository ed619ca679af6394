"""Weights that lie on a grid already: finding the scale again, so that Q4_0 holds them without loss.

Quantization-aware training ends with weights w = d * q, but a release may hold the products only, as float32, float16 or bfloat16 numbers.
Converting them by the rule for ordinary weights (scale = signed largest / -8) goes wrong in every block whose largest level is not -8: the
levels -7 .. 7 then fall between those of the new scale. Here the scale is found from the numbers themselves.

    largest magnitude is level m = 1 .. 8, coarsest first            d ~ |x|max / m,   q = round(x / d)
    every d * q rounds to its x; h is half a unit in its last place   max_j (|x_j| - h_j) / |q_j|  <=  d  <=  min_j (|x_j| + h_j) / |q_j|
    where the interval is not empty, the block is on that lattice    d = least squares, on the shortest number inside of the interval

Two lattices that explain the same numbers (levels 2, 4, 6 of d are 1, 2, 3 of 2d) restore the same numbers; the coarser one is taken. Any
others are further apart than bfloat16's rounding: two fractions of integers up to 8 differ by 1/56 or more, the rounding of two numbers by
2/256 at most. Blocks on no lattice get the least-squares scale, by a search as in ggml's make_qx_quants, and never one worse than the rule.
"""

from typing import NamedTuple

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, pack
from refimpl.formats.quants.codecs import quantize_by
from refimpl.formats.quants.floats import dequantize_bf16, quantize_bf16, reciprocal, to_half

_F32 = np.float32
STEPS = np.array([-7, -7.25, -7.5, -7.75, -8, -8.25, -8.5, -8.75, 6.75, 7, 7.25, 7.5], _F32)    # what the largest weight is divided by
CHUNK = 8192                    # blocks looked at together, so that all temporaries stay in the cache
FEW = 8                         # weights of a block that are looked at first; they rule out most candidates
TINY = np.finfo(_F32).tiny
SLACK = _F32(2.0 ** -6.9)       # both the largest weight and another one may be off by 2**-8


class Lattice(NamedTuple):
    """Blocks as x ~ d * q. `exact`: as far as their format tells, the numbers are products of d, or of a scale that float16 rounds to d."""

    d: np.ndarray               # float16 (n,)
    q: np.ndarray               # int8 (n, 32), -8 .. 7
    exact: np.ndarray           # bool (n,)

    @classmethod
    def empty(cls) -> "Lattice":
        """Of no blocks."""
        return cls(np.zeros(0, np.float16), np.zeros((0, 32), np.int8), np.zeros(0, bool))

    def restored(self) -> np.ndarray:
        """d * q as Q4_0 gives it back, float32 (n, 32)."""
        return self.d.astype(_F32)[:, None] * self.q.astype(_F32)


def find_lattice(x: np.ndarray) -> Lattice:
    """Blocks float32 (n, 32) -> their Lattice. Raises ValueError for NaN, infinities, and weights too large for a float16 scale."""
    parts = [_find(np.ascontiguousarray(x[lo:lo + CHUNK].T)) for lo in range(0, len(x), CHUNK)]
    return Lattice(*(np.concatenate(field) for field in zip(*parts, Lattice.empty())))


def _find(x: np.ndarray) -> Lattice:
    """The same for blocks as columns, (32, n): sums and maxima over a block then run along the columns, which is quicker."""
    largest = np.abs(x).max(axis=0)
    if not np.isfinite(largest).all():
        raise ValueError("cannot quantize: a block holds NaN or an infinity")
    d, q = np.zeros(x.shape[1], _F32), np.zeros(x.shape, np.int8)
    exact = largest == 0                                            # zeros are on every lattice
    left = np.flatnonzero(~exact)                                   # blocks not explained yet
    for m in range(1, 9):
        per_step = _F32(m) * reciprocal(largest[left])
        maybe = np.flatnonzero(_near(x[:FEW].take(left, axis=1) * per_step))
        u = x.take(left[maybe], axis=1) * per_step[maybe]
        maybe, q_maybe = maybe[near := _near(u)], np.rint(u[:, near])
        at = left[maybe]
        found, d_found, q_found = _on_lattice(x.take(at, axis=1), q_maybe)
        at = at[found]
        d[at], q[:, at], exact[at] = d_found, q_found, True
        left = np.delete(left, maybe[found])
    if len(left):
        d[left], q[:, left] = _best_fit(x.take(left, axis=1))
    half = to_half(d)
    if not np.isfinite(half).all():
        raise ValueError("cannot quantize: the weights are too large for a float16 scale")
    exact &= (half != 0) | (largest == 0)
    return Lattice(half, q.T, exact)


def quantize_q4_0_on_lattice(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> Q4_0 bytes, uint8 (*lead, D // 32 * 18): `quantize_q4_0` for weights that may lie on a grid already.

    Weights that do come back as they were trained, within the rounding of the format they were kept in. For all others the squared error of
    a block is at most that of `quantize_q4_0`. Raises ValueError for NaN, infinities, and weights too large for a float16 scale.
    """
    return quantize_by(_lattice_bytes, x, "Q4_0")


def _lattice_bytes(x: np.ndarray) -> np.ndarray:
    blocks = blocks_of(x, BLOCKS["Q4_0"])
    found = find_lattice(blocks.reshape(-1, 32))
    q = (found.q + np.int8(8)).astype(np.uint8).reshape(blocks.shape)
    return bytes_of(BLOCKS["Q4_0"], d=found.d.reshape(blocks.shape[:-1]), qs=pack(q, n_bits=4, group=16))


def _near(u: np.ndarray) -> np.ndarray:
    """Which columns of multiples may be integers, but for rounding?"""
    q = np.rint(u)
    difference = u - q
    np.abs(difference, out=difference)
    np.abs(q, out=q)
    q *= SLACK
    return (difference <= q).all(axis=0)


def _on_lattice(x: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The exact test. Blocks (32, n), candidate levels -> (which columns pass, their d with sign, their q int8)."""
    size, level = np.abs(x), np.abs(q)
    least, greatest = _reach(x, size)
    with np.errstate(divide="ignore"):                              # a zero says nothing of d: -inf and inf
        low = (least / level).max(axis=0, initial=0)
        high = (greatest / level).min(axis=0, initial=np.inf)
    top, bottom = q.max(axis=0, initial=0), q.min(axis=0, initial=0)
    passes = (low <= high) & ~((top == 8) & (bottom == -8))
    size, level, q = size[:, passes], level[:, passes], q[:, passes]
    low, high = low[passes], high[passes]
    best = np.einsum("jn,jn->n", size, level) / np.einsum("jn,jn->n", level, level)
    d = _shortest(best.clip(low, high), low, high)
    sign = np.where(top[passes] == 8, _F32(-1), _F32(1))            # the side that reaches 8 is the negative one
    return passes, d * sign, (q * sign).astype(np.int8)


def _reach(x: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest magnitude that rounds to each number in the shortest format that holds all of its block: bfloat16, float16
    or float32. Halves round to the even neighbour, so an odd number does not reach as far as to them.
    """
    bits = x.view(np.uint32)
    power = (bits & np.uint32(0x7F800000)).view(_F32)               # 2**exponent, the number without its fraction
    # Of float32 four units: the product has been rounded, and so are the quotients of the caller.
    n = x.shape[1]
    half, floor, last_bit = np.full(n, 2.0 ** -21, _F32), np.full(n, TINY), np.zeros(n, np.uint32)
    is_bf16 = (np.bitwise_or.reduce(bits, axis=0) & np.uint32(0xFFFF)) == 0
    half[is_bf16], last_bit[is_bf16] = 2.0 ** -8, 1 << 16
    others = np.flatnonzero(~is_bf16)
    wide = x.take(others, axis=1)
    is_f16 = others[(to_half(wide).astype(_F32) == wide).all(axis=0)]
    half[is_f16], floor[is_f16], last_bit[is_f16] = 2.0 ** -11, 2.0 ** -25, 1 << 13     # below 2**-14 the unit stays the same
    odd = (bits & last_bit) != 0
    half_unit = np.maximum(power * half, floor)
    half_unit *= _F32(1 + 2.0 ** -10) - odd * _F32(2.0 ** -9)
    greatest = size + half_unit
    half_unit *= _F32(1) - (size == power) * _F32(0.5)              # the numbers below a power of two lie closer
    return size - half_unit, greatest


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
    """Blocks (32, n) -> float16's d (as float32) and q int8 of least squared error among the candidates, the rule's own included."""
    furthest = _furthest(x)
    inverse = reciprocal(furthest)
    best_gain, best_d = np.full(len(furthest), -1, _F32), np.zeros(len(furthest), _F32)
    u = x * inverse                                                 # -1 .. 1, and 1 at the largest weight
    q = np.empty_like(u)
    for step in STEPS:
        np.multiply(u, step, out=q)
        _to_levels(q)
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
    """d as float16 holds it, the nearest levels, and the squared error."""
    d = to_half(d).astype(_F32)
    q = _to_levels(x * reciprocal(d))
    difference = d * q
    difference -= x
    return d, q, np.einsum("jn,jn->n", difference, difference)


def _to_levels(u: np.ndarray) -> np.ndarray:
    """In place."""
    np.rint(u, out=u)
    return np.clip(u, -8, 7, out=u)
