"""What llama.cpp's own tools write.

`llama-eval-callback` and `llama-debug` print every tensor of the graph: a line with name, type and sizes (innermost first), then rows of
numbers with four decimals, of which an axis longer than 6 shows its first and last 3, then the sum. `llama-debug --save-logits` writes
float32: `llamacpp-NAME.bin`, the logits of the last token, or with --embedding `llamacpp-NAME-embeddings.bin`, a state for every token;
`...-tokens.bin` beside it has the ids. (common/debug.cpp, examples/debug/debug.cpp.)
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from refimpl.lab.compare.names import place_of
from refimpl.lab.compare.trace import Trace, TraceError, Value

HEAD = re.compile(r"(?:common_debug_cb_eval|ggml_debug): +(.+?) = \((\w+)\) +\w+\(.*\) = \{(\d+), (\d+), (\d+), (\d+)\}\s*$")
NUMBERS = re.compile(r"^\s*\[\s+([-\d.naifNAIF ,]+?)\s*\],?\s*$")
SHOWN = 3                   # of each end of an axis
DECIMAL = 0.5e-4            # four decimals are off by this at most
OTHERS = ("ffn_moe_weights", "h_nextn")     # llama.cpp calls other values so (names.py)


def open_text(path: str | os.PathLike) -> Trace:
    """A printed graph. Raises TraceError, naming the line, for one that is cut short or has no tensors or ids."""
    path, found = Path(path), {}
    lines = path.read_text("utf-8", "replace").splitlines()
    ids = _ids(path, lines)
    at = 0
    while at < len(lines):
        head = HEAD.search(lines[at])
        at += 1
        if head:
            sizes = tuple(map(int, head.groups()[2:]))[::-1]
            at, array = _block(path, lines, at, head[1], sizes)
            name = head[1].strip()
            place = place_of(name)
            if place is not None and place.name not in OTHERS:
                value = _value(array, sizes, len(ids))
                if value is not None:
                    found[name] = value
    if not found:
        raise TraceError(f"{path}: no tensor with a known name; expected what llama-eval-callback or llama-debug --verbose print")
    return Trace(str(path), ids, tuple(range(len(ids))), "q8", {}, {"engine": "llama.cpp"}, found, DECIMAL)


def shown(n: int) -> np.ndarray:
    """The indices of an axis of n that are printed."""
    return np.arange(n) if n <= 2 * SHOWN else np.r_[0:SHOWN, n - SHOWN:n]


def _block(path: Path, lines: list[str], at: int, name: str, sizes: tuple[int, ...]) -> tuple[int, np.ndarray]:
    kept = [len(shown(n)) for n in sizes]
    rows: list[list[float]] = []
    first = at
    while at < len(lines) and "sum =" not in lines[at] and not HEAD.search(lines[at]):
        match = NUMBERS.match(lines[at])
        if match:
            rows.append([float(word) for word in match[1].replace("...", "").replace(",", " ").split()])
        at += 1
    if len(rows) != kept[0] * kept[1] * kept[2] or any(len(row) != kept[3] for row in rows) or at == len(lines):
        raise TraceError(f"{path}: line {first}: {name} is cut short: {len(rows)} of {kept[0] * kept[1] * kept[2]} rows")
    return at + 1, np.array(rows, np.float32).reshape(kept)


def _value(array: np.ndarray, sizes: tuple[int, ...], n_tok: int) -> Value | None:
    """Positions in front; None for a tensor that has none (or only some, at an end of the graph)."""
    while len(sizes) > 2 and sizes[0] == 1 and sizes[0] != n_tok:
        array, sizes = array[0], sizes[1:]
    if n_tok == 1:
        array, sizes = array.reshape(1, *array.shape[-2:]), (1, *sizes[-2:])
    if sizes[0] == n_tok:
        positions = shown(n_tok)
    elif sizes[0] == 1:
        positions = np.array([n_tok - 1])
    else:
        return None
    return Value(array, positions, tuple(shown(n) for n in sizes[1:]), tuple(sizes[1:]))


def _ids(path: Path, lines: list[str]) -> tuple[int, ...]:
    for i, n in _announced(lines):
        if "number of input tokens" in lines[i]:
            words = [line.split()[-1] if line.split() else "" for line in lines[i + 1:i + 1 + n]]
        else:
            words = re.findall(r"\((\d+)\) ", " ".join(lines[i + 1:i + 2]) + " ")
        if len(words) == n and all(word.isdigit() for word in words):
            return tuple(map(int, words))
    raise TraceError(f"{path}: no token ids; expected the lines after 'number of input tokens' or 'Token ids' that llama.cpp's tools print")


def _announced(lines: list[str]) -> Iterator[tuple[int, int]]:
    for i, line in enumerate(lines):
        match = re.search(r"number of input tokens = (\d+)|Token ids \((\d+)\):", line)
        if match:
            yield i, int(match[1] or match[2])


def open_bin(path: str | os.PathLike) -> Trace:
    """`--save-logits`' file, with its `-tokens.bin` beside it. Raises TraceError."""
    path = Path(path)
    tokens = path.with_name(f"{path.stem}-tokens.bin")
    if not tokens.exists():
        raise TraceError(f"{path}: {tokens.name} is missing beside it, which has the token ids")
    for file in (path, tokens):
        if not file.stat().st_size or file.stat().st_size % 4:
            raise TraceError(f"{file}: {file.stat().st_size} bytes are no whole number of 32-bit values: it is cut short")
    ids, values = np.fromfile(tokens, "<i4"), np.fromfile(path, "<f4")
    if not path.stem.endswith("-embeddings"):
        partial = {"result_output": Value(values[None], np.array([len(ids) - 1]))}
    elif len(values) % len(ids):
        raise TraceError(f"{path}: {len(values)} values for {len(ids)} tokens: it is cut short")
    else:
        state_TD = values.reshape(len(ids), -1)
        if np.abs(np.linalg.norm(state_TD, axis=1) - 1).max() < 1e-3:
            raise TraceError(f"{path}: every row has length 1: run llama-debug with --embd-normalize -1")
        partial = {"result_norm": Value(state_TD, np.arange(len(ids)))}
    return Trace(str(path), tuple(map(int, ids)), tuple(range(len(ids))), "q8", {}, {"engine": "llama.cpp"}, partial)
