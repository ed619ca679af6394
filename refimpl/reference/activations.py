"""Activations quantized to 8 bits, block by block, as `q8` arithmetic multiplies them with quantized weights: ggml's rule.

    weights                           activations   blocks of   scale
    Q4_0, Q5_0, Q8_0, IQ4_NL, MXFP4   Q8_0          32          largest magnitude / 127, rounded to float16
    Q4_1, Q5_1                        Q8_1          32          the same, and scale * sum of the integers, rounded to float16
    Q2_K .. Q6_K, IQ4_XS              Q8_K          256         signed largest / -127, in float32

Integers are rounded to nearest, halves to even, as ggml's vector code does on x86 and Arm (its plain C rounds halves away from zero).
Source: quantize_row_q8_0, quantize_row_q8_1 (ggml-cpu/arch), quantize_row_q8_K_ref (ggml-quants.c).
"""

from dataclasses import dataclass

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS


@dataclass(frozen=True)
class QuantizedActivations:
    """x ~ d * q. `q_TBQ`: integers of -127..127, as int32; `d_TB`: scales; `sum_TB`: what Q8_1 stores for minimums (0 for Q8_K)."""

    q_TBQ: np.ndarray
    d_TB: np.ndarray
    sum_TB: np.ndarray


def quantize_activations(x_TD: np.ndarray, weight_type: str) -> QuantizedActivations:
    """Quantizes float32 (T, D) in the blocks that weights of `weight_type` are multiplied with. D is a whole number of blocks."""
    n = BLOCKS[weight_type].elements
    x_TBQ = x_TD.reshape(len(x_TD), x_TD.shape[1] // n, n)
    return _q8_k(x_TBQ) if n == 256 else _q8_0(x_TBQ)


def _q8_0(x_TBQ: np.ndarray) -> QuantizedActivations:
    largest_TB = np.abs(x_TBQ).max(axis=-1)
    d_TB = largest_TB / np.float32(127)
    inverse_TB = np.divide(np.float32(127), largest_TB, out=np.zeros_like(largest_TB), where=largest_TB != 0)
    q_TBQ = np.rint(x_TBQ * inverse_TB[..., None]).astype(np.int32)
    return QuantizedActivations(q_TBQ, _half(d_TB), _half(d_TB * q_TBQ.sum(axis=-1, dtype=np.int32).astype(np.float32)))


def _q8_k(x_TBQ: np.ndarray) -> QuantizedActivations:
    at = np.abs(x_TBQ).argmax(axis=-1)[..., None]
    signed_TB = np.take_along_axis(x_TBQ, at, axis=-1)[..., 0]
    inverse_TB = np.divide(np.float32(-127), signed_TB, out=np.zeros_like(signed_TB), where=signed_TB != 0)
    q_TBQ = np.minimum(np.rint(x_TBQ * inverse_TB[..., None]), np.float32(127)).astype(np.int32)
    d_TB = np.divide(np.float32(1), inverse_TB, out=np.zeros_like(inverse_TB), where=inverse_TB != 0)
    return QuantizedActivations(q_TBQ, d_TB, np.zeros_like(d_TB))


def _half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)
