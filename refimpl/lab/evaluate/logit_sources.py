"""Where logits come from: this package's two backends, or llama.cpp, each with one file."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from refimpl.kernels.cores.threads import prepare
from refimpl.lab.engines import ARITHMETIC, EVALUATED, LLAMACPP, REFERENCE, known, parse
from refimpl.lab.llamacpp.client import LlamaCpp
from refimpl.loading.model import BUILT_IN, Model, load
from refimpl.progress import Progress, silent

CHUNK_BYTES, MOST_ROWS = 64 << 20, 512          # of logits at a time: never a whole window of a large vocabulary


@dataclass(frozen=True)
class Side:
    """An engine of lab.engines.EVALUATED and the file it runs. `arithmetic` is None for llama.cpp, which has one."""

    engine: str
    arithmetic: str | None
    path: Path

    def __str__(self) -> str:
        how = self.engine if self.arithmetic is None else f"{self.engine}, {self.arithmetic}"
        return f"{self.path.name} ({how})"


class LogitSource(Protocol):
    """Something that gives logits."""

    def rows(self, ids: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """Logits at positions first, first + 1, ... of `ids`, float32 (some, V) at a time: of every source the same numbers of rows."""


class ModelSource:
    """A model of this package as a LogitSource."""

    def __init__(self, model: Model, size: int):
        self.model, self.size = model, size

    def rows(self, ids: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """As in LogitSource."""
        state_TD = self.model.prefill(ids, self.model.new_cache(len(ids)))[first:]
        for start in range(0, len(state_TD), self.size):
            yield self.model.head(state_TD[start:start + self.size])


def side_of(engine: str, arithmetic: str | None, path: Path | None) -> Side:
    """Checks what can be checked before anything is loaded. Raises ValueError."""
    if known(engine, EVALUATED) == LLAMACPP:
        LlamaCpp.check()
        if arithmetic is not None:
            raise ValueError("llama.cpp has one arithmetic; --arithmetic is for kernels and reference")
    else:
        arithmetic = arithmetic or ARITHMETIC[engine]
    return Side(engine, arithmetic, Path(BUILT_IN if path is None else path))


def other_side(text: str, side: Side) -> Side:
    """What `--against` names: an engine (`llama.cpp`, `kernels:exact`, `reference`) for the same file, else a file for the same engine."""
    engine, rest = parse(text, EVALUATED)
    if engine is not None:
        return side_of(engine, rest or None, side.path)
    return Side(side.engine, side.arithmetic, Path(text))


def rows_at_once(n_vocab: int) -> int:
    """How many rows of logits are made at a time."""
    return max(1, min(MOST_ROWS, CHUNK_BYTES // (4 * n_vocab)))


def opened(side: Side, n_ctx: int, n_vocab: int, threads: int | None, stack: ExitStack, progress: Progress = silent) -> LogitSource:
    """Loads a side; what must be closed goes onto `stack`. Raises ValueError (GGUFError, LlamaCppError, MemoryRefusal among them)."""
    size = rows_at_once(n_vocab)
    if side.engine == LLAMACPP:
        return stack.enter_context(LlamaCpp(side.path, n_ctx, prepare(threads), size))
    if side.engine == REFERENCE:
        return ModelSource(load(side.path, backend="reference", arithmetic=side.arithmetic, progress=progress), size)
    return ModelSource(load(side.path, arithmetic=side.arithmetic, threads=threads, n_ctx=n_ctx, progress=progress), size)
