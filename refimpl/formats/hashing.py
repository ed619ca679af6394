"""SHA-256 of files, and of samples of them."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

CHUNK_BYTES = 1 << 20
SAMPLES, SAMPLE_BYTES = 64, 4096


def file_hash(path: str | os.PathLike, advance: Callable[[int], None] = lambda n_bytes: None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. `advance(n)` after every n bytes."""
    return files_hash([path], advance)


def files_hash(paths: Iterable[str | os.PathLike], advance: Callable[[int], None] = lambda n_bytes: None) -> str:
    """SHA-256 of the bytes of several files, one after the other, as if they were one: of the parts of a split model."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while data := file.read(CHUNK_BYTES):
                digest.update(data)
                advance(len(data))
    return digest.hexdigest()


@functools.cache
def code_hash() -> str:
    """16 hex digits that change with the source of this package."""
    return files_hash(sorted(Path(__file__).parents[1].rglob("*.py")))[:16]


def sample_hash(paths: Iterable[str | os.PathLike]) -> str:
    """SHA-256 of size, time of last change (in ns) and 64 evenly spaced pieces of 4 KB of every file: tells versions of a file apart in
    milliseconds. A change that keeps both, and misses the pieces, goes unnoticed.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
            for i in range(SAMPLES):
                file.seek(max(0, status.st_size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def stamp(path: str | os.PathLike) -> list[str | int]:
    """[absolute path, bytes, time of the last change in ns] of a file. Raises OSError."""
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]
