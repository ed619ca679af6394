"""transformers' configuration and tensor names as those of a GGUF file, as llama.cpp's converter translates them.

Used for Hugging Face directories, to export the models we train, and for the random ones that the tests compare with transformers.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import quantize
from refimpl.model.config import ARCHITECTURE, DRAFTER_ARCHITECTURE

_GLOBAL = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    # of drafters; llama.cpp's converter drops the last two, and its loader ignores them
    "pre_projection.weight": "nextn.pre_projection.weight",
    "post_projection.weight": "nextn.post_projection.weight",
    "masked_embedding.centroids.weight": "masked_embd_centroids.weight",
    "masked_embedding.token_ordering": "masked_embd_ordering",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor of transformers' Gemma4ForCausalLM or Gemma4AssistantForCausalLM. Raises KeyError for one without."""
    name = name.removeprefix("model.")
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return f"blk.{match[1]}.{_LAYER[match[2]]}" if match else _GLOBAL[name]


def stays_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Vectors and the router's matrix are never quantized."""
    return len(shape) < 2 or name.endswith("ffn_gate_inp.weight")


def gguf_metadata(config: Mapping[str, object]) -> dict[str, object]:
    """The `gemma4.*` keys for a `Gemma4TextConfig().to_dict()`."""
    kinds = config["layer_types"]
    n_layer, full = len(kinds), kinds.index("full_attention")
    overrides = {int(i): layer for i, layer in config["per_layer_config"].items()}
    head_dim = overrides[full]["head_dim"]
    n_kv = [overrides.get(i, {}).get("num_key_value_heads", config["num_key_value_heads"]) for i in range(n_layer)]
    n_shared = config["num_kv_shared_layers"]
    n_ff = [config["intermediate_size"] * (2 if config["use_double_wide_mlp"] and i >= n_layer - n_shared else 1)
            for i in range(n_layer)]
    rope = config["rope_parameters"]
    keys = {
        "block_count": n_layer,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": _one_or_array(n_ff),
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": _one_or_array(n_kv),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "attention.layer_norm_rms_epsilon": _float(config["rms_norm_eps"]),
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": np.array([kind == "sliding_attention" for kind in kinds]),
        "attention.shared_kv_layers": n_shared,
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"] or 0,
        "rope.freq_base": _float(rope["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": _float(rope["sliding_attention"]["rope_theta"]),
        "rope.dimension_count": head_dim,
        "rope.dimension_count_swa": config["head_dim"],
    }
    if config["final_logit_softcapping"] is not None:
        keys["final_logit_softcapping"] = _float(config["final_logit_softcapping"])
    if config["enable_moe_block"]:
        keys |= {"expert_count": config["num_experts"], "expert_used_count": config["top_k_experts"],
                 "expert_feed_forward_length": config["moe_intermediate_size"]}
    return under(ARCHITECTURE, keys)


def under(architecture: str, keys: Mapping[str, object]) -> dict[str, object]:
    """Metadata of a file of this architecture: its name, and its keys with that prefix."""
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in keys.items()}


def drafter_metadata(config: Mapping[str, object]) -> dict[str, object]:
    """The `gemma4-assistant.*` keys for a `Gemma4AssistantConfig().to_dict()`."""
    text = dict(config["text_config"])
    prefix = ARCHITECTURE + "."
    keys = {key.removeprefix(prefix): value for key, value in gguf_metadata(text).items() if key.startswith(prefix)}
    keys |= {"embedding_length_out": config["backbone_hidden_size"], "nextn_predict_layers": keys["block_count"]}
    if config["use_ordered_embeddings"]:
        keys["masked_embd_top_k"] = config["centroid_intermediate_top_k"]       # ours: other engines do not use the centroids
    return under(DRAFTER_ARCHITECTURE, keys)


def rope_divisors(head_dim: int, rotated_share: float) -> np.ndarray:
    """`rope_freqs.weight`, float32 (head_dim / 2,): 1 for the pairs that full layers rotate, 1e30 for the others.

    Raises ValueError for an impossible width or share.
    """
    if type(head_dim) is not int or not 2 <= head_dim <= 1 << 16 or not 0 <= rotated_share <= 1:
        raise ValueError(f"expected a head of 2 to 65536 and a rotated share of 0 to 1, found {head_dim} and {rotated_share}")
    return np.where(np.arange(head_dim // 2) < int(rotated_share * head_dim // 2), 1, 1e30).astype(np.float32)


def gguf_tensors(config: Mapping[str, object], state: Mapping[str, np.ndarray],
                 type_of) -> Iterable[tuple[str, str, np.ndarray]]:
    """Yields (name, block type, data) for `write_gguf`, from a state dict of float32 arrays.

    `type_of(name, shape)` chooses the type of every tensor that may be quantized; a type whose block does not divide the row falls
    back to the next one that does, as llama.cpp's quantizer does (Q4_K to Q5_0, Q2_K to Q4_0, ..., else F16).
    """
    full = config["layer_types"].index("full_attention")
    head_dim = {int(i): layer for i, layer in config["per_layer_config"].items()}[full]["head_dim"]
    yield "rope_freqs.weight", "F32", rope_divisors(head_dim, config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    for hf_name, value in state.items():
        if hf_name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        name = "output.weight" if hf_name == "lm_head.weight" else gguf_name(hf_name)
        if name == "masked_embd_ordering":
            yield name, "I32", np.asarray(value, np.int32)
            continue
        value = np.asarray(value, np.float32)
        block = "F32" if stays_float32(name, value.shape) else fitting_type(type_of(name, value.shape), value.shape[-1])
        plain = {"F32": np.float32, "F16": np.float16}.get(block)
        yield name, block, quantize(value, block) if plain is None else value.astype(plain)


_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL", "IQ4_NL": "F16",
             "MXFP4": "F16", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q8_K": "Q8_0",
             "Q4_0": "F16", "Q4_1": "F16", "Q5_0": "F16", "Q5_1": "F16", "Q8_0": "F16"}


def fitting_type(block: str, n_cols: int) -> str:
    """`block`, or its replacement where a row of `n_cols` weights is not a whole number of blocks."""
    while n_cols % BLOCKS[block].elements:
        block = _FALLBACK[block]
    return block


def _float(value: float) -> float:
    """As a float. Raises ValueError also for an integer that is too large."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError("a number is too large") from None


def _one_or_array(values: list[int]) -> int | np.ndarray:
    return values[0] if len(set(values)) == 1 else np.array(values, np.int32)
