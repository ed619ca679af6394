"""What is in a Gemma 4 file or directory, as plain data. Reads no weights, except the scales of a W4A16 directory."""

import os
from collections import defaultdict
from dataclasses import asdict

import numpy as np

from refimpl.formats.gguf import GGUFError
from refimpl.formats.source import TensorSource
from refimpl.host import available
from refimpl.loading.memory import buffer_bytes, needed, tower_bytes, weight_bytes
from refimpl.loading.model import BUILT_IN, CHUNK, float32_bytes
from refimpl.loading.open import open_model
from refimpl.model.cache import cache_bytes
from refimpl.model.config import DRAFTER_ARCHITECTURE, PROJECTOR_ARCHITECTURE, Config, Keys, MoeFfn, architecture_of, config_from_gguf
from refimpl.model.drafter import CENTROIDS
from refimpl.model.towers.config import ProjectorConfig, projector_config_from_gguf
from refimpl.model.towers.weights import projector_weights_from_gguf
from refimpl.model.weights import vocabulary_size, weights_from_gguf

LONG = 16           # entries of a longer array that are kept


def describe(path: str | os.PathLike | None, n_ctx: int | None = None) -> dict[str, object]:
    """Metadata, layers, tensors by type, and memory in bytes for a context of `n_ctx` (the model's own when None).

    A drafter and a projector are described as such. Raises GGUFError for a file that is none of the three.
    """
    file = open_model(BUILT_IN if path is None else path)
    if architecture_of(file.metadata) == DRAFTER_ARCHITECTURE:
        return _head(file) | {"drafter": _drafter(file)} | _contents(file)
    if architecture_of(file.metadata) == PROJECTOR_ARCHITECTURE:
        return _head(file) | {"projector": _projector(file)} | _contents(file)
    config = config_from_gguf(file.metadata, file.tensors.keys(), vocabulary_size(file), file.path)
    n_ctx = config.n_ctx if n_ctx is None else n_ctx
    return _head(file) | {
        "model": {"n_vocab": config.n_vocab, "n_embd": config.n_embd, "n_layer": config.n_layer, "n_ctx": config.n_ctx,
                  "n_ple": config.n_ple, "softcap": config.softcap, "n_parameters": float32_bytes(file) // 4},
        "layers": [_layer(config, i) for i in range(config.n_layer)],
        "memory": _memory(file, config, n_ctx),
    } | _contents(file)


def _head(file: TensorSource) -> dict[str, object]:
    return {"path": str(file.path)} | file.facts | {"metadata": {key: _plain(value) for key, value in file.metadata.items()}}


def _contents(file: TensorSource) -> dict[str, object]:
    return {"types": _types(file), "tensors": [{"name": t.name, "type": t.type, "shape": list(t.shape), "bytes": t.n_bytes}
                                               for t in file.tensors.values()]}


def _drafter(file: TensorSource) -> dict[str, object]:
    """What a drafter is, as far as it shows without its target."""
    keys = Keys(file.metadata, file.path, DRAFTER_ARCHITECTURE)
    big = 1 << 20
    return {"n_vocab": vocabulary_size(file), "n_embd": keys.number("embedding_length", 1, big),
            "n_target": keys.number("embedding_length_out", 1, big), "n_layer": keys.number("block_count", 1, big),
            "heads": ["dense", "centroid"] if CENTROIDS in file.tensors else ["dense"], "n_parameters": float32_bytes(file) // 4}


def _projector(file: TensorSource) -> dict[str, object]:
    """What a projector is: the dimensions of its towers, as its file names them."""
    config = projector_config_from_gguf(file)
    towers = {name: None if tower is None else {key: _plain(value) for key, value in asdict(tower).items()}
              for name, tower in (("vision", config.vision), ("audio", config.audio))}
    return {"n_out": config.n_out, **towers, "n_parameters": float32_bytes(file) // 4, "memory": _projector_memory(file, config)}


def _projector_memory(file: TensorSource, config: ProjectorConfig) -> dict[str, object]:
    """As held for the kernels; the buffers are those of the largest picture or sound."""
    from refimpl.kernels.machine.tiles import held_bytes  # here: it takes a third of a second

    weights = projector_weights_from_gguf(file, config)
    return {"weight_bytes": weight_bytes(weights, held_bytes, weights.tables)[0], "buffer_bytes": tower_bytes(config),
            "free_bytes": available()}


def _memory(file: TensorSource, config: Config, n_ctx: int) -> dict[str, object]:
    """As held for the kernels, with keys and values in float16; the weights as in the file where this version cannot load it."""
    from refimpl.kernels.machine.tiles import held_bytes  # here: it takes a third of a second

    half = np.dtype(np.float16)
    try:
        need = needed(weights_from_gguf(file, config), config, n_ctx, CHUNK, half, held_bytes)
        weight_bytes, held_as_float32 = need.weights, need.held_as_float32
    except GGUFError:
        weight_bytes, held_as_float32 = file.n_bytes, {}
    return {"n_ctx": n_ctx, "weight_bytes": weight_bytes, "held_as_float32": {kind: len(names) for kind, names in held_as_float32.items()},
            "kv_bytes": cache_bytes(config, n_ctx, CHUNK, half),
            "buffer_bytes": buffer_bytes(config, CHUNK), "free_bytes": available()}


def _layer(config: Config, i: int) -> dict[str, object]:
    spec = config.layers[i]
    ffn = {"n_ff": spec.ffn.n_ff}
    if isinstance(spec.ffn, MoeFfn):
        ffn |= {"n_expert": spec.ffn.n_expert, "n_expert_used": spec.ffn.n_used, "n_ff_expert": spec.ffn.n_ff_expert}
    return {"layer": i, "attention": spec.attention.value, "n_head": spec.n_head, "n_kv": spec.n_kv, "head_dim": spec.head_dim,
            "window": spec.window, "kv_from": spec.kv_from, "values_are_keys": spec.values_are_keys} | ffn


def _types(file: TensorSource) -> dict[str, dict[str, int]]:
    types = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for tensor in file.tensors.values():
        types[tensor.type]["tensors"] += 1
        types[tensor.type]["bytes"] += tensor.n_bytes
    return dict(types)


def _plain(value):
    """As JSON can hold it; long arrays are cut to their first entries and their length."""
    if isinstance(value, float):
        return float(f"{value:.7g}")            # a float32 in the file
    if isinstance(value, (str, int)):
        return value
    head = [entry.item() if isinstance(entry, np.generic) else entry for entry in value[:LONG]]
    return head if len(value) <= LONG else {"length": len(value), "first": head}
