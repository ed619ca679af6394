"""What a call has to read of a published model's weights, part by part, from its shape alone: no file is needed."""

import math

from refimpl.files.synth import config_of, drafter_tensors, model_tensors, recipe_type
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.lab.bench.distinct_experts import distinct_if_independent

PARTS = ("attention", "dense feed-forward", "experts", "head", "the rest")


def part_of(name: str) -> str:
    """The part that a tensor belongs to, one of PARTS."""
    role = name.split(".")[2] if name.startswith("blk.") else name
    if role in ("attn_q", "attn_k", "attn_v", "attn_output"):
        return "attention"
    if role in ("ffn_gate_up_exps", "ffn_down_exps") and name.endswith(".weight"):
        return "experts"
    return {"ffn_gate": "dense feed-forward", "ffn_up": "dense feed-forward", "ffn_down": "dense feed-forward",
            "token_embd.weight": "head"}.get(role, "the rest")


def read_bytes(name: str, n_rows: int = 1, recipe: str = "google-q4_0", all_experts: bool = False, n_layer: int | None = None
               ) -> dict[str, float]:
    """Bytes of weights that a call of `n_rows` rows reads, by part, for the shape `name` with the types of `recipe` (files/synth.py).

    Every matrix once; of the experts as many as rows need that choose independently of each other, or all of them; of the tables of
    embeddings a row for each row of the call, and all of the first one as the head.
    """
    config = config_of(name, n_layer)
    found = dict.fromkeys(PARTS, 0.0)
    for tensor, shape in model_tensors(config):
        if tensor == "rope_freqs.weight":           # read once, when the model is loaded
            continue
        block = BLOCKS[recipe_type(recipe, tensor, shape, len(config["layer_types"]))]
        row_bytes = block.row_bytes(shape[-1])
        n_bytes, part = math.prod(shape[:-1]) * row_bytes, part_of(tensor)
        if part == "experts" and not all_experts:
            n_bytes *= distinct_if_independent(config["num_experts"], config["top_k_experts"], n_rows) / config["num_experts"]
        elif tensor == "per_layer_token_embd.weight":
            n_bytes = n_rows * row_bytes
        elif tensor == "token_embd.weight":
            n_bytes += n_rows * row_bytes
        found[part] += float(n_bytes)
    return found


def drafter_bytes(name: str, recipe: str = "google-q4_0") -> float:
    """Bytes of weights that a step of the drafter of `name` reads, with its dense head."""
    return float(sum(math.prod(shape[:-1]) * BLOCKS[recipe_type(recipe, tensor, shape, 4)].row_bytes(shape[-1])
                     for tensor, shape in drafter_tensors(name) if not tensor.startswith("masked_embd")))
