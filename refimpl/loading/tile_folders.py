"""All copies of tiles below the cache root (tile_file.py): listed, removed, kept within a limit. Never imports Numba."""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from refimpl.formats.hashing import stamp
from refimpl.kernels.machine.cache_folder import cache_root

NAME = re.compile(r"weights-[0-9a-f]{16}")
TRIAL = re.compile(r"trial-\w+")    # see `trial`: killed, if nobody holds its lock
FREE_BYTES = 5 * 10**9              # of the disk stay free


class TileFolder(NamedTuple):
    """A folder with the tiles of a model. `name`, `files`: of the model, "" and () where the index cannot be read, and for a trial's.

    `current`: all of its files exist, and none has changed since the tiles were made; the trial is under way.
    """

    path: Path
    name: str
    files: tuple[str, ...]
    n_bytes: int
    used: float
    current: bool


def tile_folders() -> list[TileFolder]:
    """All of them, the most recently used first. Files that vanish meanwhile count as nothing."""
    return sorted(map(_described, _folders()), key=lambda folder: -folder.used)


def remove(paths: Iterable[Path]):
    """Removes folders. Raises ValueError for a path that is none of them, before anything is removed, and OSError where removing fails.

    On Windows a folder that a process has mapped cannot be removed; elsewhere that process keeps what it has.
    """
    paths, known = [Path(path) for path in paths], _folders()
    for path in paths:
        if path not in known:
            raise ValueError(f"{path} is not a folder of rearranged weights")
    for path in paths:
        shutil.rmtree(path)


@contextlib.contextmanager
def trial() -> Iterator[Path]:
    """A cache folder for a measurement, on the same disk, which is gone afterwards; what is left of one that is killed counts as old."""
    with tempfile.TemporaryDirectory(dir=cache_root(), prefix="trial-") as root, FileLock(Path(root) / "lock"):
        yield Path(root)


def make_room(own: Path, n_bytes: int, total: int, limit: int) -> str | None:
    """Makes room for `n_bytes` more in the folder `own`, of `total` when it is complete: removes others, the least recently used first,
    until all of them together take at most `limit` bytes and the disk has FREE_BYTES left. None, or why there is no room; what cannot help
    is not removed. Raises OSError.
    """
    others = [folder for folder in tile_folders() if folder.path != own]
    root = next(path for path in (cache_root(), *cache_root().parents) if path.exists())
    if total > limit:
        return f"{_gb(total)} are more than --cache-disk allows ({_gb(limit)})"
    free, held = shutil.disk_usage(root).free - FREE_BYTES, sum(folder.n_bytes for folder in others)
    if free + held < n_bytes:
        return f"the disk of {root} has {_gb(max(0, free + FREE_BYTES))} free, {_gb(n_bytes)} are needed and {_gb(FREE_BYTES)} stay free"
    while others and (held + total > limit or free < n_bytes):
        oldest = others.pop()
        with contextlib.suppress(OSError, Timeout), FileLock(oldest.path / "lock", timeout=0):
            shutil.rmtree(oldest.path)
        free, held = shutil.disk_usage(root).free - FREE_BYTES, held - oldest.n_bytes
    return None if free >= n_bytes else f"the disk of {root} is full"


def _described(path: Path) -> TileFolder:
    name, files, current = "", (), False
    if TRIAL.fullmatch(path.name):
        return TileFolder(path, "a measurement", (), _disk_bytes(path), _used(path), _held(path / "lock"))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        index = json.loads((path / "index.json").read_bytes())
        name, files = str(index["name"]), tuple(str(file[0]) for file in index["files"])
        current = [stamp(file) for file in files] == index["files"]
    return TileFolder(path, name, files, _disk_bytes(path), _used(path), current)


def _held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _disk_bytes(folder: Path) -> int:
    """What the folder's files take on the disk: a copy that is not complete has holes."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.stat()
            total += status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size
    return total


def _folders() -> list[Path]:
    try:
        return sorted(path for path in cache_root().iterdir()
                      if (NAME.fullmatch(path.name) or TRIAL.fullmatch(path.name)) and path.is_dir() and not path.is_symlink())
    except OSError:
        return []


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
