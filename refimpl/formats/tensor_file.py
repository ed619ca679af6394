"""One safetensors file of named arrays with text beside them (the format: checkpoint.py). Written piece by piece, read where it lies."""

import contextlib
import json
import math
import os
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refimpl.formats.checkpoint import CheckpointError, tensors_of
from refimpl.formats.gguf import map_file, view

CODES = {np.dtype("<f4"): "F32", np.dtype("<f2"): "F16", np.dtype("<i8"): "I64", np.dtype("<i4"): "I32"}
DTYPES = {code: dtype for dtype, code in CODES.items()}


class TensorFile:
    """An open file. `path`, `metadata` (str -> str), `tensors` (name -> TensorInfo, in the header's order)."""

    def __init__(self, path: str | os.PathLike):
        """Maps the file and checks its header. Raises CheckpointError."""
        self.path = Path(path)
        self._mapping = map_file(self.path, "a safetensors file", CheckpointError)
        self.tensors = tensors_of(self.path, self._mapping, 0, lambda name: True)
        metadata = json.loads(self._mapping[8:8 + int.from_bytes(self._mapping[:8], "little")]).get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(self.path, 8, "expected __metadata__ to hold strings")
        self.metadata: dict[str, str] = metadata

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes, uint8, rows apart: a read-only view of the mapping."""
        return view(self._mapping, self.tensors[name])

    def array(self, name: str) -> np.ndarray:
        """A tensor: a read-only view of the mapping in its own type, bfloat16 widened to float32."""
        info, raw = self.tensors[name], self.raw(name)
        if info.type == "BF16":
            return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(info.shape)
        return raw.view(DTYPES[info.type]).reshape(info.shape)


class TensorWriter:
    """Writes a file under a temporary name, which becomes `path` with `finish`, or is gone where a `with` block ends without it.

    Tensors may come in pieces, row after row, several tensors in turn: `add` makes room for one, `write` fills it. The header stands
    at the front, so room for it is kept: at most `header_bytes`, the rest is spaces.
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
        """Leaves nothing behind where `finish` was not reached."""
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
