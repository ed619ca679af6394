"""SIMD intrinsics for Numba: functions that compile to a few vector instructions.

Each is defined by its NumPy body, the reference: a kernel called as plain Python runs on these (slowly, with every access checked against
the array it points into). In a compiled kernel an intrinsic becomes a few instructions of the instruction set `ISA` (isa.py), and its
vectors stay in registers. All bodies give the same bits: integers are exact, every float intrinsic is correctly rounded IEEE arithmetic
lane by lane, and a multiply-add is fused only where `fma` is written.

There are three vector types: `U8x64` holds 64 bytes, as 16 lanes of 4; `I32x16` and `F32x16` hold 16 lanes. Kernels for AVX2
and Arm use these with 8 lanes too (`U8x32`, `I32x8`, `F32x8`); intrinsics marked `narrow` take and return either.
"""

from functools import partial

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.typing import signature
from numba.extending import lower_builtin, type_callable

from refimpl.kernels.machine import arm
from refimpl.kernels.machine.isa import (
    BYTE,
    FLOAT,
    HALF,
    INT,
    LANES,
    SHORT,
    Address,
    F32x16,
    F64x16,
    I32x16,
    I64x16,
    Pointer,
    U8x64,
    as_lanes,
    by_128_bits,
    by_registers,
    call,
    intrinsic,
    join,
    lanes,
    load,
    part,
    resized,
    splat,
    store,
)

# ---- memory

def address(array: np.ndarray) -> Pointer:
    """Where a contiguous array's bytes begin. Numba frees an array after the last line that names it, so take the address where it is
    used, in the body of a parallel loop too. (A slice there would count references across threads; this does not.)
    """
    return Pointer(array.reshape(-1).view(np.uint8), 0)


@type_callable(address)
def _address_type(context):
    return lambda array: signature(Address, array) if isinstance(array, types.Array) and array.layout == "C" else None


@lower_builtin(address, types.Array)
def _address_of(context, builder, sig, args):
    return builder.bitcast(context.make_array(sig.args[0])(context, builder, args[0]).data, BYTE.as_pointer())


@intrinsic(Address, Address, types.intp, every=lambda builder, pointer, n_bytes: builder.gep(pointer, [n_bytes]))
def at(pointer, n_bytes):
    """The address `n_bytes` further on."""
    return Pointer(pointer.data, pointer.offset + n_bytes)


@intrinsic(U8x64, Address, every=lambda builder, pointer: load(builder, pointer, U8x64.llvm))
def load_u8(pointer):
    """64 bytes."""
    return pointer.span(64).copy()


@intrinsic(F32x16, Address, every=lambda builder, pointer: load(builder, pointer, F32x16.llvm))
def load_f32(pointer):
    """16 float32."""
    return pointer.span(64).copy().view(np.float32)


def _half_hardware(builder, pointer):
    return builder.fpext(load(builder, pointer, ir.VectorType(HALF, LANES)), F32x16.llvm)


def half_from_bits(builder, h):
    """In integers (without F16C LLVM would call a library that need not exist): moves the fields and corrects the exponent by a product."""
    n, floats = h.type.count, resized(F32x16.llvm, h.type.count)
    magnitude = builder.and_(h, lanes(0x7FFF, n))
    moved = builder.shl(magnitude, lanes(13, n))
    number = builder.bitcast(builder.fmul(builder.bitcast(moved, floats), ir.Constant(floats, [2.0 ** 112] * n)), h.type)
    not_finite = builder.icmp_signed(">=", magnitude, lanes(0x7C00, n))
    value = builder.select(not_finite, builder.or_(moved, lanes(0x7F800000, n)), number)
    sign = builder.shl(builder.and_(h, lanes(0x8000, n)), lanes(16, n))
    return builder.bitcast(builder.or_(value, sign), floats)


def _half_portable(builder, pointer):
    return half_from_bits(builder, builder.zext(load(builder, pointer, ir.VectorType(SHORT, LANES)), I32x16.llvm))


@intrinsic(F32x16, Address, avx512=_half_hardware, avx2=_half_hardware, neon=_half_hardware, portable=_half_portable)
def load_f16(pointer):
    """16 float16, as float32. Exact."""
    return pointer.span(32).copy().view(np.float16).astype(np.float32)


@intrinsic(I32x16, Address, every=lambda builder, pointer: builder.zext(load(builder, pointer, ir.VectorType(BYTE, LANES)), I32x16.llvm))
def load_u8_as_i32(pointer):
    """16 unsigned bytes, each as an int32 lane."""
    return pointer.span(16).astype(np.int32)


@intrinsic(I32x16, Address, every=lambda builder, pointer: builder.sext(load(builder, pointer, ir.VectorType(BYTE, LANES)), I32x16.llvm))
def load_i8_as_i32(pointer):
    """16 signed bytes, each as an int32 lane."""
    return pointer.span(16).view(np.int8).astype(np.int32)


def _load_e8m0(builder, pointer):
    e = builder.zext(load(builder, pointer, ir.VectorType(BYTE, LANES)), I32x16.llvm)
    denormal = builder.shl(lanes(0x00200000), builder.and_(e, lanes(1)))
    normal = builder.shl(builder.sub(e, lanes(1)), lanes(23))
    return builder.bitcast(builder.select(builder.icmp_signed("<", e, lanes(2)), denormal, normal), F32x16.llvm)


@intrinsic(F32x16, Address, every=_load_e8m0)
def load_e8m0(pointer):
    """16 unsigned bytes e, each as 2^(e - 128). Exact; the first two are denormal."""
    return np.ldexp(np.float32(1), pointer.span(16).astype(np.int32) - 128)


@intrinsic(types.void, Address, F32x16, narrow=True, every=store)
def store_f32(pointer, v):
    """Writes all lanes."""
    pointer.span(4 * len(v))[:] = v.view(np.uint8)


@intrinsic(types.void, Address, I32x16, narrow=True, every=store)
def store_i32(pointer, v):
    """Writes all lanes."""
    pointer.span(4 * len(v))[:] = v.view(np.uint8)


@intrinsic(I32x16, Address, every=lambda builder, pointer: load(builder, pointer, I32x16.llvm))
def load_i32(pointer):
    """16 int32."""
    return pointer.span(64).copy().view(np.int32)


@intrinsic(types.void, Address, U8x64, narrow=True, every=store)
def store_u8(pointer, v):
    """Writes all bytes."""
    pointer.span(len(v))[:] = v


def _inside(builder, n):
    """A mask of the first n lanes."""
    return builder.icmp_signed("<", ir.Constant(I32x16.llvm, list(range(LANES))), splat(builder, builder.trunc(n, INT)))


def _load_part(builder, pointer, n):
    pointer = builder.bitcast(pointer, F32x16.llvm.as_pointer())
    nothing = ir.Constant(F32x16.llvm, [0.0] * LANES)
    return call(builder, "llvm.masked.load.v16f32.p0", F32x16.llvm, pointer, INT(1), _inside(builder, n), nothing)


def _store_part(builder, pointer, v, n):
    pointer = builder.bitcast(pointer, F32x16.llvm.as_pointer())
    call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), v, pointer, INT(1), _inside(builder, n))


@intrinsic(F32x16, Address, types.intp, every=_load_part)
def load_f32_part(pointer, n):
    """n float32 (at most 16), then zeros."""
    return np.append(pointer.span(4 * n).copy().view(np.float32), np.zeros(LANES - n, np.float32))


@intrinsic(types.void, Address, F32x16, types.intp, every=_store_part)
def store_f32_part(pointer, v, n):
    """Writes the first n lanes (at most 16)."""
    pointer.span(4 * n)[:] = v[:n].view(np.uint8)


def _load_bf16(builder, pointer):
    raw = builder.zext(load(builder, pointer, ir.VectorType(SHORT, LANES)), I32x16.llvm)
    return builder.bitcast(builder.shl(raw, lanes(16)), F32x16.llvm)


@intrinsic(F32x16, Address, every=_load_bf16)
def load_bf16(pointer):
    """16 bfloat16, as float32. Exact."""
    return (pointer.span(32).copy().view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_half_portable(builder, v):
    """In integers. Above the smallest normal half: rounds 13 bits off by adding just under half of their range, and one more when odd.
    Below: adding 0.5 lets the float adder round at the right place.
    """
    raw = builder.bitcast(v, I32x16.llvm)
    magnitude = builder.and_(raw, lanes(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, lanes(13)), lanes(1))
    normal = builder.lshr(builder.add(builder.add(magnitude, lanes(0xFFF - (112 << 23))), odd), lanes(13))
    shifted = builder.fadd(builder.bitcast(magnitude, F32x16.llvm), ir.Constant(F32x16.llvm, [0.5] * LANES))
    small = builder.sub(builder.bitcast(shifted, I32x16.llvm), lanes(0x3F000000))
    half = builder.select(builder.icmp_signed("<", magnitude, lanes(0x38800000)), small, normal)
    half = builder.select(builder.icmp_signed(">=", magnitude, lanes(0x477FF000)), lanes(0x7C00), half)
    half = builder.select(builder.icmp_signed(">", magnitude, lanes(0x7F800000)), lanes(0x7E00), half)
    sign = builder.lshr(builder.and_(raw, lanes(-0x80000000)), lanes(16))
    return builder.trunc(builder.or_(half, sign), ir.VectorType(SHORT, LANES))


def _to_half_hardware(builder, v):
    return builder.fptrunc(v, ir.VectorType(HALF, LANES))


@intrinsic(types.void, Address, I32x16,
           every=lambda builder, pointer, v: store(builder, pointer, builder.trunc(v, ir.VectorType(BYTE, LANES))))
def store_i8(pointer, v):
    """Writes the low byte of every lane."""
    pointer.span(16)[:] = v.astype(np.uint32).astype(np.uint8)


@intrinsic(types.void, Address, I32x16,
           every=lambda builder, pointer, v: store(builder, pointer, builder.trunc(v, ir.VectorType(SHORT, LANES))))
def store_i16(pointer, v):
    """Writes the low 16 bits of every lane."""
    pointer.span(32)[:] = v.astype(np.uint32).astype(np.uint16).view(np.uint8)


def _copy(n_bytes: int):
    kind = ir.IntType(8 * n_bytes)
    return lambda builder, to, source: store(builder, to, builder.load(builder.bitcast(source, kind.as_pointer()), align=1))


@intrinsic(types.void, Address, Address, every=_copy(1))
def copy1(to, source):
    """Copies a byte."""
    to.span(1)[:] = source.span(1)


@intrinsic(types.void, Address, Address, every=_copy(2))
def copy2(to, source):
    """Copies 2 bytes."""
    to.span(2)[:] = source.span(2)


@intrinsic(types.void, Address, Address, every=_copy(4))
def copy4(to, source):
    """Copies 4 bytes."""
    to.span(4)[:] = source.span(4)


def _prefetch(locality: int):
    return lambda builder, pointer: call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, INT(0), INT(locality), INT(1))


# on AVX2 into the first cache: Q6_K with one row, from a mapped file, 37-45 ms instead of 50 (Zen 1); other sets not measured
@intrinsic(types.void, Address, avx2=_prefetch(3), avxvnni=_prefetch(2), every=_prefetch(2))
def prefetch(pointer):
    """Hints that this address will be read soon. It need not be valid."""


def _take(builder, counter, n):
    return builder.atomic_rmw("add", builder.bitcast(counter, n.type.as_pointer()), n, "monotonic")


@intrinsic(types.intp, Address, types.intp, every=_take)
def take(counter, n):
    """Adds n to the int64 at this address and returns what it was before, in one step: no two threads are given the same."""
    number = counter.span(8).view(np.int64)
    before = int(number[0])
    number[0] += n
    return before


# ---- bytes

def _bytes(builder, byte, n: int):
    """An int64 of 0 to 255 in every byte of n lanes of int32."""
    return splat(builder, builder.mul(builder.trunc(byte, INT), INT(0x01010101)), n)


def _bits(builder, v, shift, mask):
    """By lanes of 32 bits, there is no shift of bytes; the mask clears what comes over from the next byte."""
    lane, kept = as_lanes(builder, v), builder.and_(mask, builder.lshr(mask.type(255), shift))
    shifted = builder.lshr(lane, splat(builder, builder.trunc(shift, INT), lane.type.count))
    return builder.bitcast(builder.and_(shifted, _bytes(builder, kept, lane.type.count)), v.type)


def _or_shifted(builder, a, b, shift):
    lane, kept = as_lanes(builder, b), builder.and_(builder.shl(shift.type(255), shift), shift.type(255))
    shifted = builder.shl(lane, splat(builder, builder.trunc(shift, INT), lane.type.count))
    return builder.or_(a, builder.bitcast(builder.and_(shifted, _bytes(builder, kept, lane.type.count)), a.type))


@intrinsic(U8x64, U8x64, types.intp, types.intp, narrow=True, every=_bits)
def bits(v, shift, mask):
    """(v >> shift) & mask, byte by byte; shift 0 to 7."""
    return (v >> np.uint8(shift)) & np.uint8(mask)


@intrinsic(U8x64, U8x64, U8x64, types.intp, narrow=True, every=_or_shifted)
def or_shifted(a, b, shift):
    """a | (b << shift), byte by byte; shift 0 to 7. Bits shifted out are lost."""
    return a | (b << np.uint8(shift)).astype(np.uint8)


def _fifth_bits(builder, bits_of_32, group):
    lane = as_lanes(builder, bits_of_32)
    n, shift = lane.type.count, builder.shl(builder.trunc(group, INT), INT(2))
    four = builder.and_(builder.lshr(lane, splat(builder, shift, n)), lanes(15, n))
    spread = builder.mul(four, lanes(0x00204081, n))         # bit j of the four to bit 8 j
    return builder.bitcast(builder.shl(builder.and_(spread, lanes(0x01010101, n)), lanes(4, n)), bits_of_32.type)


@intrinsic(U8x64, U8x64, types.intp, narrow=True, every=_fifth_bits)
def fifth_bits(bits_of_32, group):
    """Byte j of lane r: 16 if bit 4 * group + j of the lane (32 bits, one for each weight of a block) is set, else 0; group 0 to 7."""
    lane = bits_of_32.view(np.uint32) >> np.uint32(4 * group)
    return (((lane[:, None] >> np.arange(4, dtype=np.uint32)) & np.uint32(1)) << np.uint32(4)).astype(np.uint8).reshape(-1)


def _table(builder, first, last, n_bytes: int):
    """16 bytes over and over, from the int64s of their halves."""
    pair = builder.insert_element(ir.Constant(ir.VectorType(first.type, 2), ir.Undefined), first, INT(0))
    pair = builder.insert_element(pair, last, INT(1))
    index = ir.Constant(ir.VectorType(INT, n_bytes // 8), [0, 1] * (n_bytes // 16))
    return builder.bitcast(builder.shuffle_vector(pair, ir.Constant(pair.type, ir.Undefined), index), ir.VectorType(BYTE, n_bytes))


def _look_up_avx512(builder, v, first, last):
    return call(builder, "llvm.x86.avx512.pshuf.b.512", U8x64.llvm, _table(builder, first, last, 64), v)


def _look_up_avx2(builder, v, first, last):
    table = _table(builder, first, last, 32)
    return by_registers(builder, lambda half: call(builder, "llvm.x86.avx2.pshuf.b", table.type, table, half), v)


def _look_up_neon(builder, v, first, last):
    return arm.look_up(builder, v, _table(builder, first, last, 16))


def _look_up_portable(builder, v, first, last):
    """A tree of choices, bit by bit of the index: 8 pairs by the lowest, 4 by the next, ..."""
    entries = [splat(builder, builder.trunc(builder.lshr(half, half.type(8 * k)), BYTE), 64) for half in (first, last) for k in range(8)]
    for bit in (1, 2, 4, 8):
        chosen = builder.icmp_unsigned("!=", builder.and_(v, ir.Constant(U8x64.llvm, [bit] * 64)), ir.Constant(U8x64.llvm, [0] * 64))
        entries = [builder.select(chosen, odd, even) for even, odd in zip(entries[0::2], entries[1::2])]
    return entries[0]


@intrinsic(U8x64, U8x64, types.intp, types.intp, narrow=True, avx512=_look_up_avx512, avx2=_look_up_avx2, neon=_look_up_neon,
           portable=_look_up_portable)
def look_up(v, first, last):
    """Entry v[i] (0 to 15) of a table of 16 bytes, byte by byte. `first` holds entries 0 to 7, from its low bits up, `last` the others."""
    return np.array([first, last], np.int64).view(np.uint8)[v]


def _byte_of_lane(builder, v, j):
    shifted = builder.lshr(builder.bitcast(v, I32x16.llvm), splat(builder, builder.shl(builder.trunc(j, INT), INT(3))))
    return builder.and_(shifted, lanes(255))


@intrinsic(I32x16, U8x64, types.intp, every=_byte_of_lane)
def byte_of_lane(v, j):
    """Byte j (0 to 3) of every lane, as a number of 0 to 255."""
    return v.reshape(LANES, 4)[:, j].astype(np.int32)


@intrinsic(U8x64, U8x64, narrow=True, every=lambda builder, v: builder.xor(v, ir.Constant(v.type, [128] * v.type.count)))
def plus_128(v):
    """Signed bytes plus 128, as unsigned bytes."""
    return v ^ np.uint8(128)


def _shorts(first: int):
    """Bytes `first` and the next of every lane: extended by their signs once 128 is subtracted, which modulo 256 is adding it."""
    def emit(builder, v):
        chosen = ir.Constant(ir.VectorType(INT, 2 * LANES), [4 * lane + first + j for lane in range(LANES) for j in (0, 1)])
        two = builder.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), chosen)
        signed = builder.xor(two, ir.Constant(two.type, [128] * 2 * LANES))
        return builder.bitcast(builder.sext(signed, ir.VectorType(SHORT, 2 * LANES)), I32x16.llvm)
    return emit


@intrinsic(I32x16, U8x64, every=_shorts(0))
def low_shorts(v):
    """The first two bytes of every lane, 128 subtracted, as two int16."""
    return (v.reshape(LANES, 4)[:, :2].astype(np.int16) - np.int16(128)).reshape(-1).view(np.int32)


@intrinsic(I32x16, U8x64, every=_shorts(2))
def high_shorts(v):
    """The last two bytes of every lane, 128 subtracted, as two int16."""
    return (v.reshape(LANES, 4)[:, 2:].astype(np.int16) - np.int16(128)).reshape(-1).view(np.int32)


# ---- integer products: 4 weights of each row with the same 4 activations, or 16 with 16

def _four(builder, activations, lanes: int = LANES):
    return splat(builder, load(builder, activations, INT), lanes)


def _i16(builder, v):
    """The same bits as int16."""
    return builder.bitcast(v, ir.VectorType(SHORT, 2 * as_lanes(builder, v).type.count))


def _dot4_avx512(builder, total, weights, activations):
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", I32x16.llvm, total, builder.bitcast(weights, I32x16.llvm),
                 _four(builder, activations))


def _dot4_avxvnni(builder, total, weights, activations):
    eight, four = ir.VectorType(INT, 8), _four(builder, activations, 8)

    def half(t, w):
        return call(builder, "llvm.x86.avx512.vpdpbusd.256", eight, t, builder.bitcast(w, eight), four)
    return by_registers(builder, half, total, weights)


def _pairs_portable(builder, total, a, b):
    """Adds the products of 16-bit neighbours, in the form that LLVM knows as multiply-and-add-pairs on SSE2 and Arm."""
    n = total.type.count
    nothing = ir.Constant(ir.VectorType(SHORT, 2 * n), ir.Undefined)
    for k in (0, 1):
        index = ir.Constant(total.type, list(range(k, 2 * n, 2)))
        low_or_high = (builder.shuffle_vector(_i16(builder, v), nothing, index) for v in (a, b))
        total = builder.add(total, builder.mul(*(builder.sext(v, total.type) for v in low_or_high)))
    return total


def _dot4_portable(builder, total, weights, activations):
    w, x = _i16(builder, weights), _i16(builder, _four(builder, activations, total.type.count))
    byte, eight = (ir.Constant(w.type, [value] * w.type.count) for value in (255, 8))
    low, low_x = builder.and_(w, byte), builder.ashr(builder.shl(x, eight), eight)                                 # bytes 0 and 2
    total = _pairs_portable(builder, total, low, low_x)
    return _pairs_portable(builder, total, builder.lshr(w, eight), builder.ashr(x, eight))                         # 1 and 3


def _dot4_avx2(builder, total, weights, activations):
    """With both sides as int16."""
    shorts, ints = ir.VectorType(SHORT, 16), ir.VectorType(INT, 8)
    four = builder.sext(builder.bitcast(_four(builder, activations, 4), ir.VectorType(BYTE, 16)), shorts)

    def quarter(w):         # 16 weights: 4 lanes, as 8 sums of pairs
        return call(builder, "llvm.x86.avx2.pmadd.wd", ints, builder.zext(w, shorts), four)
    pairs = by_128_bits(builder, quarter, weights)
    even, odd = (ir.Constant(total.type, list(range(k, 2 * total.type.count, 2))) for k in (0, 1))
    nothing = ir.Constant(pairs.type, ir.Undefined)
    return builder.add(total, builder.add(builder.shuffle_vector(pairs, nothing, even), builder.shuffle_vector(pairs, nothing, odd)))


def _dot16_of(dot4):
    def emit(builder, total, *weights_and_activations):
        *weights, activations = weights_and_activations
        for k, w in enumerate(weights):
            total = dot4(builder, total, w, builder.gep(activations, [INT(4 * k)]))
        return total
    return emit


def _dot4_int8(builder, total, weights, activations):
    w, x = _i16(builder, weights), _i16(builder, _four(builder, activations, total.type.count))
    eight = ir.Constant(w.type, [8] * w.type.count)
    total = _pairs_portable(builder, total, *(builder.ashr(builder.shl(v, eight), eight) for v in (w, x)))
    return _pairs_portable(builder, total, *(builder.ashr(v, eight) for v in (w, x)))


def _add_products(total, weights, activations):
    """Weights (64 for every 4 activations) as numbers."""
    x = activations.span(4 * len(weights)).view(np.int8).astype(np.int32).reshape(-1, 1, 4)
    products = np.stack(weights).reshape(len(weights), -1, 4).astype(np.int32) * x
    return total + products.sum(axis=(0, 2), dtype=np.int32)


@intrinsic(I32x16, I32x16, U8x64, U8x64, U8x64, U8x64, Address, narrow=True, avx512=_dot16_of(_dot4_avx512),
           avxvnni=_dot16_of(_dot4_avxvnni), avx2=_dot16_of(_dot4_avx2), i8mm=arm.dot16("usdot"), portable=_dot16_of(_dot4_portable))
def dot16(total, w0, w1, w2, w3, activations):
    """total[r] + sum over j < 4 of w0[4 r + j] * activations[j], and so on with w1 and the next 4 activations, w2, w3: unsigned weights,
    int8 activations. Slow on AVX2, NEON and `sdot`.
    """
    return _add_products(total, (w0, w1, w2, w3), activations)


@intrinsic(I32x16, I32x16, U8x64, U8x64, U8x64, U8x64, Address, narrow=True, dotprod=arm.dot16("sdot"), every=_dot16_of(_dot4_int8))
def dot16_int8(total, w0, w1, w2, w3, activations):
    """The same for int8 weights."""
    return _add_products(total, [w.view(np.int8) for w in (w0, w1, w2, w3)], activations)


def _dot4_i16(is_signed: bool):
    def emit(builder, total, weights, activations):
        """Without `vpmaddubsw`: bytes 0 and 2, then bytes 1 and 3."""
        w, x = _i16(builder, weights), _i16(builder, _four(builder, activations, total.type.count))
        eight, extended = ir.Constant(w.type, [8] * w.type.count), builder.ashr if is_signed else builder.lshr
        w = builder.xor(w, ir.Constant(w.type, [-0x7F80] * w.type.count)) if is_signed else w
        low = builder.mul(extended(builder.shl(w, eight), eight), builder.ashr(builder.shl(x, eight), eight))
        high = builder.mul(extended(w, eight), builder.ashr(x, eight))
        return builder.bitcast(builder.add(_i16(builder, total), builder.add(low, high)), total.type)
    return emit


def _maddubs(builder, total, unsigned, signed):
    pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(SHORT, 16), unsigned, signed)
    return builder.bitcast(builder.add(_i16(builder, total), pairs), total.type)


def _dot4_i16_avx2(builder, total, weights, activations):
    four = builder.bitcast(_four(builder, activations, 8), ir.VectorType(BYTE, 32))
    return by_registers(builder, lambda total, w: _maddubs(builder, total, w, four), total, weights)


def _dot4_i16_signed_avx2(builder, total, weights, activations):
    """|w| * (x with the sign of w)."""
    four, wraps = builder.bitcast(_four(builder, activations, 8), ir.VectorType(BYTE, 32)), ir.Constant(ir.IntType(1), 0)    # |-128| is 128

    def register(total, w):
        w = builder.xor(w, ir.Constant(w.type, [128] * 32))
        x = call(builder, "llvm.x86.avx2.psign.b", w.type, four, w)
        return _maddubs(builder, total, call(builder, "llvm.abs.v32i8", w.type, w, wraps), x)
    return by_registers(builder, register, total, weights)


def _add_i16(total, weights, activations):
    x = activations.span(4).view(np.int8).astype(np.int32).reshape(2, 2)
    sums = (weights.astype(np.int32).reshape(-1, 2, 2) * x).sum(axis=2)
    return (total.view(np.int16) + sums.reshape(-1)).astype(np.int16).view(np.int32)


@intrinsic(I32x16, I32x16, U8x64, Address, narrow=True, avx2=_dot4_i16_avx2, every=_dot4_i16(False))
def dot4_i16(total, weights, activations):
    """Adds the products of unsigned weights and int8 activations in two int16 for every lane: of the first two of its four, and of the
    others. The sums must fit: weights of at most 128, or several calls in a row with smaller ones.
    """
    return _add_i16(total, weights, activations)


@intrinsic(I32x16, I32x16, U8x64, Address, narrow=True, avx2=_dot4_i16_signed_avx2, every=_dot4_i16(True))
def dot4_i16_signed(total, weights, activations):
    """The same for weights of 0 to 255 from which 128 is subtracted first, and activations of -127 to 127."""
    return _add_i16(total, weights.astype(np.int32) - 128, activations)


def _dot2_of(name: str, lanes: int):
    def emit(builder, total, a, b):
        return call(builder, name, ir.VectorType(INT, lanes), total, a, b)
    return emit


def _dot2_avx2(builder, total, a, b):
    def half(a, b):
        shorts = ir.VectorType(SHORT, 16)
        return call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(INT, 8), builder.bitcast(a, shorts), builder.bitcast(b, shorts))
    return builder.add(total, by_registers(builder, half, a, b))


def _dot2_avxvnni(builder, total, a, b):
    return by_registers(builder, partial(_dot2_of("llvm.x86.avx512.vpdpwssd.256", 8), builder), total, a, b)


@intrinsic(I32x16, I32x16, I32x16, I32x16, narrow=True, avx512=_dot2_of("llvm.x86.avx512.vpdpwssd.512", LANES), avxvnni=_dot2_avxvnni,
           avx2=_dot2_avx2, portable=_pairs_portable)
def dot2(total, a, b):
    """total + a_low * b_low + a_high * b_high for every lane, modulo 2^32: a lane of a and of b is two int16, the low one first."""
    products = a.view(np.int16).astype(np.int32) * b.view(np.int16).astype(np.int32)
    return total + products[0::2] + products[1::2]


# ---- lanes

@intrinsic(I32x16, types.int32, every=splat)
def splat_i32(x):
    """x in every lane."""
    return np.full(LANES, x, np.int32)


@intrinsic(I32x16, Address, every=lambda builder, pointer: splat(builder, load(builder, pointer, INT)))
def splat_i32_from(pointer):
    """One int32 in memory, in every lane."""
    return np.full(LANES, pointer.span(4).copy().view(np.int32)[0])


@intrinsic(F32x16, types.float32, every=splat)
def splat_f32(x):
    """x in every lane."""
    return np.full(LANES, x, np.float32)


@intrinsic(I32x16, I32x16, I32x16, narrow=True, every=lambda builder, a, b: builder.add(a, b))
def add_i32(a, b):
    """a + b, modulo 2^32."""
    return a + b


@intrinsic(I32x16, I32x16, I32x16, narrow=True, every=lambda builder, a, b: builder.mul(a, b))
def mul_i32(a, b):
    """a * b, modulo 2^32."""
    return a * b


@intrinsic(I32x16, I32x16, I32x16, narrow=True, every=lambda builder, a, b: builder.sub(a, b))
def sub_i32(a, b):
    """a - b, modulo 2^32."""
    return a - b


def _int16_pair(builder, v):
    n = v.type.count
    return builder.or_(builder.and_(v, lanes(0xFFFF, n)), builder.shl(v, lanes(16, n)))


@intrinsic(I32x16, I32x16, narrow=True, every=_int16_pair)
def int16_pair(v):
    """The low 16 bits of every lane, twice."""
    return np.repeat(v.view(np.int16)[0::2], 2).view(np.int32)


@intrinsic(I32x16, I32x16, types.intp, narrow=True,
           every=lambda builder, v, n: builder.shl(v, splat(builder, builder.trunc(n, INT), v.type.count)))
def shift_left(v, n):
    """v * 2^n, modulo 2^32; n of 0 to 31."""
    return (v.view(np.uint32) << np.uint32(n)).view(np.int32)


def _field(builder, v, shift, mask):
    shift, mask = (splat(builder, builder.trunc(x, INT), v.type.count) for x in (shift, mask))
    return builder.and_(builder.lshr(v, shift), mask)


@intrinsic(I32x16, I32x16, types.intp, types.intp, narrow=True, every=_field)
def field_i32(v, shift, mask):
    """(v >> shift) & mask for every lane, read as unsigned; shift 0 to 31."""
    return ((v.view(np.uint32) >> np.uint32(shift)) & np.uint32(mask)).view(np.int32)


def _folded_to(n: int, emit, builder, v):
    while v.type.count > n:
        half = v.type.count // 2
        v = emit(builder, part(builder, v, 0, half), part(builder, v, half, half))
    return [builder.extract_element(v, INT(i)) for i in range(n)]


def _folded(emit):
    return lambda builder, v: emit(builder, *_folded_to(2, emit, builder, v))


def _fold(v, combine):
    while len(v) > 1:
        v = combine(v[:len(v) // 2], v[len(v) // 2:])
    return v[0]


def _add(builder, a, b):
    return builder.add(a, b)


@intrinsic(types.int32, I32x16, every=_folded(_add))
def sum_i32(v):
    """The sum of all lanes, modulo 2^32."""
    return np.int32(_fold(v, np.add))


def _sum_pairs(builder, v):
    a, b, c, d = _folded_to(4, _add, builder, v)
    return builder.or_(builder.and_(builder.add(a, b), INT(0xFFFF)), builder.shl(builder.add(c, d), INT(16)))


@intrinsic(types.int32, I32x16, every=_sum_pairs)
def sum_pairs_i32(v):
    """Two int16, the low one first: the sum of the first two of every four lanes, and of the other two, modulo 2^16."""
    sums = v.reshape(4, 2, 2).sum(axis=(0, 2), dtype=np.int64)
    return sums.astype(np.int16).view(np.int32)[0]


@intrinsic(F32x16, I32x16, narrow=True, every=lambda builder, v: builder.sitofp(v, resized(F32x16.llvm, v.type.count)))
def to_f32(v):
    """int32 to float32, rounded to nearest even."""
    return v.astype(np.float32)


@intrinsic(F32x16, F32x16, F32x16, narrow=True, every=lambda builder, a, b: builder.fadd(a, b))
def add_f32(a, b):
    """a + b."""
    return a + b


@intrinsic(F32x16, F32x16, F32x16, narrow=True, every=lambda builder, a, b: builder.fmul(a, b))
def mul_f32(a, b):
    """a * b."""
    return a * b


def _fma_hardware(builder, a, b, c):
    return call(builder, f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)


def _fma_portable(builder, a, b, c):
    """In float64, because without FMA in hardware LLVM would call a slow function 16 times.

    Rounding the float64 sum again is harmless unless it lies halfway between two float32, or is so small that float32 keeps fewer bits of
    it. Only then comes the long way, which is the reference below.
    """
    a, b, c = (builder.fpext(v, F64x16) for v in (a, b, c))
    product = builder.fmul(a, b)
    total = builder.fadd(product, c)
    raw = builder.bitcast(total, I64x16)
    low = builder.trunc(raw, I32x16.llvm)
    high = builder.and_(builder.trunc(builder.lshr(raw, ir.Constant(I64x16, [32] * LANES)), I32x16.llvm), lanes(0x7FFFFFFF))
    halfway = builder.icmp_signed("==", builder.and_(low, lanes(0x1FFFFFFF)), lanes(0x10000000))
    tiny = builder.icmp_unsigned("<", builder.sub(high, lanes(1)), lanes((897 << 20) - 1))       # below 2^-126, but not 0
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


@intrinsic(F32x16, F32x16, F32x16, F32x16, narrow=True, avx512=_fma_hardware, avx2=_fma_hardware, neon=_fma_hardware,
           portable=_fma_portable)
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


@intrinsic(F32x16, F32x16, F32x16, narrow=True, every=lambda builder, a, b: builder.fsub(a, b))
def sub_f32(a, b):
    """a - b."""
    return a - b


@intrinsic(F32x16, F32x16, F32x16, every=lambda builder, a, b: builder.fdiv(a, b))
def div_f32(a, b):
    """a / b."""
    with np.errstate(all="ignore"):
        return a / b


@intrinsic(F32x16, F32x16, every=lambda builder, v: call(builder, "llvm.sqrt.v16f32", F32x16.llvm, v))
def sqrt_f32(v):
    """The square root."""
    with np.errstate(all="ignore"):
        return np.sqrt(v)


@intrinsic(F32x16, F32x16,
           every=lambda builder, v: builder.bitcast(builder.and_(builder.bitcast(v, I32x16.llvm), lanes(0x7FFFFFFF)), v.type))
def abs_f32(v):
    """The magnitude."""
    return np.abs(v)


def _where_less(builder, a, b, x, y):
    return builder.select(builder.fcmp_ordered("<", a, b), x, y)


@intrinsic(F32x16, F32x16, F32x16, F32x16, F32x16, every=_where_less)
def where_less(a, b, x, y):
    """x where a < b, y elsewhere (also where a or b is NaN)."""
    return np.where(a < b, x, y)


@intrinsic(F32x16, F32x16, F32x16, every=lambda builder, a, b: _where_less(builder, a, b, b, a))
def max_f32(a, b):
    """b where a < b, else a."""
    return np.where(a < b, b, a)


@intrinsic(F32x16, F32x16, F32x16, every=lambda builder, a, b: _where_less(builder, b, a, b, a))
def min_f32(a, b):
    """b where b < a, else a."""
    return np.where(b < a, b, a)


def _round_to_i32(builder, v):
    """Adding 1.5 * 2^23 leaves no room for a fraction: the adder rounds it off."""
    magic = ir.Constant(F32x16.llvm, [12582912.0] * LANES)
    return builder.fptosi(builder.fsub(builder.fadd(v, magic), magic), I32x16.llvm)


@intrinsic(I32x16, F32x16, every=_round_to_i32)
def round_to_i32(v):
    """The nearest integer, halves to even; |v| at most 2^22."""
    return np.rint(v).astype(np.int32)


def _power_of_two(builder, n):
    return builder.bitcast(builder.shl(builder.add(n, lanes(127)), lanes(23)), F32x16.llvm)


@intrinsic(F32x16, I32x16, every=_power_of_two)
def power_of_two(n):
    """2^n for n of -126 to 127; 0 for -127 and infinite for 128."""
    return ((n + np.int32(127)) << np.int32(23)).view(np.float32)


def _half_and_back(builder, v):
    return builder.fpext(_to_half_hardware(builder, v), F32x16.llvm)


def _half_and_back_portable(builder, v):
    return half_from_bits(builder, builder.zext(_to_half_portable(builder, v), I32x16.llvm))


@intrinsic(F32x16, F32x16, avx512=_half_and_back, avx2=_half_and_back, neon=_half_and_back, portable=_half_and_back_portable)
def round_f16(v):
    """Rounded to float16, nearest even; still held as float32."""
    with np.errstate(over="ignore"):
        return v.astype(np.float16).astype(np.float32)


@intrinsic(types.float32, F32x16, every=_folded(lambda builder, a, b: builder.fadd(a, b)))
def sum_f32(v):
    """The sum of all lanes: first lane i + lane i + 8 for every i below 8, then of those i + 4, and so on."""
    return np.float32(_fold(v, np.add))


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered("<", a, b), b, a)


@intrinsic(types.float32, F32x16, every=_folded(_larger))
def largest_f32(v):
    """The largest of all lanes (in the order of `sum_f32`, with `max_f32`)."""
    return np.float32(_fold(v, lambda a, b: np.where(a < b, b, a)))


def _add_pairs(builder, a, b):
    even, odd = (ir.Constant(I32x16.llvm, [first + quarter + k for quarter in range(0, LANES, 4) for first in (0, LANES) for k in pair])
                 for pair in ((0, 2), (1, 3)))
    return builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd))


@intrinsic(F32x16, F32x16, F32x16, every=_add_pairs)
def add_pairs(a, b):
    """The sums of neighbours, 2i and 2i + 1: of the first four lanes of a, then of b, then of the next four of both, and so on."""
    both = np.stack([a.reshape(-1, 4), b.reshape(-1, 4)], axis=1).reshape(-1)
    return both[0::2] + both[1::2]


def _add_quarters(builder, *vectors):
    quarters = [[part(builder, v, first, 4) for v in vectors] for first in range(0, LANES, 4)]
    q0, q1, q2, q3 = (join(builder, join(builder, a, b), join(builder, c, d)) for a, b, c, d in quarters)
    return builder.fadd(builder.fadd(q0, q1), builder.fadd(q2, q3))


@intrinsic(F32x16, F32x16, F32x16, F32x16, F32x16, every=_add_quarters)
def add_quarters(a, b, c, d):
    """The sum of the four quarters of a, neighbours first, then those of b, c and d."""
    q0, q1, q2, q3 = (np.concatenate([v[first:first + 4] for v in (a, b, c, d)]) for first in range(0, LANES, 4))
    return (q0 + q1) + (q2 + q3)


@intrinsic(F32x16, Address, every=lambda builder, pointer: splat(builder, load(builder, pointer, FLOAT)))
def splat_f32_from(pointer):
    """One float32 in memory, in every lane."""
    return np.full(LANES, pointer.span(4).view(np.float32)[0])
