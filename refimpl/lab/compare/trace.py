"""Traces: every named value of a run in one file, with what is needed to run it again elsewhere.

A trace file is a safetensors file. Tensors carry the names of names.py; the first axis of those of the prompt are the positions asked for.
Those of towers (image0.inp) are whole: their rows are patches, frames or soft tokens. Its metadata, under "refimpl", is a JSON object:

    format                    "refimpl trace 1"
    ids, positions            of the prompt, and of the rows; -1 - k stands for a soft token of number k of `media`
    engine, arithmetic        "refimpl 0.1.0"; "exact" or "q8" (other engines: "float32", "bfloat16", "float16", "q8")
    backend, isa, threads     how it was computed
    model, model_sha256       the file, and what identifies it
    prompt, template          the text, where there was one, and what the chat template made of it
    media                     of each picture and sound: its name before values ("image0"), what it is of, SHA-256 of what was decoded,
                              size, budget, number of soft tokens, placeholder: the id that a template has in its place
    projector, projector_sha256    the file with the towers, where there is media
    crc32                     name -> of the tensor's bytes, against damage
"""

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from refimpl.formats.safetensors import TensorFile

FORMAT = "refimpl trace 1"
ARITHMETIC = ("exact", "float32", "bfloat16", "float16", "q8")


class TraceError(ValueError):
    """A trace that cannot be read or compared. One line."""


@dataclass(frozen=True)
class Value:
    """A traced tensor: rows `positions` of it, and of its other axes, `shape` in whole, the indices `index` where not all are there."""

    array: np.ndarray
    positions: np.ndarray
    index: tuple[np.ndarray, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """A trace from anywhere. `where` names it in messages; `arrays` may read lazily; `resolution` is the step of printed values.

    `partial`: name -> Value, for tensors of which other rows than `positions`, or not all columns, are there.
    """

    where: str
    ids: tuple[int, ...]
    positions: tuple[int, ...]
    arithmetic: str
    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, object] = field(default_factory=dict)
    partial: Mapping[str, Value] = field(default_factory=dict)
    resolution: float = 0.0

    def names(self) -> list[str]:
        """What is there."""
        return [*self.arrays, *self.partial]

    def value(self, name: str) -> Value:
        """A tensor, positions in front. Towers, draft steps and rounds count their rows from 0."""
        if name in self.partial:
            return self.partial[name]
        array = self.arrays[name]
        whole = not name.startswith(("image", "audio", "draft", "round"))
        if whole and len(array) != len(self.positions):
            raise TraceError(f"{self.where}: {name} has {len(array)} rows, expected one for each of {len(self.positions)} positions")
        return Value(array, np.array(self.positions) if whole else np.arange(len(array)))


class _Checked(Mapping):
    """The tensors of a trace file, each checked against its checksum when it is read."""

    def __init__(self, file: TensorFile, crc32: Mapping[str, int]):
        self._file, self._crc32 = file, crc32

    def __getitem__(self, name: str) -> np.ndarray:
        if zlib.crc32(self._file.raw(name)) != self._crc32.get(name):
            raise TraceError(f"{self._file.path}: {name} is damaged: its checksum is not the one that was written down; trace again")
        return self._file.array(name)

    def __iter__(self):
        return iter(self._file.tensors)

    def __len__(self):
        return len(self._file.tensors)


def open_trace(path: str | os.PathLike) -> Trace:
    """Opens a trace file. Raises TraceError or CheckpointError."""
    file = TensorFile(path)
    if "refimpl" not in file.metadata:
        raise TraceError(f"{path}: expected a trace of refimpl, found another safetensors file; the trace to judge by comes first")
    try:
        header = json.loads(file.metadata["refimpl"])
        if header.pop("format") != FORMAT:
            raise TraceError(f"{path}: is no '{FORMAT}'; trace again with this version")
        ids, positions, arithmetic, crc32 = (header.pop(key) for key in ("ids", "positions", "arithmetic", "crc32"))
        if not all(re.fullmatch("(image|audio)[0-9]{1,4}", part["name"]) for part in header.get("media", ())):
            raise TraceError(f"{path}: its metadata names media otherwise than image0, audio0; trace again")
        return Trace(str(path), tuple(map(int, ids)), tuple(map(int, positions)), arithmetic, _Checked(file, crc32), header)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{path}: its metadata is not that of a trace ({type(error).__name__}: {error})") from None
