"""Where logits come from: this package's two backends, or llama.cpp, each with one file."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from refimpl.formats.gguf import open_gguf
from refimpl.formats.hashing import files_hash, stamp
from refimpl.kernels.cores.threads import prepare
from refimpl.lab.engines import ARITHMETIC, EVALUATED, LLAMACPP, REFERENCE, known, parse
from refimpl.lab.llamacpp.client import LlamaCpp
from refimpl.loading.hub import is_remote, listed_sha256, local
from refimpl.loading.model import BUILT_IN, Model, load
from refimpl.progress import Progress, silent

CHUNK_BYTES, MOST_ROWS = 64 << 20, 512          # of logits at a time: never a whole window of a large vocabulary


@dataclass(frozen=True)
class Side:
    """An engine of lab.engines.EVALUATED and the file it runs. `arithmetic` is None for llama.cpp, which has one.

    `name` is how any machine finds the file: an absolute path, hf:..., or "" for the built-in model. Whether it is the right one there is
    told by `sha256`, or, between processes of one machine, by `stamps` (size and time of each of its parts). `identified` fills them in.
    """

    engine: str
    arithmetic: str | None
    path: Path
    name: str
    sha256: str | None = None
    stamps: tuple | None = None

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


def side_of(engine: str, arithmetic: str | None, model: str | Path | None) -> Side:
    """Checks what can be checked before anything is loaded; a model hf:... is downloaded. None: the built-in one. Raises ValueError."""
    if known(engine, EVALUATED) == LLAMACPP:
        LlamaCpp.check()
        if arithmetic is not None:
            raise ValueError("llama.cpp has one arithmetic; --arithmetic is for kernels and reference")
    else:
        arithmetic = arithmetic or ARITHMETIC[engine]
    if model is None:
        return Side(engine, arithmetic, Path(BUILT_IN), "")
    path = local(model)
    return Side(engine, arithmetic, path, str(model) if is_remote(model) else str(path.absolute()))


def other_side(text: str, side: Side) -> Side:
    """What `--against` names: an engine (`llama.cpp`, `kernels:exact`, `reference`) for the same file, else a file for the same engine."""
    engine, rest = parse(text, EVALUATED)
    if engine is not None:
        return replace(side_of(engine, rest or None, None), path=side.path, name=side.name)
    return side_of(side.engine, side.arithmetic, text)


def identified(side: Side, hashed: bool, near: bool) -> Side:
    """The side with what its file is known by: the SHA-256 of all parts if `hashed`, stamps if all work is done `near`, on this machine.

    Raises GGUFError, OSError.
    """
    with open_gguf(side.path) as file:
        paths = file.files()
    return replace(side, stamps=tuple(map(tuple, map(stamp, paths))) if near else None, sha256=sha256_of(paths) if hashed else None)


def sha256_of(paths: Sequence[Path]) -> str:
    """SHA-256 of the parts of a model; for one file in the hub's cache the one that was checked when it came. Raises OSError."""
    listed = listed_sha256(paths[0]) if len(paths) == 1 else None
    return listed or _hashed(tuple(tuple(stamp(path)) for path in paths))


@functools.cache
def _hashed(stamps: tuple) -> str:
    return files_hash(path for path, *_ in stamps)


def located(side: Side) -> Path:
    """The file of an identified side in this process, which may be on another machine. Raises ValueError where it is missing or is another
    one; GGUFError.
    """
    path = local(side.name) if side.name else Path(BUILT_IN)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    with open_gguf(path) as file:
        paths = file.files()
    if side.stamps is not None:
        if tuple(map(tuple, map(stamp, paths))) != side.stamps:
            raise ValueError(f"{path}: has changed since the start")
    elif (theirs := sha256_of(paths)) != side.sha256:
        raise ValueError(f"{path}: is another file: SHA-256 {theirs}, expected {side.sha256}")
    return path


def rows_at_once(n_vocab: int) -> int:
    """How many rows of logits are made at a time."""
    return max(1, min(MOST_ROWS, CHUNK_BYTES // (4 * n_vocab)))


def opened(side: Side, n_ctx: int, n_vocab: int, threads: int | None, stack: ExitStack, progress: Progress = silent) -> LogitSource:
    """Loads a side; what must be closed goes onto `stack`. Raises ValueError (LlamaCppError, MemoryRefusal among them), GGUFError."""
    path, size = located(side), rows_at_once(n_vocab)
    if side.engine == LLAMACPP:
        return stack.enter_context(LlamaCpp(path, n_ctx, prepare(threads), size))
    if side.engine == REFERENCE:
        return ModelSource(load(path, backend="reference", arithmetic=side.arithmetic, progress=progress), size)
    return ModelSource(load(path, arithmetic=side.arithmetic, threads=threads, n_ctx=n_ctx, progress=progress), size)
