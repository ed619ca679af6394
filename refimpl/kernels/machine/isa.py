"""Defines intrinsics and picks the instruction set: the vector types, `intrinsic`, and what its emitters share.

    avx512     512-bit registers, `vpdpbusd` (AVX-512 VNNI)
    avxvnni    256-bit registers, `vpdpbusd` (AVX-VNNI, or AVX-512 VNNI at half the width)
    avx2       256-bit registers, `vpmaddubsw` and `vpmaddwd`

    i8mm       128-bit registers, `usdot` (Armv8.6: Apple M2, Graviton3 and later)
    dotprod    128-bit registers, `sdot` (Armv8.2: Apple M1, Graviton2, Raspberry Pi 5)
    neon       128-bit registers, `fmla` and `tbl` (every AArch64 processor: Raspberry Pi 4)

    portable   plain vector IR; LLVM picks the instructions

The best one of the machine is used; the environment variable `REFIMPL_ISA` forces a lower one. It is read at import.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.typing import signature
from numba.extending import lower_builtin, register_model, type_callable

from refimpl.kernels.cores.cpu_features import arm_features

LANES = 16
BYTE, SHORT, INT, HALF, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


# ---- instruction sets

class InstructionSet(NamedTuple):
    """`needs`: features of the processor. `inherits`: the sets whose emitters it takes where it has none, in this order. `cpu` and
    `features`: what LLVM may use in the code around the intrinsics where the set is forced. All in LLVM's names.
    """

    needs: tuple[str, ...]
    inherits: tuple[str, ...]
    cpu: str
    features: str


X86 = {                 # the lowest first
    "portable": InstructionSet((), (), "x86-64", ""),
    "avx2": InstructionSet(("avx2", "fma", "f16c"), (), "x86-64-v3", "+avx2,+fma,+f16c"),
    # machines with AVX-512 need not have AVX-VNNI itself
    "avxvnni": InstructionSet(("avx2", "fma", "f16c", "avxvnni"), ("avx2",), "x86-64-v3", "+avx2,+fma,+f16c,+avx512vl,+avx512vnni"),
    "avx512": InstructionSet(("avx512f", "avx512bw", "avx512vl", "avx512vnni"), (), "x86-64-v4", "+avx512vnni"),
}
ARM = {
    "portable": InstructionSet((), (), "generic", "+neon"),
    "neon": InstructionSet((), (), "generic", "+neon"),
    "dotprod": InstructionSet(("dotprod",), ("neon",), "generic", "+neon,+dotprod"),
    "i8mm": InstructionSet(("dotprod", "i8mm"), ("dotprod", "neon"), "generic", "+neon,+dotprod,+i8mm"),
}
ARCHITECTURES = {"x86_64": X86, "aarch64": ARM, "arm64": ARM}         # as LLVM's triples begin; any other has portable code alone
ARCHITECTURE = llvm.get_process_triple().partition("-")[0]
SETS = ARCHITECTURES.get(ARCHITECTURE, {"portable": InstructionSet((), (), "generic", "")})
ORDER = tuple(SETS)


def best_isa(features: dict[str, bool], sets: dict[str, InstructionSet] = SETS) -> str:
    """The highest instruction set that the host's features (LLVM's names -> bool) allow."""
    return next(isa for isa in reversed(sets) if all(features.get(need, False) for need in sets[isa].needs))


def chosen_isa(wanted: str | None, best: str, sets: dict[str, InstructionSet] = SETS) -> str:
    """`wanted` (REFIMPL_ISA), or the best. Raises ValueError for an unknown name, or one that this machine cannot run."""
    if not wanted:
        return best
    order = tuple(sets)
    if wanted in X86 | ARM and wanted not in order:
        raise ValueError(f"REFIMPL_ISA={wanted}: for other processors; this one may have {', '.join(reversed(order))}")
    if wanted not in order:
        raise ValueError(f"REFIMPL_ISA={wanted}: expected one of {', '.join(reversed(order))}")
    if order.index(wanted) > order.index(best):
        raise ValueError(f"REFIMPL_ISA={wanted}: this machine has {best} at most")
    return wanted


def emitter(bodies: dict[str, Callable], isa: str) -> Callable:
    """The body of an intrinsic for an instruction set: its own, that of a set it inherits from, or that of all sets."""
    return next(bodies[name] for name in (isa, *(X86 | ARM)[isa].inherits, "every", "portable") if name in bodies)


def add_features(known: str, features: dict[str, bool]) -> str:
    """LLVM's list of features, longer by those that a processor has or has not; of two that contradict each other the last one counts."""
    return ",".join(filter(None, [known, *(f"{'+' if there else '-'}{name}" for name, there in features.items())]))


OPTIONAL = arm_features() if SETS is ARM else {}
BEST = best_isa(dict(llvm.get_host_cpu_features()) | OPTIONAL)
ISA = chosen_isa(os.environ.get("REFIMPL_ISA"), BEST)
if ISA != BEST:         # the code around the intrinsics stays within the forced set too
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = SETS[ISA].cpu, SETS[ISA].features
elif OPTIONAL:          # LLVM has no instruction to select for an intrinsic whose feature it does not know of, and ends the process
    known = numba.config.CPU_FEATURES
    numba.config.CPU_FEATURES = add_features(llvm.get_host_cpu_features().flatten() if known is None else known, OPTIONAL)


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
# sixteen registers of 256 bits, or 32 of 128: half of the lanes at a time leaves more of them
SMALL_REGISTERS = ISA in ("avx2", "avxvnni", "neon", "dotprod", "i8mm")
HALF_TILES = SMALL_REGISTERS and ISA != "avxvnni"         # of products with bytes: `vpdpbusd` needs no registers between bytes and sums
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
    instruction set (`emitter`). `narrow`: these (`every`, or where there are SMALL_REGISTERS) take vectors of half the lanes too.
    """

    def define(reference: Callable) -> Callable:
        emit = emitter(bodies, ISA)
        wide, both = signature(result, *parameters), narrow and (SMALL_REGISTERS or "every" in bodies)
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


def by_128_bits(builder, emit: Callable, *vectors):
    """The same for vectors of 128 bits."""
    if as_lanes(builder, vectors[0]).type.count == LANES // 4:
        return emit(*vectors)
    return by_halves(builder, lambda *halves: by_128_bits(builder, emit, *halves), *vectors)


def by_halves(builder, emit: Callable, *vectors):
    """Runs an emitter on the lower and the upper half of every vector and joins the results."""
    return join(builder, *(emit(*(part(builder, v, side * v.type.count // 2, v.type.count // 2) for v in vectors)) for side in (0, 1)))


