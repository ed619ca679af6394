"""The other side of a comparison by what the command line says: a file of any kind, or an engine to run."""

from collections.abc import Sequence
from pathlib import Path

from refimpl.formats.safetensors import TensorFile
from refimpl.lab.compare.engines import foreign, llamacpp, llamacpp_dumps, transformers
from refimpl.lab.compare.trace import Trace, TraceError, open_trace

ENGINES = ("transformers", "llama.cpp")


def open_any(source: str, ids: Sequence[int] | None = None, dtype: str = "float32", threads: int = 1) -> Trace:
    """A trace file, tensors by the convention of foreign.py, what llama.cpp's tools write, or, with `ids`, `transformers:DIRECTORY` (run in
    `dtype`) and `llama.cpp:FILE.gguf` live. Raises TraceError, GGUFError or OSError.
    """
    engine, colon, path = source.partition(":")
    if colon and engine in ENGINES:
        if ids is None:
            raise TraceError(f"{source}: an engine runs the prompt of the trace before it; give that one first")
        return transformers.trace(path, ids, dtype=dtype) if engine == "transformers" else llamacpp.trace(path, ids, threads)
    if colon and not Path(source).exists() and "/" not in engine and "." not in engine:
        raise TraceError(f"{source}: no engine {engine!r}, expected {' or '.join(ENGINES)}, or the name of a file")
    suffix = Path(source).suffix
    if suffix == ".npz":
        return foreign.open_npz(source)
    if suffix == ".bin":
        return llamacpp_dumps.open_bin(source)
    if suffix in (".txt", ".log"):
        return llamacpp_dumps.open_text(source)
    if suffix == ".safetensors":
        return open_trace(source) if "refimpl" in TensorFile(source).metadata else foreign.open_safetensors(source)
    raise TraceError(f"{source}: expected .safetensors, .npz, .txt or .log (printed by llama.cpp), .bin (llama-debug --save-logits), or "
                     f"ENGINE:PATH with {' or '.join(ENGINES)}")
