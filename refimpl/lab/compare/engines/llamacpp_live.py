"""A trace of llama.cpp, run through llama-cpp-python in a process of its own (lab/llamacpp)."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refimpl.formats.gguf import GGUFFile, open_gguf
from refimpl.lab.compare.names import BY_NAME, place_of
from refimpl.lab.compare.trace import Trace
from refimpl.lab.llamacpp.client import LlamaCpp

NORMALIZED_WEIGHTS = "ffn_moe_weights_norm"         # llama.cpp's name of the experts' renormalised weights
NOT_OURS = ("ffn_moe_weights", "h_nextn")           # its weights before they are renormalised; its final norm


def trace(path: str | os.PathLike, ids: Sequence[int], threads: int = 1) -> Trace:
    """Runs `ids` in one batch and keeps every tensor that has a name of ours. Raises LlamaCppError, with llama.cpp's reason."""
    LlamaCpp.check()
    file = open_gguf(path)
    with LlamaCpp(Path(path), len(ids), threads) as engine:
        found = engine.trace(ids, [*BY_NAME, NORMALIZED_WEIGHTS])
        version = engine.facts["version"]
    return Trace("llama.cpp", tuple(map(int, ids)), tuple(range(len(ids))), "q8", in_our_terms(found, len(ids), file),
                 {"engine": f"llama.cpp (llama-cpp-python {version})"})


def in_our_terms(found: dict[str, np.ndarray], n_tok: int, file: GGUFFile) -> dict[str, np.ndarray]:
    """llama.cpp's tensors under our names, positions in front. Its experts' weights are multiplied by the experts' scales, which it
    applies later.
    """
    arrays = {}
    for name, value in found.items():
        base, _, layer = name.partition("-")
        if base in NOT_OURS:
            continue
        if base == NORMALIZED_WEIGHTS:
            name = f"ffn_moe_weights-{layer}"
        if place_of(name) is None or value.size % n_tok:
            continue
        arrays[name] = value.reshape(n_tok, -1)
    for name in [name for name in arrays if name.startswith("ffn_moe_weights-")]:
        scale = f"blk.{name.rpartition('-')[2]}.ffn_down_exps.scale"
        if scale in file.tensors:
            arrays[name] = arrays[name] * file.raw(scale).view("<f4").ravel()[arrays[name.replace("weights", "topk")]]
    return arrays
