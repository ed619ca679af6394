"""The product of activations with a weight matrix: where nearly all the time and all the bytes go.

Twice: `exact`, with weights as float32; and `q8`, with both sides as integers inside a block, as ggml computes.
"""

from dataclasses import dataclass

import numpy as np

from refimpl.formats.blocks import BLOCKS, fields_of, unpack
from refimpl.formats.matrix import Matrix
from refimpl.formats.q4_k import unpack_scales
from refimpl.reference.activations import round_activations
from refimpl.reference.ops import fma


def matmul(x_TD: np.ndarray, w_OD: Matrix) -> np.ndarray:
    """y[t, o] = sum over d of x[t, d] * w[o, d]. float32 (T, D) and a Matrix of (O, D) -> float32 (T, O).

    The weights are dequantized chunk by chunk and forgotten again, so that a matrix larger than memory could be used.
    einsum without `optimize` adds each row up in the same order however many rows there are; BLAS does not.
    """
    y_TO = np.empty((x_TD.shape[0], w_OD.shape[0]), np.float32)
    for first, end in w_OD.row_chunks():
        y_TO[:, first:end] = np.einsum("TD,OD->TO", x_TD, w_OD.rows(first, end).float32())
    return y_TO


def matmul_q8(x_TD: np.ndarray, w_OD: Matrix) -> np.ndarray:
    """The same product with activations rounded to 8 bits (see activations.py). Weights of F16, BF16 and F32 stay with `matmul`.

    Inside a block everything is an integer and exact; the blocks of a row are added in order, each with one fused multiply-add (two
    where the type has a minimum). (ggml fuses and orders as its vector width suggests.)
    """
    if BLOCKS[w_OD.type].elements == 1:
        return matmul(x_TD, w_OD)
    x = round_activations(x_TD, w_OD.type)
    y_TO = np.empty((x_TD.shape[0], w_OD.shape[0]), np.float32)
    for first, end in w_OD.row_chunks():
        w = integer_parts(w_OD.rows(first, end))
        total_TO = np.zeros((len(x_TD), end - first), np.float32)
        for b in range(w.d_OB.shape[1]):
            dot_TO = np.einsum("TQ,OQ->TO", x.q_TBQ[:, b], w.q_OBQ[:, b])
            total_TO = fma(x.d_TB[:, b, None] * w.d_OB[:, b], dot_TO.astype(np.float32), total_TO)
            if w.minimum == "integers":
                low_TO = np.einsum("TQ,OQ->TO", x.q_TBQ[:, b], w.low_OBQ[:, b])
                total_TO = fma(-x.d_TB[:, b, None] * w.dmin_OB[:, b], low_TO.astype(np.float32), total_TO)
            elif w.minimum == "float":
                total_TO = fma(x.sum_TB[:, b, None], w.dmin_OB[:, b], total_TO)
        y_TO[:, first:end] = total_TO
    return y_TO


@dataclass(frozen=True)
class IntegerParts:
    """w = d * q + the minimum: none; "integers", - dmin * low; or "float", + dmin. Sub-block scales are already in `q` and `low`."""

    q_OBQ: np.ndarray
    d_OB: np.ndarray
    minimum: str
    low_OBQ: np.ndarray
    dmin_OB: np.ndarray


def integer_parts(w_OD: Matrix) -> IntegerParts:
    """A quantized matrix taken apart into integers (int32) and the scales of its blocks (float32). Formulas: formats/."""
    f = fields_of(w_OD.raw, BLOCKS[w_OD.type])
    d_OB = f["d"].astype(np.float32)
    q_OBQ = _LEVELS[w_OD.type](f)
    nothing = np.zeros((*q_OBQ.shape[:-1], 1), np.int32)
    low_OBQ = np.broadcast_to(nothing, q_OBQ.shape)
    if w_OD.type in ("Q4_1", "Q5_1"):
        return IntegerParts(q_OBQ, d_OB, "float", low_OBQ, f["m"].astype(np.float32))
    if w_OD.type in ("Q4_K", "Q5_K"):
        s, m = (np.repeat(part, 32, axis=-1).astype(np.int32) for part in unpack_scales(f["scales"]))
        return IntegerParts(q_OBQ * s, d_OB, "integers", m, f["dmin"].astype(np.float32))
    if w_OD.type == "Q6_K":
        q_OBQ = q_OBQ * np.repeat(f["scales"], 16, axis=-1).astype(np.int32)
    return IntegerParts(q_OBQ, d_OB, "none", low_OBQ, np.zeros_like(d_OB))


def _nibbles(f, group: int) -> np.ndarray:
    return unpack(f["qs"], n_bits=4, group=group).astype(np.int32)


def _fifth_bits(f) -> np.ndarray:
    return (f["qh"][..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(np.int32) << 4


_LEVELS = {
    "Q4_0": lambda f: _nibbles(f, 16) - 8,
    "Q4_1": lambda f: _nibbles(f, 16),
    "Q5_0": lambda f: (_nibbles(f, 16) | _fifth_bits(f)) - 16,
    "Q5_1": lambda f: _nibbles(f, 16) | _fifth_bits(f),
    "Q8_0": lambda f: f["qs"].astype(np.int32),
    "Q4_K": lambda f: _nibbles(f, 32),
    "Q5_K": lambda f: _nibbles(f, 32) | unpack(f["qh"], n_bits=1, group=32).astype(np.int32) << 4,
    "Q6_K": lambda f: (unpack(f["ql"], n_bits=4, group=64) | unpack(f["qh"], n_bits=2, group=32) << 4).astype(np.int32) - 32,
}
