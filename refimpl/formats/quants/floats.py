"""F32, F16, BF16: plain floating-point numbers, and the few float operations all quantizers share.

         sign  exponent  fraction
    F32  | 1 |    8    |    23    |      little-endian IEEE single
    F16  | 1 |    5    |    10    |      little-endian IEEE half; largest finite value 65504
    BF16 | 1 |    8    |     7    |      the upper half of an F32: its range, a third of its digits

Formula: w = x, converted to float32 without error. Source: GGML_TYPE_F32, GGML_TYPE_F16, ggml_bf16_t (ggml.h, ggml-impl.h).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of


def dequantize_f32(raw: np.ndarray) -> np.ndarray:
    """Bytes as they are: uint8 (*lead, 4 * D) -> float32 (*lead, D). Exact, NaN payloads included."""
    return fields_of(raw, BLOCKS["F32"])["x"].astype(np.float32)


def quantize_f32(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, 4 * D). Exact."""
    return bytes_of(BLOCKS["F32"], x=blocks_of(x, BLOCKS["F32"])[..., 0])


def dequantize_f16(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, 2 * D) -> float32 (*lead, D). Exact."""
    return fields_of(raw, BLOCKS["F16"])["x"].astype(np.float32)


def quantize_f16(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, 2 * D), rounded to nearest, ties to even; beyond 65520 it is an infinity."""
    return bytes_of(BLOCKS["F16"], x=to_half(blocks_of(x, BLOCKS["F16"])[..., 0]))


def dequantize_bf16(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, 2 * D) -> float32 (*lead, D). Exact."""
    upper = fields_of(raw, BLOCKS["BF16"])["x"].astype(np.uint32)
    return (upper << np.uint32(16)).view(np.float32)


def quantize_bf16(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, 2 * D), rounded to nearest, ties to even; a NaN stays a (quiet) NaN."""
    bits = np.ascontiguousarray(blocks_of(x, BLOCKS["BF16"])[..., 0]).view(np.uint32)
    # Adding 0x7FFF, and one more where the kept part is odd, carries into it exactly when nearest-even rounds up.
    # It cannot wrap: the largest pattern that is not a NaN is 0xFF800000.
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)
    # A NaN must not round to infinity: keep its upper half and set the quiet bit.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return bytes_of(BLOCKS["BF16"], x=np.where(is_nan, quiet, rounded).astype(np.uint16))


def to_half(x: np.ndarray) -> np.ndarray:
    """Round float32 to float16. Too large becomes an infinity, in silence: it is what the file then says."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16)


def reciprocal(d: np.ndarray) -> np.ndarray:
    """1 / d for the scales of a quantizer, and 0 where d is 0 or so small that 1 / d overflows; refuses NaN and infinity.

    gguf-py multiplies by that infinity and casts the outcome to an integer, which NumPy leaves undefined. Such a scale is 0
    as a float16, so the block restores to the same zeros (or the same minimum) whatever its integers are; ours are defined.
    """
    if not np.isfinite(d).all():
        raise ValueError("cannot quantize: a block holds NaN, an infinity, or values further apart than float32 reaches")
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))
