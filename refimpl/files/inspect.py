"""What is in a Gemma 4 file or directory, as plain data and as text. Reads no weights (of a W4A16 directory, the scales)."""

import os
from collections import Counter, defaultdict

import numpy as np

from refimpl.formats.gguf import GGUFError
from refimpl.formats.source import TensorSource
from refimpl.host import available
from refimpl.loading.memory import buffer_bytes, needed
from refimpl.loading.model import BUILT_IN, CHUNK, float32_bytes
from refimpl.loading.open import open_model
from refimpl.model.cache import cache_bytes
from refimpl.model.config import DRAFTER_ARCHITECTURE, Config, Keys, MoeFfn, architecture_of, config_from_gguf
from refimpl.model.drafter import CENTROIDS
from refimpl.model.weights import vocabulary_size, weights_from_gguf

LONG = 16           # array entries shown


def describe(path: str | os.PathLike | None, n_ctx: int | None = None) -> dict[str, object]:
    """Metadata, layers, tensors by type, and memory in bytes for a context of `n_ctx` (the model's own when None).

    A drafter is described as one. Raises GGUFError for a file that is neither a Gemma 4 model nor a drafter.
    """
    file = open_model(BUILT_IN if path is None else path)
    if architecture_of(file.metadata) == DRAFTER_ARCHITECTURE:
        return _head(file) | {"drafter": _drafter(file)} | _contents(file)
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
    """What can be said of a drafter without its target."""
    keys = Keys(file.metadata, file.path, DRAFTER_ARCHITECTURE)
    big = 1 << 20
    return {"n_vocab": vocabulary_size(file), "n_embd": keys.number("embedding_length", 1, big),
            "n_target": keys.number("embedding_length_out", 1, big), "n_layer": keys.number("block_count", 1, big),
            "heads": ["dense", "centroid"] if CENTROIDS in file.tensors else ["dense"], "n_parameters": float32_bytes(file) // 4}


def _memory(file: TensorSource, config: Config, n_ctx: int) -> dict[str, object]:
    """As the kernels hold it, with keys and values in float16. Of a file that this version cannot load: the weights as they are."""
    from refimpl.kernels.machine.tiles import held_bytes  # here: it takes a third of a second

    half = np.dtype(np.float16)
    try:
        need = needed(weights_from_gguf(file, config), config, n_ctx, CHUNK, half, held_bytes)
        weight_bytes, widened = need.weights, need.widened
    except GGUFError:
        weight_bytes, widened = file.n_bytes, {}
    return {"n_ctx": n_ctx, "weight_bytes": weight_bytes, "held_as_float32": {kind: len(names) for kind, names in widened.items()},
            "kv_bytes": cache_bytes(config, n_ctx, CHUNK, half),
            "buffer_bytes": buffer_bytes(config, CHUNK), "free_bytes": available()}


def _layer(config: Config, i: int) -> dict[str, object]:
    spec = config.layers[i]
    ffn = {"n_ff": spec.ffn.n_ff}
    if isinstance(spec.ffn, MoeFfn):
        ffn |= {"n_expert": spec.ffn.n_expert, "n_expert_used": spec.ffn.n_used, "n_ff_expert": spec.ffn.n_ff_expert}
    return {"layer": i, "kind": spec.attention.value, "n_head": spec.n_head, "n_kv": spec.n_kv, "head_dim": spec.head_dim,
            "window": spec.window, "kv_from": spec.kv_from, "values_are_keys": spec.values_are_keys} | ffn


def _types(file: TensorSource) -> dict[str, dict[str, int]]:
    types = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for tensor in file.tensors.values():
        types[tensor.type]["tensors"] += 1
        types[tensor.type]["bytes"] += tensor.n_bytes
    return dict(types)


def _plain(value):
    """JSON can hold it: long arrays are cut, with their length."""
    if isinstance(value, float):
        return float(f"{value:.7g}")            # a float32 in the file
    if isinstance(value, (str, int)):
        return value
    head = [entry.item() if isinstance(entry, np.generic) else entry for entry in value[:LONG]]
    return head if len(value) <= LONG else {"length": len(value), "first": head}


def as_text(described: dict[str, object]) -> str:
    """The same for people."""
    form = f"GGUF v{described['gguf_version']}" if "gguf_version" in described else f"{described['safetensors_files']} safetensors files"
    lines = [f"{described['path']}: {form}, {size(described['file_bytes'])}", ""]
    for key, value in described["metadata"].items():
        shown = f"{value['length']} entries, first {value['first'][:4]}" if isinstance(value, dict) else repr(value)
        lines.append(f"  {key} = {shown if len(shown) <= 100 else shown[:97] + '...'}")
    if "drafter" in described:
        drafter = described["drafter"]
        lines += ["", f"a drafter, for a target of width {drafter['n_target']} and {drafter['n_vocab']} pieces: give it with --draft", "",
                  f"{drafter['n_parameters']:,} parameters, {drafter['n_layer']} layers of width {drafter['n_embd']}, heads: "
                  f"{' and '.join(drafter['heads'])}", ""]
        return "\n".join(lines + _type_lines(described))
    model = described["model"]
    lines += ["", f"{model['n_parameters']:,} parameters, {model['n_layer']} layers of width {model['n_embd']}, "
              f"{model['n_vocab']} pieces, context {model['n_ctx']}", "",
              "layer  kind     heads  kv  width  window  keys from  feed-forward"]
    for layer in described["layers"]:
        source = "own" if layer["kv_from"] == layer["layer"] else str(layer["kv_from"])
        source += ", = values" if layer["values_are_keys"] and source == "own" else ""
        ffn = str(layer["n_ff"])
        if "n_expert" in layer:
            ffn += f" + {layer['n_expert_used']} of {layer['n_expert']} experts of {layer['n_ff_expert']}"
        lines.append(f"{layer['layer']:>5}  {layer['kind']:<7}  {layer['n_head']:>5}  {layer['n_kv']:>2}  {layer['head_dim']:>5}  "
                     f"{layer['window'] or 'all':>6}  {source:<9}  {ffn}")
    lines += ["", *_type_lines(described)]
    memory = described["memory"]
    lines += ["", f"memory: weights {size(memory['weight_bytes'])}, keys and values {size(memory['kv_bytes'])} for a full context of "
              f"{memory['n_ctx']} (-c sets another), {size(memory['buffer_bytes'])} to compute in; {size(memory['free_bytes'])} free"]
    if memory["held_as_float32"]:
        types = ", ".join(f"{kind} ({n} tensors)" for kind, n in memory["held_as_float32"].items())
        lines.append(f"there are no kernels for {types}: held as float32, 4 bytes a weight, which is counted")
    return "\n".join(lines)


def _type_lines(described: dict[str, object]) -> list[str]:
    ignored = Counter(described.get("ignored", {}).values())
    lines = [f" ignored: {n:>4} tensors, {reason}" for reason, n in ignored.items()]
    return lines + [f"{name:>8}: {entry['tensors']:>4} tensors, {size(entry['bytes'])}" for name, entry in described["types"].items()]


def size(n_bytes: int) -> str:
    """Bytes for people: powers of 1000, as disks are sold."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes} B"
