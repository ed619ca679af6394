"""Defines intrinsics and picks the instruction set: the vector types, `intrinsic`, and what its emitters share.

    avx512     512-bit registers, `vpdpbusd` (AVX-512 VNNI)
    avxvnni    256-bit registers, `vpdpbusd` (AVX-VNNI, or AVX-512 VNNI at half the width)
    avx2       256-bit registers, `vpmaddubsw` and `vpmaddwd`
    portable   plain vector IR; LLVM picks the instructions

The best one of the machine is used; the environment variable `REFIMPL_ISA` forces a lower one. It is read at import.
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
ORDER = ("portable", "avx2", "avxvnni", "avx512")
NEEDS = {"avx512": ("avx512f", "avx512bw", "avx512vl", "avx512vnni"), "avxvnni": ("avx2", "fma", "f16c", "avxvnni"),
         "avx2": ("avx2", "fma", "f16c"), "portable": ()}
TARGETS = {             # what LLVM may use under a forced set; machines with AVX-512 need not have AVX-VNNI itself
    "avxvnni": ("x86-64-v3", "+avx2,+fma,+f16c,+avx512vl,+avx512vnni"),
    "avx2": ("x86-64-v3", "+avx2,+fma,+f16c"),
    "portable": ("x86-64", ""),
}


def best_isa(features) -> str:
    """The highest instruction set that the host's features (LLVM's names -> bool) allow."""
    return next(isa for isa in reversed(ORDER) if all(features.get(need, False) for need in NEEDS[isa]))


def chosen_isa(wanted: str | None, best: str) -> str:
    """`wanted` (REFIMPL_ISA), or the best. Raises ValueError for an unknown name, or one that this machine cannot run."""
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
    # the code around the intrinsics stays within the forced set too
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
U8x32, I32x8, F32x8 = Vector("U8x32", BYTE, 32), Vector("I32x8", INT, LANES // 2), Vector("F32x8", FLOAT, LANES // 2)
NARROW = {U8x64: U8x32, I32x16: I32x8, F32x16: F32x8}
TWO_WIDTHS = ISA == "avx2"         # sixteen registers of 256 bits: half a tile at a time leaves more of them for rows
Address = types.CPointer(types.uint8)
F64x16, I64x16 = ir.VectorType(ir.DoubleType(), LANES), ir.VectorType(ir.IntType(64), LANES)      # inside intrinsics only


class Pointer:
    """An address in plain Python: an array's bytes and an offset. Reading or writing outside the array raises IndexError."""

    def __init__(self, data: np.ndarray, offset: int):
        self.data, self.offset = data, offset

    def span(self, n_bytes: int) -> np.ndarray:
        """The next `n_bytes` bytes, as a view."""
        if not 0 <= self.offset <= len(self.data) - n_bytes:
            raise IndexError(f"bytes {self.offset} to {self.offset + n_bytes} of an array of {len(self.data)}")
        return self.data[self.offset:self.offset + n_bytes]


# ---- defining intrinsics

@dataclass(frozen=True)
class Intrinsic:
    """Its Python reference, its types, the emitters of LLVM code by instruction set, and whether these take narrow vectors as well."""

    reference: Callable
    result: types.Type
    parameters: tuple[types.Type, ...]
    bodies: dict[str, Callable]
    narrow: bool


INTRINSICS: dict[str, Intrinsic] = {}


def intrinsic(result: types.Type, *parameters: types.Type, narrow: bool = False, **bodies: Callable):
    """Makes an intrinsic of a NumPy function, its reference. `bodies` are emitters `(builder, *values) -> value`: `every`, or one for each
    instruction set, where `avxvnni` falls back to `avx2`. `narrow`: these (`every`, or where there are TWO_WIDTHS) take vectors of half the
    lanes too.
    """

    def define(reference: Callable) -> Callable:
        emit = bodies.get(ISA) or bodies.get("avx2" if ISA == "avxvnni" else "every") or bodies["every"]
        wide, both = signature(result, *parameters), narrow and (TWO_WIDTHS or "every" in bodies)
        half = signature(NARROW.get(result, result), *(NARROW.get(kind, kind) for kind in parameters))

        def takes(*args):
            return half if both and any(kind in NARROW.values() for kind in args) else wide

        @type_callable(reference)
        def typing(context):        # Numba reads the number of parameters off the function
            return (lambda: takes(), lambda a: takes(a), lambda a, b: takes(a, b), lambda a, b, c: takes(a, b, c),
                    lambda a, b, c, d: takes(a, b, c, d), lambda a, b, c, d, e: takes(a, b, c, d, e),
                    lambda a, b, c, d, e, f: takes(a, b, c, d, e, f))[len(parameters)]

        def lowering(context, builder, sig, args):
            value = emit(builder, *args)
            return context.get_dummy_value() if value is None else value

        lower_builtin(reference, *wide.args)(lowering)
        if both:
            lower_builtin(reference, *half.args)(lowering)
        INTRINSICS[reference.__name__] = Intrinsic(reference, result, parameters, bodies, both)
        return reference
    return define


def call(builder, name: str, result: ir.Type, *args):
    """Emits a call of an LLVM intrinsic."""
    return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name), args)


def splat(builder, scalar, lanes: int = LANES):
    """The same value in every lane."""
    vector = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, INT(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))


def lanes(value: int, n: int = LANES) -> ir.Constant:
    """The same int32 constant in every lane."""
    return ir.Constant(ir.VectorType(INT, n), [value] * n)


def resized(vector: ir.Type, n: int) -> ir.Type:
    """The vector type of n such elements."""
    return ir.VectorType(vector.element, n)


def as_lanes(builder, v):
    """The same bits as lanes of int32."""
    n_bits = v.type.count * (32 if isinstance(v.type.element, ir.FloatType) else v.type.element.width)
    return builder.bitcast(v, ir.VectorType(INT, n_bits // 32))


def load(builder, pointer, vector: ir.Type):
    """A vector from memory, at any alignment."""
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=1)


def store(builder, pointer, value):
    """A vector to memory, at any alignment."""
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)


def part(builder, v, first: int, n: int):
    """Lanes first..first+n-1."""
    return builder.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), ir.Constant(ir.VectorType(INT, n), list(range(first, first + n))))


def join(builder, a, b):
    """The lanes of a, then those of b."""
    n = a.type.count
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, 2 * n), list(range(2 * n))))


def by_registers(builder, emit: Callable, *vectors):
    """Runs an emitter for vectors of 256 bits: on these very vectors, or on their lower and upper halves, and joins the results."""
    if as_lanes(builder, vectors[0]).type.count == LANES // 2:
        return emit(*vectors)
    return by_halves(builder, emit, *vectors)


def by_halves(builder, emit: Callable, *vectors):
    """Runs an emitter on the lower and the upper half of every vector and joins the results."""
    return join(builder, *(emit(*(part(builder, v, side * v.type.count // 2, v.type.count // 2) for v in vectors)) for side in (0, 1)))


