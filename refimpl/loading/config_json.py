"""`config.json` of a Hugging Face directory as the metadata of a GGUF file.

There are two forms of the sizes of full layers: `global_head_dim` and `num_global_key_value_heads` (files as published), and
`per_layer_config` (as transformers 5.22 saves it). Where a file has both, `per_layer_config` counts, as in transformers; llama.cpp's
converter takes the other.

Source: transformers' Gemma4TextConfig, Gemma4UnifiedTextConfig, Gemma4AssistantConfig.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refimpl.formats.checkpoint import CheckpointError
from refimpl.loading.hf_names import drafter_metadata, gguf_metadata, rope_divisors
from refimpl.model.config import ARCHITECTURE, DRAFTER_ARCHITECTURE

MODELS = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
DRAFTERS = ("gemma4_assistant", "gemma4_unified_assistant")
FULL, SLIDING = "full_attention", "sliding_attention"
# The classes' defaults. Sizes have none here: a file without one is damaged.
DEFAULTS = {
    "use_double_wide_mlp": False, "final_logit_softcapping": None, "enable_moe_block": False, "num_kv_shared_layers": 0,
    "attention_k_eq_v": False, "attention_bias": False, "hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": None,
    "rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
                        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0}},
}


def is_drafter(config: Mapping[str, object], place: Path) -> bool:
    """Is this the configuration of a drafter? Raises CheckpointError where it is neither one nor a Gemma 4 model."""
    kind = config.get("model_type")
    if kind not in MODELS + DRAFTERS:
        raise CheckpointError(place, None, f"model_type is {kind!r}; refimpl runs {', '.join(MODELS)}, and drafters {', '.join(DRAFTERS)}")
    return kind in DRAFTERS


def metadata_of(config: Mapping[str, object], place: Path) -> tuple[dict[str, object], np.ndarray]:
    """(`gemma4.*` or `gemma4-assistant.*` keys, `rope_freqs.weight`) of the config.json at `place`.

    Raises CheckpointError naming what is missing, malformed or not supported.
    """
    drafter = is_drafter(config, place)
    architecture = DRAFTER_ARCHITECTURE if drafter else ARCHITECTURE
    try:
        text = with_per_layer_config(config if config["model_type"].endswith("_text") else config["text_config"])
        _refuse_what_is_not_computed(text, place)
        check_sight(config, place)
        metadata = drafter_metadata({**config, "text_config": text}) if drafter else gguf_metadata(text)
        epsilon = f"{architecture}.attention.layer_norm_rms_epsilon"
        metadata[epsilon] = float(np.float32(metadata[epsilon]))        # as a GGUF file holds it: the same bits from both
        share = text["rope_parameters"][FULL]["partial_rotary_factor"]
        return metadata, rope_divisors(metadata[f"{architecture}.attention.key_length"], share)
    except KeyError as error:
        raise CheckpointError(place, None, f"is no configuration of a Gemma 4 {'drafter' if drafter else 'model'}: "
                              f"{error.args[0]} is missing") from None
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(place, None, f"is no configuration of a Gemma 4 {'drafter' if drafter else 'model'}: "
                              f"{type(error).__name__} {error}") from None


def check_sight(config: Mapping[str, object], place: Path):
    """Raises CheckpointError where a model that sees says of its pictures' rows something else than its structure does
    (`Config.looks_ahead_in_images`): they see each other ("vision") in models without per-layer inputs, and in no others.
    """
    if config.get("vision_config") is None:
        return
    text = config["text_config"]
    said = text.get("use_bidirectional_attention", "vision" if config["model_type"] == "gemma4_unified" else None)
    expected = None if text.get("hidden_size_per_layer_input") else "vision"
    if said != expected:
        raise CheckpointError(place, None, f"use_bidirectional_attention is {said!r}, expected {expected!r}: pictures look ahead in models "
                              "without per-layer inputs (12B, 26B-A4B, 31B) and in no others")


def is_tied(config: Mapping[str, object]) -> bool:
    """Is the head the embedding (tied)?"""
    return bool(config.get("tie_word_embeddings", True))


def with_per_layer_config(text: Mapping[str, object]) -> dict[str, object]:
    """`text_config` with defaults filled in, and the sizes of its full layers under `per_layer_config`."""
    text = DEFAULTS | dict(text)
    if text.get("model_type") == "gemma4_unified_text":
        text.setdefault("hidden_size_per_layer_input", 0)       # that class has no such setting
    if text["rope_parameters"] is None:
        text["rope_parameters"] = DEFAULTS["rope_parameters"]
    if text.get("per_layer_config") is None:
        own = {"head_dim": text["global_head_dim"]}
        if text["attention_k_eq_v"] and text.get("num_global_key_value_heads"):
            own["num_key_value_heads"] = text["num_global_key_value_heads"]
        text["per_layer_config"] = {str(i): own for i, kind in enumerate(text["layer_types"]) if kind == FULL}
    return text


def _refuse_what_is_not_computed(text: Mapping[str, object], place: Path):
    """Refuses settings of transformers' that no published Gemma 4 has and the forward pass does not have either."""
    def require(holds: bool, what: str):
        if not holds:
            raise CheckpointError(place, None, f"unsupported {what}")

    kinds, rope, own = text["layer_types"], text["rope_parameters"], text["per_layer_config"]
    require(text["hidden_activation"] == "gelu_pytorch_tanh", f"hidden_activation {text['hidden_activation']!r}")
    require(not text["attention_bias"], "attention_bias true")
    require(text["use_bidirectional_attention"] in (None, "vision"), f"use_bidirectional_attention {text['use_bidirectional_attention']!r}")
    require(len(kinds) == text["num_hidden_layers"] and set(kinds) <= {FULL, SLIDING} and kinds[-1] == FULL,
            f"layer_types: expected {text['num_hidden_layers']} entries of {SLIDING} or {FULL}, ending in {FULL}")
    require(rope[FULL]["rope_type"] == "proportional", f"rope_type of full layers {rope[FULL]['rope_type']!r}")
    require(rope[SLIDING]["rope_type"] == "default" and rope[SLIDING].get("partial_rotary_factor", 1.0) == 1.0,
            "rotation of sliding layers: expected rope_type default, not partial")
    full = {i for i, kind in enumerate(kinds) if kind == FULL}
    require(set(map(int, own)) == full and len({layer["head_dim"] for layer in own.values()}) == 1
            and all(set(layer) <= {"head_dim", "num_key_value_heads"} for layer in own.values()),
            "per_layer_config: expected head_dim (one for all) and num_key_value_heads of the full layers")
