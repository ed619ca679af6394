"""What the tests of kernels compute: random weights and rows, the shapes of attention, the cases of the small kernels."""

import numpy as np
import pytest

from refimpl.formats.matrix import Matrix
from refimpl.formats.quants.codecs import quantize
from refimpl.kernels import ops, tower_attention
from refimpl.model.blocks import layer_of

INTEGER = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")
TYPES = (*INTEGER, "F16", "BF16", "F32")
# compiled in every run: one type for each way through a product. In plain Python the others are beside their twins too
OFTEN = {"matmul_q8": ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "F16", "BF16", "F32"), "matmul": ("Q4_0", "F16", "BF16", "F32")}
WIDTHS = (1, 5, 15, 16, 17, 64, 100, 2816)          # of rows that the small kernels are given


def often(cases):
    """Parameters of a test that compiles kernels: cases as text, such as "matmul_q8 Q4_0 7 rows". Types that are rare are exhaustive."""
    def is_often(case):
        name, *words = case.split()
        chosen = OFTEN[name] if name in OFTEN else ("Q4_0", "Q6_K", "F32") if name == "matmul_chosen" else ("Q4_0",)
        return all(word in chosen for word in words if word in TYPES)
    return [pytest.param(case, marks=() if is_often(case) else pytest.mark.exhaustive, id=case) for case in cases]


def matrix(block: str, *shape: int, seed: int = 0) -> Matrix:
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(shape[-1] ** -0.5)
    raw = np.ascontiguousarray(w.astype({"F32": np.float32, "F16": np.float16}[block]) if block in ("F32", "F16") else quantize(w, block))
    return Matrix(raw.view(np.uint8).reshape(*shape[:-1], -1), block)


def rows(n: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(np.uint8), b.view(np.uint8))


# ---- attention

def cache_arrays(n_tok, n_head, n_kv, head_dim, n_slots, dtype, seed=0, sharpness=1.5):
    """Random queries, keys and values; scores have a standard deviation of `sharpness`."""
    rng = np.random.default_rng(seed)
    q = (rng.standard_normal((n_tok, n_head, head_dim)) * sharpness / head_dim**0.5).astype(np.float32)
    k, v = (rng.standard_normal((n_slots, n_kv, head_dim)).astype(dtype) for _ in range(2))
    return q, k, v


def causal(n_tok, past, window):
    """Ranges of n_tok rows after `past` positions."""
    end = past + 1 + np.arange(n_tok)
    return np.maximum(0, end - window), end


#        T, N, K,  H, keys, past, window
ATTENTION = {
    "one key": (1, 1, 1, 16, 1, 0, 1),
    "two keys, later": (2, 2, 1, 16, 2, 40, 1),
    "prompt": (9, 4, 2, 32, 9, 0, 99),
    "a chunk to the brim": (3, 2, 2, 48, 128, 61, 64),
    "keys repeated inside of a chunk": (7, 4, 1, 16, 90, 100, 70),
    "keys repeated within a chunk": (5, 3, 3, 80, 21, 200, 17),
    "spans": (6, 2, 1, 16, 1300, 1200, 1100),
    "spans, far on": (5, 4, 2, 32, 1100, 5000, 1024),
    "decode": (1, 8, 1, 64, 700, 650, 2000),
    "eight heads to a key": (2, 16, 2, 16, 300, 250, 999),
    "more rows than a unit of work": (70, 2, 1, 16, 150, 30, 80),
}


def attention_case(name, dtype=np.float16):
    n_tok, n_head, n_kv, head_dim, n_different, past, window = ATTENTION[name]
    q, k, v = cache_arrays(n_tok, n_head, n_kv, head_dim, n_different, dtype)
    ranges = causal(n_tok, past, window)
    return q, in_blocks(k, v, *ranges), *ranges


def in_blocks(k, v, first, end):
    """The positions of these ranges in blocks: position p has the key and value number p modulo how many there are."""
    place = np.arange(first.min(), end.max()) % len(k)
    return layer_of(k[place], v[place], int(first.min()))


def tower_cases():
    """(name, function, arguments) of the towers' attention: awkward widths, one row, more rows than a span."""
    rng = np.random.default_rng(6)
    for n_tok, n_head, head_dim in ((1, 1, 16), (70, 2, 24), (600, 2, 72)):
        q, k, v = (normal(rng, n_tok, n_head, head_dim, scale=0.5) for _ in range(3))
        yield f"attend_all {n_tok} {head_dim}", tower_attention.attend_all, (q, k, v)
        yield f"attend_band {n_tok} {head_dim}", tower_attention.attend_band, (q, k, v, normal(rng, 12, n_head, head_dim), 50.0)


# ---- the functions between the matrix products

def normal(rng, *shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def angles(rng, n_tok, n_pairs):
    angle = rng.uniform(0, 100, (n_tok, n_pairs))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def ops_cases():
    """(name, function, arguments) of all shapes that are compared bit by bit, small ones and some that threads share."""
    rng = np.random.default_rng(1)
    for width in WIDTHS:
        x, weight = normal(rng, 3, width, scale=4), normal(rng, width)
        yield f"rms_norm {width}", ops.rms_norm, (x, weight, 1e-6)
        yield f"rms_normalise {width}", ops.rms_normalise, (x, 1e-6)
        yield f"gated {width}", ops.gated, (x, normal(rng, 3, width))
        yield f"softcap {width}", ops.softcap, (x, 3.0)
        yield f"layer_norm {width}", ops.layer_norm, (x, weight, normal(rng, width), 1e-5)
        yield f"silu {width}", ops.silu, (x,)
        yield f"glu {width}", ops.glu, (normal(rng, 3, 2 * width, scale=4),)
        yield f"limit {width}", ops.limit, (x, -0.7, 1.3)
    for n_tok, n_head, head_dim in ((1, 1, 2), (3, 2, 10), (2, 3, 34), (9, 4, 64)):
        yield f"rotate {head_dim}", ops.rotate, (normal(rng, n_tok, n_head, head_dim), *angles(rng, n_tok, head_dim // 2))
    yield "rms_norm heads", ops.rms_norm, (normal(rng, 5, 2, 256), normal(rng, 256), 1e-6)
    yield "rms_norm many", ops.rms_norm, (normal(rng, 301, 741), normal(rng, 741), 1e-6)         # rounding of sums shows in a few rows only
    yield "layer_norm many", ops.layer_norm, (normal(rng, 301, 741), normal(rng, 741), normal(rng, 741), 1e-5)
    yield "silu many", ops.silu, (normal(rng, 50_003),)
    yield "gated many", ops.gated, (normal(rng, 50_003), normal(rng, 50_003))
    yield "softcap many", ops.softcap, (normal(rng, 7, 5_001), 30.0)
    yield "rotate many", ops.rotate, (normal(rng, 41, 7, 130), *angles(rng, 41, 65))
