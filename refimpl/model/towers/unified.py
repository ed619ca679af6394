"""How the 12B sees and hears without an encoder: a matrix makes a soft token of a cell of pixels, another one of a frame of samples.

transformers: Gemma4UnifiedVisionEmbedder, Gemma4UnifiedMultimodalEmbedder.
"""

import numpy as np

from refimpl.model.backend import Backend
from refimpl.model.tap import Tap, no_tap
from refimpl.model.towers.config import LAYER_NORM_EPS, CellConfig, SoundFrameConfig
from refimpl.model.towers.parts import as_planes, positions_of, project
from refimpl.model.towers.weights import CellWeights, LayerNorm, SoundFrameWeights


def image_tokens(config: CellConfig, weights: CellWeights, backend: Backend, cells_TP: np.ndarray, pos_T2: np.ndarray,
                 tap: Tap = no_tap) -> np.ndarray:
    """The soft tokens of an image, float32 (T, O).

    cells_TP  float32, 0 to 1, in the order (row, column, channel) of pixels
    pos_T2    int64 (x, y) of each cell, for which there are rows in the tables
    """
    def norm(x: np.ndarray, w: LayerNorm) -> np.ndarray:
        return backend.layer_norm(x, w.weight_D, w.bias_D, LAYER_NORM_EPS)

    x_TD = backend.matmul(norm(as_planes(cells_TP, config.side), weights.norm_cell), weights.cell_DP) + weights.cell_bias_D
    x_TD = tap("inp", norm(x_TD, weights.norm_embedded))
    x_TD = tap("pos_embd", x_TD + positions_of(weights.position_2SD, pos_T2))
    x_TD = norm(x_TD, weights.norm_positioned)
    return tap("projected", project(x_TD, weights.projection_OD, config.norm_eps, backend))


def audio_tokens(config: SoundFrameConfig, weights: SoundFrameWeights, backend: Backend, frames_TU: np.ndarray,
                 tap: Tap = no_tap) -> np.ndarray:
    """The soft tokens of sound, float32 (T, O): one of each frame of samples, float32 -1 to 1."""
    return tap("projected", project(frames_TU, weights.projection_OU, config.norm_eps, backend))
