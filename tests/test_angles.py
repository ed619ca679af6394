"""RoPE's cosines, sines and powers: the values that a good math library gives, with bits that no library decides."""

import hashlib
from fractions import Fraction

import numpy as np

from refimpl.model.rotation import angles_at
from refimpl.reference.angles import HALF_PI, cos_sin, power
from refimpl.reference.ops import rope_angles, rope_frequencies

REAL = ((256, 1e4), (512, 1e6))         # head width and base of sliding and full layers in all five models


def table(pos_T):
    """(cos, sin) of both kinds of layers, float32."""
    return [rope_angles(pos_T, rope_frequencies(width, base, np.ones(width // 2, np.float32))) for width, base in REAL]


def test_the_table_of_the_real_models_has_known_bits():
    pos_T = np.concatenate([np.arange(512), np.arange(512, 1 << 20, 4099)])
    digest = hashlib.sha256(b"".join(values.tobytes() for pair in table(pos_T) for values in pair)).hexdigest()
    assert digest == "bf975e79b99ebc45503b72d68bdf9c84ee14df4304da0b6d82c25a6555344eb8"


def test_the_table_is_that_of_the_math_library_rounded_to_float32():
    """Once compared at every position up to 2^20: of 403 million numbers all were equal (glibc 2.36)."""
    pos_T = np.random.default_rng(0).integers(0, 1 << 20, 500)
    for (width, base), (cos, sin) in zip(REAL, table(pos_T)):
        exponent = (np.arange(0, width, 2, dtype=np.float32) / np.float32(width)).astype(np.float64)
        frequency_R = (1.0 / np.float64(base) ** exponent).astype(np.float32)
        angle = (pos_T.astype(np.float32)[:, None] * frequency_R).astype(np.float64)
        for ours, theirs in ((cos, np.cos(angle)), (sin, np.sin(angle))):
            assert np.array_equal(ours, theirs.astype(np.float32))


def test_cosine_and_sine_are_within_an_ulp_in_every_quarter_and_near_its_ends():
    rng = np.random.default_rng(1)
    ends = (np.arange(1, 4000) * (np.pi / 2)).astype(np.float32)
    x = np.concatenate([ends, np.nextafter(ends, np.float32(0)), rng.uniform(0, 2**24, 4000).astype(np.float32),
                        np.ldexp(rng.standard_normal(4000), rng.integers(-140, 20, 4000)).astype(np.float32)]).astype(np.float64)
    for ours, theirs in zip(cos_sin(x), (np.cos(x), np.sin(x))):
        assert np.all(np.abs(ours - theirs) <= 1.5 * np.spacing(np.abs(theirs)))
    assert [float(v[0]) for v in cos_sin(np.zeros(1))] == [1.0, 0.0]
    assert [v.shape for v in cos_sin(np.zeros((3, 4, 5)))] == [(3, 4, 5)] * 2


def test_products_with_the_parts_of_half_pi_are_exact():
    for part in HALF_PI[:2]:
        for n in (2**24 - 1, 2**23 + 1, 11_184_811):
            assert Fraction(n) * Fraction(part) == Fraction(n * part)


def test_powers():
    assert power(1e4, np.array([0, 0.25, 0.5, 1])).tolist() == [1.0, 10.0, 100.0, 10_000.0]
    assert power(1.0, np.array([0, 0.7])).tolist() == [1.0, 1.0]
    rng = np.random.default_rng(2)
    for base in (1.0, 2.5, 1e4, 1e6, 1e12, *rng.uniform(1, 1e7, 20)):
        exponent = rng.uniform(0, 1, 50)
        want = np.float64(base) ** exponent
        assert np.all(np.abs(power(base, exponent) - want) <= np.spacing(want))


def test_tables_of_64_positions_are_the_same_angles():
    rng, frequency_R = np.random.default_rng(1), rope_frequencies(64, 1e4, np.ones(32, np.float32))
    for n in (1, 2, 8, 9):
        for first in (0, 60, 63, 64, 100_000):
            for pos_T in (np.arange(first, first + n), rng.integers(0, 1 << 20, n)):
                for got, want in zip(angles_at(pos_T, frequency_R), rope_angles(pos_T, frequency_R)):
                    assert got.dtype == np.float32 and np.array_equal(got, want)
