"""From the tensor names of a GGUF file to weights named by their role. The only place that knows the file's names.

Every tensor is either used, exactly once, or ignored for a stated reason; any other tensor in the file is an error.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, is_dataclass, replace

import numpy as np

from refimpl.formats.gguf import GGUFError
from refimpl.formats.matrix import Matrix, StoredMatrix
from refimpl.formats.quants.codecs import DEQUANTIZABLE
from refimpl.formats.source import TensorSource
from refimpl.model.backend import Prepared
from refimpl.model.config import AttentionType, Config, LayerSpec, MoeFfn, refuse_projector
from refimpl.reference.ops import rope_frequencies


@dataclass(frozen=True)
class OwnKv:
    """The projections of a layer that makes its own keys and values. `value_OD` is `key_OD` itself where values are keys."""

    key_OD: Prepared
    value_OD: Prepared
    key_norm_H: np.ndarray


@dataclass(frozen=True)
class SharedKv:
    """A layer without keys and values, which attends to those of another layer."""


@dataclass(frozen=True)
class AttentionWeights:
    """Attention of one layer."""

    norm_before_D: np.ndarray
    query_AD: Prepared
    query_norm_H: np.ndarray
    kv: OwnKv | SharedKv
    output_DA: Prepared
    norm_after_D: np.ndarray


@dataclass(frozen=True)
class DenseWeights:
    """A gated feed-forward network (Shazeer 2020, arXiv:2002.05202)."""

    gate_FD: Prepared
    up_FD: Prepared
    down_DF: Prepared


@dataclass(frozen=True)
class MoeWeights:
    """The experts of a layer, their router, and the norms around both branches."""

    dense: DenseWeights
    norm_after_dense_D: np.ndarray
    router_scale_D: np.ndarray
    router_ED: Prepared
    expert_scale_E: np.ndarray
    norm_before_experts_D: np.ndarray
    gate_EMD: Prepared
    up_EMD: Prepared
    down_EDM: Prepared
    norm_after_experts_D: np.ndarray


@dataclass(frozen=True)
class PerLayerWeights:
    """Per-layer embedding (PLE, from Gemma 3n): gate and projection of one layer."""

    gate_PD: Prepared
    projection_DP: Prepared
    norm_after_D: np.ndarray


@dataclass(frozen=True)
class NoPerLayer:
    """A model without per-layer embeddings."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer."""

    spec: LayerSpec
    attention: AttentionWeights
    norm_before_ffn_D: np.ndarray
    ffn: DenseWeights | MoeWeights
    norm_after_ffn_D: np.ndarray
    per_layer: PerLayerWeights | NoPerLayer
    output_scale: np.float32


@dataclass(frozen=True)
class PerLayerEmbedding:
    """The table of per-layer inputs, a row has those of all layers, and the projection of the main embedding that is added to them."""

    table_VLP: Matrix
    projection_LPD: Prepared
    norm_P: np.ndarray


@dataclass(frozen=True)
class Weights:
    """All weights of a model. In tied models `head_VD` is the embedding, as the backend holds matrices.

    `ignored` maps tensor name -> reason.
    """

    embedding_VD: Matrix
    per_layer: PerLayerEmbedding | NoPerLayer
    layers: tuple[LayerWeights, ...]
    norm_D: np.ndarray
    head_VD: Prepared
    rope_frequency_R: dict[AttentionType, np.ndarray]
    ignored: dict[str, str]


class Taker:
    """Hands out tensors by name, checks their shapes and types, keeps track of those that are unused."""

    def __init__(self, file: TensorSource):
        self.file, self.unused = file, dict(file.tensors)

    def has(self, name: str) -> bool:
        """Is there such a tensor?"""
        return name in self.file.tensors

    def matrix(self, name: str, *shape: int, types: Collection[str] = DEQUANTIZABLE) -> StoredMatrix:
        """A matrix, not read yet. Raises GGUFError if it is missing, or has another shape or type."""
        info = self.file.tensors.get(name)
        if info is None:
            raise GGUFError(self.file.path, None, f"tensor {name} is missing")
        if info.shape != shape:
            raise GGUFError(self.file.path, info.offset, f"tensor {name} has shape {info.shape}, expected {shape} (rows first)")
        if info.type not in types:
            raise GGUFError(self.file.path, info.offset, f"tensor {name} is {info.type}, which this version cannot read; "
                            f"it reads {', '.join(sorted(types))}")
        if name not in self.unused:
            raise AssertionError(f"tensor {name} was taken twice")
        del self.unused[name]
        return StoredMatrix(name, info.type, shape, lambda: Matrix(self.file.raw(name), info.type))

    def integers(self, name: str, size: int) -> np.ndarray:
        """A vector of I32 or I64 as int64."""
        found = self.matrix(name, size, types=("I32", "I64")).read()
        return found.raw.view({"I32": "<i4", "I64": "<i8"}[found.type]).astype(np.int64).ravel()

    def vector(self, name: str, size: int) -> np.ndarray:
        """A vector in float32."""
        return self.matrix(name, size).read().float32()

    def ignore(self, name: str, reason: str, ignored: dict[str, str]):
        """Marks a tensor, if the file has it, as ignored for `reason`."""
        if self.unused.pop(name, None) is not None:
            ignored[name] = reason

    def finish(self, what: str):
        """Raises GGUFError if a tensor is neither used nor ignored."""
        if self.unused:
            name, info = next(iter(self.unused.items()))
            raise GGUFError(self.file.path, info.offset, f"{len(self.unused)} unexpected tensor{'s' if len(self.unused) > 1 else ''} "
                            f"(first: {name}); not {what}?")


def vocabulary_size(file: TensorSource) -> int:
    """The number of tokens: rows of the embedding."""
    refuse_projector(file.metadata, file.path)
    info = file.tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2:
        raise GGUFError(file.path, None, "tensor token_embd.weight is missing or no matrix: not a complete model")
    return info.shape[0]


def weights_from_gguf(file: TensorSource, config: Config) -> Weights:
    """Collects the weights of a Gemma 4 model: vectors as arrays, matrices as StoredMatrix, which `prepare_weights` reads.

    Raises GGUFError for a tensor that is missing, unexpected, or has another shape or a type that cannot be read.
    """
    take = Taker(file)
    ignored: dict[str, str] = {}
    embedding = take.matrix("token_embd.weight", config.n_vocab, config.n_embd)
    head = take.matrix("output.weight", config.n_vocab, config.n_embd) if take.has("output.weight") else embedding
    weights = Weights(
        embedding_VD=embedding,
        per_layer=_per_layer_embedding(take, config),
        layers=tuple(layer_weights(take, config, spec, ignored) for spec in config.layers),
        norm_D=take.vector("output_norm.weight", config.n_embd),
        head_VD=head,
        rope_frequency_R=rope_frequencies_of(take, config),
        ignored=ignored)
    take.finish("a Gemma 4 text model")
    return weights


def prepare_weights(weights: Weights, prepare: Callable[[StoredMatrix], Prepared]) -> Weights:
    """Every matrix of a product in the form `prepare` gives it; tables, whose rows are looked up, as stored."""
    embedding = weights.embedding_VD.read()
    tied = weights.head_VD is weights.embedding_VD
    per_layer = weights.per_layer
    if isinstance(per_layer, PerLayerEmbedding):
        per_layer = replace(per_layer, table_VLP=per_layer.table_VLP.read())
    head = replace(weights.head_VD, read=lambda: embedding) if tied else weights.head_VD
    return prepare_matrices(replace(weights, embedding_VD=embedding, per_layer=per_layer, head_VD=head), prepare)


def prepare_matrices(weights, prepare: Callable[[StoredMatrix], Prepared]):
    """`weights` (of a model, a drafter) with `prepare(matrix)` for every StoredMatrix; for one with two roles once."""
    done: dict[int, Prepared] = {}

    def walk(value):
        if isinstance(value, StoredMatrix):
            if id(value) not in done:
                done[id(value)] = prepare(value)
            return done[id(value)]
        if isinstance(value, tuple):
            return tuple(map(walk, value))
        if is_dataclass(value) and not isinstance(value, Matrix):
            return replace(value, **{part.name: walk(getattr(value, part.name)) for part in fields(value)})
        return value
    return walk(weights)


def rope_frequencies_of(take: Taker, config: Config) -> dict[AttentionType, np.ndarray]:
    """RoPE frequencies by attention type, from the bases and, for full layers, the divisors in `rope_freqs.weight`."""
    frequency = {}
    for layer in config.layers:
        if layer.attention in frequency:
            continue
        n_pairs = layer.head_dim // 2
        divisor = np.ones(n_pairs, np.float32)
        if layer.attention is AttentionType.FULL:
            divisor = take.vector("rope_freqs.weight", n_pairs)
        base = config.rope_base_full if layer.attention is AttentionType.FULL else config.rope_base_sliding
        frequency[layer.attention] = rope_frequencies(layer.head_dim, base, divisor)
    return frequency


def _per_layer_embedding(take: Taker, config: Config) -> PerLayerEmbedding | NoPerLayer:
    if not config.n_ple:
        return NoPerLayer()
    width = config.n_layer * config.n_ple
    return PerLayerEmbedding(
        table_VLP=take.matrix("per_layer_token_embd.weight", config.n_vocab, width),
        projection_LPD=take.matrix("per_layer_model_proj.weight", width, config.n_embd),
        norm_P=take.vector("per_layer_proj_norm.weight", config.n_ple))


def layer_weights(take: Taker, config: Config, spec: LayerSpec, ignored: dict[str, str]) -> LayerWeights:
    """One layer, `blk.<index>.*`. Tensors that it ignores go into `ignored` with the reason."""
    blk, d = f"blk.{spec.index}.", config.n_embd
    attention = _attention(take, spec, d, ignored)
    scale_name = blk + "layer_output_scale.weight"
    return LayerWeights(
        spec=spec,
        attention=attention,
        norm_before_ffn_D=take.vector(blk + "ffn_norm.weight", d),
        ffn=_moe(take, spec, d) if isinstance(spec.ffn, MoeFfn) else _dense(take, spec, d),
        norm_after_ffn_D=take.vector(blk + "post_ffw_norm.weight", d),
        per_layer=PerLayerWeights(
            gate_PD=take.matrix(blk + "inp_gate.weight", config.n_ple, d),
            projection_DP=take.matrix(blk + "proj.weight", d, config.n_ple),
            norm_after_D=take.vector(blk + "post_norm.weight", d)) if config.n_ple else NoPerLayer(),
        output_scale=take.vector(scale_name, 1)[0] if take.has(scale_name) else np.float32(1))


def _attention(take: Taker, spec: LayerSpec, d: int, ignored: dict[str, str]) -> AttentionWeights:
    blk = f"blk.{spec.index}."
    n_query, n_key = spec.n_head * spec.head_dim, spec.n_kv * spec.head_dim
    if take.has(blk + "attn_qkv.weight"):
        fused = take.matrix(blk + "attn_qkv.weight", n_query + 2 * n_key, d)
        query, key, value = (fused.rows(first, first + n, blk + name) for name, first, n in (
            ("attn_q.weight", 0, n_query), ("attn_k.weight", n_query, n_key), ("attn_v.weight", n_query + n_key, n_key)))
    else:
        query = take.matrix(blk + "attn_q.weight", n_query, d)
        if spec.has_own_kv:
            key = take.matrix(blk + "attn_k.weight", n_key, d)
            value = key if spec.values_are_keys else take.matrix(blk + "attn_v.weight", n_key, d)
    if spec.has_own_kv:
        kv = OwnKv(key, value, take.vector(blk + "attn_k_norm.weight", spec.head_dim))
    else:
        kv = SharedKv()
        for name in ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight"):
            take.ignore(blk + name, f"layer {spec.index} attends to the keys and values of layer {spec.kv_from}", ignored)
    return AttentionWeights(
        norm_before_D=take.vector(blk + "attn_norm.weight", d),
        query_AD=query,
        query_norm_H=take.vector(blk + "attn_q_norm.weight", spec.head_dim),
        kv=kv,
        output_DA=take.matrix(blk + "attn_output.weight", d, n_query),
        norm_after_D=take.vector(blk + "post_attention_norm.weight", d))


def _dense(take: Taker, spec: LayerSpec, d: int) -> DenseWeights:
    blk, f = f"blk.{spec.index}.", spec.ffn.n_ff
    return DenseWeights(take.matrix(blk + "ffn_gate.weight", f, d), take.matrix(blk + "ffn_up.weight", f, d),
                        take.matrix(blk + "ffn_down.weight", d, f))


def _moe(take: Taker, spec: LayerSpec, d: int) -> MoeWeights:
    blk, e, m = f"blk.{spec.index}.", spec.ffn.n_expert, spec.ffn.n_ff_expert
    if take.has(blk + "ffn_gate_up_exps.weight"):       # gate rows first, then up rows, within each expert
        fused = take.matrix(blk + "ffn_gate_up_exps.weight", e, 2 * m, d)
        gate = fused.rows(0, m, blk + "ffn_gate_exps.weight")
        up = fused.rows(m, 2 * m, blk + "ffn_up_exps.weight")
    else:
        gate, up = take.matrix(blk + "ffn_gate_exps.weight", e, m, d), take.matrix(blk + "ffn_up_exps.weight", e, m, d)
    scale_name = blk + "ffn_down_exps.scale"
    return MoeWeights(
        dense=_dense(take, spec, d),
        norm_after_dense_D=take.vector(blk + "post_ffw_norm_1.weight", d),
        router_scale_D=take.vector(blk + "ffn_gate_inp.scale", d),
        router_ED=take.matrix(blk + "ffn_gate_inp.weight", e, d),
        # absent where a converter folded it into the weights (NVFP4 files)
        expert_scale_E=take.vector(scale_name, e) if take.has(scale_name) else np.ones(e, np.float32),
        norm_before_experts_D=take.vector(blk + "pre_ffw_norm_2.weight", d),
        gate_EMD=gate, up_EMD=up,
        down_EDM=take.matrix(blk + "ffn_down_exps.weight", e, d, m),
        norm_after_experts_D=take.vector(blk + "post_ffw_norm_2.weight", d))
