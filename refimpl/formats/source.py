"""What a model is read from, whatever its container: a GGUF file (gguf.py) or a Hugging Face directory (loading/open.py)."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from refimpl.formats.gguf import GGUFError, TensorInfo

RELEASE_EVERY = 1 << 30             # bytes of a mapped file that may stay in memory while it is read once from end to end


class TensorSource(Protocol):
    """Named tensors and metadata, under the names of GGUF files.

    path      the file (of a split model the first part) or the directory
    format    in words: "GGUF 3", "Hugging Face directory"
    facts     what `inspect` says of the container: its version, number of files, size, tensors left out
    metadata  key -> bool, int, float, str, array of numbers or of strings
    tensors   name -> TensorInfo
    n_bytes   of all tensors, or of all files together
    """

    path: Path
    format: str
    facts: Mapping[str, object]
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    n_bytes: int

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 `(*shape[:-1], row_bytes)`: a read-only view of the mapped file, or an array made at each call
        where the file holds the tensor in another form."""

    def files(self) -> list[Path]:
        """The files with the tensors in them."""

    def release_all(self) -> None:
        """Tells the system that the pages of the mapped files are not wanted in memory for now. Best effort; reading them again works."""


class Unchanged:
    """Whether mapped files still are what they were when this was made. Not noticed: a change while a computation reads them."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = list(paths)
        self._before = [self._state(path) for path in paths]

    def check(self):
        """Raises GGUFError for a file that was written to, or cut, in place. One that was replaced or deleted is still there for us. Takes
        some microseconds a file.
        """
        for path, before in zip(self._paths, self._before):
            now = self._state(path)
            if now[:2] == before[:2] and now != before:
                raise GGUFError(path, None, "was changed while it was in use; load it again (put a new version under another name, or move "
                                "it into the place of the old one)")

    @staticmethod
    def _state(path: Path) -> tuple[int, ...]:
        try:
            status = os.stat(path)
        except OSError:
            return (-1,)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def releasing(source: TensorSource, advance: Callable[[int], None]) -> Callable[[int], None]:
    """`advance` for a loop that reads every tensor of `source` once: releases the pages it has read every RELEASE_EVERY bytes."""
    since = 0

    def advance_and_release(n_bytes: int):
        nonlocal since
        advance(n_bytes)
        since += n_bytes
        if since > RELEASE_EVERY:
            source.release_all()
            since = 0
    return advance_and_release
