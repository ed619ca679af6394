"""Intrinsics that make narrow vectors, of 8 lanes: half a tile. Those that take vectors take narrow ones too (intrinsics.py)."""

import numpy as np
from llvmlite import ir
from numba.core import types

from refimpl.kernels.machine.intrinsics import half_from_bits
from refimpl.kernels.machine.isa import (
    BYTE,
    FLOAT,
    HALF,
    LANES,
    SHORT,
    Address,
    F32x8,
    I32x8,
    U8x32,
    intrinsic,
    lanes,
    load,
    splat,
)

N = LANES // 2
HALVES, BYTES, SHORTS = ir.VectorType(HALF, N), ir.VectorType(BYTE, N), ir.VectorType(SHORT, N)


@intrinsic(U8x32, Address, every=lambda builder, pointer: load(builder, pointer, U8x32.llvm))
def load_u8_narrow(pointer):
    """32 bytes."""
    return pointer.span(32).copy()


@intrinsic(F32x8, Address, every=lambda builder, pointer: load(builder, pointer, F32x8.llvm))
def load_f32_narrow(pointer):
    """8 float32."""
    return pointer.span(32).copy().view(np.float32)


def _half_hardware(builder, pointer):
    return builder.fpext(load(builder, pointer, HALVES), F32x8.llvm)


def _half_portable(builder, pointer):
    return half_from_bits(builder, builder.zext(load(builder, pointer, SHORTS), I32x8.llvm))


@intrinsic(F32x8, Address, avx512=_half_hardware, avx2=_half_hardware, neon=_half_hardware, portable=_half_portable)
def load_f16_narrow(pointer):
    """8 float16, as float32. Exact."""
    return pointer.span(16).copy().view(np.float16).astype(np.float32)


@intrinsic(I32x8, Address, every=lambda builder, pointer: builder.zext(load(builder, pointer, BYTES), I32x8.llvm))
def load_u8_as_i32_narrow(pointer):
    """8 unsigned bytes, each as an int32 lane."""
    return pointer.span(8).astype(np.int32)


@intrinsic(I32x8, Address, every=lambda builder, pointer: builder.sext(load(builder, pointer, BYTES), I32x8.llvm))
def load_i8_as_i32_narrow(pointer):
    """8 signed bytes, each as an int32 lane."""
    return pointer.span(8).view(np.int8).astype(np.int32)


def _load_e8m0(builder, pointer):
    e = builder.zext(load(builder, pointer, BYTES), I32x8.llvm)
    denormal = builder.shl(lanes(0x00200000, N), builder.and_(e, lanes(1, N)))
    normal = builder.shl(builder.sub(e, lanes(1, N)), lanes(23, N))
    return builder.bitcast(builder.select(builder.icmp_signed("<", e, lanes(2, N)), denormal, normal), F32x8.llvm)


@intrinsic(F32x8, Address, every=_load_e8m0)
def load_e8m0_narrow(pointer):
    """8 unsigned bytes e, each as 2^(e - 128). Exact; the first two are denormal."""
    return np.ldexp(np.float32(1), pointer.span(8).astype(np.int32) - 128)


@intrinsic(I32x8, types.int32, every=lambda builder, x: splat(builder, x, N))
def splat_i32_narrow(x):
    """x in every lane."""
    return np.full(N, x, np.int32)


@intrinsic(F32x8, types.float32, every=lambda builder, x: splat(builder, x, N))
def splat_f32_narrow(x):
    """x in every lane."""
    return np.full(N, x, np.float32)


@intrinsic(F32x8, Address, every=lambda builder, pointer: splat(builder, load(builder, pointer, FLOAT), N))
def splat_f32_from_narrow(pointer):
    """One float32 in memory, in every lane."""
    return np.full(N, pointer.span(4).view(np.float32)[0])
