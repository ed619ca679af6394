"""Weights that lie on a grid are found there again, and all others are rounded no worse than by the usual rule."""

import numpy as np
import pytest

from refimpl.formats.blocks import BLOCKS, fields_of
from refimpl.formats.codecs import dequantize, quantize
from refimpl.formats.floats import dequantize_bf16, quantize_bf16
from refimpl.formats.lattice import find_lattice, quantize_q4_0_on_lattice

F32 = np.float32
N = 3000


def as_bf16(x):
    return dequantize_bf16(quantize_bf16(np.ascontiguousarray(x, F32)))


def as_f16(x):
    return x.astype(np.float16).astype(F32)


STORED = {"F32": (lambda x: x, 2.0 ** -24), "F16": (as_f16, 2.0 ** -11), "BF16": (as_bf16, 2.0 ** -8)}
LEVELS = {"with -8": (-8, 7), "without": (-7, 7), "with +8": (-7, 8), "3 bits": (-4, 3), "2 bits": (-2, 1), "ternary": (-1, 1)}


def lattices(rng, low, high, scale):
    """Random blocks d * q with levels low .. high, half of them normal (the outer levels rare), half uniform."""
    normal = np.clip(np.rint(rng.normal(0, (high - low) / 6, (N, 32))), low, high)
    q = np.where(rng.random((N, 1)) < 0.5, normal, rng.integers(low, high + 1, (N, 32))).astype(F32)
    d = scale(np.exp(rng.uniform(-8, 2, (N, 1))).astype(F32))
    return d, q


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("scale", [as_f16, as_bf16], ids=["float16 scales", "bfloat16 scales"])
def test_every_code_of_a_random_lattice_is_recovered(levels, stored, scale):
    rng = np.random.default_rng(1)
    d, q = lattices(rng, *LEVELS[levels], scale)
    store, unit = STORED[stored]
    x = store(d * q)
    found = find_lattice(x)
    assert found.exact.all()
    # The scale found is a whole multiple of the true one (coarser, where the levels have a common divisor): codes follow from it.
    multiple = np.rint(found.d.astype(F32) / d[:, 0])
    assert (multiple != 0)[np.any(q, axis=1)].all()
    assert np.array_equal(found.q * multiple[:, None], q), "code errors"
    again = dequantize(quantize_q4_0_on_lattice(x), "Q4_0")
    assert np.array_equal(store(again), x), "other numbers would be stored"
    assert (np.abs(again - d * q) <= 2 * unit * np.abs(d * q)).all()
    if stored != "BF16":
        assert np.array_equal(again, d * q), "a format that holds the products loses nothing"


def test_the_usual_rule_loses_what_the_lattice_keeps():
    """Levels -7 .. 7: the rule puts the largest on -8 and all others between levels."""
    rng = np.random.default_rng(2)
    d, q = lattices(rng, -7, 7, as_bf16)
    x = as_bf16(d * q)
    careful, naive = (dequantize(raw, "Q4_0") for raw in (quantize_q4_0_on_lattice(x), quantize(x, "Q4_0")))
    size = np.sqrt(np.mean(x ** 2))
    assert np.sqrt(np.mean((naive - x) ** 2)) > 0.05 * size
    assert np.sqrt(np.mean((careful - x) ** 2)) < 0.003 * size


def test_the_coarsest_lattice_is_taken():
    x = np.zeros((3, 32), F32)
    x[0, :4] = 0.5, -0.5, 1, 0              # 1, -1, 2: not 4, -4, 8
    x[1, 5] = -3                            # a single weight
    found = find_lattice(x)
    assert found.q[0, :4].tolist() == [1, -1, 2, 0] and found.d[0] == 0.5
    assert abs(found.q[1, 5]) == 1 and found.restored()[1, 5] == -3
    assert found.exact.all() and not found.q[2].any() and found.d[2] == 0


def test_levels_on_both_sides_at_8_are_no_lattice_of_q4_0():
    x = np.full((1, 32), 7, F32)
    x[0, :2] = 8, -8
    found = find_lattice(x)
    assert not found.exact[0] and np.abs(found.restored() - x).max() <= 1


def test_scales_that_float16_does_not_hold_are_found_to_its_rounding():
    rng = np.random.default_rng(3)
    d, q = lattices(rng, -8, 7, lambda x: x)
    found = find_lattice(as_bf16(d * q))
    assert found.exact.all()
    assert np.abs(found.restored() - d * q).max() <= (np.abs(d * q) * (2.0 ** -8 + 2.0 ** -11)).max()


@pytest.mark.parametrize("spread", [1e-3, 1.0])
def test_ordinary_weights_are_on_no_lattice_and_never_worse_off(spread):
    rng = np.random.default_rng(4)
    for x in (rng.normal(0, spread, (N, 32)), rng.standard_t(2, (N, 32)) * spread, rng.uniform(-spread, spread, (N, 32)),
              np.sign(rng.normal(size=(N, 32))) * spread + rng.normal(0, spread / 10, (N, 32)).round(4)):
        x = x.astype(F32)
        x[:5, 7] = -np.abs(x[:5]).max(axis=1)
        x[:5, 9] = -x[:5, 7]                                # the largest twice, once with either sign
        found = find_lattice(x)
        error = np.sum((found.restored() - x) ** 2, axis=1)
        rule = np.sum((dequantize(quantize(x, "Q4_0"), "Q4_0") - x) ** 2, axis=1)
        assert found.exact.mean() < 0.001
        assert (error <= rule * (1 + 1e-5)).all() and error.sum() < 0.97 * rule.sum()


def test_bytes_are_q4_0_of_any_shape():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(3, 5, 96)).astype(F32)
    raw = quantize_q4_0_on_lattice(x)
    assert raw.shape == (3, 5, 54) and raw.dtype == np.uint8
    found = find_lattice(x.reshape(-1, 32))
    assert np.array_equal(dequantize(raw, "Q4_0").reshape(-1, 32), found.restored())
    assert np.array_equal(fields_of(raw, BLOCKS["Q4_0"])["d"].reshape(-1), found.d)
    big = rng.normal(size=(20000, 64)).astype(F32)          # more than one piece
    assert np.array_equal(quantize_q4_0_on_lattice(big)[12345], quantize_q4_0_on_lattice(big[12345]))
    assert quantize_q4_0_on_lattice(np.zeros((0, 64), F32)).shape == (0, 36)


def test_numbers_at_the_edges():
    tiny = np.full((2, 32), 1e-12, F32)                     # float16 has no such scale: zeros, as by the usual rule
    assert not find_lattice(tiny).restored().any() and not find_lattice(tiny).exact.any()
    assert find_lattice(np.full((1, 32), -0.0, F32)).exact[0]
    small = (np.arange(32) % 8 * F32(3e-7)).reshape(1, 32).astype(F32)
    assert np.isfinite(find_lattice(small).restored()).all()
    for bad in (np.nan, np.inf, -np.inf, 3e38):
        x = np.ones((1, 32), F32)
        x[0, 3] = bad
        with pytest.raises(ValueError, match="cannot quantize"):
            quantize_q4_0_on_lattice(x)
    with pytest.raises(ValueError, match="whole number of blocks"):
        quantize_q4_0_on_lattice(np.ones((1, 33), F32))
