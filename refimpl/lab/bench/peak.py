"""How fast this processor multiplies and adds at most: the innermost instructions of the kernels, and nothing else, on registers.

Integers: the dot product of 4 unsigned and 4 signed bytes, `vpdpbusd` where the instruction set has it, on AVX2 `vpmaddubsw`, `vpmaddwd`
and `vpaddd`. What kernels lack of it goes into loads, unpacking and scales; where they sum in 16 bits they can be above. Floats: fused
multiply-adds. The activations change from turn to turn: of products that do not change a compiler does one.
"""

import time

import numpy as np
from numba import prange

from refimpl.kernels.cores.threads import running
from refimpl.kernels.machine.intrinsics import (
    add_f32,
    add_i32,
    address,
    at,
    dot2,
    dot4_i16,
    dot16,
    dot16_int8,
    fma,
    load_f32,
    load_u8,
    splat_f32,
    splat_i32,
    store_f32,
    store_i32,
)
from refimpl.kernels.machine.isa import HALF_TILES, ISA
from refimpl.kernels.machine.jit import kernel, per_row
from refimpl.kernels.machine.narrow import load_u8_narrow, splat_i32_narrow
from refimpl.kernels.machine.unpack import PAIRS

EACH = tuple(range(12 if ISA == "avx512" else 5))       # sums side by side, so that none waits for the one before; all stay in registers
TURNS = 1 << 16
TURN_BYTES = 64         # activations that the loop goes through again and again, 16 in each turn
load_codes, splat_int, N_CODES = (load_u8_narrow, splat_i32_narrow, 32) if HALF_TILES else (load_u8, splat_i32, 64)
ONE, ZERO, PAIR = np.float32(1), np.int32(0), np.int32(0x10001)


def _at_once(total, codes, activations):
    return dot16(total, codes, codes, codes, codes, activations)


def _at_once_int8(total, codes, activations):
    return dot16_int8(total, codes, codes, codes, codes, activations)


def _by_pairs(total, codes, activations):
    for k in range(4):
        total = dot2(total, splat_int(PAIR), dot4_i16(splat_int(ZERO), codes, at(activations, 4 * k)))
    return total


_dot = per_row(_by_pairs if PAIRS else _at_once_int8 if ISA == "dotprod" else _at_once)


@per_row
def _codes(pointer, i):
    return load_codes(at(pointer, 64 * i))


@per_row
def _integers(i):
    return splat_int(np.int32(i))


@per_row
def _floats(i):
    return splat_f32(np.float32(i))


@per_row
def _add_product(a, b, total):
    return fma(a, b, total)


@kernel(parallel=True)
def dots(code_NC, x_X, turns, out_N16):
    """`turns` times four dot products of each of EACH vectors of codes, by every thread. Writes sums, so that none can be left out."""
    for thread in prange(len(out_N16)):
        x, codes, total = address(x_X), _codes(address(code_NC), EACH), _integers(EACH)
        for turn in range(turns):
            total = _dot(total, codes, at(x, 16 * turn % TURN_BYTES))
        whole = total[0]
        for i in range(1, len(EACH)):
            whole = add_i32(whole, total[i])
        store_i32(at(address(out_N16), 64 * thread), whole)


@kernel(parallel=True)
def products(x_X, turns, out_N16):
    """The same in float32."""
    for thread in prange(len(out_N16)):
        one, total = load_f32(address(x_X)), _floats(EACH)
        for _ in range(turns):
            total = _add_product(one, splat_f32(ONE), total)
        whole = total[0]
        for i in range(1, len(EACH)):
            whole = add_f32(whole, total[i])
        store_f32(at(address(out_N16), 64 * thread), whole)


def peak(floats: bool, n_threads: int, turns: int = TURNS) -> float:
    """Multiply-adds a second, all threads together. The first call compiles."""
    rng = np.random.default_rng(0)
    codes, x = rng.integers(0, 16, (len(EACH), 64), np.uint8), rng.integers(0, 128, TURN_BYTES, np.uint8)
    with running(n_threads):
        began = time.perf_counter()
        if floats:
            products(np.ones(16, np.float32), turns, np.empty((n_threads, 16), np.float32))
        else:
            dots(codes, x, turns, np.empty((n_threads, 16), np.int32))
        return n_threads * turns * len(EACH) * (16 if floats else 4 * N_CODES) / (time.perf_counter() - began)
