"""What is wrong with, or missing in, a file that another engine wrote (convention.py), all of it at once and each with its remedy."""

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.lab.compare.engines.choose import open_any
from refimpl.lab.compare.engines.foreign import by_convention, read_npz, read_safetensors, without_batch
from refimpl.lab.compare.names import BY_NAME, TOWERS, graph_order, place_of
from refimpl.lab.compare.stages import before_tensors
from refimpl.lab.compare.towers.inputs import with_ids_of
from refimpl.lab.compare.trace import ARITHMETIC, Trace, TraceError

ALIASES = {"fp32": "float32", "f32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16",
           "half": "float16", "int8": "q8", "q8_0": "q8", "w8a8": "q8"}
NEAR = 0.6              # similarity of a name that may be a known one, of difflib
ALL_NAMES = {name.name.lower(): name for names in (*TOWERS.values(), BY_NAME.values()) for name in names}


@dataclass(frozen=True)
class Checked:
    """`wrong`: what has to be changed; `notes`: what may be meant so; `found`: what is there, in words. One line each."""

    where: str
    wrong: list[str]
    notes: list[str]
    found: str

    @property
    def ok(self) -> bool:
        """Can it be compared as it is?"""
        return not self.wrong


def check(path: str, first: Trace | None = None) -> Checked:
    """Reads a dump and says what is wrong with it; with `first`, the trace to judge it by, whether ids and shapes are those of it.

    Raises TraceError, CheckpointError or OSError for a file that cannot be read at all.
    """
    if Path(path).suffix not in (".npz", ".safetensors"):
        open_any(path)                              # which says what it is
        raise TraceError(f"{path}: --check is for files by the convention, .npz or .safetensors")
    arrays, facts = (read_npz if Path(path).suffix == ".npz" else read_safetensors)(path)
    wrong, notes = [*_ids(arrays), *_arithmetic(facts)], []
    ids, positions = arrays.get("ids", np.zeros(0, int)), arrays.get("positions")
    n_rows = len(positions) if positions is not None and positions.ndim else ids.size
    values = {name: array for name, array in arrays.items() if name not in ("ids", "positions")}
    for name, array in values.items():
        wrong += _of_value(name, array, n_rows)
    unknown = [name for name in values if place_of(name) is None]
    for name in unknown:
        near = nearest(name)
        (wrong if near else notes).append(f"{name}: no known name" + (f"; did you mean {near}?" if near else ", it is not compared"))
    known = graph_order(values)
    if not known:
        wrong.append("no array has a known name: refimpl trace --names lists them")
    wrong += _widths({name: without_batch(name, values[name], n_rows) for name in known if not _of_value(name, values[name], n_rows)})
    notes += [*_gaps(known), *_not_finite({name: values[name] for name in known})]
    if not wrong:
        try:
            dump = by_convention(path, arrays, facts)
            for name in known:
                dump.value(name)
            wrong += [] if first is None else _against(first, dump)
        except TraceError as error:
            wrong.append(str(error).removeprefix(f"{path}: "))
    layers = {place.layer for place in map(place_of, known) if place.layer is not None and not place.tower}
    found = f"{len(known)} tensors of known names, of {len(layers)} layers; {ids.size} token ids, {n_rows} positions"
    return Checked(path, wrong, notes, found)


def nearest(name: str) -> str:
    """The known name that an unknown one may stand for, with its layer, "" where there is none near."""
    match = re.fullmatch(r"(?:(?:model\.)?(?:layers?|blk)[._])?(\d+)[._](.+)|(.+?)[._-](\d+)", name)
    base, layer = (match[2] or match[3], match[1] or match[4]) if match else (name, None)
    near = base.lower() if base.lower() in ALL_NAMES else next(iter(difflib.get_close_matches(base.lower(), ALL_NAMES, 1, NEAR)), None)
    if near is None:
        return ""
    known = ALL_NAMES[near]
    return f"{known.name}-{layer if layer is not None else 'LAYER'}" if known.layered else known.name


def _ids(arrays: dict[str, np.ndarray]) -> list[str]:
    ids = arrays.get("ids")
    if ids is None:
        near = difflib.get_close_matches("ids", [name for name in arrays if arrays[name].ndim == 1], 1, 0.4)
        return ["ids is missing: the token ids of the prompt, int (T,)" + (f"; is it {near[0]}?" if near else "")]
    if ids.dtype.kind not in "iu":
        return [f"ids is {ids.dtype}, expected int: np.array(ids, np.int64)"]
    if ids.ndim != 1 or not ids.size:
        return [f"ids has the shape {ids.shape}, expected (T,), without a batch axis and not empty"]
    return []


def _arithmetic(facts: dict[str, object]) -> list[str]:
    word = facts.get("arithmetic")
    if word in ARITHMETIC:
        return []
    near = ALIASES.get(str(word).lower()) or next(iter(difflib.get_close_matches(str(word).lower(), ARITHMETIC, 1)), None)
    said = "is missing" if word is None else f"is {word!r}"
    return [f"arithmetic {said}: expected one of {', '.join(ARITHMETIC)}" + (f"; did you mean {near}?" if near else "")]


def _of_value(name: str, array: np.ndarray, n_rows: int) -> list[str]:
    if array.dtype.kind not in "fiu":
        return [f"{name} is {array.dtype}, expected numbers" + ("; save bfloat16 as float32" if array.dtype.kind == "V" else "")]
    if not array.ndim or not array.size:
        return [f"{name} has the shape {array.shape}, expected a row for each position"]
    place = place_of(name)
    rows = len(without_batch(name, array, n_rows))
    if n_rows and place is not None and place.is_of_prompt and rows != n_rows:
        remedy = ": the axes are in another order" if n_rows in array.shape else "; positions says which they are, if not all"
        return [f"{name} has the shape {array.shape}, {rows} rows, expected {n_rows}{remedy}"]
    return []


def _widths(values: dict[str, np.ndarray]) -> list[str]:
    """Tensors whose width is another one than that of others of the same letter: those of the residual stream are all D wide."""
    wide = {name: array[0].size for name, array in values.items() if not place_of(name).tower and _shape(name) == "T D"}
    if not wide:
        return []
    usual, _ = Counter(wide.values()).most_common(1)[0]
    return [f"{name} is {n} wide, others of the residual stream are {usual}" for name, n in wide.items() if n != usual]


def _shape(name: str) -> str:
    place = place_of(name)
    return next(known.shape for known in place.names if known.name == place.name)


def _gaps(known: list[str]) -> list[str]:
    """Layers that lack a tensor which those before and behind them have."""
    layers: dict[str, set[int]] = {}
    for name in known:
        place = place_of(name)
        if place.layer is not None:
            layers.setdefault(place.prefix + place.name, set()).add(place.layer)
    found = []
    for base, have in layers.items():
        kinds = Counter(np.diff(sorted(have)).tolist())
        lacking = sorted(set(range(min(have), max(have))) - have)
        if lacking and kinds[1] >= (len(have) - 1) / 2:
            found.append(f"{base} is not there of layer {', '.join(map(str, lacking[:5]))}, others are")
    return found


def _not_finite(values: dict[str, np.ndarray]) -> list[str]:
    bad = [name for name, array in values.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
    return [f"{bad[0]} has values that are NaN or infinite" + (f", {len(bad) - 1} more too" if bad[1:] else "")] if bad else []


def _against(first: Trace, dump: Trace) -> list[str]:
    """Shapes and ids by the trace that it is to be judged by."""
    _, differs = before_tensors(first, with_ids_of(first, dump))
    wrong = [] if differs is None else [differs.text]
    for name in graph_order(set(first.names()) & set(dump.names())):
        ours, theirs = first.value(name).array.shape[1:], dump.value(name).array.shape[1:]
        if np.prod(ours) != np.prod(theirs):
            wrong.append(f"{name} is {theirs} at each position, the trace has {ours}")
    return wrong
