"""`q8` arithmetic: ggml's rule written out in plain loops, against the reference's arrays."""

from fractions import Fraction

import numpy as np
import pytest
from exact import rounded_once
from shapes import prompt, random_model, reference, worst, write_model

from refimpl.formats.matrix import Matrix
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import dequantize, quantize
from refimpl.reference.activations import quantize_activations
from refimpl.reference.matmul import FloatMinimum, IntegerMinimum, integer_parts, matmul, matmul_q8
from refimpl.reference.ops import fma

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]


def random_matrix(block: str, n_rows: int, n_cols: int, seed: int = 0) -> Matrix:
    rng = np.random.default_rng(seed)
    return Matrix(quantize(rng.standard_normal((n_rows, n_cols)).astype(np.float32), block), block)


@pytest.mark.parametrize("block", TYPES)
def test_integers_and_scales_are_the_weights(block):
    """d * q and the minimum, put together again, are the dequantized weights bit for bit, on random bytes too."""
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (20, BLOCKS[block].n_bytes * 3), dtype=np.uint8)
    for name, kind, _ in BLOCKS[block].fields:       # finite scales
        if kind == "<f2":
            raw.view(BLOCKS[block].dtype)[name] = rng.uniform(-2, 2, (20, 3)).astype(np.float16)
    w = Matrix(raw, block)
    p = integer_parts(w)
    with np.errstate(over="ignore"):                # the largest exponents of MXFP4
        values = p.d_OB[..., None] * p.q_OBQ.astype(np.float32)
    if isinstance(p.minimum, IntegerMinimum):
        values = values - p.minimum.dmin_OB[..., None] * p.minimum.low_OBQ.astype(np.float32)
    elif isinstance(p.minimum, FloatMinimum):
        values = values + p.minimum.m_OB[..., None]
    want = dequantize(raw, block)
    assert np.array_equal(values.reshape(want.shape), want)


def plain_loops(x_D: np.ndarray, w: Matrix, row: int) -> np.float32:
    """One output in scalar code: integer sums inside a block, one exactly rounded multiply-add a block and minimum."""
    p, n = integer_parts(w), BLOCKS[w.type].elements
    total = np.float32(0)
    for b in range(len(x_D) // n):
        x = x_D[b * n:(b + 1) * n]
        at = int(np.argmax(np.abs(x)))
        if n == 256:
            inverse = np.float32(-127) / x[at]
            d = np.float32(1) / inverse
            stored = d
        else:
            d, inverse = np.abs(x[at]) / np.float32(127), np.float32(127) / np.abs(x[at])
            stored = np.float32(np.float16(d))
        q = [min(127, round(float(np.float32(v) * inverse))) for v in x]
        dot = sum(a * int(c) for a, c in zip(q, p.q_OBQ[row, b]))
        scale = stored * p.d_OB[row, b]
        total = rounded_once(Fraction(float(scale)) * Fraction(float(np.float32(dot))) + Fraction(float(total)))
        if isinstance(p.minimum, IntegerMinimum):
            low = sum(a * int(c) for a, c in zip(q, p.minimum.low_OBQ[row, b]))
            scale = -stored * p.minimum.dmin_OB[row, b]
            total = rounded_once(Fraction(float(scale)) * Fraction(float(np.float32(low))) + Fraction(float(total)))
        elif isinstance(p.minimum, FloatMinimum):
            s = np.float32(np.float16(d * np.float32(sum(q))))
            total = rounded_once(Fraction(float(s)) * Fraction(float(p.minimum.m_OB[row, b])) + Fraction(float(total)))
    return total


@pytest.mark.parametrize("block", TYPES)
def test_equals_plain_loops_bit_for_bit(block):
    w = random_matrix(block, 5, 512)
    x_TD = np.random.default_rng(2).standard_normal((3, 512)).astype(np.float32)
    got = matmul_q8(x_TD, w)
    want = np.array([[plain_loops(x, w, row) for row in range(5)] for x in x_TD], np.float32)
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("block", TYPES)
def test_is_near_the_exact_product_and_independent_of_the_batch(block):
    w = random_matrix(block, 40, 768)
    x_TD = np.random.default_rng(3).standard_normal((6, 768)).astype(np.float32)
    got = matmul_q8(x_TD, w)
    assert 1e-5 < worst(got, matmul(x_TD, w)) < 0.02
    assert np.array_equal(got, np.concatenate([matmul_q8(x_TD[t:t + 1], w) for t in range(6)]))


def test_plain_weights_stay_exact():
    w = random_matrix("F16", 4, 64)
    x_TD = np.random.default_rng(4).standard_normal((2, 64)).astype(np.float32)
    assert np.array_equal(matmul_q8(x_TD, w), matmul(x_TD, w))


def test_zero_rows_and_halves():
    x = np.zeros((2, 64), np.float32)
    x[1, :3] = 127, 0.5, 1.5                 # scale 1: halves go to even
    r = quantize_activations(x, "Q4_0")
    assert not r.q_TBQ[0].any() and not r.d_TB[0].any() and r.q_TBQ[1, 0, :3].tolist() == [127, 0, 2] and r.d_TB[1].tolist() == [1, 0]
    assert not quantize_activations(np.zeros((1, 256), np.float32), "Q4_K").d_TB.any()


def test_fma_rounds_once():
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal(500).astype(np.float32) for _ in range(2))
    for c in (rng.standard_normal(500).astype(np.float32), (-a * b).astype(np.float32)):
        want = [rounded_once(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c)]
        assert np.array_equal(fma(a, b, c), np.array(want, np.float32))


def test_fma_where_rounding_twice_would_show():
    """A product exactly halfway between two float32, and a summand far below that decides; once more among the denormals."""
    x = np.float32([1 + 2**-12])                 # x * x is half a step above a float32
    assert fma(x, x, np.float32([2**-60])) == np.float32(1 + 2**-11 + 2**-23)
    assert fma(x, x, np.float32([-(2**-60)])) == np.float32(1 + 2**-11) == fma(x, x, np.float32([0]))
    a, b, c = (np.float32([v]) for v in (2**-75 * (1 + 2**-20), 2**-75 * (1 - 2**-20), 2**-127 + 2**-149))
    assert fma(a, b, c) == c                     # half a step less 2^-190, above an odd number of steps


def test_whole_model_any_chunking(tmp_path):
    path = write_model(tmp_path / "m.gguf", random_model("26B-A4B"), "Q4_0")
    model, ids = reference(path, arithmetic="q8"), prompt(30)
    whole = model.logits(ids)
    cache = model.new_cache()
    assert np.array_equal(model.head(np.concatenate([model.prefill(ids[i:i + 7], cache) for i in range(0, 30, 7)])), whole)
    assert 1e-4 < worst(whole, reference(path).logits(ids)) < 0.5
    with pytest.raises(ValueError, match="exact arithmetic"):
        reference(path, arithmetic="q8", weights="float32")
