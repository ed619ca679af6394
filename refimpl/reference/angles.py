"""Cosine, sine and powers in float64 for RoPE, with the same bits on every machine: the last bit of a math library's is not.

Cosine and sine are made of + - * and rounding to an integer, which IEEE 754 defines to the bit; powers of decimal integers.
"""

import math
from decimal import Context, Decimal

import numpy as np

# pi/2 as a sum: the first two have 29 bits, so that their product with an integer below 2^24 is exact (Cody & Waite 1980, chapter 8)
HALF_PI = tuple(map(float.fromhex, ("0x1.921fb54p+0", "0x1.10b4612p-30", "-0x1.676733ae8fe48p-60")))
PER_HALF_PI = float.fromhex("0x1.45f306dc9c883p-1")
# Taylor's series in r^2 of (cos r - 1 + r^2 / 2) / r^4 and (sin r - r) / r^3, highest power first; what is left out is below 2^-62
SERIES = np.array([[[(-1) ** k / math.factorial(2 * k + 4)], [(-1) ** (k + 1) / math.factorial(2 * k + 3)]] for k in range(7, -1, -1)])
SIGNS = np.array([[1.0, -1.0, -1.0, 1.0], [1.0, 1.0, -1.0, -1.0]])          # of cosine and sine, by quarter of the circle
DIGITS = Context(prec=30)


def cos_sin(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cos x, sin x), float64, of angles in radians that are float32 numbers, held as float64. Error below 0.75 ulp for |x| < 2^24."""
    flat = x.ravel()
    n = np.rint(flat * PER_HALF_PI)
    near = flat - n * HALF_PI[0]                        # exact
    more = n * HALF_PI[1]                               # exact
    difference = near - more
    rest = (near - difference - more) - n * HALF_PI[2]
    r = difference + rest
    rest = (difference - r) + rest                      # r + rest = x - n pi/2, within 2^-85
    square = r * r
    series = SERIES[0] * square
    for coefficient in SERIES[1:-1]:
        series += coefficient
        series *= square
    series += SERIES[-1]
    short = r.astype(np.float32).astype(np.float64)     # its square is exact
    left = (r - short) + rest
    half = short * short * 0.5
    first = 1.0 - half
    cos = first + ((1.0 - first - half) + (square * square * series[0] - left * (short + 0.5 * left)))
    sin = r + (r * square * series[1] + rest * first)
    both, quarter = np.stack((cos, sin)), n.astype(np.int64) & 3
    both = np.where(quarter & 1 == 1, both[::-1], both) * SIGNS.take(quarter, axis=1)
    return both[0].reshape(x.shape), both[1].reshape(x.shape)


def power(base: float, exponent_R: np.ndarray) -> np.ndarray:
    """base^exponent for every exponent, float64 (R,): to 28 digits, then rounded."""
    log = DIGITS.ln(Decimal(base))
    return np.array([float(DIGITS.exp(DIGITS.multiply(log, Decimal(float(e))))) for e in exponent_R])
