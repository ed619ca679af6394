"""Hugging Face directories: `config.json` beside one or more safetensors files, memory-mapped. Takes no file at its word.

    safetensors    8 bytes: length n of the header, little-endian
                   n bytes: JSON, tensor name -> {"dtype", "shape", "data_offsets": [begin, end] from the end of the header}
                   the tensors' bytes

Source: the format's README (huggingface/safetensors). Several files are listed in `model.safetensors.index.json`.
"""

import json
import math
import mmap
import os
from pathlib import Path

import numpy as np

from refimpl.formats.container import MAX_DIMS, GGUFError, TensorInfo, let_go, map_file, view

TYPES = {"F32": ("F32", 4), "F16": ("F16", 2), "BF16": ("BF16", 2), "I64": ("I64", 8), "I32": ("I32", 4)}
# Far above any real header (26B-A4B with every expert on its own: 35,000 tensors, 5 MB). Parsed JSON takes many times its bytes.
MAX_HEADER = 8 << 20
MAX_MARKS = 500_000                 # brackets, commas and colons of a header: each value has one
MAX_SIZE = 1 << 48                  # of one dimension: a product of numbers with thousands of digits would take for ever
MAX_JSON = 100_000_000


class CheckpointError(GGUFError):
    """A directory that cannot be read as a checkpoint. One line, as GGUFError's."""


class Checkpoint:
    """An open directory, made by `open_checkpoint`: `path`, `config` (of config.json), `tensors` (name -> TensorInfo), `n_bytes` of all."""

    def __init__(self, path: Path, config: dict[str, object], parts: list[tuple[Path, mmap.mmap, dict[str, TensorInfo]]]):
        self.path, self.config, self.tensors = path, config, {}
        self.n_bytes = sum(len(mapping) for _, mapping, _ in parts)
        for file, _, tensors in parts:
            for name, info in tensors.items():
                if name in self.tensors:
                    raise CheckpointError(file, None, f"tensor {name!r} stands in another file too")
                self.tensors[name] = info
        self._mappings = [mapping for _, mapping, _ in parts]

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 `(*shape[:-1], row_bytes)`: a read-only view of the mapping."""
        return view(self._mappings[self.tensors[name].part], self.tensors[name])

    def release_all(self) -> None:
        """Tells the system that no page is wanted in memory for now. Best effort."""
        for mapping in self._mappings:
            let_go(mapping, 0, len(mapping))


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens a Hugging Face directory. Raises CheckpointError for what is missing or senseless."""
    path = Path(path)
    config, index = _json(path / "config.json"), path / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        where = _json(index).get("weight_map")
        files = where.values() if isinstance(where, dict) else ()
        if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
            raise CheckpointError(index, None, "expected a weight_map of file names in this folder")
        names = sorted(set(files))
    parts = []
    for number, name in enumerate(names):
        mapping = map_file(path / name, "a safetensors file", CheckpointError)
        parts.append((path / name, mapping, _header(path / name, mapping, number)))
    return Checkpoint(path, config, parts)


def _json(path: Path) -> dict[str, object]:
    try:
        if path.exists() and not path.is_file():                # opening a pipe would wait for ever
            raise CheckpointError(path, None, "expected a JSON file, found no regular file")
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(path, None, f"is larger than {MAX_JSON:,} bytes, expected a small JSON file")
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path, None, "no such file; expected a Hugging Face directory with config.json and safetensors") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(path, None, f"cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(path, None, "expected a JSON object")
    return found


def _parsed(raw: bytes) -> object:
    """The JSON of a header. Raises ValueError for one that is none, has a name twice, or more in it than any model."""
    if sum(raw.count(mark) for mark in b"[{,:") > MAX_MARKS:
        raise ValueError("more entries than any model has")

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(entries := dict(pairs)) != len(pairs):
            raise ValueError("a name stands in it twice")
        return entries
    return json.loads(raw.decode("utf-8"), object_pairs_hook=once)


def _header(path: Path, mapping: mmap.mmap, number: int) -> dict[str, TensorInfo]:
    size = len(mapping)
    length = int.from_bytes(mapping[:8], "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise CheckpointError(path, 0, f"expected a header of at most {max(0, size - 8)} bytes, found a length of {length}")
    try:
        header = _parsed(mapping[8:8 + length])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, 8, f"the header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(path, 8, "the header is no JSON object")
    first, tensors, ends = 8 + length, {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, begin, end)
            if not shape or not all(type(n) is int and 0 <= n < MAX_SIZE for n in numbers) or not all(shape) or len(shape) > MAX_DIMS:
                raise ValueError
            known = dtype in TYPES
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(path, 8, f"tensor {name!r}: expected a dtype, a shape and two data_offsets") from None
        if not known:
            raise CheckpointError(path, 8, f"tensor {name!r} is {dtype}, which this version cannot read; it reads {', '.join(TYPES)}")
        block, item = TYPES[dtype]
        if end - begin != math.prod(shape) * item or end > size - first:
            raise CheckpointError(path, 8, f"tensor {name!r}: {shape} of {dtype} do not lie at bytes {begin} to {end} of {size - first}")
        tensors[name] = TensorInfo(name, block, shape, end - begin, first + begin, number)
        ends.append((begin, end, name))
    ends.sort()
    for (_, end, name), (begin, _, other) in zip(ends, ends[1:]):
        if begin < end:
            raise CheckpointError(path, 8, f"tensors {name!r} and {other!r} overlap")
    return tensors
