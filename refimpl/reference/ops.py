"""The small functions between the matrix products: norms, activations, softmax, soft cap, rotation.

float32 in, float32 out. Every constant becomes float32 before it meets an array: in NumPy 2 a float64 scalar makes the result float64.
"""

import numpy as np

from refimpl.reference.angles import cos_sin, power


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. transformers: Gemma4RMSNorm (the weight is not 1 + w)."""
    return rms_normalise(x, eps) * weight


def rms_normalise(x: np.ndarray, eps: float) -> np.ndarray:
    """The norm without a weight: used on values, and before the router."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    return x * (mean_square + np.float32(eps)) ** np.float32(-0.5)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al. 2016, arXiv:1607.06450)."""
    centred = x - np.mean(x, axis=-1, keepdims=True, dtype=np.float32)
    return rms_normalise(centred, eps) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))): "gelu_pytorch_tanh" (Hendrycks & Gimpel 2016, section 2)."""
    inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))


def gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gelu(gate) * up: what a gated feed-forward network computes between its matrices."""
    return gelu(gate) * up


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x) (Hendrycks & Gimpel 2016, section 2)."""
    return x * _sigmoid(x)


def limit(x: np.ndarray, least: float, most: float) -> np.ndarray:
    """Numbers below `least` become that, those above `most` that. transformers: Gemma4ClippableLinear."""
    return np.clip(x, np.float32(least), np.float32(most))


def glu(x: np.ndarray) -> np.ndarray:
    """The first half of the last axis times the sigmoid of the second (Dauphin et al. 2016, arXiv:1612.08083)."""
    half = x.shape[-1] // 2
    return x[..., :half] * _sigmoid(x[..., half:])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):            # e^-x may be infinite
        return np.float32(1) / (np.float32(1) + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis, the maximum subtracted first. -inf gets weight 0."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True, dtype=np.float32)


def softcap(x: np.ndarray, cap: float) -> np.ndarray:
    """cap * tanh(x / cap): limits logits to (-cap, cap). Gemma 2 (arXiv:2408.00118), section 2."""
    return np.tanh(x / np.float32(cap)) * np.float32(cap)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there (Boldo & Melquiond 2008, section 3), after which rounding it again,
    to float32, is the same as rounding once.
    """
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    to_odd = (error != 0) & (total.view(np.int64) & 1 == 0) & np.isfinite(total)
    return np.where(to_odd, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total).astype(np.float32)


def rope_frequencies(head_dim: int, base: float, divisor_R: np.ndarray) -> np.ndarray:
    """Angle per position of each of the R = head_dim / 2 rotated pairs: base^(-2r / head_dim) / divisor[r], float32 (R,).

    The divisor is 1 for ordinary RoPE (Su et al. 2021, arXiv:2104.09864). Gemma 4's full layers rotate only their fastest quarter
    ("proportional"): the file says so by a divisor of 1e30 for the others, which makes their angle 0.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (1.0 / power(base, exponent) / divisor_R).astype(np.float32)


def rope_angles(pos_T: np.ndarray, frequency_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) of every position and pair, float32 (T, R) each.

    The angle is a float32, as in transformers; cosine and sine are computed in float64.
    """
    cos_TR, sin_TR = cos_sin(np.einsum("T,R->TR", pos_T.astype(np.float32), frequency_R).astype(np.float64))
    return cos_TR.astype(np.float32), sin_TR.astype(np.float32)


def rotate(x_TNH: np.ndarray, cos_TR: np.ndarray, sin_TR: np.ndarray) -> np.ndarray:
    """Rotates each head's pairs (x[r], x[r + R]) by their angles: NeoX pairing, halves and not neighbours."""
    n_pairs = x_TNH.shape[-1] // 2
    a, b = x_TNH[..., :n_pairs], x_TNH[..., n_pairs:]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
