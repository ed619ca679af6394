"""The other side of a comparison, as the command line names it: a file of any kind, or an engine to run."""

from collections.abc import Sequence
from pathlib import Path

from refimpl.formats.safetensors import TensorFile
from refimpl.lab.compare.engines import foreign, llamacpp_dumps, llamacpp_live, transformers
from refimpl.lab.compare.towers.inputs import given_of
from refimpl.lab.compare.trace import Trace, TraceError, open_trace
from refimpl.lab.engines import TRACED, TRANSFORMERS, parse

KINDS = {"npz": (".npz",), "safetensors": (".safetensors",), "npy": (".npy",), "gguf": (".gguf",)}      # by their first bytes
SUFFIXES = (".npz", ".safetensors")


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
    suffix, kind = Path(source).suffix, kind_of(source)
    if suffix in SUFFIXES and kind and suffix not in KINDS[kind] and kind != "gguf":
        raise TraceError(f"{source}: by its contents this is {kind}: name it so, {Path(source).stem}{KINDS[kind][0]}")
    if suffix == ".npz":
        return foreign.open_npz(source)
    if suffix == ".bin":
        return llamacpp_dumps.open_bin(source)
    if suffix in (".txt", ".log"):
        return llamacpp_dumps.open_text(source)
    if suffix == ".safetensors":
        return open_trace(source) if "refimpl" in TensorFile(source).metadata else foreign.open_safetensors(source)
    raise TraceError(f"{source}: {what_instead(source, kind)}expected .safetensors, .npz, .txt or .log (printed by "
                     "llama.cpp), .bin (llama-debug --save-logits), transformers:DIRECTORY or llama.cpp:FILE.gguf")


def open_first(path: str, other: str | None = None) -> Trace:
    """The trace to judge by. Raises TraceError, which says so where the two arguments are swapped, or CheckpointError."""
    there = parse(path, TRACED)[0] is not None or Path(path).exists()
    if there and other is not None and not is_ours(path) and is_ours(other):
        raise TraceError(f"{path}: is no trace of refimpl, {other} is: the trace to judge by comes first, refimpl compare {other} {path}")
    kind = kind_of(path)
    if Path(path).is_file() and kind != "safetensors":
        raise TraceError(f"{path}: expected a trace of refimpl, FILE.safetensors, found {kind or 'something else'}; the trace to judge by "
                         "comes first: refimpl trace -m MODEL -p TEXT -o right.safetensors")
    return open_trace(path)


def is_ours(path: str) -> bool:
    """Is this a trace of refimpl?"""
    try:
        return kind_of(path) == "safetensors" and "refimpl" in TensorFile(path).metadata
    except (ValueError, OSError):
        return False


def kind_of(path: str) -> str:
    """What a file is by its first bytes, one of KINDS; "" for anything else, or no file."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError:
        return ""
    if head[:2] == b"PK":
        return "npz"
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if head[:4] == b"GGUF":
        return "gguf"
    return "safetensors" if head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**40 else ""


def what_instead(source: str, kind: str) -> str:
    """Why this cannot be opened, and the remedy, ahead of what is expected."""
    if Path(source).is_dir():
        return f"is a folder: transformers:{source} runs it, if it has a model; "
    if not Path(source).exists():
        return "no such file; "
    if kind == "gguf":
        return f"is a model, no values: refimpl trace -m {source}, or llama.cpp:{source} to run it; "
    if kind == "npy":
        return "is a single array: numpy.savez writes several, with their names, as .npz; "
    return f"by its contents this is {kind}: name it so, {Path(source).stem}{KINDS[kind][0]}; " if kind else ""
