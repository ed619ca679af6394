"""A model's matrices in tiles on disk: rearranged once, mapped from then on.

    <cache root>/weights-<16 hex digits>/      the start of the key: `key_of`
        tiles         the matrices one after the other, each from a multiple of 4,096 bytes on, at a place that the model alone decides
        index.json    {"key", "name", "files": [[path, size, time of change]], "done": {matrix: CRC-32 of samples of its tiles}}
        lock          held by the process that writes

Tiles are a permutation of the file's bytes and the same on every machine (kernels/machine/tiles.py), so a copy is valid as long as the file
is the one it was made of. What is not in the index, or does not have the CRC there, does not exist for `find`. The index is replaced after
the tiles are safe on the disk: a process that is killed, or a machine that goes down, leaves a copy of fewer matrices.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from refimpl.formats.hashing import sample_hash, stamp
from refimpl.formats.matrix import StoredMatrix
from refimpl.formats.source import TensorSource
from refimpl.kernels.machine.cache_folder import cache_root
from refimpl.kernels.machine.tiles import Tiles, held_type, layout_digest, tiles_shape

PAGE = 4096
WRITE_BYTES, COMMIT_BYTES = 8 << 20, 256 << 20      # written at once; written before the index is brought up to date
AHEAD_BYTES = 4 << 20
SAMPLES = 4                                         # pages of a matrix that are compared when it is mapped


class TileFile:
    """The tiles of one model on disk.

    found    names of the matrices that are there, after `open`
    damaged  names of those that were there and are not what they should be
    """

    def __init__(self, folder: Path, key: str, name: str, files: Sequence[Path], matrices: Sequence[StoredMatrix]):
        """The parts; nothing is read. `matrices`: all that may be kept, in order."""
        self.folder, self.key, self.name, self.files = folder, key, name, list(map(stamp, files))
        self.found: set[str] = set()
        self.damaged: list[str] = []
        self._done: dict[str, int] = {}
        self._pending = 0
        self._place, end = {}, 0
        for matrix in matrices:
            shape = tiles_shape(matrix)
            self._place[matrix.name] = (end, shape)
            end += -(-math.prod(shape) // PAGE) * PAGE
        self.n_bytes = end
        self._mapped = np.empty(0, np.uint8)

    @property
    def data(self) -> Path:
        """The file with the tiles."""
        return self.folder / "tiles"

    @property
    def names(self) -> frozenset[str]:
        """Of all matrices that may be kept."""
        return frozenset(self._place)

    def size_of(self, matrices: Sequence[StoredMatrix]) -> int:
        """Bytes that their tiles take."""
        return sum(math.prod(self._place[matrix.name][1]) for matrix in matrices)

    def open(self):
        """Finds out what is there. Whatever is wrong with it counts as not there; of another user's files nothing does."""
        self.found, self.damaged, self._done = set(), [], {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            index = json.loads((self.folder / "index.json").read_bytes())
            if index["key"] != self.key or not all(map(ours, (self.folder, self.data, self.folder / "index.json"))):
                return
            listed = {name: int(crc) for name, crc in index["done"].items() if name in self._place}
            if self.data.stat().st_size != self.n_bytes:
                self.damaged = sorted(listed)
                return
            self._map()
            for name, crc in listed.items():
                if sample_crc(self._tiles(name)) == crc:
                    self.found.add(name)
                    self._done[name] = crc
                else:
                    self.damaged.append(name)
            os.utime(self.folder)                   # used now: `tile_folders.make_room` removes the least recently used

    def find(self, matrix: StoredMatrix) -> Tiles:
        """The tiles of a matrix that is `found`: mapped memory, which no one may write to."""
        return Tiles(self._tiles(matrix.name), held_type(matrix.type), matrix.shape)

    def read_ahead(self, names: Collection[str]):
        """Has the system read these matrices from the disk, in the order in which they lie there. Best effort."""
        if not hasattr(os, "posix_fadvise"):        # macOS, Windows
            return
        with contextlib.suppress(OSError), open(self.data, "rb") as file:
            for name, (start, shape) in self._place.items():
                for first in range(start, start + math.prod(shape) if name in names else start, AHEAD_BYTES):
                    os.posix_fadvise(file.fileno(), first, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)

    def touch(self, names: Collection[str]):
        """Reads a byte of every page of these matrices, so that kernels do not stop to have pages mapped. One call of NumPy for each, in
        which other threads run: in pieces of 4 MB it would wait for the interpreter thousands of times.
        """
        for name in self._place:
            if name in names:
                np.maximum.reduce(self._tiles(name).reshape(-1)[::PAGE])

    def create(self):
        """An empty copy, or what is there of one, of the size of a complete one (the rest is a hole). Raises OSError."""
        for left in self.folder.glob("*.tmp"):
            left.unlink(missing_ok=True)
        with open(self.data, "ab") as file:
            file.truncate(self.n_bytes)
        self._write_index()
        self._map()

    def keep(self, matrix: StoredMatrix, tiles: Tiles):
        """Writes a matrix. The holder of the lock calls it, after `create`. Raises OSError."""
        start, shape = self._place[matrix.name]
        raw = np.ascontiguousarray(tiles.raw).reshape(-1)
        with open(self.data, "r+b", buffering=0) as file:
            file.seek(start)
            for first in range(0, len(raw), WRITE_BYTES):
                left = memoryview(raw[first:first + WRITE_BYTES])
                while left:
                    left = left[file.write(left):]
        self._done[matrix.name] = sample_crc(tiles.raw)
        self.found.add(matrix.name)
        self._pending += raw.nbytes
        if self._pending > COMMIT_BYTES:
            self.commit()

    def commit(self):
        """What has been kept is on the disk, and then in the index. Raises OSError."""
        with open(self.data, "r+b") as file:
            os.fsync(file.fileno())
        self._write_index()
        self._pending = 0

    def _tiles(self, name: str) -> np.ndarray:
        start, shape = self._place[name]
        return self._mapped[start:start + math.prod(shape)].reshape(shape)

    def _map(self):
        # private: Numba would compile every kernel once more for arrays that cannot be written to
        self._mapped = np.asarray(np.memmap(self.data, np.uint8, "c"))

    def _write_index(self):
        temporary = self.folder / f"{secrets.token_hex(4)}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump({"key": self.key, "name": self.name, "files": self.files, "done": self._done}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / "index.json")
        finally:
            temporary.unlink(missing_ok=True)


def copy_of(source: TensorSource, matrices: Sequence[StoredMatrix]) -> TileFile:
    """What there is on disk of these matrices' tiles, opened. Raises OSError where the source cannot be read."""
    key = key_of(source, matrices)
    copy = TileFile(cache_root() / f"weights-{key[:16]}", key, source.path.name, source.files(), matrices)
    copy.open()
    return copy


def key_of(source: TensorSource, matrices: Sequence[StoredMatrix]) -> str:
    """64 hex digits for: the files a model is read from (`sample_hash`), its matrices, the layout of tiles. Raises OSError."""
    config = source.path / "config.json"            # of a directory: says how packed weights are read
    files = sample_hash([*source.files(), *([config] if config.is_file() else [])])
    described = [(matrix.name, matrix.type, matrix.shape) for matrix in matrices]
    return hashlib.sha256(repr((files, described, layout_digest())).encode()).hexdigest()


def sample_crc(raw: np.ndarray) -> int:
    """CRC-32 of the first, the last and two pages between of an array's bytes."""
    flat, crc = raw.reshape(-1), 0
    for i in range(SAMPLES):
        first = max(0, len(flat) - PAGE) * i // (SAMPLES - 1)
        crc = zlib.crc32(flat[first:first + PAGE], crc)
    return crc


def ours(path: Path) -> bool:
    """Does this user, or the system's own, own the file? Nobody else's bytes are computed with."""
    return not hasattr(os, "getuid") or path.stat().st_uid in (os.getuid(), 0)
