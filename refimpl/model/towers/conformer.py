"""The conformer (Gulati et al. 2020, arXiv:2005.08100) with which E2B and E4B hear, top to bottom, for one clip.

Two convolutions of stride 2 make one row of four frames. A layer is half a feed-forward network, attention, a convolution in time and the
other half. Attention reaches back over the latest dozen rows, itself included; keys are made of distances too. Nothing looks ahead but the
first two convolutions.

`tap(name, value)` (model/tap.py) shows values; llama.cpp names none of these. transformers: Gemma4AudioModel.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from refimpl.model.backend import Backend
from refimpl.model.tap import Tap, no_tap, of_layer
from refimpl.model.towers.config import AUDIO_CAP, AUDIO_EPS, BAND, ConformerConfig
from refimpl.model.towers.parts import in_chunks, linear, project
from refimpl.model.towers.weights import BandAttention, ConformerLayer, ConformerWeights, Convolution, FeedForward, LightConvolution
from refimpl.reference.angles import power
from refimpl.reference.ops import rope_angles

LONGEST = 10_000.0                                          # slowest wave of the code of distances
KEY_SCALE = np.float32(math.log(1 + math.e) / math.log(2))
HALF = np.float32(0.5)
TOGETHER = 16                                               # rows in time whose windows are in memory, and in a cache, together


@dataclass(frozen=True)
class Step:
    """What all layers share: `distance_SD` is the code of the distances 0 to BAND - 1."""

    config: ConformerConfig
    distance_SD: np.ndarray
    backend: Backend
    tap: Tap

    def in_layer(self, i: int) -> "Step":
        """The same, with a tap that adds the layer's number to names."""
        return self if self.tap is no_tap else replace(self, tap=of_layer(self.tap, i))


def audio_tokens(config: ConformerConfig, weights: ConformerWeights, backend: Backend, frames_TM: np.ndarray,
                 tap: Tap = no_tap) -> np.ndarray:
    """The soft tokens of a clip, float32 (a quarter of T, O): one of four mel frames, float32 (T, M)."""
    x_TJC = frames_TM[:, :, None]
    for convolution in weights.convolutions:
        x_TJC = convolve(x_TJC, convolution, backend)
    x_TD = tap("inp", backend.matmul(x_TJC.reshape(len(x_TJC), -1), weights.input_DJC))
    step = Step(config, distance_code(config.n_embd), backend, tap)
    for i, layer in enumerate(weights.layers):
        x_TD = run_layer(layer, x_TD, step.in_layer(i))
    x_TI = tap("encoded", backend.matmul(x_TD, weights.output_ID) + weights.output_bias_I)
    return tap("projected", project(x_TI, weights.projection_OI, AUDIO_EPS, backend))


def convolve(x_TJC: np.ndarray, w: Convolution, backend: Backend) -> np.ndarray:
    """A 3 x 3 convolution of stride 2 over time and frequency, a layer norm over channels, relu: half as many rows and bands.

    The windows of 3 x 3 numbers become rows of a matrix product. Zeros surround the clip.
    """
    n_time, n_bands, n_in = x_TJC.shape
    n_rows, n_columns = (n_time + 1) // 2, (n_bands + 1) // 2
    padded_TJC = np.zeros((n_time + 2, n_bands + 2, n_in), np.float32)
    padded_TJC[1:-1, 1:-1] = x_TJC
    parts = []
    for first in range(0, n_rows, TOGETHER):
        n = min(TOGETHER, n_rows - first)
        window_TJC33 = np.empty((n, n_columns, n_in, 3, 3), np.float32)
        for time in range(3):
            for band in range(3):
                window_TJC33[..., time, band] = padded_TJC[2 * first + time:][:2 * n:2, band:band + 2 * n_columns:2]
        y = backend.matmul(window_TJC33.reshape(n * n_columns, -1), w.kernel_CK)
        y = backend.layer_norm(y, w.norm.weight_D, w.norm.bias_D, AUDIO_EPS)
        parts.append(np.maximum(y, np.float32(0)).reshape(n, n_columns, -1))
    return np.concatenate(parts)


def distance_code(width: int) -> np.ndarray:
    """Sines, then cosines, of distances 0 to BAND - 1 times width / 2 frequencies from 1 down to 1 / LONGEST: float32 (BAND, width).

    transformers: Gemma4AudioRelPositionalEncoding.
    """
    n = width // 2
    frequency = (1 / power(LONGEST, np.arange(n) / max(n - 1, 1))).astype(np.float32)
    cos, sin = rope_angles(np.arange(BAND), frequency)
    return np.concatenate([sin, cos], axis=-1)


def run_layer(w: ConformerLayer, x_TD: np.ndarray, step: Step) -> np.ndarray:
    """One layer. transformers: Gemma4AudioLayer."""
    backend, tap = step.backend, step.tap
    x_TD = tap("ffn_out", half_feed_forward(w.first, x_TD, backend))
    y_TD = attention(w.attention, backend.rms_norm(x_TD, w.attention.norm_before_D, AUDIO_EPS), step)
    x_TD = tap("attn_out", x_TD + backend.rms_norm(y_TD, w.attention.norm_after_D, AUDIO_EPS))
    x_TD = tap("conv_out", light_convolution(w.convolution, x_TD, backend))
    x_TD = tap("ffn_out_1", half_feed_forward(w.second, x_TD, backend))
    return tap("layer_out", backend.rms_norm(x_TD, w.norm_D, AUDIO_EPS))


def half_feed_forward(w: FeedForward, x_TD: np.ndarray, backend: Backend) -> np.ndarray:
    """x + norm(down(silu(up(norm(x))))) / 2. transformers: Gemma4AudioFeedForward."""
    def network(part_TD: np.ndarray) -> np.ndarray:
        hidden_TF = backend.silu(linear(backend.rms_norm(part_TD, w.norm_before_D, AUDIO_EPS), w.up_FD, backend))
        return part_TD + HALF * backend.rms_norm(linear(hidden_TF, w.down_DF, backend), w.norm_after_D, AUDIO_EPS)
    return in_chunks(network, x_TD)


def attention(w: BandAttention, x_TD: np.ndarray, step: Step) -> np.ndarray:
    """Projections, scales, attention to the latest BAND rows. transformers: Gemma4AudioAttention."""
    backend, config = step.backend, step.config
    shape = len(x_TD), config.n_head, config.head_dim
    query_scale = np.float32(config.head_dim ** -0.5 / math.log(2))
    q_TNH, k_TNH, v_TNH = (linear(x_TD, matrix, backend).reshape(shape) for matrix in (w.query_AD, w.key_AD, w.value_AD))
    q_TNH, k_TNH = step.tap("Qcur", q_TNH * query_scale * w.scale_H), step.tap("Kcur", k_TNH * KEY_SCALE)
    relative_SNH = backend.matmul(step.distance_SD, w.relative_AD).reshape(BAND, *shape[1:])
    out_TNH = step.tap("kqv_out", backend.attend_band(q_TNH, k_TNH, v_TNH, relative_SNH, AUDIO_CAP))
    return linear(out_TNH.reshape(len(x_TD), -1), w.output_DA, backend)


def light_convolution(w: LightConvolution, x_TD: np.ndarray, backend: Backend) -> np.ndarray:
    """x + end(silu(norm(convolution(glu(start(norm(x))))))), each channel convolved on its own. transformers: Gemma4AudioLightConv1d."""
    gated_TD = backend.glu(linear(backend.rms_norm(x_TD, w.norm_before_D, AUDIO_EPS), w.start_2D, backend))
    n_taps = w.kernel_DK.shape[1]
    padded_TD = np.concatenate([np.zeros((n_taps - 1, x_TD.shape[1]), np.float32), gated_TD])
    y_TD = np.zeros_like(x_TD)
    for tap in range(n_taps):                   # the last tap is a row's own
        y_TD += padded_TD[tap:tap + len(x_TD)] * w.kernel_DK[:, tap]
    return x_TD + linear(backend.silu(backend.rms_norm(y_TD, w.norm_after_D, AUDIO_EPS)), w.end_DD, backend)
