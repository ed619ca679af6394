"""The vision transformer (ViT) of Gemma 4, top to bottom, for one image. How it differs from the first one (arXiv:2010.11929):

- any number of patches in any arrangement: positions are rows of two tables, one for x, one for y, that are added;
- they turn queries and keys as well: one half of a head by x, the other by y (2-D RoPE);
- no class token: 3 x 3 patches are averaged to a soft token;
- the norms, gated feed-forward network and unscaled attention of Gemma 4's text model; every patch sees all others;
- the small one (E2B, E4B) limits what goes into and comes out of its matrices; the large one (26B-A4B, 31B) standardizes what is averaged.

`tap(name, value)` (model/tap.py) shows values under llama.cpp's names. transformers: Gemma4VisionModel.
"""

from dataclasses import dataclass, replace

import numpy as np

from refimpl.model.backend import Backend
from refimpl.model.rotation import angles_at
from refimpl.model.tap import Tap, no_tap, of_layer
from refimpl.model.towers.config import POOL, ROPE_BASE, VisionConfig
from refimpl.model.towers.parts import as_planes, in_chunks, linear, positions_of, project
from refimpl.model.towers.weights import Standardize, VisionLayer, VisionWeights
from refimpl.reference.ops import rope_frequencies

Angles = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Step:
    """What all layers share."""

    config: VisionConfig
    x_angles: Angles        # cosines and sines, float32 (T, H / 4) each
    y_angles: Angles
    backend: Backend
    tap: Tap

    def in_layer(self, i: int) -> "Step":
        """The same, with a tap that adds the layer's number to names."""
        return self if self.tap is no_tap else replace(self, tap=of_layer(self.tap, i))


def image_tokens(config: VisionConfig, weights: VisionWeights, backend: Backend, patches_TP: np.ndarray, pos_T2: np.ndarray,
                 tap: Tap = no_tap) -> np.ndarray:
    """The soft tokens of an image, row by row, float32 (T / 9, O).

    patches_TP  float32, 0 to 1, in the order (row, column, channel) of pixels
    pos_T2      int64 (x, y) of each patch, row by row; width and height are multiples of 3, and there are rows for all in the tables
    """
    half = config.head_dim // 2
    frequency = rope_frequencies(half, ROPE_BASE, np.ones(half // 2, np.float32))
    step = Step(config, angles_at(pos_T2[:, 0], frequency), angles_at(pos_T2[:, 1], frequency), backend, tap)
    pixels_TP = np.float32(2) * (as_planes(patches_TP, config.side) - np.float32(0.5))
    x_TD = tap("inp", backend.matmul(pixels_TP, weights.patch_DP))
    x_TD = tap("pos_embd", x_TD + positions_of(weights.position_2SD, pos_T2))
    for i, layer in enumerate(weights.layers):
        x_TD = run_layer(layer, x_TD, step.in_layer(i))
    x_TD = tap("pooled", pool(x_TD, int(pos_T2[:, 0].max()) + 1) * np.float32(config.n_embd ** 0.5))
    if isinstance(weights.standard, Standardize):
        x_TD = tap("std_scaled", (x_TD - weights.standard.bias_D) * weights.standard.scale_D)
    return tap("projected", project(x_TD, weights.projection_OD, config.norm_eps, backend))


def run_layer(w: VisionLayer, x_TD: np.ndarray, step: Step) -> np.ndarray:
    """One layer: attention, feed-forward network. transformers: Gemma4VisionEncoderLayer."""
    backend, eps, tap = step.backend, step.config.norm_eps, step.tap
    y_TD = attention(w, tap("layer_inp_normed", backend.rms_norm(x_TD, w.norm_before_D, eps)), step)
    x_TD = tap("ffn_inp", x_TD + tap("attn_post_normed", backend.rms_norm(y_TD, w.norm_after_D, eps)))
    normed_TD = tap("ffn_inp_normed", backend.rms_norm(x_TD, w.norm_before_ffn_D, eps))
    y_TD = tap("ffn_out", in_chunks(lambda part_TD: feed_forward(w, part_TD, backend), normed_TD))
    return tap("layer_out", x_TD + tap("ffn_post_normed", backend.rms_norm(y_TD, w.norm_after_ffn_D, eps)))


def attention(w: VisionLayer, x_TD: np.ndarray, step: Step) -> np.ndarray:
    """Projections, norms of heads, rotation, attention to all patches. transformers: Gemma4VisionAttention."""
    backend, eps, tap = step.backend, step.config.norm_eps, step.tap
    shape = len(x_TD), step.config.n_head, step.config.head_dim
    q_TNH, k_TNH, v_TNH = (linear(x_TD, matrix, backend).reshape(shape) for matrix in (w.query_AD, w.key_AD, w.value_AD))
    q_TNH = tap("Qcur", backend.rms_norm(q_TNH, w.query_norm_H, eps))
    k_TNH = tap("Kcur", backend.rms_norm(k_TNH, w.key_norm_H, eps))
    v_TNH = tap("Vcur_normed", backend.rms_normalise(tap("Vcur", v_TNH), eps))
    q_TNH, k_TNH = tap("Qcur_pos", rotate(q_TNH, step)), tap("Kcur_pos", rotate(k_TNH, step))
    out_TNH = tap("kqv_out", backend.attend_all(q_TNH, k_TNH, v_TNH))
    return tap("attn_out", linear(out_TNH.reshape(len(x_TD), -1), w.output_DA, backend))


def rotate(x_TNH: np.ndarray, step: Step) -> np.ndarray:
    """Turns the first half of each head by x, the second by y. transformers: apply_multidimensional_rope."""
    half = x_TNH.shape[-1] // 2
    return np.concatenate([step.backend.rotate(x_TNH[..., :half], *step.x_angles),
                           step.backend.rotate(x_TNH[..., half:], *step.y_angles)], axis=-1)


def feed_forward(w: VisionLayer, x_TD: np.ndarray, backend: Backend) -> np.ndarray:
    """down(gelu(gate(x)) * up(x)). transformers: Gemma4VisionMLP."""
    hidden_TF = backend.gated(linear(x_TD, w.gate_FD, backend), linear(x_TD, w.up_FD, backend))
    return linear(hidden_TF, w.down_DF, backend)


def pool(x_TD: np.ndarray, n_columns: int) -> np.ndarray:
    """The mean of each square of 3 x 3 patches, row by row: float32 (T / 9, D)."""
    square = x_TD.reshape(-1, POOL, n_columns // POOL, POOL, x_TD.shape[-1])
    total = np.zeros(square[:, 0, :, 0].shape, np.float32)
    for row in range(POOL):
        for column in range(POOL):
            total += square[:, row, :, column]
    return (total / np.float32(POOL * POOL)).reshape(-1, x_TD.shape[-1])
