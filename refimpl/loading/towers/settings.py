"""The parts of `config.json` that see and hear as the metadata of a projector file.

Source: transformers' Gemma4VisionConfig, Gemma4AudioConfig, Gemma4UnifiedVisionConfig, Gemma4UnifiedAudioConfig.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refimpl.formats.checkpoint import CheckpointError
from refimpl.loading.config_json import check_sight, is_drafter
from refimpl.loading.hf_names import under
from refimpl.model.config import PROJECTOR_ARCHITECTURE
from refimpl.model.towers.config import AUDIO_CAP, AUDIO_EPS, BAND, POOL, ROPE_BASE

MEL_BINS = 128                  # of Gemma4AudioFeatureExtractor; config.json does not say
DUMMY_SIZE = 224                # llama.cpp wants the key; images have any size
# The classes' defaults of settings that are no sizes.
VISION = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "rms_norm_eps": 1e-6, "rope_parameters": None,
          "pooling_kernel_size": POOL}
AUDIO = {"hidden_act": "silu", "residual_weight": 0.5, "attention_context_left": BAND + 1, "attention_context_right": 0,
         "attention_logit_cap": AUDIO_CAP, "rms_norm_eps": AUDIO_EPS, "attention_chunk_size": BAND}


def projector_metadata(config: Mapping[str, object], place: Path) -> dict[str, object]:
    """The `clip.*` keys for the config.json at `place`. Raises CheckpointError naming what is missing, malformed or not supported."""
    if is_drafter(config, place):
        raise CheckpointError(place, None, f"model_type is {config['model_type']!r}: a drafter, no projector; give it with -md")
    vision, audio = config.get("vision_config"), config.get("audio_config")
    if config["model_type"].endswith("_text") or vision is None and audio is None:
        raise CheckpointError(place, None, "has neither vision_config nor audio_config: this model reads text only")
    unified = config["model_type"] == "gemma4_unified"
    try:
        check_sight(config, place)
        keys: dict[str, object] = {}
        if vision is not None:
            keys |= _vision(VISION | dict(vision), unified, place)
        if audio is not None:
            keys |= _audio(AUDIO | dict(audio), unified, place)
        width = config["text_config"]["hidden_size"]
        keys |= {f"{tower}.projection_dim": width for tower, own in (("vision", vision), ("audio", audio)) if own is not None}
        return under(PROJECTOR_ARCHITECTURE, keys) | {"general.type": "mmproj"}
    except KeyError as error:
        raise CheckpointError(place, None, f"is no configuration of a Gemma 4 projector: {error.args[0]} is missing") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(place, None, f"is no configuration of a Gemma 4 projector: {type(error).__name__} {error}") from None


def _vision(vision: dict, unified: bool, place: Path) -> dict[str, object]:
    _require(vision["pooling_kernel_size"] == POOL, f"pooling_kernel_size {vision['pooling_kernel_size']!r}", place)
    if unified:
        sizes = {"embedding_length": vision["mm_embed_dim"], "feed_forward_length": 0, "block_count": 0, "attention.head_count": 0}
    else:
        rope = vision["rope_parameters"] or {}
        _require(vision["hidden_activation"] == "gelu_pytorch_tanh", f"hidden_activation {vision['hidden_activation']!r}", place)
        _require(not vision["attention_bias"], "attention_bias true", place)
        _require(rope.get("rope_theta", ROPE_BASE) == ROPE_BASE, f"rope_theta {rope.get('rope_theta')!r} of images", place)
        _require(vision.get("num_key_value_heads", vision["num_attention_heads"]) == vision["num_attention_heads"],
                 "num_key_value_heads of images that are not num_attention_heads", place)
        sizes = {"embedding_length": vision["hidden_size"], "feed_forward_length": vision["intermediate_size"],
                 "block_count": vision["num_hidden_layers"], "attention.head_count": vision["num_attention_heads"]}
    keys = {"projector_type": "gemma4uv" if unified else "gemma4v", "image_size": DUMMY_SIZE, "patch_size": vision["patch_size"],
            "image_mean": [0.0] * 3, "image_std": [1.0] * 3, "attention.layer_norm_epsilon": _epsilon(vision)} | sizes
    return {"has_vision_encoder": True} | {f"vision.{key}": value for key, value in keys.items()}


def _audio(audio: dict, unified: bool, place: Path) -> dict[str, object]:
    if unified:
        sizes = {"embedding_length": audio["audio_embed_dim"], "feed_forward_length": 0, "block_count": 0, "attention.head_count": 0}
    else:
        for key, value in AUDIO.items():
            _require(audio[key] == value, f"{key} {audio[key]!r} of sound: expected {value!r}", place)
        sizes = {"embedding_length": audio["hidden_size"], "feed_forward_length": 4 * audio["hidden_size"],
                 "block_count": audio["num_hidden_layers"], "attention.head_count": audio["num_attention_heads"]}
    keys = {"projector_type": "gemma4ua" if unified else "gemma4a", "num_mel_bins": MEL_BINS,
            "attention.layer_norm_epsilon": _epsilon(audio)} | sizes
    return {"has_audio_encoder": True} | {f"audio.{key}": value for key, value in keys.items()}


def _epsilon(config: dict) -> float:
    """As a GGUF file holds it: the same bits from both."""
    return float(np.float32(config["rms_norm_eps"]))


def _require(holds: bool, what: str, place: Path):
    if not holds:
        raise CheckpointError(place, None, f"unsupported {what}")
