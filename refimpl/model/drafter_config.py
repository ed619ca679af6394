"""The hyperparameters of a drafter, read from the metadata of a `gemma4-assistant` file, and whether it fits its target.

Source: llama.cpp's converter (conversion/gemma.py) and transformers' Gemma4AssistantConfig.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from refimpl.formats.gguf import GGUFError
from refimpl.model.config import (
    ARCHITECTURE,
    DRAFTER_ARCHITECTURE,
    AttentionType,
    Config,
    DenseFfn,
    Keys,
    LayerSpec,
    architecture_of,
    base_of_sliding,
    head_dims,
    refuse_projector,
)

N_TOP = 32              # groups whose logits are computed; all published drafters have 32 (transformers: centroid_intermediate_top_k)


@dataclass(frozen=True)
class DrafterConfig:
    """A drafter. `trunk` is its own small model of width D, whose layers have no keys and values (`kv_from` is a layer of the target).

    `n_target`: the target's width, C in array names. `n_top`: of how many groups a centroid head computes logits.
    """

    trunk: Config
    n_target: int
    n_top: int


def drafter_config_from_gguf(metadata: Mapping[str, object], n_vocab: int, target: Config, path) -> DrafterConfig:
    """Reads the configuration of a drafter for `target`. Raises GGUFError naming the key, or the dimension that does not fit."""
    architecture = architecture_of(metadata)
    if architecture == ARCHITECTURE:
        raise GGUFError(path, None, "this is a model (gemma4), no drafter (gemma4-assistant)")
    refuse_projector(metadata, path)
    if architecture != DRAFTER_ARCHITECTURE:
        raise GGUFError(path, None, f"architecture is {architecture!r}; a drafter is {DRAFTER_ARCHITECTURE}")
    keys, big = Keys(metadata, path, DRAFTER_ARCHITECTURE), 1 << 20

    def must_fit(what: str, ours: int, theirs: int):
        if ours != theirs:
            keys.fail(f"{what} is {ours}, the target has {theirs}: this drafter belongs to another model")

    must_fit(f"{keys.prefix}embedding_length_out", keys.number("embedding_length_out", 1, big), target.n_embd)
    must_fit("the vocabulary", n_vocab, target.n_vocab)
    n_layer = keys.number("block_count", 1, 1024)
    n_head = keys.per_layer("attention.head_count", n_layer, 1, big)
    n_kv = keys.per_layer("attention.head_count_kv", n_layer, 1, big)
    n_ff = keys.per_layer("feed_forward_length", n_layer, 1, big)
    pattern = keys.per_layer("attention.sliding_window_pattern", n_layer, 0, 1)
    window, head_dim = keys.number("attention.sliding_window", 2, 1 << 30), head_dims(keys)
    if "attention.shared_kv_layers" in keys.values and keys.number("attention.shared_kv_layers", 0, big) != n_layer:
        keys.fail(f"{keys.prefix}attention.shared_kv_layers is {keys.values['attention.shared_kv_layers']}, expected all {n_layer} layers")
    if "expert_count" in keys.values and keys.number("expert_count", 0, big):
        keys.fail(f"{keys.prefix}expert_count is not 0; a drafter has no experts")
    if keys.number("embedding_length_per_layer_input", 0, big):
        keys.fail(f"{keys.prefix}embedding_length_per_layer_input is not 0; a drafter has no per-layer inputs")

    layers = []
    for i, sliding in enumerate(pattern):
        attention = AttentionType.SLIDING if sliding else AttentionType.FULL
        if not any(layer.attention is attention for layer in target.layers):
            keys.fail(f"layer {i} reads the keys of a {attention.value} layer, and the target has none")
        donor = target.layers[target.last_own(attention)]
        must_fit(f"{keys.prefix}attention.head_count_kv of layer {i}", n_kv[i], donor.n_kv)
        must_fit(f"the width of a {attention.value} layer's keys", head_dim[attention], donor.head_dim)
        if donor.window is not None:
            must_fit(f"{keys.prefix}attention.sliding_window", window, donor.window)
        if n_head[i] % n_kv[i]:
            keys.fail(f"layer {i} has {n_head[i]} query heads, no multiple of the target's {n_kv[i]} key/value heads")
        layers.append(LayerSpec(index=i, attention=attention, n_head=n_head[i], n_kv=n_kv[i], head_dim=head_dim[attention],
                                window=donor.window, kv_from=donor.index, has_own_kv=False, values_are_keys=False, ffn=DenseFfn(n_ff[i])))
    trunk = Config(
        n_vocab=n_vocab, n_embd=keys.number("embedding_length", 1, big), n_ctx=keys.number("context_length", 1, 1 << 30), n_ple=0,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 0.0, 1.0, float), rope_base_sliding=base_of_sliding(keys),
        rope_base_full=keys.number("rope.freq_base", 1.0, 1e12, float),
        softcap=None,           # files may name one, but neither transformers nor llama.cpp caps a drafter's logits
        layers=tuple(layers))
    n_top = keys.number("masked_embd_top_k", 1, big) if "masked_embd_top_k" in keys.values else N_TOP
    return DrafterConfig(trunk, target.n_embd, n_top)
