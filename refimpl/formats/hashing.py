"""SHA-256 of files."""

import hashlib
import os
from collections.abc import Callable, Iterable

CHUNK_BYTES = 1 << 20


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
