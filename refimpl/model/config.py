"""The hyperparameters of a Gemma 4 model, read from GGUF metadata. No defaults: a key that is missing is an error.

The dimension key. Arrays carry their shape as a suffix (`x_TD`), in these letters:

    T tokens in this call      S positions in a cache     D model width (n_embd)
    N query heads              K key/value heads          G query heads per key/value head, N / K
    H width of a head          R pairs rotated, H / 2     A all query heads together, N * H
    F dense feed-forward width E experts                  X experts used per token        M expert width
    P per-layer input width    L layers                   V vocabulary                    O output rows of a matrix
    Y bytes in a row           B blocks                   Q elements in a block of weights
"""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from refimpl.formats.gguf import GGUFError

ARCHITECTURE, DRAFTER_ARCHITECTURE, PROJECTOR_ARCHITECTURE = "gemma4", "gemma4-assistant", "clip"


class AttentionType(Enum):
    """Which positions a layer attends to: a sliding window of the latest ones, or all."""

    SLIDING = "sliding"
    FULL = "full"


@dataclass(frozen=True)
class DenseFfn:
    """One feed-forward network of width `n_ff`."""

    n_ff: int


@dataclass(frozen=True)
class MoeFfn:
    """Mixture of experts: `n_used` of `n_expert` networks of width `n_ff_expert`, and a dense one of width `n_ff` that every token uses."""

    n_ff: int
    n_expert: int
    n_used: int
    n_ff_expert: int


@dataclass(frozen=True)
class LayerSpec:
    """One layer: its attention, where its keys and values come from, its feed-forward network."""

    index: int
    attention: AttentionType
    n_head: int
    n_kv: int
    head_dim: int
    window: int | None        # number of visible positions, the query's own included; None: all
    kv_from: int              # the layer (for a drafter: of its target) whose keys and values it attends to
    has_own_kv: bool          # it has key and value projections (then kv_from is its own index)
    values_are_keys: bool     # no value projection: the values are the key projection, before the key's norm and rotation
    ffn: DenseFfn | MoeFfn


@dataclass(frozen=True)
class Config:
    """A whole model. `n_ple` is the width of the per-layer inputs, 0 for models without; `softcap` None: logits are not capped."""

    n_vocab: int
    n_embd: int
    n_ctx: int
    n_ple: int
    norm_eps: float
    rope_base_sliding: float
    rope_base_full: float
    softcap: float | None
    layers: tuple[LayerSpec, ...]

    @property
    def n_layer(self) -> int:
        """Number of layers, L."""
        return len(self.layers)

    @property
    def looks_ahead_in_images(self) -> bool:
        """Do the rows of an image see each other in sliding layers? Those of E2B and E4B, the models with per-layer inputs, do not."""
        return self.n_ple == 0

    def last_own(self, attention: AttentionType) -> int:
        """The last layer of this type that has its own keys and values: layers that share, and a drafter, attend to them."""
        return max(layer.index for layer in self.layers if layer.attention is attention and layer.has_own_kv)


_COMMON = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "expert_count",
    "embedding_length_per_layer_input", "final_logit_softcapping", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.key_length_swa", "attention.value_length_swa", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "attention.sliding_window_pattern", "attention.shared_kv_layers", "rope.freq_base", "rope.freq_base_swa",
    "rope.dimension_count", "rope.dimension_count_swa",
}
KNOWN = {
    ARCHITECTURE: _COMMON | {"expert_used_count", "expert_feed_forward_length"},
    DRAFTER_ARCHITECTURE: _COMMON | {"embedding_length_out", "nextn_predict_layers", "masked_embd_top_k"},
    PROJECTOR_ARCHITECTURE: {"has_vision_encoder", "has_audio_encoder"} | {f"{tower}.{key}" for tower, own in (
        ("vision", {"image_size", "patch_size", "image_mean", "image_std", "projector.scale_factor"}), ("audio", {"num_mel_bins"}))
        for key in own | {"projector_type", "projection_dim", "embedding_length", "feed_forward_length", "block_count",
                          "attention.head_count", "attention.layer_norm_epsilon"}},
}


class Keys:
    """The metadata keys of one architecture. Everything that does not fit raises GGUFError with one clear line."""

    def __init__(self, metadata: Mapping[str, object], path, architecture: str):
        self.path, self.prefix = path, architecture + "."
        self.values = {key.removeprefix(self.prefix): value for key, value in metadata.items() if key.startswith(self.prefix)}

    def fail(self, what: str):
        """Raises GGUFError saying `what`."""
        raise GGUFError(self.path, None, what)

    def number(self, key: str, low: float, high: float, number_type: type = int):
        """A required number within low..high."""
        if key not in self.values:
            self.fail(f"metadata key {self.prefix}{key} is missing")
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (number_type is int and not isinstance(value, int)):
            self.fail(f"{self.prefix}{key} is {value!r}, expected one {number_type.__name__}")
        if not low <= value <= high:
            self.fail(f"{self.prefix}{key} is {value}, expected {low} to {high}")
        return number_type(value)

    def per_layer(self, key: str, n_layer: int, low: int, high: int) -> list[int]:
        """A number per layer, from one number for all layers or an array."""
        value = self.values.get(key)
        if not isinstance(value, np.ndarray):
            return [self.number(key, low, high)] * n_layer
        if len(value) != n_layer:
            self.fail(f"{self.prefix}{key} has {len(value)} entries for {n_layer} layers")
        if value.dtype.kind not in "iub" or not all(low <= int(v) <= high for v in value):
            self.fail(f"{self.prefix}{key} has entries outside {low} to {high}")
        return [int(v) for v in value]


def architecture_of(metadata: Mapping[str, object]) -> str | None:
    """The value of `general.architecture`; None where it is missing or no string."""
    value = metadata.get("general.architecture")
    return value if isinstance(value, str) else None


def refuse_projector(metadata: Mapping[str, object], path):
    """Raises GGUFError for the metadata of a projector."""
    if architecture_of(metadata) == PROJECTOR_ARCHITECTURE:
        raise GGUFError(path, None, "this is a projector (clip), the part of a model that sees and hears: give it with --mmproj, beside "
                        "its model")


def unknown_keys(metadata: Mapping[str, object]) -> list[str]:
    """The keys of the file's architecture (`gemma4.*`, `gemma4-assistant.*`, `clip.*`) that this version does not know and ignores."""
    architecture = architecture_of(metadata)
    own = [key for key in metadata if key.startswith(f"{architecture}.")]
    return sorted(key for key in own if key.removeprefix(f"{architecture}.") not in KNOWN.get(architecture, ()))


def warn_of_unknown_keys(metadata: Mapping[str, object], path):
    """A warning that names them, if there are any."""
    if unknown := unknown_keys(metadata):
        shown = ", ".join(key if len(key) <= 80 else key[:77] + "..." for key in unknown[:5]) + ", ..." * (len(unknown) > 5)
        warnings.warn(f"{path}: this version does not know {shown} and ignores {'them' if len(unknown) > 1 else 'it'}, "
                      "which may change the result; a newer refimpl may know more", stacklevel=3)


def config_from_gguf(metadata: Mapping[str, object], tensor_names: Collection[str], n_vocab: int, path) -> Config:
    """Reads the configuration of a Gemma 4 text model. Raises GGUFError naming the key that is missing, malformed or contradicts
    another. Keys that are not in KNOWN are ignored (`unknown_keys`).

    `tensor_names` says what no key does: which layers have no value projection. Source: llama.cpp's converter (conversion/gemma.py).
    """
    architecture = architecture_of(metadata)
    if architecture == DRAFTER_ARCHITECTURE:
        raise GGUFError(path, None, "this is a drafter (gemma4-assistant), which cannot run alone: load its target as the model")
    refuse_projector(metadata, path)
    if architecture != ARCHITECTURE:
        raise GGUFError(path, None, f"architecture is {architecture!r}; refimpl runs {ARCHITECTURE} only")
    keys = Keys(metadata, path, ARCHITECTURE)
    big = 1 << 20
    n_layer = keys.number("block_count", 1, 1024)
    pattern = keys.per_layer("attention.sliding_window_pattern", n_layer, 0, 1)
    n_shared = keys.number("attention.shared_kv_layers", 0, n_layer - 1) if "attention.shared_kv_layers" in keys.values else 0
    n_head = keys.per_layer("attention.head_count", n_layer, 1, big)
    n_kv = keys.per_layer("attention.head_count_kv", n_layer, 1, big)
    n_ff = keys.per_layer("feed_forward_length", n_layer, 1, big)
    window = keys.number("attention.sliding_window", 1, 1 << 30)
    head_dim = head_dims(keys)
    n_expert = keys.number("expert_count", 0, big) if "expert_count" in keys.values else 0
    attentions = [AttentionType.SLIDING if sliding else AttentionType.FULL for sliding in pattern]

    layers = []
    for i, attention in enumerate(attentions):
        if n_head[i] % n_kv[i]:
            keys.fail(f"layer {i} has {n_head[i]} query heads, no multiple of its {n_kv[i]} key/value heads")
        kv_from = i
        if i >= n_layer - n_shared:
            donors = [j for j in range(n_layer - n_shared) if attentions[j] is attention]
            if not donors:
                keys.fail(f"layer {i} shares keys and values, but no {attention.value} layer before it makes any")
            kv_from = donors[-1]
        has_values = f"blk.{i}.attn_v.weight" in tensor_names or f"blk.{i}.attn_qkv.weight" in tensor_names
        layers.append(LayerSpec(
            index=i, attention=attention, n_head=n_head[i], n_kv=n_kv[i], head_dim=head_dim[attention],
            window=window if attention is AttentionType.SLIDING else None, kv_from=kv_from, has_own_kv=kv_from == i,
            values_are_keys=kv_from == i and not has_values,
            ffn=_ffn(keys, i, n_ff[i], n_expert, tensor_names, n_layer)))
    return Config(
        n_vocab=n_vocab, n_embd=keys.number("embedding_length", 1, big), n_ctx=keys.number("context_length", 1, 1 << 30),
        n_ple=keys.number("embedding_length_per_layer_input", 0, big), norm_eps=keys.number(
            "attention.layer_norm_rms_epsilon", 0.0, 1.0, float),
        rope_base_sliding=base_of_sliding(keys), rope_base_full=keys.number("rope.freq_base", 1.0, 1e12, float),
        softcap=keys.number("final_logit_softcapping", 1e-6, 1e9, float) if "final_logit_softcapping" in keys.values else None,
        layers=tuple(layers))


def head_dims(keys: Keys) -> dict[AttentionType, int]:
    """The width of a head by attention type."""
    return {AttentionType.FULL: _head_dim(keys, ""), AttentionType.SLIDING: _head_dim(keys, "_swa")}


def base_of_sliding(keys: Keys) -> float:
    """The RoPE base of sliding layers; 10,000 without the key, as in llama.cpp."""
    return keys.number("rope.freq_base_swa", 1.0, 1e12, float) if "rope.freq_base_swa" in keys.values else 10_000.0


def _head_dim(keys: Keys, suffix: str) -> int:
    """The width of a head. Keys, values and the rotation have the same one in Gemma 4."""
    width = keys.number(f"attention.key_length{suffix}", 2, 1 << 16)
    for other in (f"attention.value_length{suffix}", f"rope.dimension_count{suffix}"):
        if other in keys.values and keys.number(other, 2, 1 << 16) != width:
            keys.fail(f"{keys.prefix}{other} is {keys.values[other]}, expected {width} as in attention.key_length{suffix}")
    if width % 2:
        keys.fail(f"{keys.prefix}attention.key_length{suffix} is {width}, expected an even number")
    return width


def _ffn(keys: Keys, i: int, n_ff: int, n_expert: int, tensor_names: Collection[str], n_layer: int) -> DenseFfn | MoeFfn:
    if f"blk.{i}.ffn_gate_inp.weight" not in tensor_names:
        return DenseFfn(n_ff)
    if n_expert < 1:
        keys.fail(f"layer {i} has a router, but {keys.prefix}expert_count is {n_expert}")
    return MoeFfn(n_ff, n_expert, keys.number("expert_used_count", 1, n_expert),
                  keys.per_layer("expert_feed_forward_length", n_layer, 1, 1 << 20)[i])
