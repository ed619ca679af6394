"""What a call has to read of a published model's weights, part by part, from its shape alone: no file is needed."""

import math
from collections.abc import Iterable, Iterator

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
            "token_embd.weight": "head", "output.weight": "head"}.get(role, "the rest")


def tensors_of(name: str, recipe: str = "google-q4_0", n_layer: int | None = None) -> Iterator[tuple[str, int, int, int]]:
    """(tensor, weights, bytes, bytes of a row) of the shape `name` with the types of `recipe` (files/synth.py)."""
    config = config_of(name, n_layer)
    for tensor, shape in model_tensors(config):
        row_bytes = BLOCKS[recipe_type(recipe, tensor, shape, len(config["layer_types"]))].row_bytes(shape[-1])
        yield tensor, math.prod(shape), math.prod(shape[:-1]) * row_bytes, row_bytes


def read_by_part(tensors: Iterable[tuple[str, int, int]], chosen: float = 1.0, n_rows: int = 1) -> dict[str, float]:
    """Bytes that a call of `n_rows` rows reads of `tensors` (name, bytes, bytes of a row), by part.

    Every matrix once; of experts the share `chosen`; of the tables of embeddings a row for each row of the call, and all of the first one
    as the head where there is no other.
    """
    tensors, found = list(tensors), dict.fromkeys(PARTS, 0.0)
    tied = all(name != "output.weight" for name, *_ in tensors)
    for name, n_bytes, row_bytes in tensors:
        if name in ("token_embd.weight", "per_layer_token_embd.weight"):
            n_bytes = n_rows * row_bytes + (n_bytes if tied and name == "token_embd.weight" else 0)
        elif part_of(name) == "experts":
            n_bytes *= chosen
        if name != "rope_freqs.weight":             # which is read once, when the model is loaded
            found[part_of(name)] += float(n_bytes)
    return found


def read_bytes(name: str, n_rows: int = 1, recipe: str = "google-q4_0", all_experts: bool = False, n_layer: int | None = None
               ) -> dict[str, float]:
    """`read_by_part` of a published shape, with as many experts as rows need that choose independently of each other, or all of them."""
    config, chosen = config_of(name), 1.0
    if "num_experts" in config and not all_experts:
        chosen = distinct_if_independent(config["num_experts"], config["top_k_experts"], n_rows) / config["num_experts"]
    return read_by_part([(tensor, *sizes) for tensor, _, *sizes in tensors_of(name, recipe, n_layer)], chosen, n_rows)


def drafter_bytes(name: str, recipe: str = "google-q4_0") -> float:
    """Bytes of weights that a step of the drafter of `name` reads, with its dense head."""
    return float(sum(math.prod(shape[:-1]) * BLOCKS[recipe_type(recipe, tensor, shape, 4)].row_bytes(shape[-1])
                     for tensor, shape in drafter_tensors(name) if not tensor.startswith("masked_embd")))
