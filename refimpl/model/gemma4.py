"""The forward pass of Gemma 4, top to bottom. How it differs from a plain decoder-only transformer such as Llama:

- sliding-window attention: most layers see the latest 512 or 1,024 positions only; every fifth or sixth sees all of them, with wider
  heads, a larger RoPE base, and only a quarter of the pairs rotated (partial, "proportional" RoPE);
- QK-norm: queries and keys are RMS-normalised per head, values too (without a weight), and scores are not divided by sqrt(H);
- keys as values: full layers of the larger models have no value projection; values are the keys before their norm and rotation;
- shared keys and values: the last layers of E2B and E4B have none of their own and attend to those of an earlier layer;
- four norms: every block is normalised before and after, and a learnt scalar multiplies the output of a layer;
- per-layer embeddings (PLE): E2B and E4B give every layer its own small embedding of the token;
- mixture of experts: the 26B-A4B adds 8 of 128 experts to a dense feed-forward network, routed from the residual stream itself;
- logits are soft-capped: c * tanh(logit / c).

Rows of several sequences may be computed together: products and experts see them all, attention goes sequence by sequence. A row's bits
are the same, whatever the others are.

Array names carry their shape (letters in config.py). `backend` (backend.py) has the functions that cost time. `tap(name, value)` (tap.py)
shows a value to whoever wants to see it, and returns it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refimpl.model.backend import Backend
from refimpl.model.cache import Cache
from refimpl.model.config import AttentionType, Config, LayerSpec
from refimpl.model.rotation import angles_at
from refimpl.model.soft import NO_SOFT, Soft
from refimpl.model.tap import Tap, no_tap, of_layer
from refimpl.model.weights import (
    AttentionWeights,
    DenseWeights,
    LayerWeights,
    MoeWeights,
    PerLayerEmbedding,
    PerLayerWeights,
    SharedKv,
    Weights,
)

PAD = 0         # the token whose per-layer embedding soft tokens have


@dataclass(frozen=True)
class Step:
    """What all layers of one call share. The query in row t is at position pos_T[t] and sees keys of positions below end_T[t], which is
    its own position plus 1, or in sliding layers the end of the picture that it is part of.
    """

    parts: Sequence[tuple[slice, Cache]]                              # rows that belong to one sequence, and its cache
    pos_T: np.ndarray
    end_T: Mapping[AttentionType, np.ndarray]
    angles: Mapping[AttentionType, tuple[np.ndarray, np.ndarray]]     # cosines and sines of the rotation, float32 (T, R) each
    backend: Backend
    eps: float                                                        # added to the mean square in every norm
    tap: Tap

    def in_layer(self, i: int) -> "Step":
        """The same, with a tap that adds the layer's number to names."""
        return self if self.tap is no_tap else replace(self, tap=of_layer(self.tap, i))


def forward(config: Config, weights: Weights, backend: Backend, ids_T: np.ndarray, sequences: Sequence[tuple[Cache, int]],
            tap: Tap = no_tap, soft: Soft = NO_SOFT) -> np.ndarray:
    """Runs the next tokens of one or more sequences. Returns the final normed states, float32 (T, D).

    `sequences`: a cache, and how many of the rows go on in it, at positions cache.length, cache.length + 1, ...; for each sequence, in the
    order of the rows. `soft`: what negative ids stand for. Writes keys and values into the caches but does not commit them: the caller
    does, with `cache.advance`. `head` turns states into logits, and a drafter reads them too. `ids_T` must have been checked.
    transformers: Gemma4TextModel.
    """
    for cache, n_rows in sequences:
        cache.reserve(n_rows)
    ends = np.cumsum([n_rows for _, n_rows in sequences])
    parts = [(slice(end - n_rows, end), cache) for (cache, n_rows), end in zip(sequences, ends)]
    pos_T = np.concatenate([cache.length + np.arange(n_rows) for cache, n_rows in sequences])
    angles = {attention: angles_at(pos_T, frequency_R) for attention, frequency_R in weights.rope_frequency_R.items()}
    with_picture_T = np.concatenate([soft.ends(ids_T[rows], pos_T[rows]) for rows, _ in parts])
    end_T = {AttentionType.FULL: pos_T + 1, AttentionType.SLIDING: with_picture_T}
    step = Step(parts, pos_T, end_T, angles, backend, config.norm_eps, tap)
    token_T = np.where(ids_T < 0, PAD, ids_T)
    x_TD = tap("inp_scaled", soft.fill(embed(config, weights, token_T), ids_T))
    per_layer_TLP = None
    if isinstance(weights.per_layer, PerLayerEmbedding):
        per_layer_TLP = per_layer_inputs(config, weights.per_layer, token_T, x_TD, step)
    for layer in weights.layers:
        x_TD = run_layer(layer, x_TD, per_layer_TLP, step)
    return tap("result_norm", backend.rms_norm(x_TD, weights.norm_D, config.norm_eps))


def head(config: Config, weights: Weights, backend: Backend, x_TD: np.ndarray) -> np.ndarray:
    """Logits of normed states, float32 (T, V)."""
    logit_TV = backend.matmul(x_TD, weights.head_VD)
    return logit_TV if config.softcap is None else backend.softcap(logit_TV, config.softcap)


def embed(config: Config, weights: Weights, ids_T: np.ndarray) -> np.ndarray:
    """Rows of the embedding times sqrt(D), float32 (T, D). (In bfloat16, as the model was trained, the factor itself would be rounded.)"""
    return weights.embedding_VD.take(ids_T) * np.float32(config.n_embd ** 0.5)


def run_layer(layer: LayerWeights, x_TD: np.ndarray, per_layer_TLP: np.ndarray | None, step: Step) -> np.ndarray:
    """One layer: attention, feed-forward, per-layer embedding, scale. transformers: Gemma4TextDecoderLayer."""
    i = layer.spec.index
    step = step.in_layer(i)
    backend, eps, tap = step.backend, step.eps, step.tap

    normed_TD = tap("attn_norm", backend.rms_norm(x_TD, layer.attention.norm_before_D, eps))
    y_TD = attention(layer.spec, layer.attention, normed_TD, step)
    y_TD = tap("attn_post_norm", backend.rms_norm(y_TD, layer.attention.norm_after_D, eps))
    x_TD = tap("attn_out", x_TD + y_TD)

    normed_TD = backend.rms_norm(x_TD, layer.norm_before_ffn_D, eps)
    if isinstance(layer.ffn, MoeWeights):
        y_TD = tap("ffn_moe_combined", moe_ffn(layer.ffn, layer.spec.ffn.n_used, x_TD, tap("ffn_norm_1", normed_TD), step))
    else:
        y_TD = tap("ffn_out", dense_ffn(layer.ffn, tap("ffn_norm", normed_TD), step))
    y_TD = tap("ffn_post_norm", backend.rms_norm(y_TD, layer.norm_after_ffn_D, eps))
    x_TD = x_TD + y_TD

    if isinstance(layer.per_layer, PerLayerWeights):
        x_TD = tap("pe_in", x_TD)
        x_TD = x_TD + tap("per_layer_embd_out", per_layer_embedding(layer.per_layer, x_TD, per_layer_TLP[:, i], step))
    return tap("l_out", x_TD * layer.output_scale)


def attention(spec: LayerSpec, w: AttentionWeights, x_TD: np.ndarray, step: Step) -> np.ndarray:
    """QKV projection, QK-norm, RoPE, cache update, attention, output projection. transformers: Gemma4TextAttention."""
    backend, eps, tap, n_tok = step.backend, step.eps, step.tap, len(x_TD)
    angles, kept = step.angles[spec.attention], [(rows, cache.layers[spec.kv_from]) for rows, cache in step.parts]

    q_TNH = tap("Qcur", backend.matmul(x_TD, w.query_AD).reshape(n_tok, spec.n_head, spec.head_dim))
    q_TNH = tap("Qcur_normed", backend.rms_norm(q_TNH, w.query_norm_H, eps))
    q_TNH = tap("Qcur_pos", backend.rotate(q_TNH, *angles))

    if not isinstance(w.kv, SharedKv):
        k_TKH = tap("Kcur", backend.matmul(x_TD, w.kv.key_OD).reshape(n_tok, spec.n_kv, spec.head_dim))
        v_TKH = tap("Vcur", k_TKH if spec.values_are_keys else backend.matmul(x_TD, w.kv.value_OD).reshape(k_TKH.shape))
        k_TKH = tap("Kcur_normed", backend.rms_norm(k_TKH, w.kv.key_norm_H, eps))
        v_TKH = tap("Vcur_normed", backend.rms_normalise(v_TKH, eps))
        k_TKH = tap("Kcur_pos", backend.rotate(k_TKH, *angles))
        for rows, layer in kept:
            layer.write(step.pos_T[rows.start], k_TKH[rows], v_TKH[rows])

    out_TNH = np.empty_like(q_TNH)
    for rows, layer in kept:
        out_TNH[rows] = backend.attend(q_TNH[rows], layer, layer.first_visible(step.pos_T[rows]), step.end_T[spec.attention][rows])
    return backend.matmul(tap("kqv_out", out_TNH).reshape(n_tok, -1), w.output_DA)


def dense_ffn(w: DenseWeights, x_TD: np.ndarray, step: Step) -> np.ndarray:
    """down(gelu(gate(x)) * up(x)). transformers: Gemma4TextMLP."""
    backend, tap = step.backend, step.tap
    gate_TF = tap("ffn_gate", backend.matmul(x_TD, w.gate_FD))
    up_TF = tap("ffn_up", backend.matmul(x_TD, w.up_FD))
    return backend.matmul(tap("ffn_geglu", backend.gated(gate_TF, up_TF)), w.down_DF)


def moe_ffn(w: MoeWeights, n_used: int, x_TD: np.ndarray, normed_TD: np.ndarray, step: Step) -> np.ndarray:
    """The dense network plus the chosen experts, each normalised on its own. `normed_TD` is the dense network's input.

    Router and experts start from the residual stream `x_TD`: the router after a norm without weight, the experts after a norm of their own.
    transformers: Gemma4TextDecoderLayer.forward, Gemma4TextRouter, Gemma4TextExperts.
    """
    backend, eps, tap = step.backend, step.eps, step.tap
    dense_TD = tap("ffn_mlp", backend.rms_norm(dense_ffn(w.dense, normed_TD, step), w.norm_after_dense_D, eps))

    router_in_TD = backend.rms_normalise(x_TD, eps) * w.router_scale_D * np.float32(x_TD.shape[1] ** -0.5)
    logit_TE = tap("ffn_moe_logits", backend.matmul(router_in_TD, w.router_ED))
    id_TX, weight_TX = backend.route(logit_TE, n_used, w.expert_scale_E)
    id_TX, weight_TX = tap("ffn_moe_topk", id_TX), tap("ffn_moe_weights", weight_TX)

    expert_in_TD = tap("ffn_norm_2", backend.rms_norm(x_TD, w.norm_before_experts_D, eps))
    expert_TD = tap("ffn_moe_out", backend.run_experts(expert_in_TD, id_TX, weight_TX, w.gate_EMD, w.up_EMD, w.down_EDM))
    return dense_TD + tap("ffn_moe", backend.rms_norm(expert_TD, w.norm_after_experts_D, eps))


def per_layer_inputs(config: Config, ple: PerLayerEmbedding, ids_T: np.ndarray, x_TD: np.ndarray, step: Step) -> np.ndarray:
    """The inputs of all layers' per-layer embeddings, (T, L, P): rows of a table of their own, plus a projection of the embedding."""
    backend, tap, shape = step.backend, step.tap, (len(ids_T), config.n_layer, config.n_ple)
    table_TLP = ple.table_VLP.take(ids_T).reshape(shape) * np.float32(config.n_ple ** 0.5)
    table_TLP = tap("inp_per_layer_selected", table_TLP)
    projected_TLP = backend.matmul(x_TD, ple.projection_LPD).reshape(shape) * np.float32(config.n_embd ** -0.5)
    projected_TLP = tap("per_layer_proj", backend.rms_norm(projected_TLP, ple.norm_P, step.eps))
    return tap("inp_per_layer", (projected_TLP + table_TLP) * np.float32(2 ** -0.5))


def per_layer_embedding(w: PerLayerWeights, x_TD: np.ndarray, input_TP: np.ndarray, step: Step) -> np.ndarray:
    """Per-layer embedding (PLE): the token's per-layer input, gated by the hidden state: norm(project(gelu(gate(x)) * input))."""
    backend = step.backend
    gated_TP = backend.gated(backend.matmul(x_TD, w.gate_PD), input_TP)
    return backend.rms_norm(backend.matmul(gated_TP, w.projection_DP), w.norm_after_D, step.eps)
