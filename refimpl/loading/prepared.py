"""Every matrix of a model as the kernels hold it: from its copy on disk, or rearranged now and kept there for the next time.

    copy there                      mapped: no wait, no memory of this process; other processes share its pages, and the system drops them
                                    when memory is short
    first start                     tiles in memory, as without a disk; a thread of low priority writes them while the model runs
    ... more than memory holds      written first, then mapped
    no room on the disk, a folder that cannot be written, another process writes, a small model: tiles in memory

Why copies and not the file's own rows: lab/bench/README.md has the measurements.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from refimpl.formats.matrix import Matrix, StoredMatrix
from refimpl.formats.source import TensorSource
from refimpl.host import available
from refimpl.model.backend import Prepared

if TYPE_CHECKING:
    from filelock import FileLock

    from refimpl.loading.tile_file import TileFile

SMALL = 64 << 20            # bytes of weights up to which nothing is kept: they are rearranged in a tenth of a second
CACHE_DISK = 50 * 10**9     # default of `cache_disk`
EXPERTS = "_exps.weight"


class InMemory:
    """Rearranges every matrix into memory.

    notes   lines for the user
    mapped  names of the matrices that take no memory of this process
    """

    def __init__(self, tiled: Callable[[Matrix], Prepared], notes: Sequence[str] = ()):
        self.tiled, self.notes, self.mapped = tiled, list(notes), frozenset()

    def fit(self, need: Callable[[Collection[str]], int], have: int):
        """Decides, before the first matrix, how to stay within the `have` bytes of memory that are free; `need(mapped)` is what the model
        takes where the matrices named in `mapped` take nothing.
        """

    def prepare(self, matrix: StoredMatrix) -> Prepared:
        """The tiles of a matrix."""
        return self.tiled(matrix.read())

    def finish(self):
        """After the last matrix."""

    def wait(self):
        """Returns when no copy is being written any more."""


class Mapped(InMemory):
    """Maps the matrices of which there are copies, rearranges the others into memory."""

    def __init__(self, tiled: Callable[[Matrix], Prepared], notes: Sequence[str], copy: TileFile):
        super().__init__(tiled, notes)
        self.copy, self.mapped = copy, frozenset(copy.found)

    def prepare(self, matrix: StoredMatrix) -> Prepared:
        """The tiles of a matrix."""
        return self.copy.find(matrix) if matrix.name in self.copy.found else super().prepare(matrix)

    def finish(self):
        """Has the matrices read from the disk, and mapped page by page, ahead of their first use: all of them, or where memory is short
        those that every token needs (an expert is read when a token chooses it).
        """
        names = self.mapped if self.copy.n_bytes < available() else {name for name in self.mapped if not name.endswith(EXPERTS)}
        for work in (self.copy.read_ahead, self.copy.touch):
            threading.Thread(target=work, args=(names,), name=f"refimpl-{work.__name__}", daemon=True).start()


class Writing(Mapped):
    """The same, and writes copies of the others: after the model is loaded, or at once where memory is short."""

    def __init__(self, tiled: Callable[[Matrix], Prepared], notes: Sequence[str], copy: TileFile, lock: FileLock):
        super().__init__(tiled, notes, copy)
        self.lock, self.at_once, self._left = lock, False, []
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._write, name="refimpl-tiles", daemon=True)

    def fit(self, need: Callable[[Collection[str]], int], have: int):
        """Decides when to write."""
        self.at_once = need(self.mapped) > have
        if self.at_once:
            self.mapped = self.copy.names

    def prepare(self, matrix: StoredMatrix) -> Prepared:
        """The tiles of a matrix. Raises OSError where they have to be written and the disk is full."""
        tiles = super().prepare(matrix)
        if matrix.name in self.copy.found:
            return tiles
        if self.at_once:
            self.copy.keep(matrix, tiles)
            return self.copy.find(matrix)
        self._left.append((matrix, tiles))
        return tiles

    def finish(self):
        """Starts the thread that writes. At the end of the process it stops within one matrix; the next start goes on from there."""
        if self.at_once:
            self.copy.commit()
            self.lock.release()
        else:
            atexit.register(self.stop)
            self._thread.start()

    def stop(self):
        """Returns when the thread has written its present matrix and ended."""
        self._stop.set()
        self._thread.join()

    def wait(self):
        """Returns when everything is written."""
        if self._thread.ident is not None:
            self._thread.join()

    def _write(self):
        with contextlib.suppress(OSError, AttributeError):              # Windows has no such call
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        with contextlib.suppress(OSError):                              # the disk is full: the copy stays incomplete
            while self._left and not self._stop.is_set():
                self.copy.keep(*self._left.pop(0))
            if not self._left:
                self.copy.commit()
        self._left = []
        self.lock.release()


def preparer(source: TensorSource, matrices: Sequence[StoredMatrix], tiled: Callable[[Matrix], Prepared],
             held: Callable[[StoredMatrix], int], cache_disk: int) -> InMemory:
    """How the `matrices` of a model, all that will be asked for, are prepared with `tiled`.

    `held` as Backend.held. `cache_disk`: bytes that all copies together may take on the disk; with 0 nothing is read or kept there.
    """
    if not cache_disk or sum(map(held, matrices)) < SMALL:
        return InMemory(tiled)
    from filelock import FileLock, Timeout  # here, with the others: they take a third of a second

    from refimpl.kernels.machine.cache_folder import cache_root
    from refimpl.loading.tile_file import copy_of, ours
    from refimpl.loading.tile_folders import make_room

    notes: list[str] = []
    try:
        copy = copy_of(source, matrices)
        if copy.damaged:
            notes.append(f"{copy.data}: {len(copy.damaged)} matrices are not as they were written (first {copy.damaged[0]}): made again")
        missing = [matrix for matrix in matrices if matrix.name not in copy.found]
        if not missing:
            return Mapped(tiled, notes, copy)
        if why := make_room(copy.folder, copy.size_of(missing), copy.n_bytes, cache_disk):
            return Mapped(tiled, [*notes, f"weights are rearranged at every start: {why}"], copy)
        copy.folder.mkdir(parents=True, exist_ok=True)
        if not ours(copy.folder):
            return InMemory(tiled, [f"weights are rearranged at every start: {copy.folder} belongs to another user"])
        lock = FileLock(copy.folder / "lock", timeout=0, thread_local=False)
        lock.acquire()
        try:
            copy.open()                     # what another process has written meanwhile
            copy.create()
        except BaseException:
            lock.release()
            raise
        notes.append(f"the rearranged weights, {copy.n_bytes / 1e9:.1f} GB, are kept in {copy.folder} and mapped from the next start on "
                     "(refimpl cache lists them, --cache-disk 0 keeps none)")
        return Writing(tiled, notes, copy, lock)
    except Timeout:
        return Mapped(tiled, [*notes, f"{copy.folder}: another process is writing the rearranged weights"], copy)
    except OSError as error:
        return InMemory(tiled, [*notes, f"weights are rearranged at every start: {error.filename or cache_root()}: {error.strerror}"])
