"""The other side of a comparison, as the command line names it: a file of any kind, or an engine to run."""

from collections.abc import Sequence
from pathlib import Path

from refimpl.formats.safetensors import TensorFile
from refimpl.lab.compare.engines import foreign, llamacpp_dumps, llamacpp_live, transformers
from refimpl.lab.compare.towers.inputs import given_of
from refimpl.lab.compare.trace import Trace, TraceError, open_trace
from refimpl.lab.engines import TRACED, TRANSFORMERS, parse


def open_any(source: str, ids: Sequence[int] | None = None, dtype: str = "float32", threads: int = 1,
             first: Trace | None = None) -> Trace:
    """A trace file, tensors by the convention of foreign.py, or output of llama.cpp's tools; with `ids`, the prompt, also an engine to run:
    `transformers:DIRECTORY` (in `dtype`) or `llama.cpp:FILE.gguf`. `first`: the trace that the ids are of; the engine's towers are given
    what it has of pictures and sounds. Raises ValueError (TraceError, GGUFError, LlamaCppError) or OSError.
    """
    engine, path = parse(source, TRACED)
    if engine is not None:
        if not path:
            raise TraceError(f"{source}: name what it runs, {engine}:{'DIRECTORY' if engine == TRANSFORMERS else 'FILE.gguf'}")
        if ids is None:
            raise TraceError(f"{source}: an engine runs the prompt of a trace; give the trace first")
        given = {} if first is None else given_of(first)
        if engine == TRANSFORMERS:
            return transformers.trace(path, ids, dtype=dtype, given=given)
        if given:
            raise TraceError(f"{source}: llama.cpp runs text only from here; dump its values with its own tools, and name the file")
        return llamacpp_live.trace(path, ids, threads)
    suffix = Path(source).suffix
    if suffix == ".npz":
        return foreign.open_npz(source)
    if suffix == ".bin":
        return llamacpp_dumps.open_bin(source)
    if suffix in (".txt", ".log"):
        return llamacpp_dumps.open_text(source)
    if suffix == ".safetensors":
        return open_trace(source) if "refimpl" in TensorFile(source).metadata else foreign.open_safetensors(source)
    raise TraceError(f"{source}: {'' if Path(source).exists() else 'no such file; '}expected .safetensors, .npz, .txt or .log (printed by "
                     "llama.cpp), .bin (llama-debug --save-logits), transformers:DIRECTORY or llama.cpp:FILE.gguf")
