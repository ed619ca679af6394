"""Where compiled kernels are kept on disk. Imports nothing that compiles, so that the folders can be listed and cleared without Numba.

    <cache root>/kernels-<instruction set>-<hash>/     the hash covers the kernels' source and the versions of Numba and llvmlite

The cache root is `REFIMPL_CACHE_DIR`, or else the user's cache folder of the operating system (on Linux ~/.cache/refimpl). A change of the
source makes a new folder; folders of the same instruction set that nobody has used for 14 days are removed on that occasion. Inside a
folder Numba distinguishes processors, so a folder that several machines share is safe.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

UNUSED_SECONDS = 14 * 24 * 3600
NAME = re.compile(r"kernels-(?P<isa>[a-z0-9]+)-(?P<hash>[0-9a-f]{16})")


class KernelFolder(NamedTuple):
    """A folder of compiled kernels. `in_use`: it belongs to the kernels of this installation (of any instruction set)."""

    path: Path
    n_bytes: int
    in_use: bool


def cache_root() -> Path:
    """The folder that holds all kernel folders; it need not exist."""
    from platformdirs import user_cache_path

    base = os.environ.get("REFIMPL_CACHE_DIR")
    return Path(base) if base else user_cache_path("refimpl")


@functools.cache
def source_hash() -> str:
    """16 hex digits that change with the source of the kernels and of the block types (whose tables are compiled in), with Numba's and
    llvmlite's version, and with how they are compiled: with bounds checking, with less optimizing.
    """
    package, digest = Path(__file__).parents[2], hashlib.sha256()
    for room in ("kernels", "formats/quants"):
        for source in sorted((package / room).rglob("*.py")):
            digest.update(source.read_bytes())
    versions = (importlib.metadata.version(name) for name in ("numba", "llvmlite"))
    digest.update(f"{' '.join(versions)} {os.environ.get('NUMBA_BOUNDSCHECK')} {os.environ.get('NUMBA_OPT')}".encode())
    return digest.hexdigest()[:16]


def kernel_folders() -> list[KernelFolder]:
    """All kernel folders below the cache root, by name. Files that vanish meanwhile count as nothing."""
    return [KernelFolder(path, _size(path), path.name.endswith(source_hash())) for path in _folders(cache_root())]


def remove(paths: Iterable[Path]):
    """Removes kernel folders. Raises ValueError for a path that is none, before anything is removed, and OSError where removing fails.

    A running process is not disturbed: it has loaded its kernels, and those that it cannot keep it compiles again next time.
    """
    paths, known = [Path(path) for path in paths], _folders(cache_root())
    for path in paths:
        if path not in known:
            raise ValueError(f"{path} is not a folder of compiled kernels")
    for path in paths:
        shutil.rmtree(path)


def open_folder(isa: str) -> Path | None:
    """The folder for an instruction set's kernels, made if need be and marked as used now; None if it cannot be written."""
    try:
        folder = cache_root() / f"kernels-{isa}-{source_hash()}"
        new = not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            os.utime(folder)
    except OSError:
        return None
    if new:
        _remove_unused(isa, folder)
    return folder


def _remove_unused(isa: str, ours: Path):
    """Best effort: a folder that another process is removing or that belongs to someone else stays as it is."""
    for folder in _folders(ours.parent):
        with contextlib.suppress(OSError):
            if folder != ours and NAME.fullmatch(folder.name)["isa"] == isa and time.time() - folder.stat().st_mtime > UNUSED_SECONDS:
                shutil.rmtree(folder)


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink())
    except OSError:
        return []


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
