"""Where recorded tensors go: into memory, or into a file, written by a thread while the model computes."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from refimpl.formats.safetensors import TensorWriter

PENDING = 64 << 20          # bytes that may wait to be written


class Memory(dict):
    """Keeps tensors in memory; the methods are those of a TensorWriter."""

    def add(self, name: str, dtype: np.dtype, shape: tuple[int, ...]):
        """Allocates a tensor."""
        self[name] = np.empty(shape, dtype)

    def write(self, name: str, row: int, rows: np.ndarray):
        """Rows row, row + 1, ... of a tensor."""
        self[name][row:row + len(rows)] = rows


class BackgroundWriter:
    """Passes tensors to a TensorWriter in a thread of its own while the model computes; at most PENDING bytes wait."""

    def __init__(self, out: TensorWriter):
        self.out, self._thread, self._pending, self._bytes = out, ThreadPoolExecutor(1), deque(), 0

    def add(self, name: str, dtype: np.dtype, shape: tuple[int, ...]):
        """Allocates a tensor."""
        self._thread.submit(self.out.add, name, dtype, shape)

    def write(self, name: str, row: int, rows: np.ndarray):
        """Rows row, row + 1, ... of a tensor. Raises the errors of earlier writes."""
        self._pending.append((self._thread.submit(self.out.write, name, row, rows), rows.nbytes))
        self._bytes += rows.nbytes
        self.wait(PENDING)

    def wait(self, most: int = 0):
        """Waits until at most so many bytes are pending. Raises the errors of the writes."""
        while self._pending and (self._bytes > most or not most):
            written, n_bytes = self._pending.popleft()
            self._bytes -= n_bytes
            written.result()

    def close(self):
        """Drops what is pending."""
        self._thread.shutdown(cancel_futures=True)
