"""The entry point of the formats: dequantize and quantize by type name, in bounded memory.

Decoding is exact but for one rounding. A half has 11 significant bits, the integers beside it at most 12 together, so every
product d * q or (d * s) * q fits the 24 bits of a float32; only the sum with a minimum (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K) rounds, once, and
the product with the float32 scale of Q8_K. MXFP4's scale is a power of two.
A decoder that fuses, or works in float64, must therefore give the same bits: a difference from these numbers is an error.
"""

from collections.abc import Callable

import numpy as np

from refimpl.formats.quants import floats
from refimpl.formats.quants.basic import mxfp4, nvfp4, q1_0, q4_0, q5_0, q8_0, tq
from refimpl.formats.quants.blocks import BLOCKS, Block, blocks_of, fields_of
from refimpl.formats.quants.iq import iq1, iq2, iq3, iq4
from refimpl.formats.quants.k import q2_k, q3_k, q4_k, q5_k, q6_k, q8_k

Codec = Callable[[np.ndarray], np.ndarray]

_DEQUANTIZE: dict[str, Codec] = {
    "F32": floats.dequantize_f32,
    "F16": floats.dequantize_f16,
    "BF16": floats.dequantize_bf16,
    "Q4_0": q4_0.dequantize_q4_0,
    "Q4_1": q4_0.dequantize_q4_1,
    "Q5_0": q5_0.dequantize_q5_0,
    "Q5_1": q5_0.dequantize_q5_1,
    "Q8_0": q8_0.dequantize_q8_0,
    "Q4_K": q4_k.dequantize_q4_k,
    "Q5_K": q5_k.dequantize_q5_k,
    "Q6_K": q6_k.dequantize_q6_k,
    "Q2_K": q2_k.dequantize_q2_k,
    "Q3_K": q3_k.dequantize_q3_k,
    "IQ4_NL": iq4.dequantize_iq4_nl,
    "IQ4_XS": iq4.dequantize_iq4_xs,
    "MXFP4": mxfp4.dequantize_mxfp4,
    "IQ3_S": iq3.dequantize_iq3_s,
    "IQ3_XXS": iq3.dequantize_iq3_xxs,
    "IQ2_S": iq2.dequantize_iq2_s,
    "IQ2_XS": iq2.dequantize_iq2_xs,
    "IQ2_XXS": iq2.dequantize_iq2_xxs,
    "IQ1_M": iq1.dequantize_iq1_m,
    "IQ1_S": iq1.dequantize_iq1_s,
    "TQ1_0": tq.dequantize_tq1_0,
    "TQ2_0": tq.dequantize_tq2_0,
    "NVFP4": nvfp4.dequantize_nvfp4,
    "Q1_0": q1_0.dequantize_q1_0,
    "Q2_0": q1_0.dequantize_q2_0,
    "Q8_1": q8_0.dequantize_q8_1,
    "Q8_K": q8_k.dequantize_q8_k,
}

_QUANTIZE: dict[str, Codec] = {
    "F32": floats.quantize_f32,
    "F16": floats.quantize_f16,
    "BF16": floats.quantize_bf16,
    "Q4_0": q4_0.quantize_q4_0,
    "Q4_1": q4_0.quantize_q4_1,
    "Q5_0": q5_0.quantize_q5_0,
    "Q5_1": q5_0.quantize_q5_1,
    "Q8_0": q8_0.quantize_q8_0,
    "Q4_K": q4_k.quantize_q4_k,
    "Q5_K": q5_k.quantize_q5_k,
    "Q6_K": q6_k.quantize_q6_k,
    "Q2_K": q2_k.quantize_q2_k,
    "Q3_K": q3_k.quantize_q3_k,
    "IQ4_NL": iq4.quantize_iq4_nl,
    "IQ4_XS": iq4.quantize_iq4_xs,
    "MXFP4": mxfp4.quantize_mxfp4,
    "TQ1_0": tq.quantize_tq1_0,
    "TQ2_0": tq.quantize_tq2_0,
    "Q8_K": q8_k.quantize_q8_k,
}

DEQUANTIZABLE = frozenset(_DEQUANTIZE)
QUANTIZABLE = frozenset(_QUANTIZE)

# Elements converted at a time: 1 MB of float32, so that a codec's temporaries stay in the cache and are small beside any tensor.
_CHUNK = 1 << 18


class UnsupportedType(ValueError):
    """A block type this project does not encode or decode."""


def dequantize(raw: np.ndarray, type_name: str) -> np.ndarray:
    """Stored weights as numbers: uint8 (*lead, row_bytes) -> a new float32 array (*lead, n_elements).

    Takes any bytes without a warning: an infinite or NaN scale gives infinities and NaN. Peak memory: the output and a few MB.
    """
    codec = _look_up(_DEQUANTIZE, type_name, "dequantize")
    block = BLOCKS[type_name]
    *lead, n_blocks = fields_of(raw, block).shape
    out = np.empty((*lead, n_blocks * block.elements), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        _convert(codec, raw, block.n_bytes, out, block.elements, block)
    return out


def quantize(x: np.ndarray, type_name: str) -> np.ndarray:
    """Numbers as stored weights: float32 (*lead, n_elements) -> a new uint8 array (*lead, row_bytes).

    The quantized types refuse NaN and infinities with a ValueError, the K types also weights too large for their float16 scales.
    """
    return quantize_by(_look_up(_QUANTIZE, type_name, "quantize to"), x, type_name)


def quantize_by(codec: Codec, x: np.ndarray, type_name: str) -> np.ndarray:
    """The same by another rule for this type than llama.cpp's: `codec` takes rows of float32 to bytes."""
    block = BLOCKS[type_name]
    blocks_of(x[:0] if x.ndim > 1 else x, block)  # dtype and row length; no copy of x
    out = np.empty((*x.shape[:-1], block.row_bytes(x.shape[-1])), np.uint8)
    # Overflow and NaN are judged by the codecs, on the scales; NumPy's warnings would only say it twice.
    with np.errstate(over="ignore", invalid="ignore"):
        _convert(codec, x, block.elements, out, block.n_bytes, block)
    return out


def _look_up(codecs: dict[str, Codec], type_name: str, verb: str) -> Codec:
    if type_name not in codecs:
        raise UnsupportedType(f"cannot {verb} {type_name}; supported: {', '.join(codecs)}")
    return codecs[type_name]


def _convert(codec: Codec, source: np.ndarray, source_unit: int, out: np.ndarray, out_unit: int, block: Block) -> None:
    """Fill `out` with codec(source), halving both along the first axis until a part is at most _CHUNK elements.

    A unit is what one block takes along the last axis, so a single long row is cut between blocks. Cutting copies nothing,
    whatever the strides.
    """
    n_blocks = out.size // out_unit
    if n_blocks * block.elements <= _CHUNK:
        out[...] = codec(source)
    elif len(out) == 1 and out.ndim > 1:
        _convert(codec, source[0], source_unit, out[0], out_unit, block)
    else:
        last = out.ndim == 1
        half = (n_blocks if last else len(out)) // 2
        cut_source, cut_out = (half * source_unit, half * out_unit) if last else (half, half)
        _convert(codec, source[:cut_source], source_unit, out[:cut_out], out_unit, block)
        _convert(codec, source[cut_source:], source_unit, out[cut_out:], out_unit, block)
