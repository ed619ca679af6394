"""Exact arithmetic for the tests of rounding."""

from fractions import Fraction

import numpy as np


def rounded_once(x: Fraction) -> np.float32:
    """Nearest float32, halves to even, from an exact fraction."""
    near = np.float32(float(x))
    options = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(options, key=lambda o: (abs(Fraction(float(o)) - x), int(o.view(np.uint32)) & 1))
