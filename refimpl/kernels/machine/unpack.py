"""Weight formats: where the fields of a block lie in a tile (tiles.py), and how integers and scales are unpacked.

A kernel is written once for a family of formats and compiled for each. A `WeightFormat` is its first argument, and Numba gives every
format a type of its own: `fmt.zero_point` is a compile-time constant, and `codes(fmt, ...)` is that format's function. Diagrams and
formulas of the blocks: formats/quants/. An offset here is 16 times the one there, because every field is stored 16 times, row beside row.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numba import typeof
from numba.core import types
from numba.core.datamodel.models import OpaqueModel
from numba.core.typing.templates import AttributeTemplate
from numba.extending import NativeValue, infer_getattr, lower_getattr_generic, register_model, typeof_impl, unbox

from refimpl.formats.quants.basic import mxfp4
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.iq import iq4
from refimpl.kernels.machine.intrinsics import (
    add_i32,
    at,
    bits,
    dot16,
    dot16_int8,
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
    splat_f32,
    splat_f32_from,
    splat_i32,
)
from refimpl.kernels.machine.isa import ISA, LANES
from refimpl.kernels.machine.jit import by_format, inline
from refimpl.kernels.machine.narrow import (
    load_e8m0_narrow,
    load_f16_narrow,
    load_f32_narrow,
    load_i8_as_i32_narrow,
    load_u8_as_i32_narrow,
    load_u8_narrow,
    splat_f32_from_narrow,
    splat_f32_narrow,
    splat_i32_narrow,
)

PAIRS = ISA in ("avx2", "neon")         # no dot product of bytes: products of neighbours are summed in 16 bits, as far as they fit
SIGNED = PAIRS or ISA in ("dotprod", "i8mm")        # larger codes than 127 are multiplied without their zero point, as int8
ALL, LOWER, UPPER = "all", "lower", "upper"


@dataclass(frozen=True)
class WeightFormat:
    """A weight type with the precision of the activations: `integer` for 8 bits ("q8"), else float32 ("exact").

    `family`: "block" (32 weights under a scale), "superblock" (256, with integer scales for sub-blocks) or "float". A block has `n_sub`
    sub-blocks. Codes are unpacked as 0 to `max_code`; `zero_point` is subtracted from them. `scale`, `minimum`: offsets of the block's
    scale and minimum, the latter only where `has_minimum`. `scattered`: a block's fields are not read from front to back. `lanes`: the rows
    of a tile that are unpacked and multiplied at a time: ALL, or half of them in narrow vectors.
    """

    type: str
    family: str
    integer: bool
    n_sub: int = 1
    zero_point: int = 0
    max_code: int = 0
    scale: int = 0
    has_minimum: bool = False
    minimum: int = 0
    scattered: bool = False
    lanes: str = ALL

    @property
    def elements(self) -> int:
        """Weights of a block."""
        return BLOCKS[self.type].elements

    @property
    def per_sub(self) -> int:
        """Weights of a sub-block."""
        return self.elements // self.n_sub

    @property
    def n_bytes(self) -> int:
        """Bytes of 16 blocks side by side."""
        return LANES * BLOCKS[self.type].n_bytes

    @property
    def signed(self) -> bool:
        """Is the zero point (128) subtracted from codes before they are multiplied?"""
        return SIGNED and self.max_code > 128

    @property
    def zero_in_pairs(self) -> bool:
        """Is the zero point subtracted from sums of pairs of products, in 16 bits? Not where a whole block fits there without: its sum in
        32 bits can as well start with the zero points.
        """
        return PAIRS and self.zero_point > 0 and not self.signed and (self.family == "superblock" or self.max_code > 15)

    @property
    def run(self) -> int:
        """How many products of pairs are added up in 16 bits (PAIRS), each of at most 2 * 127 times a code's magnitude. Where
        `zero_in_pairs`, the sums start with what the zero points of a whole sub-block contribute, so that all of it has to fit.
        """
        largest = max(self.zero_point, self.max_code - self.zero_point) if self.zero_in_pairs else self.max_code
        return next((n for n in (8, 4, 2) if n * 254 * largest < 2 ** 15 and 4 * n <= self.per_sub), 1)

    @property
    def paired_sums(self) -> bool:
        """Do the sums of two sub-blocks of activations share one int32, for products of pairs with integer minimums?"""
        return self.family == "superblock" and self.has_minimum

    @property
    def dequantized(self) -> bool:
        """Is a tile converted to float32 before it is multiplied?"""
        return not self.integer and self.family != "float"

    @property
    def widened(self) -> bool:
        """Is a tile unpacked to int16 for many rows (tile_shorts.py)? Their activations are there as int8 and as int16."""
        return ISA == "avx2" and self.integer and self.family == "block" and self.run == 1 and self.signed

    @property
    def unpacked(self) -> bool:
        """Does multiplying many rows need space for an unpacked tile?"""
        return self.dequantized or self.widened

    @cached_property
    def _numba_type_(self) -> "FormatType":
        """Where Numba's dispatcher looks first: ten times as fast as `typeof`."""
        return FormatType(self.type, self.integer, self.lanes)

    def half(self, lanes: str) -> "WeightFormat":
        """The same format for LOWER or UPPER lanes."""
        return replace(self, lanes=lanes)


LAYOUTS = {
    "Q4_0": dict(family="block", max_code=15, zero_point=8),
    "Q4_1": dict(family="block", max_code=15, has_minimum=True, minimum=32),
    "Q5_0": dict(family="block", max_code=31, zero_point=16),
    "Q5_1": dict(family="block", max_code=31, has_minimum=True, minimum=32),
    "Q8_0": dict(family="block", max_code=255, zero_point=128),
    "IQ4_NL": dict(family="block", max_code=241, zero_point=128),
    "MXFP4": dict(family="block", max_code=24, zero_point=12),
    "Q2_K": dict(family="superblock", max_code=3, n_sub=16, scale=1280, has_minimum=True, minimum=1312),
    "Q3_K": dict(family="superblock", max_code=7, n_sub=16, zero_point=4, scale=1728, scattered=True),
    "Q4_K": dict(family="superblock", max_code=15, n_sub=8, has_minimum=True, minimum=32),
    "Q5_K": dict(family="superblock", max_code=31, n_sub=8, has_minimum=True, minimum=32),
    "Q6_K": dict(family="superblock", max_code=63, n_sub=16, zero_point=32, scale=3328, scattered=True),
    "IQ4_XS": dict(family="superblock", max_code=241, n_sub=8, zero_point=128),
    "F32": dict(family="float"),
    "F16": dict(family="float"),
    "BF16": dict(family="float"),
}
FORMATS = {         # by arithmetic and weight type; floats are multiplied by float32 activations in either
    "exact": {name: WeightFormat(type=name, integer=False, **layout) for name, layout in LAYOUTS.items()},
    "q8": {name: WeightFormat(type=name, integer=layout["family"] != "float", **layout) for name, layout in LAYOUTS.items()},
}


# ---- Numba's type of each format

class FormatType(types.Dummy):
    """The type of one WeightFormat."""

    def __init__(self, weight_type: str, integer: bool, lanes: str = ALL):
        self.weight_type, self.integer, self.lanes = weight_type, integer, lanes
        super().__init__(f"WeightFormat({weight_type}, {'q8' if integer else 'exact'}{'' if lanes == ALL else ', ' + lanes})")

    @property
    def format(self) -> WeightFormat:
        """The format itself."""
        return FORMATS["q8" if self.integer else "exact"][self.weight_type].half(self.lanes)


register_model(FormatType)(OpaqueModel)


@typeof_impl.register(WeightFormat)
def _type_of(fmt, context):
    return fmt._numba_type_


@unbox(FormatType)
def _unbox(fmt, obj, c):
    return NativeValue(c.context.get_dummy_value())


CONSTANTS = {"elements", "n_sub", "per_sub", "n_bytes", "zero_point", "max_code", "scale", "has_minimum", "minimum", "scattered",
             "dequantized", "integer", "signed", "run", "zero_in_pairs", "paired_sums", "widened", "unpacked"}


@infer_getattr
class _ConstantTypes(AttributeTemplate):
    key = FormatType

    def generic_resolve(self, fmt, name):
        return typeof(getattr(fmt.format, name)) if name in CONSTANTS else None


@lower_getattr_generic(FormatType)
def _constant(context, builder, fmt, value, name):
    value = getattr(fmt.format, name)
    return context.get_constant(typeof(value), value)


# ---- fields of all rows or of half of them, from where the field of the first row begins

def _by_lanes(whole, narrow, half_bytes: int):
    """Bodies for ALL, LOWER and UPPER from an intrinsic and its narrow form; half of the lanes take `half_bytes`."""
    def upper(fmt, pointer):
        return narrow(at(pointer, half_bytes))
    bodies = {ALL: lambda fmt, pointer: whole(pointer), LOWER: lambda fmt, pointer: narrow(pointer), UPPER: upper}
    return lambda fmt: bodies[fmt.lanes]


@by_format(_by_lanes(load_u8, load_u8_narrow, 32))
def load_codes(fmt, pointer):
    """4 bytes of each row."""


@by_format(_by_lanes(load_f16, load_f16_narrow, 16))
def load_half(fmt, pointer):
    """A float16 of each row, as float32."""


@by_format(_by_lanes(load_e8m0, load_e8m0_narrow, 8))
def load_power(fmt, pointer):
    """A byte e of each row, as 2^(e - 128)."""


@by_format(_by_lanes(load_u8_as_i32, load_u8_as_i32_narrow, 8))
def bytes_as_i32(fmt, pointer):
    """An unsigned byte of each row, as int32."""


@by_format(_by_lanes(load_i8_as_i32, load_i8_as_i32_narrow, 8))
def signed_bytes_as_i32(fmt, pointer):
    """A signed byte of each row, as int32."""


def _splat_by_lanes(whole, narrow):
    bodies = {True: lambda fmt, x: whole(x), False: lambda fmt, x: narrow(x)}
    return lambda fmt: bodies[fmt.lanes == ALL]


@by_format(_splat_by_lanes(splat_i32, splat_i32_narrow))
def splat_int(fmt, x):
    """x in every lane."""


@by_format(_splat_by_lanes(splat_f32, splat_f32_narrow))
def splat_float(fmt, x):
    """x in every lane."""


# ---- codes, type by type: group g of sub-block s holds, for each of 16 rows, the 4 weights from s * per_sub + 4 g on

def _q4_0(fmt, block, s, g):
    return bits(load_codes(fmt, at(block, 32 + 64 * (g & 3))), 4 * (g >> 2), 15)


def _q4_1(fmt, block, s, g):
    return bits(load_codes(fmt, at(block, 64 + 64 * (g & 3))), 4 * (g >> 2), 15)


def _q5_0(fmt, block, s, g):
    nibbles = bits(load_codes(fmt, at(block, 96 + 64 * (g & 3))), 4 * (g >> 2), 15)
    return or_shifted(nibbles, fifth_bits(load_codes(fmt, at(block, 32)), g), 0)


def _q5_1(fmt, block, s, g):
    nibbles = bits(load_codes(fmt, at(block, 128 + 64 * (g & 3))), 4 * (g >> 2), 15)
    return or_shifted(nibbles, fifth_bits(load_codes(fmt, at(block, 64)), g), 0)


def _q8_0(fmt, block, s, g):
    return plus_128(load_codes(fmt, at(block, 32 + 64 * g)))


def _table(values: np.ndarray, zero_point: int) -> tuple[int, int]:
    """16 values plus `zero_point`, as `look_up` takes them."""
    return tuple((values.astype(np.int64) + zero_point).astype(np.uint8).view(np.int64).tolist())


IQ4_FIRST, IQ4_LAST = _table(iq4.VALUES, LAYOUTS["IQ4_NL"]["zero_point"])
FP4_FIRST, FP4_LAST = _table(mxfp4.VALUES, LAYOUTS["MXFP4"]["zero_point"])


def _iq4_nl(fmt, block, s, g):
    return look_up(bits(load_codes(fmt, at(block, 32 + 64 * (g & 3))), 4 * (g >> 2), 15), IQ4_FIRST, IQ4_LAST)


def _iq4_xs(fmt, block, s, g):
    return look_up(bits(load_codes(fmt, at(block, 128 + 256 * s + 64 * (g & 3))), 4 * (g >> 2), 15), IQ4_FIRST, IQ4_LAST)


def _mxfp4(fmt, block, s, g):
    return look_up(bits(load_codes(fmt, at(block, 16 + 64 * (g & 3))), 4 * (g >> 2), 15), FP4_FIRST, FP4_LAST)


def _q2_k(fmt, block, s, g):
    half, quarter, part = s >> 3, (s & 7) >> 1, 4 * (s & 1) + g
    return bits(load_codes(fmt, at(block, 256 + 512 * half + 64 * part)), 2 * quarter, 3)


def _q3_k(fmt, block, s, g):
    half, quarter, part = s >> 3, (s & 7) >> 1, 4 * (s & 1) + g
    low = bits(load_codes(fmt, at(block, 512 + 512 * half + 64 * part)), 2 * quarter, 3)
    return or_shifted(low, bits(load_codes(fmt, at(block, 64 * part)), s >> 1, 1), 2)


def _q4_k(fmt, block, s, g):
    return bits(load_codes(fmt, at(block, 256 + 512 * (s >> 1) + 64 * g)), 4 * (s & 1), 15)


def _q5_k(fmt, block, s, g):
    nibbles = bits(load_codes(fmt, at(block, 768 + 512 * (s >> 1) + 64 * g)), 4 * (s & 1), 15)
    return or_shifted(nibbles, bits(load_codes(fmt, at(block, 256 + 64 * g)), s, 1), 4)


def _q6_k(fmt, block, s, g):
    half, quarter, part = s >> 3, (s & 7) >> 1, 4 * (s & 1) + g
    low = bits(load_codes(fmt, at(block, 1024 * half + 512 * (quarter & 1) + 64 * part)), 4 * (quarter >> 1), 15)
    return or_shifted(low, bits(load_codes(fmt, at(block, 2048 + 512 * half + 64 * part)), 2 * quarter, 3), 4)


@by_format({"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k,
            "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4})
def codes(fmt, block, s, g):
    """The weights of group g in sub-block s as unsigned integers, U8x64: `fmt.zero_point` is still to be subtracted."""


# ---- products of codes

def _dot16(fmt, total, w0, w1, w2, w3, activations):
    return dot16(total, w0, w1, w2, w3, activations)


def _dot16_int8(fmt, total, w0, w1, w2, w3, activations):
    return dot16_int8(total, w0, w1, w2, w3, activations)


def _dot16_signed(fmt, total, w0, w1, w2, w3, activations):
    return dot16_int8(total, plus_128(w0), plus_128(w1), plus_128(w2), plus_128(w3), activations)        # modulo 256 it is minus 128


@by_format(lambda fmt: _dot16_signed if fmt.signed else _dot16_int8 if ISA == "dotprod" else _dot16)
def dot_of_codes(fmt, total, w0, w1, w2, w3, activations):
    """Adds the products of 16 codes of each row with 16 activations; where `fmt.signed`, of what is left of them without their zero point.
    `sdot` takes no unsigned codes; up to 127 it makes no difference.
    """


# ---- scales of blocks

def _scale_f16(fmt, block):
    return load_half(fmt, at(block, fmt.scale))


def _scale_e8m0(fmt, block):
    return load_power(fmt, at(block, fmt.scale))


@by_format(lambda fmt: _scale_e8m0 if fmt.type == "MXFP4" else _scale_f16)
def block_scale(fmt, block):
    """The scales of 16 rows' blocks, F32x16."""


# ---- integer scales and minimums of sub-blocks

MINUS_32 = np.int32(-32)


def _scale_2(fmt, block, s):
    return field_i32(bytes_as_i32(fmt, at(block, 16 * s)), 0, 15)


def _scale_3(fmt, block, s):
    """Six bits in two places: see the diagram in formats/quants/k/q3_k.py."""
    lower = field_i32(bytes_as_i32(fmt, at(block, 1536 + 16 * (s & 7))), 4 * (s >> 3), 15)
    upper = field_i32(bytes_as_i32(fmt, at(block, 1664 + 16 * (s & 3))), 2 * (s >> 2), 3)
    return add_i32(add_i32(lower, shift_left(upper, 4)), splat_int(fmt, MINUS_32))


def _scale_iq4_xs(fmt, block, s):
    """Six bits in two places: see the diagram in formats/quants/iq/iq4.py."""
    lower = field_i32(bytes_as_i32(fmt, at(block, 64 + 16 * (s >> 1))), 4 * (s & 1), 15)
    upper = field_i32(bytes_as_i32(fmt, at(block, 32 + 16 * (s >> 2))), 2 * (s & 3), 3)
    return add_i32(add_i32(lower, shift_left(upper, 4)), splat_int(fmt, MINUS_32))


def _scale_4(fmt, block, s):
    """Six bits, in two places from the fifth sub-block on: see the diagram in formats/quants/k/q4_k.py."""
    if s < 4:
        return field_i32(bytes_as_i32(fmt, at(block, 64 + 16 * s)), 0, 63)
    upper = field_i32(bytes_as_i32(fmt, at(block, 64 + 16 * (s - 4))), 6, 3)
    return add_i32(field_i32(bytes_as_i32(fmt, at(block, 64 + 16 * (s + 4))), 0, 15), shift_left(upper, 4))


def _scale_6(fmt, block, s):
    return signed_bytes_as_i32(fmt, at(block, 3072 + 16 * s))


@by_format({"Q2_K": _scale_2, "Q3_K": _scale_3, "Q4_K": _scale_4, "Q5_K": _scale_4, "Q6_K": _scale_6, "IQ4_XS": _scale_iq4_xs})
def sub_scale(fmt, block, s):
    """The integer scales of sub-block s of 16 rows, I32x16."""


def _minimum_2(fmt, block, s):
    return field_i32(bytes_as_i32(fmt, at(block, 16 * s)), 4, 15)


def _minimum_4(fmt, block, s):
    if s < 4:
        return field_i32(bytes_as_i32(fmt, at(block, 64 + 16 * (s + 4))), 0, 63)
    upper = field_i32(bytes_as_i32(fmt, at(block, 64 + 16 * s)), 6, 3)
    return add_i32(field_i32(bytes_as_i32(fmt, at(block, 64 + 16 * (s + 4))), 4, 15), shift_left(upper, 4))


# Numba types a branch that is never taken too, so types without minimums have a body as well
@by_format(lambda fmt: _minimum_2 if fmt.type == "Q2_K" else _minimum_4)
def sub_minimum(fmt, block, s):
    """The integer minimums of sub-block s of 16 rows, I32x16."""


@inline
def sub_minimum_pair(fmt, block, s):
    """The minimums of sub-blocks s and s + 1, as two int16 in a lane."""
    return add_i32(sub_minimum(fmt, block, s), shift_left(sub_minimum(fmt, block, s + 1), 16))


# ---- floats

def _float_bf16(fmt, pointer):
    return load_bf16(pointer)


FLOATS = {"F32": _by_lanes(load_f32, load_f32_narrow, 32), "F16": _by_lanes(load_f16, load_f16_narrow, 16), "BF16": lambda fmt: _float_bf16}


@by_format(lambda fmt: FLOATS[fmt.type](fmt))
def load_floats(fmt, pointer):
    """16 numbers stored as F32, F16 or BF16, as float32: a column of 16 rows. Half of them in narrow vectors (not of BF16)."""


@by_format(_by_lanes(load_f32, load_f32_narrow, 32))
def load_activations(fmt, pointer):
    """As many float32 as there are lanes."""


@by_format(_splat_by_lanes(splat_f32_from, splat_f32_from_narrow))
def splat_from(fmt, pointer):
    """One float32 in memory, in every lane."""
