"""The small functions between the matrix products: norms, activations, soft cap, rotation.

A row's result does not depend on the other rows of the call. Squares are summed into 4 vectors of 16 lanes in turn, then across the
vectors, then across lanes. Decoding calls these functions hundreds of times a token with one row, so they use threads only for large
arrays.
"""

import numpy as np
from numba import prange

from refimpl.kernels.cores.threads import threads_for
from refimpl.kernels.machine.checks import mismatch
from refimpl.kernels.machine.intrinsics import (
    add_f32,
    address,
    at,
    div_f32,
    fma,
    load_f32,
    load_f32_part,
    max_f32,
    min_f32,
    mul_f32,
    splat_f32,
    sqrt_f32,
    store_f32,
    store_f32_part,
    sub_f32,
    sum_f32,
)
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.jit import inline, kernel
from refimpl.kernels.machine.vecmath import exp16, gelu16, tanh16

ZERO, ONE = np.float32(0), np.float32(1)


@inline
def _load(pointer, n):
    return load_f32(pointer) if n == LANES else load_f32_part(pointer, n)


@inline
def _store(pointer, v, n):
    if n == LANES:
        store_f32(pointer, v)
    else:
        store_f32_part(pointer, v, n)


# ---- norms

def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. transformers: Gemma4RMSNorm (the weight is not 1 + w)."""
    if x.dtype != np.float32 or weight.dtype != np.float32 or weight.ndim != 1 or weight.shape != x.shape[-1:]:
        raise mismatch(x, weight)
    return _norm(x, weight, True, eps)


def rms_normalise(x: np.ndarray, eps: float) -> np.ndarray:
    """The norm without a weight: used on values, and before the router."""
    if x.dtype != np.float32 or not x.ndim:
        raise mismatch(x)
    return _norm(x, x, False, eps)


def _norm(x, weight, weighted, eps):
    flat, out = x.ravel(), np.empty(x.size, np.float32)
    if x.size:
        norm_rows(flat, weight.ravel() if weighted else flat, weighted, float(eps), x.shape[-1], out, threads_for(x.size))
    return out.reshape(x.shape)


@inline
def _norm_part(x, weight, weighted, eps, width, out, first, end):
    """Rows first..end-1."""
    for row in range(first, end):
        source, to = at(x, 4 * width * row), at(out, 4 * width * row)
        a = b = c = d = splat_f32(ZERO)
        by_four = width - width % (4 * LANES)
        for i in range(0, by_four, 4 * LANES):
            here = at(source, 4 * i)
            v0, v1, v2, v3 = load_f32(here), load_f32(at(here, 64)), load_f32(at(here, 128)), load_f32(at(here, 192))
            a, b, c, d = fma(v0, v0, a), fma(v1, v1, b), fma(v2, v2, c), fma(v3, v3, d)
        for i in range(by_four, width, LANES):
            v = _load(at(source, 4 * i), min(LANES, width - i))
            a = fma(v, v, a)
        mean = sum_f32(add_f32(add_f32(a, b), add_f32(c, d))) / np.float32(width)
        scale = div_f32(splat_f32(ONE), sqrt_f32(splat_f32(mean + np.float32(eps))))
        for i in range(0, width, LANES):
            n = min(LANES, width - i)
            y = mul_f32(_load(at(source, 4 * i), n), scale)
            _store(at(to, 4 * i), mul_f32(y, _load(at(weight, 4 * i), n)) if weighted else y, n)


@kernel(parallel=True)
def norm_rows(x, weight, weighted, eps, width, out, n):
    """Either norm of x's rows of `width` numbers, on n threads."""
    a, b, to, n_rows = address(x), address(weight), address(out), x.size // width
    if n == 1:
        _norm_part(a, b, weighted, eps, width, to, 0, n_rows)
    else:
        for part in prange(n):
            thread = np.int64(part)
            _norm_part(a, b, weighted, eps, width, to, thread * n_rows // n, (thread + 1) * n_rows // n)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al. 2016, arXiv:1607.06450)."""
    if any(a.dtype != np.float32 for a in (x, weight, bias)) or weight.ndim != 1 or not weight.shape == bias.shape == x.shape[-1:]:
        raise mismatch(x, weight, bias)
    out = np.empty(x.size, np.float32)
    if x.size:
        layer_norm_rows(x.ravel(), weight.ravel(), bias.ravel(), float(eps), x.shape[-1], out, threads_for(x.size))
    return out.reshape(x.shape)


@inline
def _layer_norm_part(x, weight, bias, eps, width, out, first, end):
    """Rows first..end-1: twice over a row for its mean and variance."""
    for row in range(first, end):
        source, to = at(x, 4 * width * row), at(out, 4 * width * row)
        total = square = splat_f32(ZERO)
        for i in range(0, width, LANES):
            total = add_f32(total, _load(at(source, 4 * i), min(LANES, width - i)))
        mean = splat_f32(sum_f32(total) / np.float32(width))
        for i in range(0, width, LANES):
            n = min(LANES, width - i)
            _store(at(to, 4 * i), sub_f32(_load(at(source, 4 * i), n), mean), n)
            v = _load(at(to, 4 * i), n)             # 0 in the lanes after the last
            square = fma(v, v, square)
        scale = div_f32(splat_f32(ONE), sqrt_f32(splat_f32(sum_f32(square) / np.float32(width) + np.float32(eps))))
        for i in range(0, width, LANES):
            n = min(LANES, width - i)
            y = mul_f32(mul_f32(_load(at(to, 4 * i), n), scale), _load(at(weight, 4 * i), n))
            _store(at(to, 4 * i), add_f32(y, _load(at(bias, 4 * i), n)), n)


@kernel(parallel=True)
def layer_norm_rows(x, weight, bias, eps, width, out, n):
    """`layer_norm` of x's rows of `width` numbers, on n threads."""
    a, b, c, to, n_rows = address(x), address(weight), address(bias), address(out), x.size // width
    if n == 1:
        _layer_norm_part(a, b, c, eps, width, to, 0, n_rows)
    else:
        for part in prange(n):
            thread = np.int64(part)
            _layer_norm_part(a, b, c, eps, width, to, thread * n_rows // n, (thread + 1) * n_rows // n)


# ---- elementwise

def gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gelu(gate) * up: what a gated feed-forward network computes between its matrices."""
    if gate.dtype != np.float32 or up.dtype != np.float32 or gate.shape != up.shape:
        raise mismatch(gate, up)
    out = np.empty(gate.size, np.float32)
    gated_numbers(gate.ravel(), up.ravel(), out, threads_for(out.size))
    return out.reshape(gate.shape)


@inline
def _gated_part(gate, up, out, first, end):
    for i in range(first, end, LANES):
        n = min(LANES, end - i)
        _store(at(out, 4 * i), mul_f32(gelu16(_load(at(gate, 4 * i), n)), _load(at(up, 4 * i), n)), n)


@kernel(parallel=True)
def gated_numbers(gate, up, out, n):
    """`gated` on n threads."""
    a, b, to, size = address(gate), address(up), address(out), gate.size
    if n == 1:
        _gated_part(a, b, to, 0, size)
    else:
        for part in prange(n):
            thread = np.int64(part)
            _gated_part(a, b, to, thread * size // n, (thread + 1) * size // n)


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x) (Hendrycks & Gimpel 2016, section 2)."""
    if x.dtype != np.float32:
        raise mismatch(x)
    return _times_sigmoid(x, x)


def glu(x: np.ndarray) -> np.ndarray:
    """The first half of the last axis times the sigmoid of the second (Dauphin et al. 2016, arXiv:1612.08083)."""
    if x.dtype != np.float32 or not x.ndim or x.shape[-1] % 2:
        raise mismatch(x)
    half = x.shape[-1] // 2
    return _times_sigmoid(x[..., :half], x[..., half:])


def _times_sigmoid(x, gate):
    out = np.empty(x.size, np.float32)
    sigmoid_numbers(x.ravel(), gate.ravel(), out, threads_for(out.size))
    return out.reshape(x.shape)


@inline
def _sigmoid_part(x, gate, out, first, end):
    for i in range(first, end, LANES):
        n = min(LANES, end - i)
        below = add_f32(splat_f32(ONE), exp16(sub_f32(splat_f32(ZERO), _load(at(gate, 4 * i), n))))
        _store(at(out, 4 * i), div_f32(_load(at(x, 4 * i), n), below), n)


@kernel(parallel=True)
def sigmoid_numbers(x, gate, out, n):
    """x times the sigmoid of `gate`, on n threads."""
    a, b, to, size = address(x), address(gate), address(out), x.size
    if n == 1:
        _sigmoid_part(a, b, to, 0, size)
    else:
        for part in prange(n):
            thread = np.int64(part)
            _sigmoid_part(a, b, to, thread * size // n, (thread + 1) * size // n)


def softcap(x: np.ndarray, cap: float) -> np.ndarray:
    """cap * tanh(x / cap): limits logits to (-cap, cap). Gemma 2 (arXiv:2408.00118), section 2."""
    if x.dtype != np.float32:
        raise mismatch(x)
    out = np.empty(x.size, np.float32)
    capped_numbers(x.ravel(), float(cap), out, threads_for(out.size))
    return out.reshape(x.shape)


@inline
def _capped_part(x, cap, out, first, end):
    c = splat_f32(cap)
    for i in range(first, end, LANES):
        n = min(LANES, end - i)
        _store(at(out, 4 * i), mul_f32(tanh16(div_f32(_load(at(x, 4 * i), n), c)), c), n)


@kernel(parallel=True)
def capped_numbers(x, cap, out, n):
    """`softcap` on n threads."""
    a, to, size = address(x), address(out), x.size
    if n == 1:
        _capped_part(a, np.float32(cap), to, 0, size)
    else:
        for part in prange(n):
            thread = np.int64(part)
            _capped_part(a, np.float32(cap), to, thread * size // n, (thread + 1) * size // n)


def limit(x: np.ndarray, least: float, most: float) -> np.ndarray:
    """Numbers below `least` become that, those above `most` that. transformers: Gemma4ClippableLinear."""
    if x.dtype != np.float32:
        raise mismatch(x)
    out = np.empty(x.size, np.float32)
    limited_numbers(x.ravel(), float(least), float(most), out, threads_for(out.size))
    return out.reshape(x.shape)


@inline
def _limited_part(x, least, most, out, first, end):
    low, high = splat_f32(least), splat_f32(most)
    for i in range(first, end, LANES):
        n = min(LANES, end - i)
        _store(at(out, 4 * i), min_f32(max_f32(_load(at(x, 4 * i), n), low), high), n)


@kernel(parallel=True)
def limited_numbers(x, least, most, out, n):
    """`limit` on n threads."""
    a, to, size = address(x), address(out), x.size
    if n == 1:
        _limited_part(a, np.float32(least), np.float32(most), to, 0, size)
    else:
        for part in prange(n):
            thread = np.int64(part)
            _limited_part(a, np.float32(least), np.float32(most), to, thread * size // n, (thread + 1) * size // n)


# ---- rotation

def rotate(x_TNH: np.ndarray, cos_TR: np.ndarray, sin_TR: np.ndarray) -> np.ndarray:
    """Rotates each head's pairs (x[r], x[r + R]) by their angles: NeoX pairing, halves and not neighbours."""
    if (x_TNH.dtype != np.float32 or cos_TR.dtype != np.float32 or sin_TR.dtype != np.float32 or x_TNH.ndim != 3 or x_TNH.shape[2] % 2
            or cos_TR.shape != sin_TR.shape or cos_TR.shape != (x_TNH.shape[0], x_TNH.shape[2] // 2)):
        raise mismatch(x_TNH, cos_TR, sin_TR)
    out = np.empty(x_TNH.size, np.float32)
    if out.size:
        rotate_heads(x_TNH.ravel(), cos_TR.ravel(), sin_TR.ravel(), x_TNH.shape[1], x_TNH.shape[2] // 2, out, threads_for(out.size))
    return out.reshape(x_TNH.shape)


@inline
def _rotated_part(x, cos, sin, n_head, n_pairs, out, first, end):
    """Heads first..end-1, counted across all rows."""
    for head in range(first, end):
        angle, pairs = 4 * n_pairs * (head // n_head), 8 * n_pairs * head
        for r in range(0, n_pairs, LANES):
            n = min(LANES, n_pairs - r)
            low, high = pairs + 4 * r, pairs + 4 * (n_pairs + r)
            a, b, c, s = _load(at(x, low), n), _load(at(x, high), n), _load(at(cos, angle + 4 * r), n), _load(at(sin, angle + 4 * r), n)
            _store(at(out, low), sub_f32(mul_f32(a, c), mul_f32(b, s)), n)
            _store(at(out, high), add_f32(mul_f32(b, c), mul_f32(a, s)), n)


@kernel(parallel=True)
def rotate_heads(x, cos, sin, n_head, n_pairs, out, n):
    """`rotate` on n threads."""
    a, c, s, to, heads = address(x), address(cos), address(sin), address(out), x.size // (2 * n_pairs)
    if n == 1:
        _rotated_part(a, c, s, n_head, n_pairs, to, 0, heads)
    else:
        for part in prange(n):
            thread = np.int64(part)
            _rotated_part(a, c, s, n_head, n_pairs, to, thread * heads // n, (thread + 1) * heads // n)
