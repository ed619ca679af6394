"""Tensors that any engine can write: `.npz` or `.safetensors` by the convention of convention.py."""

import os
import zipfile
from collections.abc import Mapping

import numpy as np

from refimpl.formats.safetensors import TensorFile
from refimpl.lab.compare.engines.convention import NUMBERS, OPTIONAL, WORDS
from refimpl.lab.compare.trace import ARITHMETIC, Trace, TraceError


def open_npz(path: str | os.PathLike) -> Trace:
    """A `.npz` file. Raises TraceError, naming the file and what is wrong."""
    arrays, words = read_npz(path)
    return by_convention(str(path), arrays, words)


def read_npz(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """(arrays, words and single numbers by their keys) of a `.npz` file. Raises TraceError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError, AttributeError, OSError, NotImplementedError) as error:
        text = " ".join(str(error).split())
        if "pickle" in text and zipfile.is_zipfile(path):
            raise TraceError(f"{path}: an array in it holds Python objects, which are not read; save numbers and words") from None
        raise TraceError(f"{path}: cannot be read as .npz, it may be cut short ({text})") from None
    facts = {key: _word(path, key, arrays.pop(key)) for key in ("arithmetic", *WORDS) if key in arrays}
    return arrays, facts | {key: arrays.pop(key).tolist() for key in NUMBERS if key in arrays}


def open_safetensors(path: str | os.PathLike) -> Trace:
    """A `.safetensors` file that is no trace of ours. Raises TraceError or CheckpointError."""
    return by_convention(str(path), *read_safetensors(path))


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """(arrays, words and single numbers by their keys) of a `.safetensors` file. Raises CheckpointError."""
    file = TensorFile(path)
    facts: dict[str, object] = {key: file.metadata[key] for key in ("arithmetic", *OPTIONAL) if key in file.metadata}
    for key in NUMBERS:
        if key in facts:
            try:
                facts[key] = float(facts[key]) if key == "temperature" else int(facts[key])
            except ValueError:
                raise TraceError(f"{path}: expected '{key}' to be a number, found {facts[key]!r}") from None
    return {name: file.array(name) for name in file.tensors}, facts


def by_convention(where: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, object]) -> Trace:
    """The trace in arrays that follow the convention. Raises TraceError."""
    arrays, facts = dict(arrays), dict(facts)
    ids, arithmetic = arrays.pop("ids", None), facts.pop("arithmetic", None)
    if ids is None or ids.dtype.kind not in "iu" or ids.ndim != 1 or not len(ids):
        raise TraceError(f"{where}: expected an array 'ids' with the prompt's token ids, int (T,)")
    if arithmetic not in ARITHMETIC:
        raise TraceError(f"{where}: expected 'arithmetic' to be one of {', '.join(ARITHMETIC)}, found {arithmetic!r}")
    positions = arrays.pop("positions", np.arange(len(ids)))
    if (positions.ndim != 1 or positions.dtype.kind not in "iu" or not len(positions) or positions[0] < 0 or positions[-1] >= len(ids)
            or (np.diff(positions.astype(np.int64)) <= 0).any()):
        raise TraceError(f"{where}: expected 'positions' to be int (R,), rising, each from 0 to {len(ids) - 1}")
    _check_sampled(where, facts)
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise TraceError(f"{where}: {name} is of type {array.dtype}, expected numbers; store bfloat16 as float32")
        if not array.ndim:
            raise TraceError(f"{where}: {name} is a single number, expected rows of positions")
        arrays[name] = without_batch(name, array, len(positions))
    return Trace(where, tuple(map(int, ids)), tuple(map(int, positions)), str(arithmetic), arrays, facts)


def without_batch(name: str, array: np.ndarray, n_rows: int) -> np.ndarray:
    """A value without the axis of 1 in front that a batch has."""
    of_tower = name.startswith(("image", "audio")) and "." in name
    if array.shape[:1] == (1,) and (array.ndim > 2 if of_tower else array.shape[1:2] == (n_rows,) != (1,)):
        return array[0]
    return array


def write_npz(path: str | os.PathLike, trace: Trace):
    """A trace as another engine would write it, one tensor in memory at a time."""
    facts = {key: trace.facts[key] for key in OPTIONAL if trace.facts.get(key) is not None}
    few = {"ids": np.array(trace.ids, np.int64), "positions": np.array(trace.positions, np.int64), "arithmetic": trace.arithmetic} | facts
    with zipfile.ZipFile(path, "w", allowZip64=True) as out:
        for name in (*few, *trace.names()):
            array = np.asarray(few[name]) if name in few else trace.value(name).array
            with out.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array) if array.ndim else array, allow_pickle=False)


def _word(path: str | os.PathLike, key: str, array: np.ndarray) -> str:
    """A word: as str, bytes in UTF-8, or these as an array of uint8."""
    if array.dtype.kind == "U" and array.size == 1:
        return array.item()
    try:
        if array.dtype.kind == "S" and array.size == 1:
            return array.item().decode()
        if array.dtype == np.uint8 and array.ndim == 1:
            return array.tobytes().decode()
    except UnicodeDecodeError:
        raise TraceError(f"{path}: '{key}' is no text in UTF-8") from None
    raise TraceError(f"{path}: expected '{key}' to be one word, str or bytes, found {array.dtype} {array.shape}")


def _check_sampled(where: str, facts: dict[str, object]):
    """Numbers that belong to a sampled id: each a single one, the temperature with it."""
    for key in NUMBERS:
        value = facts.get(key)
        if isinstance(value, list) and len(value) == 1:
            value = facts[key] = value[0]
        if value is not None and (type(value) not in ((int, float) if key == "temperature" else (int,)) or not 0 <= value < 2**64):
            raise TraceError(f"{where}: expected '{key}' to be one number, {'0 or more' if key == 'temperature' else 'int'}, found "
                             f"{str(value):.40}")
    if "sampled" in facts and "temperature" not in facts:
        raise TraceError(f"{where}: 'sampled' needs the 'temperature' beside it, 0 for greedy")
