"""Wrong forward passes: each is one change of one function, of a kind that real engines shipped.

`inject(bug)` makes the change for the length of a `with` block, in the reference's functions (the kernels are compiled). A model must be
loaded inside the block where the change is one of loading (`at_load`).

Sources: issues of other engines, such as ik_llama.cpp 1993 (the drafter fed with a state from before the norm), llama.cpp's converter
(proportional RoPE), mlx-lm and vLLM (windows, stale keys), and lists of mistakes kept by authors of from-scratch models.
"""

import contextlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from refimpl.decode import drafter as drafting
from refimpl.formats.quants.basic import q4_0
from refimpl.formats.quants.k import q4_k
from refimpl.model import blocks, config, drafter, gemma4, weights
from refimpl.reference import attention, moe, ops

MOE, PLE, K_QUANTS = "moe", "ple", "k-quants"     # models that show it: the built-in one, one with per-layer inputs, one in Q4_K


@dataclass(frozen=True)
class Bug:
    """In `function`, `old` becomes `new`. On a model of the kind `on`, `first` departs first, and the difference looks like `kind`.

    `kind` "": no test recognises it. `{full}` in `first` stands for the first full layer, `{shared}` for the first that shares keys.
    """

    function: Callable
    old: str
    new: str
    on: str
    first: str
    kind: str = ""

    @property
    def at_load(self) -> bool:
        """Does a model have to be loaded with the bug in place?"""
        return self.function in (q4_0.codes_q4_0, q4_k.unpack_scales, weights._moe, config.config_from_gguf, ops.rope_frequencies)

    def expected(self, config) -> str:
        """`first` for a model of this configuration."""
        full = next(layer.index for layer in config.layers if layer.window is None)
        shared = next((layer.index for layer in config.layers if not layer.has_own_kv), None)
        return self.first.format(full=full, shared=shared)


BUGS = {
    # the embedding
    "embedding not scaled": Bug(gemma4.embed, " * np.float32(config.n_embd ** 0.5)", "", MOE, "inp_scaled", "constant factor"),
    "embedding scale rounded to bfloat16": Bug(gemma4.embed, "np.float32(config.n_embd ** 0.5)",
        "((np.float32(config.n_embd ** 0.5).view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)", MOE,
        "inp_scaled", "constant factor"),
    "embedding of the token before": Bug(gemma4.embed, "take(ids_T)", "take(np.roll(ids_T, 1))", MOE, "inp_scaled", "shifted rows"),
    "per-layer table not scaled": Bug(gemma4.per_layer_inputs, " * np.float32(config.n_ple ** 0.5)", "", PLE, "inp_per_layer_selected",
        "constant factor"),
    "per-layer projection not scaled": Bug(gemma4.per_layer_inputs, " * np.float32(config.n_embd ** -0.5)", "", PLE, "per_layer_proj",
        "factor per row"),
    "per-layer input not scaled": Bug(gemma4.per_layer_inputs, " * np.float32(2 ** -0.5)", "", PLE, "inp_per_layer", "constant factor"),
    "per-layer input of the next layer": Bug(gemma4.run_layer, "per_layer_TLP[:, i]", "per_layer_TLP[:, (i + 1) % per_layer_TLP.shape[1]]",
        PLE, "per_layer_embd_out-0"),
    # weights
    "nibbles swapped": Bug(q4_0.codes_q4_0, 'blocks["qs"]', 'blocks["qs"] >> 4 | blocks["qs"] << 4', MOE, "inp_scaled",
        "swapped halves"),
    "6-bit scales unpacked wrongly": Bug(q4_k.unpack_scales, "(third & low4) | ((first >> 2) & top2)", "third & low4", K_QUANTS,
        "inp_scaled"),
    "expert halves read in the wrong order": Bug(weights._moe, "fused.rows(0, m,", "fused.rows(m, 2 * m,", MOE, "ffn_moe_out-0"),
    # norms
    "norm before attention left out": Bug(gemma4.run_layer, "backend.rms_norm(x_TD, layer.attention.norm_before_D, eps)",
        "x_TD", MOE, "attn_norm-0", "skipped step"),
    "no norm after attention": Bug(gemma4.run_layer, "backend.rms_norm(y_TD, layer.attention.norm_after_D, eps)",
        "y_TD", MOE, "attn_post_norm-0", "missing norm"),
    "norm weight taken as 1 + w": Bug(ops.rms_norm, "rms_normalise(x, eps) * weight", "rms_normalise(x, eps) * (1 + weight)", MOE,
        "attn_norm-0", "factor per channel"),
    "final norm left out": Bug(gemma4.forward, "backend.rms_norm(x_TD, weights.norm_D, config.norm_eps)", "x_TD", MOE,
        "result_norm", "skipped step"),
    # attention
    "RoPE turns neighbours": Bug(ops.rotate, "x_TNH[..., :n_pairs], x_TNH[..., n_pairs:]", "x_TNH[..., 0::2], x_TNH[..., 1::2]", MOE,
        "Qcur_pos-0", "other rotation"),
    "RoPE backwards": Bug(ops.rotate, "[a * cos - b * sin, b * cos + a * sin]", "[a * cos + b * sin, b * cos - a * sin]", MOE,
        "Qcur_pos-0", "other rotation"),
    "rope_freqs ignored": Bug(ops.rope_frequencies, " / divisor_R)", " / np.ones_like(divisor_R))", MOE, "Qcur_pos-{full}",
        "other rotation"),
    "positions counted from 1": Bug(gemma4.forward, "angles_at(pos_T, frequency_R)", "angles_at(pos_T + 1, frequency_R)", MOE,
        "Qcur_pos-0", "other rotation"),
    "window one too long": Bug(blocks.BlockTable.first_visible, "pos - self.window + 1", "pos - self.window", MOE, "kqv_out-0",
        "from a position"),
    "window one too short": Bug(blocks.BlockTable.first_visible, "pos - self.window + 1", "pos - self.window + 2", MOE, "kqv_out-0",
        "from a position"),
    "scores divided by sqrt(H)": Bug(attention.attend_one, 'np.einsum("KGH,SKH->KGS", q_KGH, k_SKH)',
        'np.einsum("KGH,SKH->KGS", q_KGH, k_SKH) / q_KGH.shape[-1] ** 0.5', MOE, "kqv_out-0", "other scores"),
    "query heads dealt out to the wrong keys": Bug(attention.attend, "q_TKGH = q_TNH.reshape(n_tok, n_kv, n_head // n_kv, head_dim)",
        "q_TKGH = np.ascontiguousarray(q_TNH.reshape(n_tok, n_head // n_kv, n_kv, head_dim).swapaxes(1, 2))", MOE, "kqv_out-0",
        "other scores"),
    "values are keys after their norm": Bug(gemma4.attention, "backend.rms_normalise(v_TKH, eps)",
        "backend.rms_normalise(k_TKH if spec.values_are_keys else v_TKH, eps)", MOE, "Vcur_normed-{full}", "another tensor"),
    "values not normalised": Bug(gemma4.attention, "backend.rms_normalise(v_TKH, eps)", "v_TKH", MOE, "Vcur_normed-0",
        "skipped step"),
    "keys shared from the wrong layer": Bug(config.config_from_gguf, "kv_from = donors[-1]", "kv_from = donors[0]", PLE,
        "kqv_out-{shared}"),
    "a batch's keys written one slot on": Bug(blocks.LayerCache.write, "(k_TKH, v_TKH)", "(np.roll(k_TKH, 1, 0), v_TKH)", MOE,
        "cache_k-0", "shifted rows"),
    "no residual around attention": Bug(gemma4.run_layer, '"attn_out", x_TD + y_TD', '"attn_out", y_TD', MOE, "attn_out-0",
        "skipped step"),
    # feed-forward
    "GELU by erf": Bug(ops.gelu, "inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)",
        "import math; return (x * np.float32(0.5) * (1 + np.vectorize(math.erf)(x / 2 ** 0.5))).astype(np.float32)", MOE, "ffn_geglu-0",
        "another activation"),
    "SiLU instead of GELU": Bug(ops.gelu, "return np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))",
        "return x / (np.float32(1) + np.exp(-x))", MOE, "ffn_geglu-0", "another activation"),
    "gate and up swapped": Bug(ops.gated, "return gelu(gate) * up", "return gelu(up) * gate", MOE, "ffn_geglu-0", "another activation"),
    "gate and up of the experts swapped": Bug(moe.run_experts,
        "gelu(matmul(x_TD, gate_EMD.expert(e))) * matmul(x_TD, up_EMD.expert(e))",
        "gelu(matmul(x_TD, up_EMD.expert(e))) * matmul(x_TD, gate_EMD.expert(e))", MOE, "ffn_moe_out-0"),
    "layer scalar left out": Bug(gemma4.run_layer, "x_TD * layer.output_scale", "x_TD", PLE, "l_out-0", "constant factor"),
    # experts
    "router reads the normed input": Bug(gemma4.moe_ffn, "backend.rms_normalise(x_TD, eps) * w.router_scale_D",
        "normed_TD * w.router_scale_D", MOE, "ffn_moe_logits-0"),
    "router not scaled by sqrt(D)": Bug(gemma4.moe_ffn, " * np.float32(x_TD.shape[1] ** -0.5)", "", MOE, "ffn_moe_logits-0",
        "constant factor"),
    "weights not renormalised": Bug(moe.route, "weight_TX = weight_TX / weight_TX.sum(axis=-1, keepdims=True, dtype=np.float32)", "pass",
        MOE, "ffn_moe_weights-0", "factor per row"),
    "expert scale before renormalisation": Bug(moe.route, "weight_TX = np.take_along_axis(probability_TE, id_TX, axis=-1)",
        "weight_TX = np.take_along_axis(probability_TE, id_TX, axis=-1) * expert_scale_E[id_TX]; expert_scale_E = expert_scale_E * 0 + 1",
        MOE, "ffn_moe_weights-0", "factor per row"),
    "expert scale dropped": Bug(moe.route, "return id_TX, weight_TX * expert_scale_E[id_TX]", "return id_TX, weight_TX", MOE,
        "ffn_moe_weights-0", "factor per expert"),
    "one expert too few": Bug(moe.route, "[:, :n_used]", "[:, :n_used - 1]", MOE, "ffn_moe_topk-0", "another shape"),
    "the least likely experts": Bug(moe.route, "np.argsort(-probability_TE", "np.argsort(probability_TE", MOE, "ffn_moe_topk-0",
        "other choice"),
    "experts read the dense branch's norm": Bug(gemma4.moe_ffn, "backend.rms_norm(x_TD, w.norm_before_experts_D, eps)",
        "normed_TD", MOE, "ffn_norm_2-0", "skipped step"),
    "experts' rows given back in the wrong place": Bug(moe.run_experts, "return y_TD", "return np.roll(y_TD, 1, axis=0)", MOE,
        "ffn_moe_out-0", "shifted rows"),
    # the head
    "soft cap left out": Bug(gemma4.head, "return logit_TV if config.softcap is None else backend.softcap(logit_TV, config.softcap)",
        "return logit_TV", MOE, "result_output", "pointwise function"),
    "soft cap twice": Bug(gemma4.head, "backend.softcap(logit_TV, config.softcap)",
        "backend.softcap(backend.softcap(logit_TV, config.softcap), config.softcap)", MOE, "result_output", "pointwise function"),
    # the drafter
    "state fed back from before the drafter's norm": Bug(drafter.draft_step, "backend.matmul(z_TD, weights.post_projection_CD)",
        "backend.matmul(x_TD, weights.post_projection_CD)", MOE, "draft0.h_nextn"),
    "state and embedding exchanged": Bug(drafter.draft_step, "[embedding_C, state_C]", "[state_C, embedding_C]", MOE, "draft0.inp_xh",
        "swapped halves"),
    "drafter's embedding not scaled": Bug(drafting.Drafter.draft, "np.array([token]))[0]",
        "np.array([token]))[0] / np.float32(self.target.config.n_embd ** 0.5)", MOE, "draft0.inp_xh"),
    "position advances in the draft": Bug(drafting.Drafter.draft, "z_D, state_C = network.draft_step(",
        "angles = network.angles_at(self.weights, cache.length + len(proposed)); z_D, state_C = network.draft_step(", MOE,
        "draft1.Qcur_pos-0", "other rotation"),
    "a stale key visible to the draft": Bug(drafter.draft_step, "fromkeys(AttentionType, pos_T)", "fromkeys(AttentionType, pos_T + 1)", MOE,
        "draft0.kqv_out-0"),
    "first token drafted again": Bug(drafting.Drafter.draft, "token = int(id_K[best])\n", "token = token\n", MOE, "draft1.inp_xh"),
}


def changed(bug: Bug) -> str:
    """The source of the function with the bug."""
    source = textwrap.dedent(inspect.getsource(bug.function))
    if source.count(bug.old) != 1:
        raise ValueError(f"{bug.old!r} is {source.count(bug.old)} times in {bug.function.__qualname__}")
    return source.replace(bug.old, bug.new)


def inject(bug: Bug):
    """Runs with the bug in its function, which keeps its identity: whoever holds it has the bug too."""
    return running(bug.function, changed(bug))


@contextlib.contextmanager
def running(function: Callable, source: str):
    """Runs with another source of a function, for the length of a `with` block. Raises SyntaxError before it."""
    made = {}
    exec(compile(source, inspect.getfile(function), "exec"), function.__globals__, made)
    kept, function.__code__ = function.__code__, made[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = kept
