"""What the kernels know of each weight type: where things lie in a block of a tile (tiles.py), and how its integers are unpacked.

Kernels are written once for a family of types and compiled for each type. A `Kind` carries the type into the compiler: Numba sees a type
of its own for each, so `kind.zero` is a constant there and `levels(kind, ...)` the function of that type. Diagrams and formulas of the
blocks: formats/. An offset here is 16 times the one there, because every field stands there 16 times, row beside row.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba.core import types
from numba.core.datamodel.models import OpaqueModel
from numba.extending import NativeValue, overload, overload_attribute, register_model, typeof_impl, unbox

from refimpl.formats.quants.basic import mxfp4
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.iq import iq4
from refimpl.kernels.machine.intrinsics import (
    add_i32,
    at,
    bits,
    field_i32,
    fifth_bits,
    load_bf16,
    load_e8m0,
    load_f16,
    load_f32,
    load_i8_as_i32,
    load_u8,
    load_u8_as_i32,
    look_up,
    or_shifted,
    plus_128,
    shift_left,
    splat_i32,
)
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.jit import INLINE, inline


@dataclass(frozen=True)
class Kind:
    """A weight type in one arithmetic: `family` is "small" (blocks of 32), "large" (256, scales in sub-blocks) or "plain" (floats).

    `n_sub` sub-blocks of `per_sub` weights; `zero` is what to take off the unpacked integers; `top` is the largest of these;
    d, minimum: offsets of the scale and the minimum (where `has_minimum`); `scattered`: a block is not read from front to back. `integer`:
    activations are rounded to 8 bits (q8), else float32.
    """

    type: str
    family: str
    integer: bool
    n_sub: int = 1
    zero: int = 0
    top: int = 0
    d: int = 0
    has_minimum: bool = False
    minimum: int = 0
    scattered: bool = False

    @property
    def elements(self) -> int:
        """Weights in a block."""
        return BLOCKS[self.type].elements

    @property
    def per_sub(self) -> int:
        """Weights in a sub-block."""
        return self.elements // self.n_sub

    @property
    def n_bytes(self) -> int:
        """Bytes of 16 blocks side by side."""
        return LANES * BLOCKS[self.type].n_bytes

    @property
    def widened(self) -> bool:
        """Must a tile be made float32 before it is multiplied?"""
        return not self.integer and self.family != "plain"

    @cached_property
    def _numba_type_(self) -> "KindType":
        """Where Numba's dispatcher looks first: ten times as quick as `typeof`."""
        return KindType(self.type, self.integer)


SHAPES = {
    "Q4_0": dict(family="small", top=15, zero=8),
    "Q4_1": dict(family="small", top=15, has_minimum=True, minimum=32),
    "Q5_0": dict(family="small", top=31, zero=16),
    "Q5_1": dict(family="small", top=31, has_minimum=True, minimum=32),
    "Q8_0": dict(family="small", top=255, zero=128),
    "IQ4_NL": dict(family="small", top=241, zero=128),
    "MXFP4": dict(family="small", top=24, zero=12),
    "Q2_K": dict(family="large", top=3, n_sub=16, d=1280, has_minimum=True, minimum=1312),
    "Q3_K": dict(family="large", top=7, n_sub=16, zero=4, d=1728, scattered=True),
    "Q4_K": dict(family="large", top=15, n_sub=8, has_minimum=True, minimum=32),
    "Q5_K": dict(family="large", top=31, n_sub=8, has_minimum=True, minimum=32),
    "Q6_K": dict(family="large", top=63, n_sub=16, zero=32, d=3328, scattered=True),
    "IQ4_XS": dict(family="large", top=241, n_sub=8, zero=128),
    "F32": dict(family="plain"),
    "F16": dict(family="plain"),
    "BF16": dict(family="plain"),
}
EXACT = {name: Kind(type=name, integer=False, **shape) for name, shape in SHAPES.items()}
Q8 = {name: Kind(type=name, integer=True, **shape) if shape["family"] != "plain" else EXACT[name] for name, shape in SHAPES.items()}


# ---- a type of Numba's for each kind

class KindType(types.Dummy):
    """The type of one Kind. Two kinds of the same name are the same kind."""

    def __init__(self, type_name: str, integer: bool):
        self.type_name, self.integer = type_name, integer
        super().__init__(f"Kind({type_name}, {'q8' if integer else 'exact'})")

    @property
    def kind(self) -> Kind:
        """The Kind itself."""
        return (Q8 if self.integer else EXACT)[self.type_name]


register_model(KindType)(OpaqueModel)


@typeof_impl.register(Kind)
def _type_of(kind, context):
    return kind._numba_type_


@unbox(KindType)
def _unbox(kind, obj, c):
    return NativeValue(c.context.get_dummy_value())


def _attribute(name: str):
    @overload_attribute(KindType, name)
    def constant(kind):
        value = getattr(kind.kind, name)
        return lambda kind: value


for _name in ("elements", "n_sub", "per_sub", "n_bytes", "zero", "top", "d", "has_minimum", "minimum", "scattered", "widened",
              "integer"):
    _attribute(_name)


# ---- unpacking, type by type: group g of sub-block s holds, for each of 16 rows, the 4 weights s * per_sub + 4 g ..

def _q4_0(kind, block, s, g):
    return bits(load_u8(at(block, 32 + 64 * (g & 3))), 4 * (g >> 2), 15)


def _q4_1(kind, block, s, g):
    return bits(load_u8(at(block, 64 + 64 * (g & 3))), 4 * (g >> 2), 15)


def _q5_0(kind, block, s, g):
    return or_shifted(bits(load_u8(at(block, 96 + 64 * (g & 3))), 4 * (g >> 2), 15), fifth_bits(load_u8(at(block, 32)), g), 0)


def _q5_1(kind, block, s, g):
    return or_shifted(bits(load_u8(at(block, 128 + 64 * (g & 3))), 4 * (g >> 2), 15), fifth_bits(load_u8(at(block, 64)), g), 0)


def _q8_0(kind, block, s, g):
    return plus_128(load_u8(at(block, 32 + 64 * g)))


def _table(values: np.ndarray, zero: int) -> tuple[int, int]:
    """16 values, `zero` higher, as `look_up` takes them."""
    return tuple((values.astype(np.int64) + zero).astype(np.uint8).view(np.int64).tolist())


IQ4_FIRST, IQ4_LAST = _table(iq4.VALUES, SHAPES["IQ4_NL"]["zero"])
FP4_FIRST, FP4_LAST = _table(mxfp4.VALUES, SHAPES["MXFP4"]["zero"])


def _iq4_nl(kind, block, s, g):
    return look_up(bits(load_u8(at(block, 32 + 64 * (g & 3))), 4 * (g >> 2), 15), IQ4_FIRST, IQ4_LAST)


def _iq4_xs(kind, block, s, g):
    return look_up(bits(load_u8(at(block, 128 + 256 * s + 64 * (g & 3))), 4 * (g >> 2), 15), IQ4_FIRST, IQ4_LAST)


def _mxfp4(kind, block, s, g):
    return look_up(bits(load_u8(at(block, 16 + 64 * (g & 3))), 4 * (g >> 2), 15), FP4_FIRST, FP4_LAST)


def _q2_k(kind, block, s, g):
    half, quarter, piece = s >> 3, (s & 7) >> 1, 4 * (s & 1) + g
    return bits(load_u8(at(block, 256 + 512 * half + 64 * piece)), 2 * quarter, 3)


def _q3_k(kind, block, s, g):
    half, quarter, piece = s >> 3, (s & 7) >> 1, 4 * (s & 1) + g
    low = bits(load_u8(at(block, 512 + 512 * half + 64 * piece)), 2 * quarter, 3)
    return or_shifted(low, bits(load_u8(at(block, 64 * piece)), s >> 1, 1), 2)


def _q4_k(kind, block, s, g):
    return bits(load_u8(at(block, 256 + 512 * (s >> 1) + 64 * g)), 4 * (s & 1), 15)


def _q5_k(kind, block, s, g):
    nibbles = bits(load_u8(at(block, 768 + 512 * (s >> 1) + 64 * g)), 4 * (s & 1), 15)
    return or_shifted(nibbles, bits(load_u8(at(block, 256 + 64 * g)), s, 1), 4)


def _q6_k(kind, block, s, g):
    half, quarter, piece = s >> 3, (s & 7) >> 1, 4 * (s & 1) + g
    low = bits(load_u8(at(block, 1024 * half + 512 * (quarter & 1) + 64 * piece)), 4 * (quarter >> 1), 15)
    return or_shifted(low, bits(load_u8(at(block, 2048 + 512 * half + 64 * piece)), 2 * quarter, 3), 4)


LEVELS = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k,
          "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4}


def levels(kind, block, s, g):
    """The weights of group g in sub-block s as integers, U8x64: `kind.zero` too large."""
    return LEVELS[kind.type](kind, block, s, g)


@overload(levels, jit_options=INLINE)
def _levels(kind, block, s, g):
    return LEVELS[kind.type_name]


# ---- the scale of a block

def _d_f16(kind, block):
    return load_f16(at(block, kind.d))


def _d_e8m0(kind, block):
    return load_e8m0(at(block, kind.d))


def scale_of_block(kind, block):
    """The scale of 16 rows' blocks, F32x16."""
    return (_d_e8m0 if kind.type == "MXFP4" else _d_f16)(kind, block)


@overload(scale_of_block, jit_options=INLINE)
def _scale_of_block(kind, block):
    return _d_e8m0 if kind.type_name == "MXFP4" else _d_f16


# ---- scales and minimums of the sub-blocks

def _scale_2(kind, block, s):
    return field_i32(load_u8_as_i32(at(block, 16 * s)), 0, 15)


def _scale_3(kind, block, s):
    """Six bits in two places, see the diagram in formats/quants/k/q3_k.py."""
    lower = field_i32(load_u8_as_i32(at(block, 1536 + 16 * (s & 7))), 4 * (s >> 3), 15)
    upper = field_i32(load_u8_as_i32(at(block, 1664 + 16 * (s & 3))), 2 * (s >> 2), 3)
    return add_i32(add_i32(lower, shift_left(upper, 4)), splat_i32(MINUS_32))


def _scale_iq4_xs(kind, block, s):
    """Six bits in two places, see the diagram in formats/quants/iq/iq4.py."""
    lower = field_i32(load_u8_as_i32(at(block, 64 + 16 * (s >> 1))), 4 * (s & 1), 15)
    upper = field_i32(load_u8_as_i32(at(block, 32 + 16 * (s >> 2))), 2 * (s & 3), 3)
    return add_i32(add_i32(lower, shift_left(upper, 4)), splat_i32(MINUS_32))


def _scale_4(kind, block, s):
    """Six bits, in two places from the fifth on: see the diagram in formats/quants/k/q4_k.py."""
    if s < 4:
        return field_i32(load_u8_as_i32(at(block, 64 + 16 * s)), 0, 63)
    upper = field_i32(load_u8_as_i32(at(block, 64 + 16 * (s - 4))), 6, 3)
    return add_i32(field_i32(load_u8_as_i32(at(block, 64 + 16 * (s + 4))), 0, 15), shift_left(upper, 4))


def _scale_6(kind, block, s):
    return load_i8_as_i32(at(block, 3072 + 16 * s))


MINUS_32 = np.int32(-32)
SCALES = {"Q2_K": _scale_2, "Q3_K": _scale_3, "Q4_K": _scale_4, "Q5_K": _scale_4, "Q6_K": _scale_6, "IQ4_XS": _scale_iq4_xs}


def scale_of(kind, block, s):
    """The integer scale of sub-block s of 16 rows, I32x16."""
    return SCALES[kind.type](kind, block, s)


@overload(scale_of, jit_options=INLINE)
def _scale_of(kind, block, s):
    return SCALES[kind.type_name]


def _low_2(kind, block, s):
    return field_i32(load_u8_as_i32(at(block, 16 * s)), 4, 15)


def _low_4(kind, block, s):
    if s < 4:
        return field_i32(load_u8_as_i32(at(block, 64 + 16 * (s + 4))), 0, 63)
    upper = field_i32(load_u8_as_i32(at(block, 64 + 16 * s)), 6, 3)
    return add_i32(field_i32(load_u8_as_i32(at(block, 64 + 16 * (s + 4))), 4, 15), shift_left(upper, 4))


def low_of(kind, block, s):
    """The integer minimum of sub-block s of 16 rows (Q2_K, Q4_K and Q5_K), I32x16."""
    return (_low_2 if kind.type == "Q2_K" else _low_4)(kind, block, s)


@overload(low_of, jit_options=INLINE)
def _low_of(kind, block, s):
    return _low_2 if kind.type_name == "Q2_K" else _low_4


@inline
def lows_of(kind, block, s):
    """The minimums of sub-blocks s and s + 1, two int16 in a lane."""
    return add_i32(low_of(kind, block, s), shift_left(low_of(kind, block, s + 1), 16))


# ---- plain floats

def _column_f32(kind, column):
    return load_f32(column)


def _column_f16(kind, column):
    return load_f16(column)


def _column_bf16(kind, column):
    return load_bf16(column)


COLUMNS = {"F32": _column_f32, "F16": _column_f16, "BF16": _column_bf16}


def column_of(kind, column):
    """One column of 16 rows, F32x16."""
    return COLUMNS[kind.type](kind, column)


@overload(column_of, jit_options=INLINE)
def _column_of(kind, column):
    return COLUMNS[kind.type_name]
