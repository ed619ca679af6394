"""What was read, on the disk: blocks of keys and values in safetensors files, mapped while they are needed again.

    <cache root>/read-<16 hex digits>/      the start of `key_of`: the model and everything that a bit depends on
        <32 hex digits>.safetensors         ids of the tokens from a multiple of 64 on, and blocks of their keys and values; the metadata
                                            entry "refimpl" is JSON: {"format", "key", "model", "parent", "first", "ids", "blocks", ...}

A file goes on where its parent ends, so a turn writes what is new in it. It has all blocks of full layers, and of sliding layers those
that are visible at its end. Its name is a hash of the key, the parent and the ids; it is written aside and moved, and never changes:
processes may share the folder. What is damaged, of another model or of another user is passed over.
"""

import contextlib
import hashlib
import json
import mmap
import os
import re
import shutil
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refimpl.formats.gguf import GGUFError, TensorInfo, map_file, view
from refimpl.formats.hashing import sample_hash
from refimpl.formats.safetensors import DTYPES, CheckpointError, TensorFile, TensorWriter
from refimpl.loading.model import Model
from refimpl.model.blocks import BLOCK

FORMAT = 1
NUMERICS = 1                # goes up when any bit of a key or value does
NAME = re.compile(r"read-[0-9a-f]{16}")
BAD = (OSError, GGUFError, ValueError, KeyError, TypeError, AttributeError, RecursionError)      # what reading any bytes can raise
MAX_NOTES = 100            # as many are kept and told
LINE = 64                   # bytes; blocks begin at multiples, as in memory


@dataclass(eq=False)
class Snapshot:
    """One file. `first`: number of its first block; `blocks`: for each table, the numbers of its blocks, in order.

    It is mapped only as long as a sequence uses its blocks: a mapped file takes a descriptor and, once deleted, its room on the disk.
    """

    path: Path
    parent: str
    first: int
    ids: tuple[int, ...]
    blocks: list[list[int]]
    crc32: Mapping[str, int]
    tensors: Mapping[str, TensorInfo]
    sound: bool | None = None           # None: nobody has looked
    _mapping: Callable[[], mmap.mmap | None] = lambda: None         # a weak reference

    @property
    def name(self) -> str:
        """What children call it."""
        return self.path.stem

    def open(self) -> list[dict[int, np.ndarray]] | None:  # noqa: A003
        """For each table, number -> block: read-only views of the file, whose rows lie as they were written. None where it is gone, cannot
        be opened, or has other bytes than were written (`sound` is False), for which it is read once. It counts as used now.
        """
        try:
            if (mapping := self._mapping()) is None:
                mapping = map_file(self.path, "a safetensors file", CheckpointError)
                self._mapping = weakref.ref(mapping)
        except CheckpointError:
            return None
        try:
            raw = {name: view(mapping, info) for name, info in self.tensors.items()}
        except ValueError:                      # it has become shorter
            raw, self.sound = {}, False
        if self.sound is None:
            self.sound = all(zlib.crc32(raw[name].reshape(-1)) == crc for name, crc in self.crc32.items())
        if not self.sound:
            return None
        self.touch()
        return [dict(zip(mine, raw[str(table)].view(DTYPES[self.tensors[str(table)].type]))) if mine else {}
                for table, mine in enumerate(self.blocks)]

    def touch(self):
        """Counts as used now."""
        now = time.time_ns()                        # the system's own is the same for some milliseconds
        with contextlib.suppress(OSError):
            os.utime(self.path, ns=(now, now))


class Snapshots:
    """The files of one model in one folder.

    notes    lines for the user: what was passed over, and why something could not be written, each reason once
    deleted  names of files that had to make room, for whoever still knows them to take
    """

    def __init__(self, root: str | os.PathLike, model: Model, limit: int, tell: Callable[[str], None] = lambda note: None):
        """`root`: the cache root. `limit`: bytes that all files of all models may take; the least recently used go first. `tell` is called
        with each note when there is one, from whatever thread reads or writes.
        """
        tables = model.new_cache(1).tables
        self.root, self.key, self.model, self.limit = Path(root), key_of(model), model.name, limit
        self.folder = self.root / f"read-{self.key[:16]}"
        self.shapes, self.dtype = [table.shape for table in tables], tables[0].dtype
        self.notes: list[str] = []
        self.deleted: set[str] = set()
        self._tell, self._noted = tell, set[str]()

    def found(self) -> list[Snapshot]:
        """All files that may be used, each after its parent."""
        children: dict[str, list[Snapshot]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                snapshot = self._open(path)
            except BAD as error:
                self._note(f"{path}: passed over: {getattr(error, 'strerror', None) or error}")
            else:
                children.setdefault(snapshot.parent, []).append(snapshot)
        ready, names = [], [""]
        while names:
            more = children.pop(names.pop(), [])
            ready += more
            names += [snapshot.name for snapshot in more]
        return ready                    # without those whose parents are gone

    def write(self, parent: str, first: int, ids: Sequence[int], blocks: Sequence[Mapping[int, np.ndarray]]) -> Snapshot | None:
        """Writes a file and opens it; None with a note where there is no room or no permission. `blocks`: for each table, number ->
        block.
        """
        path = self.folder / f"{self._name(parent, first, ids)}.safetensors"
        with contextlib.suppress(*BAD):
            if (snapshot := self._open(path)).open() is not None:
                return snapshot                     # another process was first
        header = {"format": FORMAT, "key": self.key, "model": self.model, "parent": parent, "first": first, "ids": [int(i) for i in ids],
                  "blocks": [sorted(mine) for mine in blocks]}
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._write(path, header, blocks)
            self._make_room(path)
            snapshot = self._open(path)
        except BAD as error:
            why = str(getattr(error, "strerror", None) or error)
            self._note(f"what was read is not kept on the disk: {getattr(error, 'filename', None) or path}: {why}", why)
            return None
        snapshot.sound = True
        return snapshot

    def remove(self, snapshot: Snapshot) -> bool:
        """Deletes a file that could not be used, with a note, if that is its own fault. Returns whether it is gone."""
        if snapshot.sound is not False:
            return not snapshot.path.exists()
        self._note(f"{snapshot.path}: passed over: not the bytes that were written")
        with contextlib.suppress(OSError):
            snapshot.path.unlink()
        return True

    def _note(self, note: str, key: str = ""):
        """Says it once; notes with the same `key` are the same."""
        if (key or note) not in self._noted and len(self.notes) < MAX_NOTES:
            self._noted.add(key or note)
            self.notes.append(note)
            self._tell(note)

    def _write(self, path: Path, header: dict[str, object], blocks: Sequence[Mapping[int, np.ndarray]]):
        room = -(-(len(json.dumps(json.dumps(header))) + 4096) // LINE) * LINE + LINE - 8
        with TensorWriter(path, room) as out:
            for table, mine in enumerate(blocks):
                if mine:
                    rows = self._rows(table)
                    out.add(str(table), self.dtype, (len(mine), *rows))
                    for i, number in enumerate(sorted(mine)):
                        out.write(str(table), i, mine[number].reshape(1, *rows))
            out.finish({"refimpl": json.dumps(header | {"crc32": out.crc32})})

    def _open(self, path: Path) -> Snapshot:
        """A file, its header checked. Raises one of BAD where it cannot be used."""
        if hasattr(os, "getuid") and path.stat().st_uid not in (os.getuid(), 0):
            raise ValueError("belongs to another user")
        file = TensorFile(path)
        header = json.loads(file.metadata["refimpl"])
        snapshot = Snapshot(path, str(header["parent"]), int(header["first"]), tuple(map(int, header["ids"])),
                            [[int(number) for number in numbers] for numbers in header["blocks"]],
                            {str(name): int(crc) for name, crc in header["crc32"].items()}, file.tensors)
        self._check(header, snapshot, file)
        return snapshot

    def _check(self, header: Mapping[str, object], snapshot: Snapshot, file: TensorFile):
        """Raises ValueError unless it is a file of this model whose parts fit together."""
        n_blocks = -(-len(snapshot.ids) // BLOCK)
        if header["format"] != FORMAT or header["key"] != self.key:
            raise ValueError("of another model or version")
        if snapshot.name != self._name(snapshot.parent, snapshot.first, snapshot.ids) or not snapshot.ids or snapshot.first < 0:
            raise ValueError("its name does not fit its contents")
        if len(snapshot.blocks) != len(self.shapes) or {name for name, mine in enumerate(snapshot.blocks) if mine} != set(
                map(int, file.tensors)) or set(snapshot.crc32) != set(file.tensors):
            raise ValueError("other tensors than it says")
        for table, mine in enumerate(snapshot.blocks):
            if mine != sorted(set(mine)) or any(not snapshot.first <= number < snapshot.first + n_blocks for number in mine):
                raise ValueError("blocks that its tokens do not have")
            if mine and (file.tensors[str(table)].shape != (len(mine), *self._rows(table))
                         or file.array(str(table)).dtype != self.dtype):
                raise ValueError("blocks of another shape or type")

    def _rows(self, table: int) -> tuple[int, int]:
        n_layer, two, n_pos, n_kv, head_dim = self.shapes[table]
        return n_layer * two * n_pos, n_kv * head_dim

    def _name(self, parent: str, first: int, ids: Sequence[int]) -> str:
        told = f"{self.key} {parent} {first} {','.join(str(int(i)) for i in ids)}"
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def _make_room(self, mine: Path):
        """Removes the least recently used files of all models until the rest is within the limit."""
        files = sorted((file for folder in _folders(self.root) for file in _files(folder)), key=lambda file: file[1].st_mtime_ns)
        total = sum(status.st_size for _, status in files)
        for path, status in files:
            if total <= self.limit or path == mine:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                total -= status.st_size
                if path.parent == self.folder:
                    self.deleted.add(path.stem)


def key_of(model: Model) -> str:
    """64 hex digits for all that keys and values depend on but the tokens: the model's files (`sample_hash`), the arithmetic, the type."""
    b = model.backend
    told = (sample_hash(model.file.files()), NUMERICS, b.name, b.arithmetic, str(b.kv_type), BLOCK)
    return hashlib.sha256(repr(told).encode()).hexdigest()


class Folder(NamedTuple):
    """What one model has read. `model`: what it calls itself, "" where no file says."""

    path: Path
    model: str
    n_bytes: int


def folders(root: Path) -> list[Folder]:
    """All of them, by name."""
    found = []
    for path in _folders(root):
        files, model = _files(path), ""
        for file, _ in files[:1]:
            with contextlib.suppress(*BAD):
                model = str(json.loads(TensorFile(file).metadata["refimpl"])["model"])
        found.append(Folder(path, model, sum(status.st_size for _, status in files)))
    return found


def remove(paths: Iterable[Path]):
    """Removes folders from `folders`. Raises OSError where that fails; a process that has files of them mapped keeps what it has, but on
    Windows it keeps them from being removed.
    """
    for path in paths:
        shutil.rmtree(path)


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink())
    except OSError:
        return []


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):
            found.append((path, path.stat()))
    return found
