"""Logits of llama.cpp, some rows at a time, from a process of its own (llamacpp.py).

The process is this file, run as a module. `{"ids": [...], "start": n, "file": name}` runs ids at positions n, n + 1, ... (at 0, after
forgetting all that was before); with a name, it writes their logits into that file, float32 (ids, vocabulary), before it answers
`{"rows": n}`.
"""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from refimpl.lab.llamacpp.process import LlamaCpp, _Engine, talk


class LlamaCppRows(LlamaCpp):
    """A model loaded by llama.cpp, asked for logits. It runs at most `size` tokens at once, as it keeps the logits of all of them."""

    def __init__(self, path: Path, n_ctx: int, n_threads: int, size: int, command: Sequence[str] | None = None):
        """Starts the process (`command`, for tests, in place of our own) and waits for the model. Raises LlamaCppError."""
        super().__init__(path, n_ctx, n_threads, command or (sys.executable, "-m", __name__, str(size)))
        self.size = size

    def rows(self, ids: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """Logits at positions first, first + 1, ... of `ids`, float32 (at most `size`, V) at a time. Raises LlamaCppError."""
        ids, file = list(ids), Path(self._folder.name) / "rows"
        for start in range(0, first, self.size):
            self._ask(ids=ids[start:min(start + self.size, first)], start=start, file="")
        for start in range(first, len(ids), self.size):
            n = self._ask(ids=ids[start:start + self.size], start=start, file=str(file))["rows"]
            yield np.fromfile(file, np.float32).reshape(n, -1)


class _Rows(_Engine):
    """Inside of the process."""

    def run_rows(self, ids: list[int], start: int, file: str) -> int:
        lib, n = self.lib, len(ids)
        if not start:
            lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = lib.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, start + i, 1, 0, bool(file)
            if not file:
                batch.logits[n - 1] = True              # without any, it takes the whole call for an embedding
            if status := lib.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode gave {status}")
        finally:
            lib.llama_batch_free(batch)
        if file:
            n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
            whole = ctypes.cast(lib.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float * (n * n_vocab)))
            np.frombuffer(whole.contents, np.float32).tofile(file)
        return n


def counted(engine: _Rows, **request) -> dict:
    """The answer to a request for rows."""
    return {"rows": engine.run_rows(**request)}


if __name__ == "__main__":
    size, path, n_ctx, n_threads = sys.argv[1:]
    talk(lambda: _Rows(path, int(n_ctx), int(n_threads), int(size), int(size)), counted)
