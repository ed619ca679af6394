"""The names of a forward pass's values, in the order in which it computes them: llama.cpp's names of its graph, and their place in
transformers.

A name in a trace is `NAME`, `NAME-LAYER`, or one of these after a prefix: `draft0.` (step 0 of a draft after the prompt), `round1.draft0.`
and `round1.verify.` (speculative rounds, `round1.drafted` and `round1.emitted` are ids). Names of TOWERS stand after `image0.`, `audio0.`
(the first picture, the first sound, counted apart) and come before the text model's: the rows of `image0.projected` are those of
`inp_scaled` in the places of the first picture.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Name:
    """A value. `shape` is in the letters of model/config.py.

    `module` is the transformers module whose input or output it is (`side`: "in", "out", "out 1" for an item of several), below
    `model.layers.N` where `layered` ("." is the layer itself); "" where it is no module's. `only`: in "dense" layers, or those with
    "experts", "" for all.
    """

    name: str
    shape: str
    what: str
    module: str = ""
    side: str = "out"
    layered: bool = True
    only: str = ""


NAMES = (
    Name("inp_scaled", "T D", "embedding times sqrt(D)", "model.embed_tokens", layered=False),
    Name("inp_per_layer_selected", "T L P", "per-layer table times sqrt(P)", "model.embed_tokens_per_layer", layered=False),
    Name("per_layer_proj", "T L P", "projected embedding, normed", "model.per_layer_projection_norm", layered=False),
    Name("inp_per_layer", "T L P", "both, times 1/sqrt(2)", "model.layers.N", "in 1", layered=False),
    Name("inp_xh", "1 2C", "drafter: embedding and state side by side", "pre_projection", "in", layered=False),
    Name("pre_proj", "1 D", "drafter: their projection", "pre_projection", layered=False),
    Name("attn_norm", "T D", "norm before attention", "input_layernorm"),
    Name("Qcur", "T N H", "queries", "self_attn.q_proj"),
    Name("Qcur_normed", "T N H", "queries, normed per head", "self_attn.q_norm"),
    Name("Qcur_pos", "T N H", "queries, rotated", "self_attn", "rotated"),
    Name("Kcur", "T K H", "keys", "self_attn.k_proj"),
    Name("Vcur", "T K H", "values (the keys where a layer has no values of its own)", "self_attn.v_proj"),
    Name("Kcur_normed", "T K H", "keys, normed per head", "self_attn.k_norm"),
    Name("Vcur_normed", "T K H", "values, normed per head, without weight", "self_attn.v_norm"),
    Name("Kcur_pos", "T K H", "keys, rotated", "self_attn", "rotated"),
    Name("cache_k", "T K H", "keys as the cache holds them"),
    Name("cache_v", "T K H", "values as the cache holds them"),
    Name("kqv_out", "T N H", "attention's mean of values, before its output matrix", "self_attn.o_proj", "in"),
    Name("attn_post_norm", "T D", "attention's output, normed", "post_attention_layernorm"),
    Name("attn_out", "T D", "residual stream after attention", "pre_feedforward_layernorm", "in"),
    Name("ffn_norm", "T D", "norm before the feed-forward network", "pre_feedforward_layernorm", only="dense"),
    Name("ffn_norm_1", "T D", "norm before the dense branch", "pre_feedforward_layernorm", only="experts"),
    Name("ffn_gate", "T F", "gate", "mlp.gate_proj"),
    Name("ffn_up", "T F", "up", "mlp.up_proj"),
    Name("ffn_geglu", "T F", "gelu(gate) * up", "mlp.down_proj", "in"),
    Name("ffn_mlp", "T D", "dense branch, normed", "post_feedforward_layernorm_1", only="experts"),
    Name("ffn_moe_logits", "T E", "router", "router.proj", only="experts"),
    Name("ffn_moe_topk", "T X", "chosen experts", "router", "out 2", only="experts"),
    Name("ffn_moe_weights", "T X", "their weights, renormalised, times the experts' scales (llama.cpp's ffn_moe_weights_norm is without)",
         "router", "out 1", only="experts"),
    Name("ffn_norm_2", "T D", "norm before the experts", "pre_feedforward_layernorm_2", only="experts"),
    Name("ffn_moe_out", "T D", "weighted sum of the experts", "experts", only="experts"),
    Name("ffn_moe", "T D", "the same, normed", "post_feedforward_layernorm_2", only="experts"),
    Name("ffn_moe_combined", "T D", "dense branch plus experts", "post_feedforward_layernorm", "in", only="experts"),
    Name("ffn_out", "T D", "feed-forward network's output", "mlp", only="dense"),
    Name("ffn_post_norm", "T D", "the same, or ffn_moe_combined, normed", "post_feedforward_layernorm"),
    Name("pe_in", "T D", "residual stream before the per-layer input", "per_layer_input_gate", "in"),
    Name("per_layer_embd_out", "T D", "per-layer branch, normed", "post_per_layer_input_norm"),
    Name("l_out", "T D", "the layer's output", "."),
    Name("result_norm", "T D", "final norm", "model.norm", layered=False),
    Name("h_nextn", "1 C", "drafter: state for the next step", "post_projection", layered=False),
    Name("result_output", "T V", "logits; or the largest: result_output.ids, .top and .logsumexp", "lm_head", "logits", layered=False),
    Name("drafted", "K", "ids that the drafter proposed", layered=False),
    Name("emitted", "K", "ids that the round gave", layered=False),
)
TOWERS = {
    "image": (
        Name("patches", "T P", "0 to 1, patches (12B: cells of 3 x 3 patches) row by row, inside (row, column, colour)", layered=False),
        Name("positions", "T 2", "(x, y) of each", layered=False),
        Name("inp", "T D", "embedded (12B: normed as well)", "patch_embedder.input_proj", layered=False),
        Name("pos_embd", "T D", "the same, plus the rows for x and y", "patch_embedder", layered=False),
        Name("layer_inp_normed", "T D", "norm before attention", "input_layernorm"),
        Name("Qcur", "T N H", "queries, normed per head", "self_attn.q_norm"),
        Name("Kcur", "T N H", "keys, normed per head", "self_attn.k_norm"),
        Name("Vcur", "T N H", "values", "self_attn.v_proj"),
        Name("Vcur_normed", "T N H", "values, normed per head, without weight", "self_attn.v_norm"),
        Name("Qcur_pos", "T N H", "queries, one half turned by x, one by y", "self_attn", "rotated"),
        Name("Kcur_pos", "T N H", "keys, turned likewise", "self_attn", "rotated"),
        Name("kqv_out", "T N H", "attention's mean of values, before its output matrix", "self_attn.o_proj", "in"),
        Name("attn_out", "T D", "attention's output", "self_attn.o_proj"),
        Name("attn_post_normed", "T D", "the same, normed", "post_attention_layernorm"),
        Name("ffn_inp", "T D", "residual stream after attention", "pre_feedforward_layernorm", "in"),
        Name("ffn_inp_normed", "T D", "norm before the feed-forward network", "pre_feedforward_layernorm"),
        Name("ffn_out", "T D", "feed-forward network's output", "mlp"),
        Name("ffn_post_normed", "T D", "the same, normed", "post_feedforward_layernorm"),
        Name("layer_out", "T D", "the layer's output", "."),
        Name("pooled", "T/9 D", "means of 3 x 3 patches, times sqrt(D)", "pooler", "out 0", layered=False),
        Name("std_scaled", "T/9 D", "the same, standardized (26B-A4B, 31B)", layered=False),
        Name("projected", "T/9 O", "the soft tokens", "embed_vision", layered=False),
    ),
    "audio": (
        Name("frames", "T M", "log mel frames (12B: samples), those of padding left out", layered=False),
        Name("inp", "T/4 D", "after both convolutions and the input matrix", "subsample_conv_projection", "out 0", layered=False),
        Name("ffn_out", "T/4 D", "residual stream after the first half of the feed-forward network", "feed_forward1"),
        Name("Qcur", "T/4 N H", "queries, with all their factors"),
        Name("Kcur", "T/4 N H", "keys, with their factor"),
        Name("kqv_out", "T/4 N H", "attention's mean of values, before its output matrix", "self_attn.post", "in"),
        Name("attn_out", "T/4 D", "residual stream after attention", "lconv1d", "in"),
        Name("conv_out", "T/4 D", "residual stream after the convolution", "lconv1d"),
        Name("ffn_out_1", "T/4 D", "residual stream after the second half", "feed_forward2"),
        Name("layer_out", "T/4 D", "the layer's output, normed", "."),
        Name("encoded", "T/4 I", "the output matrix, with its bias", "output_proj", layered=False),
        Name("projected", "T/4 O", "the soft tokens", "embed_audio", layered=False),
    ),
}
BY_NAME = {name.name: name for name in NAMES}
_TABLES = {"": BY_NAME} | {tower: {name.name: name for name in names} for tower, names in TOWERS.items()}
_ORDER = {tower: {name: i for i, name in enumerate(table)} for tower, table in _TABLES.items()}
_FIRST_LAYERED = {tower: min(_ORDER[tower][name.name] for name in table.values() if name.layered) for tower, table in _TABLES.items()}
_PLACE = re.compile(r"(?:(image|audio)(\d+)\.|(?:round(\d+)\.)?(?:(draft)(\d+)\.|(verify)\.)?)(.*)")
_NAME = re.compile(r"([A-Za-z_0-9]+?)(?:-(\d+))?(?:\.(?:ids|top|logsumexp))?$")


@dataclass(frozen=True)
class Place:
    """Where a traced value belongs: `stage` orders towers, prompt, draft steps and rounds, `prefix` is what stands before the name.

    `tower`: "image" or "audio"; "" for a value of the text model or the drafter.
    """

    stage: tuple[int, ...]
    prefix: str
    name: str
    layer: int | None
    tower: str = ""

    @property
    def names(self) -> tuple[Name, ...]:
        """All names of its tower, or of the text model and the drafter."""
        return TOWERS[self.tower] if self.tower else NAMES

    @property
    def is_of_prompt(self) -> bool:
        """Is each row one of a position of the prompt?"""
        return not self.tower and self.stage[0] < 0


def place_of(name: str) -> Place | None:
    """A name taken apart, None for one that is not in the table."""
    tower, part, round_, draft, step, verify, rest = _PLACE.fullmatch(name).groups()
    tower = tower or ""
    match, table = _NAME.fullmatch(rest), _TABLES[tower]
    if match is None or match[1] not in table or table[match[1]].layered != (match[2] is not None):
        return None
    within = (0, int(step)) if draft else (1, 0) if match[1] == "drafted" else (2, 0) if verify else (3, 0)
    first = -1 if round_ is None and not draft else 0 if round_ is None else 1 + int(round_)
    stage = (-2, list(TOWERS).index(tower), int(part)) if tower else (first, *within)
    return Place(stage, name[:len(name) - len(rest)], match[1], None if match[2] is None else int(match[2]), tower)


def graph_order(names: Iterable[str]) -> list[str]:
    """The names of the tables among `names`, in the order in which a forward pass computes them."""
    keys = {}
    for name in names:
        place = place_of(name)
        if place is not None:
            order = _ORDER[place.tower][place.name]
            inside = place.layer is not None
            keys[name] = (place.stage, _FIRST_LAYERED[place.tower] if inside else order, place.layer if inside else -1, order, name)
    return sorted(keys, key=keys.get)
