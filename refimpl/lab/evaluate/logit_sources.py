"""Where logits come from: this package's two backends, or llama.cpp, each with one file."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from refimpl.kernels.machine.threads import prepare
from refimpl.lab.llamacpp.process import LlamaCpp
from refimpl.lab.llamacpp.rows import LlamaCppRows
from refimpl.loading.model import BUILT_IN, Model, load
from refimpl.progress import Progress, silent

CHUNK_BYTES, MOST_ROWS = 64 << 20, 512          # of logits at a time: never a whole window of a large vocabulary
ENGINES = ("kernels", "reference", "llama.cpp")


@dataclass(frozen=True)
class Side:
    """One side of a comparison: an engine in ENGINES and the file it runs. `arithmetic` None: the engine's own (llama.cpp has no other)."""

    engine: str
    arithmetic: str | None
    path: Path

    def __str__(self) -> str:
        how = self.engine if self.arithmetic is None else f"{self.engine}, {self.arithmetic}"
        return f"{self.path.name} ({how})"


class Source(Protocol):
    """Something that gives logits."""

    def rows(self, ids: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """Logits at positions first, first + 1, ... of `ids`, float32 (some, V) at a time: of every source the same numbers of rows."""


class Ours:
    """A model of this package."""

    def __init__(self, model: Model, size: int):
        self.model, self.size = model, size

    def rows(self, ids: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """As Source has it."""
        state_TD = self.model.states(ids, self.model.new_cache(len(ids)))[first:]
        for start in range(0, len(state_TD), self.size):
            yield self.model.head(state_TD[start:start + self.size])


def side_of(engine: str, arithmetic: str | None, path: Path | None) -> Side:
    """Checks what can be checked before anything is loaded. Raises ValueError."""
    if engine not in ENGINES:
        raise ValueError(f"there is no engine {engine!r}; there is {', '.join(ENGINES)}")
    if engine == "llama.cpp":
        LlamaCpp.check()
        if arithmetic is not None:
            raise ValueError("llama.cpp has one arithmetic; --arithmetic is for kernels and reference")
    else:
        arithmetic = arithmetic or {"kernels": "q8", "reference": "exact"}[engine]
    return Side(engine, arithmetic, Path(BUILT_IN if path is None else path))


def other_side(words: str, side: Side) -> Side:
    """What `--against` names: an engine (`llama.cpp`, `kernels:exact`, `reference`) for the same file, else a file for the same engine."""
    engine, _, arithmetic = words.partition(":")
    if engine in ENGINES:
        return side_of(engine, arithmetic or None, side.path)
    return Side(side.engine, side.arithmetic, Path(words))


def rows_at_once(n_vocab: int) -> int:
    """How many rows of logits are made at a time."""
    return max(1, min(MOST_ROWS, CHUNK_BYTES // (4 * n_vocab)))


def opened(side: Side, n_ctx: int, n_vocab: int, threads: int | None, stack: ExitStack, progress: Progress = silent) -> Source:
    """Loads a side; what must be closed goes onto `stack`. Raises ValueError (GGUFError, LlamaCppError, MemoryRefusal among them)."""
    size = rows_at_once(n_vocab)
    if side.engine == "llama.cpp":
        return stack.enter_context(LlamaCppRows(side.path, n_ctx, prepare(threads), size))
    if side.engine == "reference":
        return Ours(load(side.path, backend="reference", arithmetic=side.arithmetic, progress=progress), size)
    return Ours(load(side.path, arithmetic=side.arithmetic, threads=threads, n_ctx=n_ctx, progress=progress), size)
