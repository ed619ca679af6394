"""Hugging Face directories under the names of GGUF files, so that everything behind them is the same."""

import os
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from refimpl.formats.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from refimpl.formats.container import TensorInfo
from refimpl.model.config import DRAFTER_ARCHITECTURE
from refimpl.model.export import drafter_metadata, gguf_name, rope_divisors

ROPE, EPSILON = "rope_freqs.weight", f"{DRAFTER_ARCHITECTURE}.attention.layer_norm_rms_epsilon"


class RenamedCheckpoint:
    """A directory with the interface of a GGUFFile: `path`, `metadata`, `tensors`, `n_bytes`, `raw`, `release_all`."""

    def __init__(self, checkpoint: Checkpoint, metadata: Mapping[str, object], names: Mapping[str, str], rope: np.ndarray):
        self.path, self.metadata, self.n_bytes, self._checkpoint = checkpoint.path, metadata, checkpoint.n_bytes, checkpoint
        self._names, self._rope = dict(names), rope.astype("<f4")
        self.tensors = {name: replace(checkpoint.tensors[theirs], name=name) for name, theirs in names.items()}
        self.tensors[ROPE] = TensorInfo(ROPE, "F32", rope.shape, self._rope.nbytes, 0, 0)

    def raw(self, name: str) -> np.ndarray:
        """As GGUFFile has it. The rotation's divisors come from config.json."""
        return self._rope.view(np.uint8) if name == ROPE else self._checkpoint.raw(self._names[name])

    def release_all(self) -> None:
        """As GGUFFile has it."""
        self._checkpoint.release_all()


def drafter_from_directory(path: str | os.PathLike) -> RenamedCheckpoint:
    """A drafter (Gemma4AssistantForCausalLM) from its directory. Raises CheckpointError, naming file and key, for anything else."""
    checkpoint = open_checkpoint(path)
    config, place = checkpoint.config, checkpoint.path / "config.json"
    if not str(config.get("model_type", "")).endswith("assistant"):
        raise CheckpointError(place, None, f"model_type is {config.get('model_type')!r}, expected a drafter's, which ends in assistant")
    try:
        config = config | {"text_config": with_per_layer_config(config["text_config"])}
        metadata = drafter_metadata(config)
        text = config["text_config"]
        share = text["rope_parameters"]["full_attention"]["partial_rotary_factor"]
        metadata[EPSILON] = float(np.float32(metadata[EPSILON]))        # as a GGUF file holds it: the same bits from both
        rope = rope_divisors(metadata[f"{DRAFTER_ARCHITECTURE}.attention.key_length"], share)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(place, None, f"is no configuration of a Gemma 4 drafter: {type(error).__name__} {error}") from None
    names = {}
    for theirs in checkpoint.tensors:
        if theirs == "lm_head.weight" and config.get("tie_word_embeddings", True):
            continue
        try:
            names[gguf_name(theirs)] = theirs
        except KeyError:
            raise CheckpointError(checkpoint.path, None, f"tensor {theirs!r} is none of a Gemma 4 drafter") from None
    return RenamedCheckpoint(checkpoint, metadata, names, rope)


def with_per_layer_config(text: Mapping[str, object]) -> dict[str, object]:
    """`text_config` with what its full layers have of their own under `per_layer_config`, where transformers 5.22 keeps it; published files
    have `global_head_dim` and `num_global_key_value_heads` instead.
    """
    text = {"use_double_wide_mlp": False, "final_logit_softcapping": None, "enable_moe_block": False} | dict(text)
    if "per_layer_config" not in text:
        own = {"head_dim": text.get("global_head_dim") or text["head_dim"]}
        if text.get("attention_k_eq_v") and text.get("num_global_key_value_heads"):
            own["num_key_value_heads"] = text["num_global_key_value_heads"]
        text["per_layer_config"] = {str(i): own for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"}
    return text
