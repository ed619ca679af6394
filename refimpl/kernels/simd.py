"""A small vector vocabulary for Numba: words that a kernel uses like ordinary functions and that stay in registers.

Every word is defined by its NumPy body, which is its meaning: a kernel called as plain Python runs on these bodies (slowly, with every
access checked against the array it points into). In a kernel compiled by Numba each word becomes a few instructions, chosen for the
instruction set named by `ISA`:

    avx512     512-bit registers, `vpdpbusd` (AVX-512 VNNI)
    avx2       256-bit registers, `vpmaddubsw` and `vpmaddwd`
    portable   plain vector IR, whatever the machine makes of it

All bodies of a word give the same bits. Integers are exact, every float word is one correctly rounded IEEE operation per lane, and a
multiply-add is fused only where `fma` is written. `REFIMPL_ISA` forces a lower instruction set; it is read at import.

A vector is one of three types. `U8x64` holds 64 bytes: 16 lanes of 4. `I32x16` and `F32x16` hold 16 lanes. A lane is a row of the
weight matrix throughout, so there is never a sum across lanes.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.typing import signature
from numba.extending import lower_builtin, register_model, type_callable

LANES = 16
BYTE, SHORT, INT, HALF, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()
ORDER = ("portable", "avx2", "avx512")
NEEDS = {"avx512": ("avx512f", "avx512bw", "avx512vnni"), "avx2": ("avx2", "fma", "f16c"), "portable": ()}
TARGETS = {"avx2": ("x86-64-v3", "+avx2,+fma,+f16c"), "portable": ("x86-64", "")}      # what LLVM may use under a forced set


def best_isa(features) -> str:
    """The highest instruction set whose needs are among the host's features (LLVM's names -> bool)."""
    return next(isa for isa in reversed(ORDER) if all(features.get(need, False) for need in NEEDS[isa]))


def chosen_isa(wanted: str | None, best: str) -> str:
    """`wanted` (REFIMPL_ISA), or the best. Raises ValueError for a name there is none of, or one this machine cannot run."""
    if not wanted:
        return best
    if wanted not in ORDER:
        raise ValueError(f"REFIMPL_ISA={wanted}: expected one of {', '.join(reversed(ORDER))}")
    if ORDER.index(wanted) > ORDER.index(best):
        raise ValueError(f"REFIMPL_ISA={wanted}: this machine has {best} at most")
    return wanted


BEST = best_isa(llvm.get_host_cpu_features())
ISA = chosen_isa(os.environ.get("REFIMPL_ISA"), BEST)
if ISA != BEST and llvm.get_process_triple().startswith("x86_64"):
    # so that nothing around the words uses more than the forced set either
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = TARGETS[ISA]


# ---- types

class Vector(types.Type):
    """A value in vector registers."""

    def __init__(self, name: str, element: ir.Type, lanes: int):
        self.llvm = ir.VectorType(element, lanes)
        super().__init__(name)


@register_model(Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.llvm)


U8x64, I32x16, F32x16 = Vector("U8x64", BYTE, 64), Vector("I32x16", INT, LANES), Vector("F32x16", FLOAT, LANES)
Address = types.CPointer(types.uint8)
F64x16, I64x16 = ir.VectorType(ir.DoubleType(), LANES), ir.VectorType(ir.IntType(64), LANES)      # inside of words only


class Pointer:
    """An address in plain Python: an array's bytes and a place in them. Reading or writing outside of them raises IndexError."""

    def __init__(self, data: np.ndarray, offset: int):
        self.data, self.offset = data, offset

    def span(self, n_bytes: int) -> np.ndarray:
        """The next `n_bytes` bytes, as a view."""
        if not 0 <= self.offset <= len(self.data) - n_bytes:
            raise IndexError(f"bytes {self.offset} to {self.offset + n_bytes} of an array of {len(self.data)}")
        return self.data[self.offset:self.offset + n_bytes]


# ---- defining words

@dataclass(frozen=True)
class Word:
    """A word: its meaning, its types, and which instruction sets have a body of their own."""

    meaning: Callable
    result: types.Type
    parameters: tuple[types.Type, ...]
    bodies: dict[str, Callable]


WORDS: dict[str, Word] = {}


def word(result: types.Type, *parameters: types.Type, **bodies: Callable):
    """Makes a word of a NumPy function. `bodies` are emitters `(builder, *values) -> value`: `every`, or one for each instruction set."""

    def define(meaning: Callable) -> Callable:
        emit = bodies.get(ISA) or bodies["every"]
        takes = signature(result, *parameters)

        @type_callable(meaning)
        def typing(context):        # Numba reads the number of parameters off the function
            return (lambda: takes, lambda a: takes, lambda a, b: takes, lambda a, b, c: takes)[len(parameters)]

        @lower_builtin(meaning, *parameters)
        def lowering(context, builder, sig, args):
            value = emit(builder, *args)
            return context.get_dummy_value() if value is None else value

        WORDS[meaning.__name__] = Word(meaning, result, parameters, bodies)
        return meaning
    return define


def _call(builder, name: str, result: ir.Type, *args):
    return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name), args)


def _splat(builder, scalar, lanes: int = LANES):
    vector = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, INT(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))


def _lanes(value: int) -> ir.Constant:
    """The same int32 in every lane."""
    return ir.Constant(I32x16.llvm, [value] * LANES)


def _load(builder, pointer, vector: ir.Type):
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=1)


def _store(builder, pointer, value):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)


def _part(builder, v, first: int, n: int):
    return builder.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), ir.Constant(ir.VectorType(INT, n), list(range(first, first + n))))


def _join(builder, a, b):
    n = a.type.count
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, 2 * n), list(range(2 * n))))


def _by_halves(builder, emit: Callable, *vectors):
    """Runs an emitter on the lower and the upper half of every vector and joins the results."""
    return _join(builder, *(emit(*(_part(builder, v, side * v.type.count // 2, v.type.count // 2) for v in vectors)) for side in (0, 1)))


# ---- memory

def address(array: np.ndarray) -> Pointer:
    """Where a contiguous array's bytes begin. Take it before a parallel loop: a slice inside one counts references across threads."""
    return Pointer(array.reshape(-1).view(np.uint8), 0)


@type_callable(address)
def _address_type(context):
    return lambda array: signature(Address, array) if isinstance(array, types.Array) and array.layout == "C" else None


@lower_builtin(address, types.Array)
def _address_of(context, builder, sig, args):
    return builder.bitcast(context.make_array(sig.args[0])(context, builder, args[0]).data, BYTE.as_pointer())


@word(Address, Address, types.intp, every=lambda builder, pointer, n_bytes: builder.gep(pointer, [n_bytes]))
def at(pointer, n_bytes):
    """The address `n_bytes` further on."""
    return Pointer(pointer.data, pointer.offset + n_bytes)


@word(U8x64, Address, every=lambda builder, pointer: _load(builder, pointer, U8x64.llvm))
def load_u8(pointer):
    """64 bytes."""
    return pointer.span(64).copy()


@word(F32x16, Address, every=lambda builder, pointer: _load(builder, pointer, F32x16.llvm))
def load_f32(pointer):
    """16 float32."""
    return pointer.span(64).copy().view(np.float32)


def _half_hardware(builder, pointer):
    return builder.fpext(_load(builder, pointer, ir.VectorType(HALF, LANES)), F32x16.llvm)


def _half_portable(builder, pointer):
    """In integers (without F16C LLVM would call a library that need not be there): moves the fields, mends the exponent by a product."""
    h = builder.zext(_load(builder, pointer, ir.VectorType(SHORT, LANES)), I32x16.llvm)
    magnitude = builder.and_(h, _lanes(0x7FFF))
    moved = builder.shl(magnitude, _lanes(13))
    number = builder.bitcast(builder.fmul(builder.bitcast(moved, F32x16.llvm), ir.Constant(F32x16.llvm, [2.0 ** 112] * LANES)), I32x16.llvm)
    not_finite = builder.icmp_signed(">=", magnitude, _lanes(0x7C00))
    value = builder.select(not_finite, builder.or_(moved, _lanes(0x7F800000)), number)
    sign = builder.shl(builder.and_(h, _lanes(0x8000)), _lanes(16))
    return builder.bitcast(builder.or_(value, sign), F32x16.llvm)


@word(F32x16, Address, avx512=_half_hardware, avx2=_half_hardware, portable=_half_portable)
def load_f16(pointer):
    """16 float16, as float32. Exact."""
    return pointer.span(32).copy().view(np.float16).astype(np.float32)


@word(I32x16, Address, every=lambda builder, pointer: builder.zext(_load(builder, pointer, ir.VectorType(BYTE, LANES)), I32x16.llvm))
def load_u8_as_i32(pointer):
    """16 unsigned bytes, each as an int32 lane."""
    return pointer.span(16).astype(np.int32)


@word(I32x16, Address, every=lambda builder, pointer: builder.sext(_load(builder, pointer, ir.VectorType(BYTE, LANES)), I32x16.llvm))
def load_i8_as_i32(pointer):
    """16 signed bytes, each as an int32 lane."""
    return pointer.span(16).view(np.int8).astype(np.int32)


@word(types.void, Address, F32x16, every=_store)
def store_f32(pointer, v):
    """Writes 16 float32."""
    pointer.span(64)[:] = v.view(np.uint8)


@word(types.void, Address, I32x16, every=_store)
def store_i32(pointer, v):
    """Writes 16 int32."""
    pointer.span(64)[:] = v.view(np.uint8)


@word(types.void, Address, U8x64, every=_store)
def store_u8(pointer, v):
    """Writes 64 bytes."""
    pointer.span(64)[:] = v


# ---- bytes

@word(U8x64, U8x64, every=lambda builder, v: builder.and_(v, ir.Constant(U8x64.llvm, [15] * 64)))
def low_nibbles(v):
    """The low 4 bits of every byte."""
    return v & np.uint8(15)


@word(U8x64, U8x64, every=lambda builder, v: builder.lshr(v, ir.Constant(U8x64.llvm, [4] * 64)))
def high_nibbles(v):
    """The high 4 bits of every byte."""
    return v >> np.uint8(4)


def _bits(builder, v, shift, mask):
    shifted = builder.lshr(v, _splat(builder, builder.trunc(shift, BYTE), 64))
    return builder.and_(shifted, _splat(builder, builder.trunc(mask, BYTE), 64))


@word(U8x64, U8x64, types.intp, types.intp, every=_bits)
def bits(v, shift, mask):
    """(v >> shift) & mask, byte by byte; shift 0 to 7."""
    return (v >> np.uint8(shift)) & np.uint8(mask)


@word(U8x64, U8x64, U8x64, types.intp,
      every=lambda builder, a, b, shift: builder.or_(a, builder.shl(b, _splat(builder, builder.trunc(shift, BYTE), 64))))
def or_shifted(a, b, shift):
    """a | (b << shift), byte by byte; shift 0 to 7. Bits shifted out are lost."""
    return a | (b << np.uint8(shift)).astype(np.uint8)


# ---- integer products: 4 weights of each row with the same 4 activations

def _four(builder, activations, lanes: int = LANES):
    return _splat(builder, _load(builder, activations, INT), lanes)


def _dot4_avx512(builder, total, weights, activations):
    return _call(builder, "llvm.x86.avx512.vpdpbusd.512", I32x16.llvm, total, builder.bitcast(weights, I32x16.llvm),
                 _four(builder, activations))


def _dot4_avx2(builder, total, weights, activations):
    four = builder.bitcast(_four(builder, activations, 8), ir.VectorType(BYTE, 32))
    ones, words = ir.Constant(ir.VectorType(SHORT, 16), [1] * 16), ir.VectorType(SHORT, 16)

    def half(w):
        pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", words, w, four)
        return _call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(INT, 8), pairs, ones)
    return builder.add(total, _by_halves(builder, half, weights))


def _dot4_portable(signed: bool):
    """Emits the sum of 4 products a lane from 16-bit halves, in the form that LLVM knows as multiply-and-add-pairs on SSE2 and Arm."""
    words, eight = ir.VectorType(SHORT, 32), ir.Constant(ir.VectorType(SHORT, 32), [8] * 32)

    def signed_bytes(builder, v):
        return builder.ashr(builder.shl(v, eight), eight), builder.ashr(v, eight)

    def unsigned_bytes(builder, v):
        return builder.and_(v, ir.Constant(words, [255] * 32)), builder.lshr(v, eight)

    def emit(builder, total, weights, activations):
        w = (signed_bytes if signed else unsigned_bytes)(builder, builder.bitcast(weights, words))
        x = signed_bytes(builder, builder.bitcast(_four(builder, activations), words))
        nothing = ir.Constant(words, ir.Undefined)
        for a, b in zip(w, x):                                   # bytes 0 and 2 of each lane, then 1 and 3
            for k in (0, 1):
                index = ir.Constant(I32x16.llvm, list(range(k, 32, 2)))
                factors = (builder.sext(builder.shuffle_vector(v, nothing, index), I32x16.llvm) for v in (a, b))
                total = builder.add(total, builder.mul(*factors))
        return total
    return emit


@word(I32x16, I32x16, U8x64, Address, avx512=_dot4_avx512, avx2=_dot4_avx2, portable=_dot4_portable(signed=False))
def dot4(total, weights, activations):
    """total[r] + sum over j < 4 of weights[4 r + j] * activations[j]: unsigned weights of at most 128, int8 activations.

    (Above 128 the 16-bit sums of AVX2 could overflow; `dot4_signed` takes the full range of a byte.)
    """
    x = activations.span(4).view(np.int8).astype(np.int32)
    return total + (weights.reshape(LANES, 4).astype(np.int32) * x).sum(axis=1, dtype=np.int32)


def _dot4_signed_avx512(builder, total, weights, activations):
    # vpdpbusd wants one side unsigned: weights + 128, and 128 times the activations' sum is taken off again
    shifted = builder.xor(weights, ir.Constant(U8x64.llvm, [128] * 64))
    four = _four(builder, activations)
    total = _call(builder, "llvm.x86.avx512.vpdpbusd.512", I32x16.llvm, total, builder.bitcast(shifted, I32x16.llvm), four)
    excess = _call(builder, "llvm.x86.avx512.vpdpbusd.512", I32x16.llvm, ir.Constant(I32x16.llvm, [0] * LANES),
                   ir.Constant(I32x16.llvm, [-0x7F7F7F80] * LANES), four)          # bytes of 128
    return builder.sub(total, excess)


def _dot4_signed_avx2(builder, total, weights, activations):
    words, ints = ir.VectorType(SHORT, 16), ir.VectorType(INT, 8)
    four = builder.sext(builder.bitcast(_four(builder, activations, 4), ir.VectorType(BYTE, 16)), words)

    def quarter(w):         # 16 weights: 4 lanes, as 8 sums of pairs
        return _call(builder, "llvm.x86.avx2.pmadd.wd", ints, builder.sext(w, words), four)
    pairs = _by_halves(builder, lambda half: _by_halves(builder, quarter, half), weights)
    even, odd = (ir.Constant(I32x16.llvm, list(range(k, 32, 2))) for k in (0, 1))
    nothing = ir.Constant(pairs.type, ir.Undefined)
    return builder.add(total, builder.add(builder.shuffle_vector(pairs, nothing, even), builder.shuffle_vector(pairs, nothing, odd)))


@word(I32x16, I32x16, U8x64, Address, avx512=_dot4_signed_avx512, avx2=_dot4_signed_avx2, portable=_dot4_portable(signed=True))
def dot4_signed(total, weights, activations):
    """As `dot4`, with the bytes of `weights` read as int8."""
    x = activations.span(4).view(np.int8).astype(np.int32)
    return total + (weights.view(np.int8).reshape(LANES, 4).astype(np.int32) * x).sum(axis=1, dtype=np.int32)


# ---- lanes

@word(I32x16, types.int32, every=_splat)
def splat_i32(x):
    """x in every lane."""
    return np.full(LANES, x, np.int32)


@word(F32x16, types.float32, every=_splat)
def splat_f32(x):
    """x in every lane."""
    return np.full(LANES, x, np.float32)


@word(I32x16, I32x16, I32x16, every=lambda builder, a, b: builder.add(a, b))
def add_i32(a, b):
    """a + b, modulo 2^32."""
    return a + b


@word(I32x16, I32x16, I32x16, every=lambda builder, a, b: builder.mul(a, b))
def mul_i32(a, b):
    """a * b, modulo 2^32."""
    return a * b


@word(F32x16, I32x16, every=lambda builder, v: builder.sitofp(v, F32x16.llvm))
def to_f32(v):
    """int32 to float32, rounded to nearest even."""
    return v.astype(np.float32)


@word(F32x16, F32x16, F32x16, every=lambda builder, a, b: builder.fadd(a, b))
def add_f32(a, b):
    """a + b."""
    return a + b


@word(F32x16, F32x16, F32x16, every=lambda builder, a, b: builder.fmul(a, b))
def mul_f32(a, b):
    """a * b."""
    return a * b


def _fma_hardware(builder, a, b, c):
    return _call(builder, "llvm.fma.v16f32", F32x16.llvm, a, b, c)


def _fma_portable(builder, a, b, c):
    """In float64, because without FMA in hardware LLVM would call a slow function 16 times.

    Rounding the float64 sum again is harmless unless it lies halfway between two float32, or is so small that float32 keeps fewer bits of
    it. Only then comes the long way, which is the meaning below.
    """
    a, b, c = (builder.fpext(v, F64x16) for v in (a, b, c))
    product = builder.fmul(a, b)
    total = builder.fadd(product, c)
    raw = builder.bitcast(total, I64x16)
    low = builder.trunc(raw, I32x16.llvm)
    high = builder.and_(builder.trunc(builder.lshr(raw, ir.Constant(I64x16, [32] * LANES)), I32x16.llvm), _lanes(0x7FFFFFFF))
    halfway = builder.icmp_signed("==", builder.and_(low, _lanes(0x1FFFFFFF)), _lanes(0x10000000))
    tiny = builder.icmp_unsigned("<", builder.sub(high, _lanes(1)), _lanes((897 << 20) - 1))       # below 2^-126, but not 0
    special = builder.bitcast(builder.or_(halfway, tiny), ir.IntType(LANES))
    short = builder.block
    with builder.if_then(builder.icmp_unsigned("!=", special, ir.IntType(LANES)(0)), likely=False):
        odd, long = _rounded_to_odd(builder, product, total, c), builder.block
    chosen = builder.phi(F64x16)
    chosen.add_incoming(total, short)
    chosen.add_incoming(odd, long)
    return builder.fptrunc(chosen, F32x16.llvm)


def _rounded_to_odd(builder, product, total, c):
    """product + c, of which `total` is the rounded value: where it is not exact, the last bit is made 1."""
    back = builder.fsub(total, product)
    error = builder.fadd(builder.fsub(product, builder.fsub(total, back)), builder.fsub(c, back))
    raw, one, zero = builder.bitcast(total, I64x16), ir.Constant(I64x16, [1] * LANES), ir.Constant(I64x16, [0] * LANES)
    # one step of the last bit: up in magnitude where the error has the sign of the sum, down where it has not
    same_sign = builder.icmp_signed(">=", builder.xor(raw, builder.bitcast(error, I64x16)), zero)
    stepped = builder.add(raw, builder.select(same_sign, one, ir.Constant(I64x16, [-1] * LANES)))
    even = builder.icmp_signed("==", builder.and_(raw, one), zero)
    infinite = ir.Constant(I64x16, [0x7FF0000000000000] * LANES)
    finite = builder.icmp_signed("!=", builder.and_(raw, infinite), infinite)
    inexact = builder.fcmp_ordered("!=", error, ir.Constant(F64x16, [0.0] * LANES))
    to_odd = builder.and_(builder.and_(even, finite), inexact)
    return builder.bitcast(builder.select(to_odd, stepped, raw), F64x16)


@word(F32x16, F32x16, F32x16, F32x16, avx512=_fma_hardware, avx2=_fma_hardware, portable=_fma_portable)
def fma(a, b, c):
    """a * b + c, rounded once.

    In NumPy: the product is exact in float64; the sum is rounded to odd there (Boldo & Melquiond 2008), so that rounding it again to
    float32 is rounding once.
    """
    with np.errstate(all="ignore"):
        product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        total = product + c
        back = total - product
        error = (product - (total - back)) + (c - back)
        even = (total.view(np.int64) & 1) == 0
        to_odd = np.isfinite(total) & (error != 0) & even
        return np.where(to_odd, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total).astype(np.float32)
