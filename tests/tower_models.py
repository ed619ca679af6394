"""Tiny random models that see and hear, built with transformers' own classes; what they are asked; what transformers makes of it."""

import numpy as np
import torch
from directories import save
from shapes import COMMON, SHAPES
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
)

SIDE = 4                # of a patch, pixels
VISION = dict(patch_size=SIDE, position_embedding_size=64, num_attention_heads=2, num_key_value_heads=2)
KINDS = {               # the towers of E2B, of 26B-A4B and 31B, of 12B; the large one has widths that Q8_0 does not fit
    "small": dict(vision_config=VISION | dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, head_dim=16,
                                              use_clipped_linears=True),
                  audio_config=dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, subsampling_conv_channels=[128, 4],
                                    output_proj_dims=24)),
    "large": dict(vision_config=VISION | dict(hidden_size=64, intermediate_size=68, num_hidden_layers=3, head_dim=24, standardize=True)),
    "unified": dict(vision_config=dict(patch_size=SIDE, mm_embed_dim=64, mm_posemb_size=32, output_proj_dims=64),
                    audio_config=dict(audio_embed_dim=40)),
}
SMALL_TEXT = dict(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0)


def random_towers(kind: str, seed: int = 0):
    """A model of this kind whose every weight and bound of the parts that see and hear is random and matters."""
    torch.manual_seed(seed)
    shape = SHAPES[{"small": "E4B", "large": "31B", "unified": "12B"}[kind]]
    text = {k: v for k, v in (COMMON | shape | SMALL_TEXT).items()
            if kind != "unified" or not k.startswith(("hidden_size_per", "vocab_size_per"))}
    if kind == "unified":
        config = Gemma4UnifiedConfig(text_config=Gemma4UnifiedTextConfig(**text), **KINDS[kind])
        model = Gemma4UnifiedForConditionalGeneration(config).eval().float()
    else:
        text["use_bidirectional_attention"] = "vision" if kind == "large" else None         # as in the files of 26B-A4B and 31B
        model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=Gemma4TextConfig(**text), **KINDS[kind])).eval().float()
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            part = name.removeprefix("model.").split(".")[0]
            if part in ("language_model", "lm_head") or not p.is_floating_point():
                continue
            if name.endswith(("input_min", "output_min")):
                p.uniform_(-2.0, -1.2)
            elif name.endswith(("input_max", "output_max")):
                p.uniform_(1.0, 1.8)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                p.uniform_(0.3, 0.5)            # weights of 1 make a random tower amplify rounding
            elif name.endswith("std_scale"):
                p.uniform_(0.1, 0.4)
            elif name.endswith(("inv_freq", "inv_timescales", "softcap")):
                continue
            elif name.endswith(("bias", "per_dim_scale")):
                p.normal_(0, 0.5)
            elif p.ndim == 1:
                p.normal_(1, 0.1)
            elif name.endswith(("position_embedding_table", "pos_embedding")):
                p.normal_(0, 0.5)
            else:
                p.normal_(0, p[0].numel() ** -0.5)
    return model


def save_towers(folder, model, dtype=torch.float32):
    """Writes the model as a Hugging Face directory."""
    return save(folder, model, dtype)


# ---- what they are asked

def picture(n_columns: int, n_rows: int, side: int = SIDE, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(patches, positions) of a random picture of so many patches."""
    y, x = np.divmod(np.arange(n_columns * n_rows), n_columns)
    patches = np.random.default_rng(seed).random((len(x), 3 * side * side), np.float32)
    return patches, np.stack([x, y], axis=-1)


def sound(n_frames: int, width: int = 128, seed: int = 0) -> np.ndarray:
    """Random frames: log-mel numbers, or samples where they are not 128 wide."""
    x = np.random.default_rng(seed).standard_normal((n_frames, width))
    return (x * 1.5 - 3 if width == 128 else x * 0.1).astype(np.float32)


# ---- what transformers makes of it

@torch.no_grad()
def image_oracle(model, patches: np.ndarray, positions: np.ndarray, padding: int = 0) -> np.ndarray:
    """Soft tokens, with so many patches of padding."""
    patches = np.concatenate([patches, np.zeros((padding, patches.shape[1]), np.float32)])
    positions = np.concatenate([positions, np.full((padding, 2), -1)])
    (tokens,) = model.model.get_image_features(torch.from_numpy(patches)[None], torch.from_numpy(positions)[None]).pooler_output
    return tokens.numpy()


@torch.no_grad()
def audio_oracle(model, frames: np.ndarray, padding: int = 0) -> np.ndarray:
    """Soft tokens, with so many frames of padding, which are masked."""
    mask = torch.tensor([[True] * len(frames) + [False] * padding])
    frames = np.concatenate([frames, np.zeros((padding, frames.shape[1]), np.float32)])
    out = model.model.get_audio_features(torch.from_numpy(frames)[None], mask)
    return out.pooler_output[0][out.attention_mask[0].bool()].numpy()
