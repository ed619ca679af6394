"""The product of activations with a weight matrix: nearly all of the time and of the bytes.

In two arithmetics: "exact", with weights dequantized to float32; and "q8", with integers on both sides inside a block, as ggml computes.
"""

from dataclasses import dataclass

import numpy as np

from refimpl.formats.matrix import Matrix
from refimpl.formats.quants.basic.mxfp4 import scales_mxfp4, values_mxfp4
from refimpl.formats.quants.basic.q4_0 import codes_q4_0, codes_q4_1
from refimpl.formats.quants.basic.q5_0 import codes_q5_0, codes_q5_1
from refimpl.formats.quants.blocks import BLOCKS, fields_of
from refimpl.formats.quants.iq.iq4 import scales_iq4_xs, values_iq4
from refimpl.formats.quants.k.q2_k import codes_q2_k, scales_q2_k
from refimpl.formats.quants.k.q3_k import codes_q3_k, scales_q3_k
from refimpl.formats.quants.k.q4_k import codes_q4_k, unpack_scales
from refimpl.formats.quants.k.q5_k import codes_q5_k
from refimpl.formats.quants.k.q6_k import codes_q6_k
from refimpl.reference.activations import quantize_activations
from refimpl.reference.ops import fma


def matmul(x_TD: np.ndarray, w_OD: Matrix) -> np.ndarray:
    """y[t, o] = sum over d of x[t, d] * w[o, d]. float32 (T, D) and a Matrix of (O, D) -> float32 (T, O).

    Weights are dequantized chunk by chunk, so the matrix may be larger than memory.
    einsum without `optimize` sums each row in the same order however many rows there are; BLAS does not.
    """
    y_TO = np.empty((x_TD.shape[0], w_OD.shape[0]), np.float32)
    for first, end in w_OD.row_chunks():
        y_TO[:, first:end] = np.einsum("TD,OD->TO", x_TD, w_OD.rows(first, end).float32())
    return y_TO


def matmul_q8(x_TD: np.ndarray, w_OD: Matrix) -> np.ndarray:
    """The same product with activations quantized to 8 bits (activations.py). Weights without integer arithmetic (F32, F16, BF16, and types
    that are not in CODES: IQ1 to IQ3, TQ, NVFP4, ...) are multiplied by `matmul`.

    Inside a block everything is an integer and exact; the blocks of a row are added in order, each with one fused multiply-add (two where
    the type has a minimum). (In ggml, fusing and order depend on the vector width.)
    """
    if w_OD.type not in CODES:
        return matmul(x_TD, w_OD)
    x = quantize_activations(x_TD, w_OD.type)
    y_TO = np.empty((x_TD.shape[0], w_OD.shape[0]), np.float32)
    for first, end in w_OD.row_chunks():
        w = integer_parts(w_OD.rows(first, end))
        total_TO = np.zeros((len(x_TD), end - first), np.float32)
        for b in range(w.d_OB.shape[1]):
            dot_TO = np.einsum("TQ,OQ->TO", x.q_TBQ[:, b], w.q_OBQ[:, b])
            total_TO = fma(x.d_TB[:, b, None] * w.d_OB[:, b], dot_TO.astype(np.float32), total_TO)
            if isinstance(w.minimum, IntegerMinimum):
                low_TO = np.einsum("TQ,OQ->TO", x.q_TBQ[:, b], w.minimum.low_OBQ[:, b])
                total_TO = fma(-x.d_TB[:, b, None] * w.minimum.dmin_OB[:, b], low_TO.astype(np.float32), total_TO)
            elif isinstance(w.minimum, FloatMinimum):
                total_TO = fma(x.sum_TB[:, b, None], w.minimum.m_OB[:, b], total_TO)
        y_TO[:, first:end] = total_TO
    return y_TO


MATMUL = {"exact": matmul, "q8": matmul_q8}         # by arithmetic


@dataclass(frozen=True)
class NoMinimum:
    """w = d * q."""


@dataclass(frozen=True)
class IntegerMinimum:
    """w = d * q - dmin * low, `low` an integer for each sub-block."""

    low_OBQ: np.ndarray
    dmin_OB: np.ndarray


@dataclass(frozen=True)
class FloatMinimum:
    """w = d * q + m."""

    m_OB: np.ndarray


@dataclass(frozen=True)
class IntegerParts:
    """A matrix as integers (int32, with the sub-block scales multiplied in), the scales of its blocks (float32), and its minimums."""

    q_OBQ: np.ndarray
    d_OB: np.ndarray
    minimum: NoMinimum | IntegerMinimum | FloatMinimum


CODES = {"Q4_0": codes_q4_0, "Q4_1": codes_q4_1, "Q5_0": codes_q5_0, "Q5_1": codes_q5_1, "Q8_0": lambda blocks: blocks["qs"],
          "Q2_K": codes_q2_k, "Q3_K": codes_q3_k, "Q4_K": codes_q4_k, "Q5_K": codes_q5_k, "Q6_K": codes_q6_k,
          "IQ4_NL": values_iq4, "IQ4_XS": values_iq4, "MXFP4": values_mxfp4}
# of the sub-blocks of a superblock; scales alone, or scales and minimums
SCALES = {"Q3_K": scales_q3_k, "Q6_K": lambda blocks: blocks["scales"], "IQ4_XS": scales_iq4_xs}
SCALES_AND_MINIMUMS = {"Q2_K": scales_q2_k, "Q4_K": lambda blocks: unpack_scales(blocks["scales"]),
                       "Q5_K": lambda blocks: unpack_scales(blocks["scales"])}


def integer_parts(w_OD: Matrix) -> IntegerParts:
    """Splits a quantized matrix into integers, scales and minimums. Formulas: formats/quants/."""
    blocks = fields_of(w_OD.raw, BLOCKS[w_OD.type])
    q_OBQ = CODES[w_OD.type](blocks).astype(np.int32)
    d_OB = scales_mxfp4(blocks) if w_OD.type == "MXFP4" else blocks["d"].astype(np.float32)
    if w_OD.type in ("Q4_1", "Q5_1"):
        return IntegerParts(q_OBQ, d_OB, FloatMinimum(blocks["m"].astype(np.float32)))
    if w_OD.type in SCALES_AND_MINIMUMS:
        s_OBQ, m_OBQ = (_spread(part, q_OBQ) for part in SCALES_AND_MINIMUMS[w_OD.type](blocks))
        return IntegerParts(q_OBQ * s_OBQ, d_OB, IntegerMinimum(m_OBQ, blocks["dmin"].astype(np.float32)))
    if w_OD.type in SCALES:
        q_OBQ = q_OBQ * _spread(SCALES[w_OD.type](blocks), q_OBQ)
    return IntegerParts(q_OBQ, d_OB, NoMinimum())


def _spread(part_OBS: np.ndarray, q_OBQ: np.ndarray) -> np.ndarray:
    """A number for each sub-block, repeated for its weights."""
    return np.repeat(part_OBS.astype(np.int32), q_OBQ.shape[-1] // part_OBS.shape[-1], axis=-1)
