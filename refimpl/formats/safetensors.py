"""safetensors files: parsed, read where they lie, written row by row. Takes no file at its word.

    8 bytes: length n of the header, little-endian
    n bytes: JSON, tensor name -> {"dtype", "shape", "data_offsets": [begin, end] from the end of the header};
             "__metadata__" -> strings by name
    the tensors' bytes, without gaps

Source: the format's README (github.com/huggingface/safetensors).
"""

import contextlib
import json
import math
import mmap
import os
import secrets
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from refimpl.formats.gguf import MAX_DIMS, GGUFError, TensorInfo, map_file, release_pages, view

TYPES = {"F32": ("F32", 4), "F16": ("F16", 2), "BF16": ("BF16", 2), "I64": ("I64", 8), "I32": ("I32", 4)}
CODES = {np.dtype("<f4"): "F32", np.dtype("<f2"): "F16", np.dtype("<i8"): "I64", np.dtype("<i4"): "I32"}
DTYPES = {code: dtype for dtype, code in CODES.items()}
# Far above any real header (26B-A4B with every expert on its own: 35,000 tensors, 5 MB). Parsed JSON takes many times its bytes.
MAX_HEADER = 8 << 20
MAX_MARKS = 500_000                 # brackets, commas and colons of a header: each value has one
MAX_SIZE = 1 << 48                  # of one dimension: a product of numbers with thousands of digits would take for ever


class CheckpointError(GGUFError):
    """A safetensors file or a Hugging Face directory that cannot be read. One line, as GGUFError's."""


class TensorFile:
    """An open file.

    metadata  the strings under "__metadata__": str -> str
    tensors   name -> TensorInfo, in the header's order
    n_bytes   size of the file
    """

    def __init__(self, path: str | os.PathLike, wanted: Callable[[str], bool] = lambda name: True, part: int = 0):
        """Maps the file and checks its header. Tensors whose names are not `wanted` are skipped unchecked; `part` is the file's number
        among several. Raises CheckpointError.
        """
        self.path = Path(path)
        self._mapping = map_file(self.path, "a safetensors file", CheckpointError)
        self.n_bytes = len(self._mapping)
        header, first = _header(self.path, self._mapping)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(value, str) for value in self.metadata.values()):
            raise CheckpointError(self.path, 8, "expected __metadata__ to hold strings")
        self.tensors = _tensors(self.path, header, first, self.n_bytes, part, wanted)

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes, uint8 `(*shape[:-1], row_bytes)`: a read-only view of the mapping."""
        return view(self._mapping, self.tensors[name])

    def array(self, name: str) -> np.ndarray:
        """A tensor: a read-only view of the mapping in its own type, but bfloat16 as float32."""
        info, raw = self.tensors[name], self.raw(name)
        if info.type == "BF16":
            return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(info.shape)
        return raw.view(DTYPES[info.type]).reshape(info.shape)

    def release_all(self) -> None:
        """Tells the system that the file's pages are not wanted in memory for now. Best effort."""
        release_pages(self._mapping, 0, len(self._mapping))


class TensorWriter:
    """Writes a file under a temporary name; `finish` renames it to `path`, and a `with` block that ends without it deletes it.

    Tensors may be written row by row, several in turn: `add` makes room for one, `write` fills it. The header is at the front, so room
    is kept for it: at most `header_bytes`, padded with spaces.
    """

    def __init__(self, path: str | os.PathLike, header_bytes: int):
        self.path, self._room, self._end = Path(path), -(-header_bytes // 8) * 8, 0
        self._entries: dict[str, dict] = {}
        self.crc32: dict[str, int] = {}             # of what each tensor was given, in the order in which it came
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        with self._named():
            self._file = self._temporary.open("xb")

    def add(self, name: str, dtype: np.dtype, shape: tuple[int, ...]):
        """Room for a tensor."""
        dtype = np.dtype(dtype).newbyteorder("<")
        if name in self._entries or dtype not in CODES or not shape or 0 in shape:
            raise ValueError(f"tensor {name}: expected a new name, one of {', '.join(map(str, CODES))}, and no empty shape; "
                             f"found {dtype} {shape}")
        size = math.prod(shape) * dtype.itemsize
        self._entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [self._end, self._end + size]}
        self._end += size                       # the format allows no gaps
        self.crc32[name] = 0

    def write(self, name: str, row: int, rows: np.ndarray):
        """Rows row, row + 1, ... of a tensor."""
        entry = self._entries[name]
        if list(rows.shape[1:]) != entry["shape"][1:] or not 0 <= row <= entry["shape"][0] - len(rows):
            raise ValueError(f"tensor {name} of shape {entry['shape']}: rows {row} to {row + len(rows)} of shape {rows.shape} do not fit")
        data = np.ascontiguousarray(rows.astype(DTYPES[entry["dtype"]], copy=False))
        with self._named():
            self._file.seek(8 + self._room + entry["data_offsets"][0] + row * (data.nbytes // max(len(rows), 1)))
            self._file.write(data)
        self.crc32[name] = zlib.crc32(data, self.crc32[name])

    def finish(self, metadata: Mapping[str, str]):
        """The header, and the file gets its name."""
        header = json.dumps({"__metadata__": dict(metadata)} | self._entries).encode()
        if len(header) > self._room:
            raise ValueError(f"{self.path}: the header takes {len(header)} bytes, there is room for {self._room}")
        with self._named():
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
            self._file.truncate(8 + self._room + self._end)
            self._file.close()
            os.replace(self._temporary, self.path)

    def __enter__(self) -> "TensorWriter":
        """Itself."""
        return self

    def __exit__(self, *error: object):
        """Deletes the temporary file if `finish` was not reached."""
        with contextlib.suppress(OSError):      # closing writes what is left, for which there may be no room
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _named(self):
        """Names the file in errors of the system, and not the temporary one."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), os.fspath(self.path)) from error


def _header(path: Path, mapping: mmap.mmap) -> tuple[dict[str, object], int]:
    """(the JSON object, where the tensors' bytes start)."""
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
    return header, 8 + length


def _tensors(path: Path, header: Mapping[str, object], first: int, size: int, part: int,
             wanted: Callable[[str], bool]) -> dict[str, TensorInfo]:
    """The `wanted` tensors of a file of `size` bytes, whose tensors' bytes start at `first`."""
    tensors, ends = {}, []
    for name, entry in header.items():
        if not wanted(name):
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if entry["shape"] == []:
                shape = 1,                  # a single number
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
            cut = ": the file is cut off, download it again" if end > size - first else ""
            raise CheckpointError(path, 8, f"tensor {name!r}: {shape} of {dtype} are not at bytes {begin} to {end} "
                                  f"of {size - first}{cut}")
        tensors[name] = TensorInfo(name, block, shape, end - begin, first + begin, part)
        ends.append((begin, end, name))
    ends.sort()
    for (_, end, name), (begin, _, other) in zip(ends, ends[1:]):
        if begin < end:
            raise CheckpointError(path, 8, f"tensors {name!r} and {other!r} overlap")
    return tensors


def _parsed(raw: bytes) -> object:
    """The JSON of a header. Raises ValueError where it is no JSON, repeats a name, or has more entries than any model."""
    if sum(raw.count(mark) for mark in b"[{,:") > MAX_MARKS:
        raise ValueError("more entries than any model has")

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(entries := dict(pairs)) != len(pairs):
            raise ValueError("a name is in it twice")
        return entries
    return json.loads(raw.decode("utf-8"), object_pairs_hook=once)
