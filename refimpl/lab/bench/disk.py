"""How fast this machine reads from its disk, and how fast it rearranges weights: what starting a model takes."""

import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.formats.matrix import Matrix
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.host import available
from refimpl.kernels.machine.cache_folder import cache_root
from refimpl.loading.tile_folders import FREE_BYTES
from refimpl.model.backend import Backend

READ_BYTES, PIECE = 128 << 20, 4 << 20
TILE_ROWS, WIDTH, MATRICES = 1 << 14, 4096, 3


@dataclass(frozen=True)
class Room:
    """What there is on this machine.

    memory      bytes that are free
    disk        bytes that rearranged weights may take where the cache folder is
    reading     bytes a second from the disk; None where the system does not let go of what was just written
    rearranging bytes of weights a second into tiles, and those into a file
    python      seconds that `python_seconds` takes
    """

    memory: int
    disk: int
    reading: float | None
    rearranging: float
    python: float


def measure_room(backend: Backend) -> Room:
    """Looks, and measures for a second. Raises OSError where the cache folder cannot be written to."""
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        rearranging, reading = _rearranging_speed(backend, root), read_speed(root)
    except OSError as error:
        what = f"{error.strerror}: measuring writes {READ_BYTES / 1e6:.0f} MB there for a moment (REFIMPL_CACHE_DIR names another folder)"
        raise OSError(error.errno, what, str(root)) from None
    return Room(available(), max(0, shutil.disk_usage(root).free - FREE_BYTES), reading, rearranging, python_seconds())


def _rearranging_speed(backend: Backend, folder: Path) -> float:
    raw = np.zeros((TILE_ROWS, BLOCKS["Q4_0"].row_bytes(WIDTH)), np.uint8)
    with backend.running():
        backend.prepare(Matrix(raw[:16], "Q4_0"))
        began, kept = time.perf_counter(), []           # as a model's are: in fresh memory
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for _ in range(MATRICES):
                kept.append(backend.prepare(Matrix(raw, "Q4_0")))
                file.write(kept[-1].raw)
        return MATRICES * raw.nbytes / (time.perf_counter() - began)


def python_seconds() -> float:
    """Seconds of some work in plain Python, which a start mostly is: the median of five times."""
    took = []
    for _ in range(5):
        began, seen = time.perf_counter(), {}
        for i in range(300_000):
            seen[i & 1023] = (i, str(i))
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def read_speed(folder: Path, n_bytes: int = READ_BYTES) -> float | None:
    """Bytes a second of reading a file of `n_bytes` in this folder that the system does not have in memory; None where it cannot be told
    to let go of a file. Raises OSError.
    """
    if not hasattr(os, "posix_fadvise"):            # macOS, Windows
        return None
    piece = os.urandom(PIECE)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(n_bytes // PIECE):
            file.write(piece)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began, n_read, into = time.perf_counter(), 0, bytearray(PIECE)
        while n := file.readinto(into):
            n_read += n
        return n_read / (time.perf_counter() - began)
