"""How fast a model will be, and what memory it will take, from its shape and what was measured of the machine (speed.py). Nothing is run.

    call    = sum over matrices (weights * seconds a weight of their type, with so many rows)
            + sum over layers (attention's start + multiply-adds * seconds of one)
            + the rest of the layers and of the head
    experts: a call of T rows reads E * (1 - (1 - X/E)^T) of E experts if the rows choose evenly and independently; each meets
             T * X rows, shared among them
    memory  = weights that are not mapped + keys and values + buffers + the process itself

What bounds a product, reading or arithmetic, shows in its seconds: they are measured with weights from memory, for one row, where reading
costs most, and for many, where arithmetic does. A context costs a token what its visible keys and values cost.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from refimpl.files.outline import N_MERGES
from refimpl.formats.matrix import StoredMatrix
from refimpl.formats.source import TensorSource
from refimpl.kernels.machine.tiles import held_bytes, held_type
from refimpl.lab.bench.distinct_experts import distinct_if_independent
from refimpl.lab.bench.speed import Heads, Rest, Speed
from refimpl.loading.memory import needed, parts_of, tables_of
from refimpl.loading.model import CHUNK
from refimpl.model.config import Config, LayerSpec, MoeFfn, config_from_gguf
from refimpl.model.drafter import CentroidHead, DrafterWeights
from refimpl.model.drafter_config import DrafterConfig
from refimpl.model.weights import MoeWeights, Weights, vocabulary_size, weights_from_gguf

PROCESS_BYTES = 84 << 20            # Python, NumPy, Numba with kernels from the disk
TOKEN_BYTES, MERGE_BYTES = 380, 130     # of a vocabulary: in the tokenizer, and in the metadata


@dataclass(frozen=True)
class Work:
    """Weights that a call meets, by the type in which the kernels hold them.

    every    of the matrices that all rows meet
    head     of the head, which only rows meet whose logits are wanted
    expert   of one expert in all layers together; each row meets `n_used` of `n_expert`
    """

    every: Mapping[str, int]
    head: Mapping[str, int]
    expert: Mapping[str, int]
    n_expert: int
    n_used: int

    @property
    def types(self) -> set[str]:
        """The types of all."""
        return {*self.every, *self.head, *self.expert}

    @property
    def n_weights(self) -> int:
        """All of them, of all experts."""
        return sum(self.every.values()) + sum(self.head.values()) + self.n_expert * sum(self.expert.values())


@dataclass(frozen=True)
class Outlined:
    """A model of which only the header has been read."""

    source: TensorSource
    config: Config
    weights: Weights
    work: Work


def outlined(source: TensorSource) -> Outlined:
    """Reads the header. Raises GGUFError for what is no Gemma 4 model."""
    config = config_from_gguf(source.metadata, source.tensors.keys(), vocabulary_size(source), source.path)
    weights = weights_from_gguf(source, config)
    return Outlined(source, config, weights, work_of(weights))


def work_of(weights: Weights) -> Work:
    """The weights of a model by what meets them."""
    every, head, expert = Counter(), Counter(), Counter()
    tables, experts, sizes = [id(table) for table in tables_of(weights)], set(), (1, 1)
    for layer in weights.layers:
        if isinstance(layer.ffn, MoeWeights):
            experts |= {id(matrix) for matrix in (layer.ffn.gate_EMD, layer.ffn.up_EMD, layer.ffn.down_EDM)}
            sizes = layer.spec.ffn.n_expert, layer.spec.ffn.n_used
    for part in parts_of(weights):
        if isinstance(part, StoredMatrix) and id(part) not in tables:
            met = head if part is weights.head_VD else expert if id(part) in experts else every
            n_weights = math.prod(part.shape)
            met[held_type(part.type)] += n_weights // (part.shape[0] if met is expert else 1)
    return Work(every, head, expert, *sizes)


def call_seconds(model: Outlined, speed: Speed, rest: Rest, sequences: list[tuple[int, int]], n_logits: int) -> float:
    """Seconds of a call of the forward pass for (tokens before, rows) of each of several sequences, with the logits of `n_logits` rows."""
    work, n_rows = model.work, sum(rows for _, rows in sequences)
    n_met = distinct_if_independent(work.n_expert, work.n_used, n_rows)
    took = sum(speed.of_weights(kind, n, n_rows) for kind, n in work.every.items())
    took += sum(speed.of_weights(kind, n, n_logits) for kind, n in work.head.items() if n_logits)
    took += sum(speed.of_weights(kind, n * n_met, n_rows * work.n_used / n_met) for kind, n in work.expert.items())
    for depth, rows in sequences:
        took += attention_seconds(model.config, speed, depth, rows)
    return took + rest.layers.at(n_rows) + rest.head * n_logits


def attention_seconds(config: Config, speed: Speed, depth: int, rows: int) -> float:
    """Seconds of the attention of all layers, for `rows` rows of one sequence after `depth` others."""
    return sum(speed.of_attention(Heads(layer.n_head, layer.n_kv, layer.head_dim), rows,
                                  2 * layer.n_head * layer.head_dim * visible(layer, depth, rows)) for layer in config.layers)


def visible(layer: LayerSpec, depth: int, rows: int) -> int:
    """Positions that `rows` queries after `depth` others see, added up."""
    seen = depth + 1 + np.arange(rows)
    return int((seen if layer.window is None else np.minimum(seen, layer.window)).sum())


def prompt_seconds(model: Outlined, speed: Speed, rest: Rest, n_tokens: int, depth: int = 0) -> float:
    """Seconds of a prompt of `n_tokens` after `depth` others, in calls of CHUNK rows, with the logits of the last one."""
    firsts = range(0, n_tokens, CHUNK)
    return sum(call_seconds(model, speed, rest, [(depth + first, min(CHUNK, n_tokens - first))], first == firsts[-1])
               for first in firsts)


def step_seconds(model: Outlined, speed: Speed, rest: Rest, depth: float, users: int = 1, rows: int = 1) -> float:
    """Seconds of a step in which each of `users` sequences, `depth` tokens long, gets a token, or verifies all but one of `rows` drafts."""
    return call_seconds(model, speed, rest, [(int(depth), rows)] * users, users * rows)


def draft_work(weights: DrafterWeights) -> Counter[str]:
    """Weights that a step of a drafter meets, by the type in which the kernels hold them; of a centroid head those of its best groups."""
    found = Counter()
    for part in parts_of(weights):
        if isinstance(part, StoredMatrix):
            chosen = isinstance(weights.head, CentroidHead) and part is weights.head.table_ZVD
            found[held_type(part.type)] += math.prod(part.shape) * weights.head.n_top // part.shape[0] if chosen else math.prod(part.shape)
    return found


def draft_seconds(target: Config, config: DrafterConfig, weights: DrafterWeights, speed: Speed, rest: Rest, depth: int) -> float:
    """Seconds of a step of a drafter after `depth` tokens; `rest` is its target's."""
    took = sum(speed.of_weights(kind, n, 1) for kind, n in draft_work(weights).items())
    return took + attention_seconds(config.trunk, speed, depth, 1) + rest.layers.at(1) * config.trunk.n_layer / target.n_layer


# ---- memory

@dataclass(frozen=True)
class Memory:
    """Bytes that stay taken: weights, keys and values of full contexts, buffers of a call, the process with its tokenizer."""

    weights: int
    cache: int
    buffers: int
    process: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.buffers + self.process


def memory_of(model: Outlined, n_ctx: int, kv_type: np.dtype, users: int = 1, rows: int = CHUNK) -> Memory:
    """What a model takes with `users` full contexts of `n_ctx` tokens, weights in memory, `rows` rows in a call."""
    need = needed(model.weights, model.config, n_ctx, rows, kv_type, held_bytes)
    n_merges = len(model.source.metadata.get("tokenizer.ggml.merges", range(N_MERGES)))
    process = PROCESS_BYTES + TOKEN_BYTES * model.config.n_vocab + MERGE_BYTES * n_merges
    return Memory(need.weights, users * need.cache, call_bytes(model.config, rows), process)


def call_bytes(config: Config, rows: int) -> int:
    """Bytes that are alive together in the widest step of a call: states, per-layer inputs, and the queries, hidden values or picks of a
    layer; and the logits of a row.
    """
    widest = max(max(3 * layer.n_head * layer.head_dim, 3 * layer.ffn.n_ff,
                     layer.ffn.n_used * (layer.ffn.n_ff_expert + 16) if isinstance(layer.ffn, MoeFfn) else 0) for layer in config.layers)
    return 4 * rows * (2 * config.n_embd + config.n_layer * config.n_ple + widest) + 8 * config.n_vocab
