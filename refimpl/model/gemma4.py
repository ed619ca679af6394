"""The forward pass of Gemma 4, top to bottom.

How it differs from a plain transformer:

- most layers see a sliding window only; every fifth or sixth sees everything, with wider heads and a slower rotation of which
  three quarters stand still ("proportional" RoPE);
- queries and keys are normalised per head, values too (without a weight), and the scores are not divided by sqrt(H);
- full layers of the larger models have no value projection: the values are the keys before their norm and rotation;
- the last layers of E2B and E4B have no keys and values at all and read those of an earlier layer;
- every block is normalised before and after, and the output of a layer is multiplied by a learnt scalar;
- E2B and E4B give every layer its own small embedding of the token (PLE);
- the 26B-A4B adds 8 of 128 experts to a dense feed-forward network, chosen by a router that reads the residual stream itself;
- logits go through a soft cap.

`backend` (backend.py) has the functions that cost time. `tap(name, array)` is called with every value that has a name, in llama.cpp's
naming (lab/compare/names.py), so that engines can be compared value by value. The array is the very one that is used afterwards: a tap that
writes into it changes the rest of the run.
"""

from collections.abc import Callable

import numpy as np

from refimpl.model.backend import Backend
from refimpl.model.cache import Cache
from refimpl.model.config import Config
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
from refimpl.reference.ops import rope_angles

Tap = Callable[[str, np.ndarray], None]


def no_tap(name: str, value: np.ndarray):
    """Looks at nothing."""


def both(first: Tap, then: Tap) -> Tap:
    """A tap that hands a value to two."""
    def tap(name: str, value: np.ndarray):
        first(name, value)
        then(name, value)
    return first if then is no_tap else tap


def of_layer(tap: Tap, i: int) -> Tap:
    """A tap for what happens inside of layer i: it adds "-i" to the names."""
    if tap is no_tap:
        return no_tap
    return lambda name, value: tap(f"{name}-{i}", value)


def forward(config: Config, weights: Weights, backend: Backend, ids_T: np.ndarray, cache: Cache, tap: Tap = no_tap) -> np.ndarray:
    """Runs tokens at positions cache.length, cache.length + 1, ... Returns the final normed state, float32 (T, D).

    Writes their keys and values into the cache but does not commit them: the caller does, with `cache.advance`. `head` turns the
    state into logits, and a drafter reads it too. The ids must have been checked. transformers: Gemma4TextModel.
    """
    cache.reserve(len(ids_T))
    pos_T = cache.length + np.arange(len(ids_T))
    angles = {kind: rope_angles(pos_T, frequency_R) for kind, frequency_R in weights.rope_frequency_R.items()}
    x_TD = embed(config, weights, ids_T)
    tap("inp_scaled", x_TD)
    per_layer_TLP = None
    if isinstance(weights.per_layer, PerLayerEmbedding):
        per_layer_TLP = per_layer_inputs(config, weights.per_layer, backend, ids_T, x_TD, tap)
    for layer in weights.layers:
        x_TD = run_layer(config, layer, backend, x_TD, per_layer_TLP, angles[layer.spec.kind], pos_T, pos_T + 1, cache, tap)
        tap(f"l_out-{layer.spec.index}", x_TD)
    x_TD = backend.rms_norm(x_TD, weights.norm_D, config.norm_eps)
    tap("result_norm", x_TD)
    return x_TD


def head(config: Config, weights: Weights, backend: Backend, x_TD: np.ndarray) -> np.ndarray:
    """Logits of normed states, float32 (T, V)."""
    logit_TV = backend.matmul(x_TD, weights.head_VD)
    return logit_TV if config.softcap is None else backend.softcap(logit_TV, config.softcap)


def embed(config: Config, weights: Weights, ids_T: np.ndarray) -> np.ndarray:
    """Rows of the embedding times sqrt(D), in float32 (in bfloat16, as trained, the factor itself would be rounded)."""
    return weights.embedding_VD.take(ids_T) * np.float32(config.n_embd ** 0.5)


def per_layer_inputs(config: Config, ple: PerLayerEmbedding, backend: Backend, ids_T: np.ndarray, x_TD: np.ndarray,
                     tap: Tap) -> np.ndarray:
    """What every layer is told about each token, (T, L, P): half from a table of its own, half from the embedding."""
    shape = (len(ids_T), config.n_layer, config.n_ple)
    from_table = ple.table_VLP.take(ids_T).reshape(shape) * np.float32(config.n_ple ** 0.5)
    tap("inp_per_layer_selected", from_table)
    projected = backend.matmul(x_TD, ple.projection_LPD).reshape(shape) * np.float32(config.n_embd ** -0.5)
    projected = backend.rms_norm(projected, ple.norm_P, config.norm_eps)
    tap("per_layer_proj", projected)
    mixed = (projected + from_table) * np.float32(2 ** -0.5)
    tap("inp_per_layer", mixed)
    return mixed


def run_layer(config, layer: LayerWeights, backend: Backend, x_TD, per_layer_TLP, angles, pos_T, end_T, cache: Cache,
              tap: Tap) -> np.ndarray:
    """One layer: attention, feed-forward, per-layer input, scale. transformers: Gemma4TextDecoderLayer.

    The query at position pos_T[t] sees keys up to end_T[t] - 1: its own is the last here, the one before it in a drafter.
    """
    i, eps = layer.spec.index, config.norm_eps
    tap = of_layer(tap, i)
    normed_TD = backend.rms_norm(x_TD, layer.attention.norm_before_D, eps)
    tap("attn_norm", normed_TD)
    attended_TD = attention(layer.spec, layer.attention, backend, normed_TD, angles, pos_T, end_T, cache, eps, tap)
    attended_TD = backend.rms_norm(attended_TD, layer.attention.norm_after_D, eps)
    tap("attn_post_norm", attended_TD)
    x_TD = x_TD + attended_TD
    tap("attn_out", x_TD)

    normed_TD = backend.rms_norm(x_TD, layer.norm_before_ffn_D, eps)
    if isinstance(layer.ffn, MoeWeights):
        tap("ffn_norm_1", normed_TD)
        y_TD = moe_ffn(layer, layer.ffn, backend, x_TD, normed_TD, eps, tap)
        tap("ffn_moe_combined", y_TD)
    else:
        tap("ffn_norm", normed_TD)
        y_TD = dense_ffn(layer.ffn, backend, normed_TD, tap)
        tap("ffn_out", y_TD)
    y_TD = backend.rms_norm(y_TD, layer.norm_after_ffn_D, eps)
    tap("ffn_post_norm", y_TD)
    x_TD = x_TD + y_TD

    if isinstance(layer.per_layer, PerLayerWeights):
        tap("pe_in", x_TD)
        branch_TD = per_layer_branch(layer.per_layer, backend, x_TD, per_layer_TLP[:, i], eps)
        tap("per_layer_embd_out", branch_TD)
        x_TD = x_TD + branch_TD
    return x_TD * layer.output_scale


def attention(spec, w: AttentionWeights, backend: Backend, x_TD, angles, pos_T, end_T, cache: Cache, eps: float,
              tap: Tap) -> np.ndarray:
    """Projects, normalises, rotates, remembers, attends. transformers: Gemma4TextAttention."""
    n_tok = len(x_TD)
    q_TNH = backend.matmul(x_TD, w.query_AD).reshape(n_tok, spec.n_head, spec.head_dim)
    tap("Qcur", q_TNH)
    q_TNH = backend.rms_norm(q_TNH, w.query_norm_H, eps)
    tap("Qcur_normed", q_TNH)
    q_TNH = backend.rotate(q_TNH, *angles)
    tap("Qcur_pos", q_TNH)
    if not isinstance(w.kv, SharedKv):
        k_TKH = backend.matmul(x_TD, w.kv.key_OD).reshape(n_tok, spec.n_kv, spec.head_dim)
        v_TKH = k_TKH if spec.values_are_keys else backend.matmul(x_TD, w.kv.value_OD).reshape(k_TKH.shape)
        tap("Kcur", k_TKH)
        tap("Vcur", v_TKH)
        k_TKH = backend.rms_norm(k_TKH, w.kv.key_norm_H, eps)
        tap("Kcur_normed", k_TKH)
        v_TKH = backend.rms_normalise(v_TKH, eps)
        tap("Vcur_normed", v_TKH)
        k_TKH = backend.rotate(k_TKH, *angles)
        tap("Kcur_pos", k_TKH)
        cache.layers[spec.index].write(pos_T[0], k_TKH, v_TKH)
    kept = cache.layers[spec.kv_from]
    out_TNH = backend.attend(q_TNH, kept.k_SKH, kept.v_SKH, kept.first_in_sight(pos_T), end_T)
    tap("kqv_out", out_TNH)
    return backend.matmul(out_TNH.reshape(n_tok, -1), w.output_DA)


def dense_ffn(w: DenseWeights, backend: Backend, x_TD: np.ndarray, tap: Tap) -> np.ndarray:
    """down(gelu(gate(x)) * up(x)). transformers: Gemma4TextMLP."""
    gate_TF, up_TF = backend.matmul(x_TD, w.gate_FD), backend.matmul(x_TD, w.up_FD)
    tap("ffn_gate", gate_TF)
    tap("ffn_up", up_TF)
    gated_TF = backend.gated(gate_TF, up_TF)
    tap("ffn_geglu", gated_TF)
    return backend.matmul(gated_TF, w.down_DF)


def moe_ffn(layer: LayerWeights, w: MoeWeights, backend: Backend, x_TD, normed_TD, eps: float, tap: Tap) -> np.ndarray:
    """The dense branch plus the chosen experts, each normalised on its own. `normed_TD` feeds the dense branch.

    The router and the experts start from the residual stream `x_TD`: the router behind a norm without weight, the experts behind
    a norm of their own. transformers: Gemma4TextDecoderLayer.forward, Gemma4TextRouter, Gemma4TextExperts.
    """
    dense_TD = backend.rms_norm(dense_ffn(w.dense, backend, normed_TD, tap), w.norm_after_dense_D, eps)
    tap("ffn_mlp", dense_TD)
    routed_TD = backend.rms_normalise(x_TD, eps) * w.router_scale_D * np.float32(x_TD.shape[1] ** -0.5)
    logit_TE = backend.matmul(routed_TD, w.router_ED)
    tap("ffn_moe_logits", logit_TE)
    id_TX, weight_TX = backend.choose(logit_TE, layer.spec.ffn.n_used, w.expert_scale_E)
    tap("ffn_moe_topk", id_TX)
    tap("ffn_moe_weights", weight_TX)
    expert_in_TD = backend.rms_norm(x_TD, w.norm_before_experts_D, eps)
    tap("ffn_norm_2", expert_in_TD)
    expert_TD = backend.run_experts(expert_in_TD, id_TX, weight_TX, w.gate_EMD, w.up_EMD, w.down_EDM)
    tap("ffn_moe_out", expert_TD)
    expert_TD = backend.rms_norm(expert_TD, w.norm_after_experts_D, eps)
    tap("ffn_moe", expert_TD)
    return dense_TD + expert_TD


def per_layer_branch(w: PerLayerWeights, backend: Backend, x_TD: np.ndarray, input_TP: np.ndarray, eps: float) -> np.ndarray:
    """The token's own word to this layer, gated by the state: norm(project(gelu(gate(x)) * input))."""
    gated_TP = backend.gated(backend.matmul(x_TD, w.gate_PD), input_TP)
    return backend.rms_norm(backend.matmul(gated_TP, w.projection_DP), w.norm_after_D, eps)


