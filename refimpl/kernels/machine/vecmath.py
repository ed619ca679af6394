"""Exponential, tanh and GELU on 16 lanes, from intrinsics alone: a math library gives other bits on other machines.

The coefficients were fitted for this file: least squares on 2000 Chebyshev nodes, reweighted where the error is largest (Lawson 1961) until
the largest relative error no longer falls, then rounded to float32. The errors below are the largest among every fifth float32 of the
range, against float64, in units of the last place (ulp). NaN stays NaN.
"""

import numpy as np

from refimpl.kernels.machine.intrinsics import (
    abs_f32,
    add_f32,
    div_f32,
    fma,
    max_f32,
    min_f32,
    mul_f32,
    power_of_two,
    round_to_i32,
    splat_f32,
    sub_f32,
    to_f32,
    where_less,
)
from refimpl.kernels.machine.jit import inline

LOWEST, HIGHEST = np.float32(-88), np.float32(89)              # exp is 0 and infinite there
# written as digits: log and sqrt need not give the same bits everywhere
PER_LN2, LN2, LN2_REST = np.float32(1.4426950408889634), np.float32(0.69314718246459961), np.float32(-1.9046542999577680e-9)
EXP = tuple(np.float32(c) for c in (0.49999994, 0.16666521, 0.04166839, 0.008368745, 0.0013814539))       # (e^r - 1 - r) / r^2
SMALL = np.float32(0.625)
TANH = tuple(np.float32(c) for c in (-0.3333328, 0.13331442, -0.053739715, 0.020639086, -0.0057049864))   # (tanh(x) / x - 1) / x^2, in x^2
GELU_1, GELU_3 = np.float32(-1.5957691216057308), np.float32(-1.5957691216057308 * 0.044715)      # -2 sqrt(2/pi) is the first
GELU_FLOOR = np.float32(-50)                                   # gelu is -0 from here on down


@inline
def _polynomial4(x, c):
    """c[0] + c[1] x + ... + c[4] x^4."""
    p = fma(x, splat_f32(c[4]), splat_f32(c[3]))
    p = fma(x, p, splat_f32(c[2]))
    p = fma(x, p, splat_f32(c[1]))
    return fma(x, p, splat_f32(c[0]))


@inline
def exp16(x):
    """e^x = 2^n e^r, n the integer nearest to x / ln 2. Error 1.01 ulp; exactly 1 at 0.

    Below -87.34 denormal, below -87.68 zero. Infinite from 88.38 on, a little early: float32 reaches to 88.72.
    """
    x = max_f32(min_f32(x, splat_f32(HIGHEST)), splat_f32(LOWEST))          # NaN passes through
    n = round_to_i32(mul_f32(max_f32(splat_f32(LOWEST), x), splat_f32(PER_LN2)))         # without NaN, which has no integer
    whole = to_f32(n)
    r = fma(whole, splat_f32(-LN2), x)
    r = fma(whole, splat_f32(-LN2_REST), r)
    p = fma(mul_f32(r, r), _polynomial4(r, EXP), r)
    return mul_f32(add_f32(p, splat_f32(np.float32(1))), power_of_two(n))


@inline
def tanh16(x):
    """tanh(x). Error 1.32 ulp, for the smallest x too; odd.

    Up to 0.625 x times a polynomial in x^2, above 1 - 2 / (e^2x + 1).
    """
    one, two = splat_f32(np.float32(1)), splat_f32(np.float32(2))
    size, square = abs_f32(x), mul_f32(x, x)
    near = mul_f32(x, fma(square, _polynomial4(square, TANH), one))
    far = sub_f32(one, div_f32(two, add_f32(exp16(mul_f32(two, size)), one)))
    zero = splat_f32(np.float32(0))
    far = where_less(x, zero, sub_f32(zero, far), far)
    return where_less(size, splat_f32(SMALL), near, far)


@inline
def gelu16(x):
    """x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3): "gelu_pytorch_tanh" (Hendrycks & Gimpel 2016, section 2).

    Written as x / (1 + e^-2u), without cancellation. Error 1.9 ulp above 0, 2.6 down to -1, and below that, where the rounding of u
    is multiplied by u, at most 7.4e-8 |x|. -0 from -50 down to -infinity.
    """
    x = max_f32(x, splat_f32(GELU_FLOOR))
    u = mul_f32(x, fma(mul_f32(x, x), splat_f32(GELU_3), splat_f32(GELU_1)))
    return div_f32(x, add_f32(splat_f32(np.float32(1)), exp16(u)))
