"""What an evaluation keeps: a file for each window while it runs, so that it can be resumed, and one file of all at the end.

    RUN              a NumPy .npz: for every token that counts its figures (COLUMNS), and the windows themselves, so that another file or
                     engine can be held against it later (`--base RUN`)
    RUN.parts/       while it runs: about.json, which says what is being measured, and one .npz for each finished window

Every file appears under its name when it is complete. A part that cannot be read is as good as none.
"""

import json
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.lab.evaluate.divergence import Kept
from refimpl.lab.evaluate.windows import Window

VERSION = 1
KEPT = {"log_sum": "<f8", "top_id": "<i4", "top_logit": "<f4"}
COLUMNS = {"nll": "<f8", **KEPT, "base_nll": "<f8", "kl_low": "<f8", "kl_high": "<f8", "same_top": "|u1", "shared_top": "|u1"}
"""By column: minus the logarithm of the token's probability, in nats; the fields of `divergence.Kept`; and, of a comparison, the base's
nll, the two bounds of the divergence (equal where it is exact), whether the most probable token is the same, how many of the most probable
ones are."""


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]):
    """The file is complete or not there at all. OSError names it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise OSError(e.errno, e.strerror or str(e), os.fspath(path)) from e
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file. Raises ValueError, in one line, for one that is no .npz or damaged; OSError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError
            return {key: file[key] for key in file.files}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, zlib.error) as e:
        raise ValueError(f"{path}: is no run of refimpl eval, or a damaged one") from e


class Journal:
    """The finished windows, on disk."""

    def __init__(self, output: Path, about: Mapping[str, object], windows: Sequence[Window]):
        """Resumes what is there. Raises ValueError where it belongs to another evaluation than `about`."""
        self.output, self.windows = output, windows
        self.folder = output.with_name(output.name + ".parts")
        note = self.folder / "about.json"
        text = json.dumps(about, indent=1, sort_keys=True)
        if self.folder.exists():
            try:
                there = json.loads(note.read_text("utf-8"))
            except (OSError, ValueError):
                there = None
            if there is None and any(self.folder.glob("*.npz")) or there is not None and there != json.loads(text):
                differ = sorted(key for key in about if there is None or there.get(key) != json.loads(text)[key])
                raise ValueError(f"{self.folder} holds another evaluation (other {', '.join(differ)}); delete it, or name another output")
        self.folder.mkdir(exist_ok=True)
        temporary = note.with_name(f".about.{secrets.token_hex(4)}.tmp")
        temporary.write_text(text, "utf-8")
        os.replace(temporary, note)

    def done(self) -> dict[int, dict[str, np.ndarray]]:
        """The figures of every finished window, by its number."""
        found = {}
        for number, window in enumerate(self.windows):
            try:
                part = read_npz(self._part(number))
            except (OSError, ValueError):
                continue
            if part.get("nll", np.empty(0)).shape == (window.n_counted,):
                found[number] = part
        return found

    def add(self, number: int, part: Mapping[str, np.ndarray]):
        """A window is done."""
        write_npz(self._part(number), part)

    def close(self):
        """Removes the parts: all is in the output."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"


@dataclass(frozen=True)
class Run:
    """A run that was read: what it says of itself, its windows, and its figures by column, those of all windows one after the other."""

    about: dict[str, object]
    windows: list[Window]
    columns: dict[str, np.ndarray]

    def nll(self, number: int) -> np.ndarray:
        """The column nll of a window."""
        first = self._first(number)
        return self.columns["nll"][first:first + self.windows[number].n_counted]

    def kept(self, number: int) -> Callable[[int], Kept]:
        """A function from the row of a window to what is kept of it."""
        first = self._first(number)
        log_sum, top_id, top_logit = (self.columns[key] for key in KEPT)
        return lambda row: Kept(float(log_sum[first + row]), top_id[first + row], top_logit[first + row])

    def _first(self, number: int) -> int:
        return sum(window.n_counted for window in self.windows[:number])


def write_run(path: Path, about: Mapping[str, object], windows: Sequence[Window], columns: Mapping[str, np.ndarray]):
    """`path` as a whole. OSError names it."""
    text = np.frombuffer(json.dumps(about | {"version": VERSION}).encode(), np.uint8)
    numbers = np.array([(len(window.ids), window.first, window.document) for window in windows], np.int64)
    ids = np.concatenate([np.array(window.ids, np.int32) for window in windows])
    write_npz(path, {"about": text, "window_numbers": numbers, "window_ids": ids, **columns})


def read_run(path: Path) -> Run:
    """A run written by `write_run`. Raises ValueError, in one line, for anything else; OSError."""
    arrays = read_npz(path)
    try:
        about = json.loads(arrays.pop("about").tobytes())
        numbers, ids = arrays.pop("window_numbers"), arrays.pop("window_ids")
        if about["version"] != VERSION:
            raise ValueError(f"has version {about['version']}, expected {VERSION}")
        ends = np.cumsum(numbers[:, 0]).tolist()
        windows = [Window(int(document), tuple(ids[end - length:end].tolist()), int(first))
                   for (length, first, document), end in zip(numbers.tolist(), ends)]
        total = sum(window.n_counted for window in windows)
        if ends[-1] != len(ids) or any(not 0 < window.first < len(window.ids) for window in windows):
            raise ValueError("has windows that are not in it")
        n_vocab, n_top = int(about["n_vocab"]), int(about["n_top"])
        for key in ("nll", *KEPT):
            wide = (total, n_top) if key.startswith("top") else (total,)
            if arrays[key].shape != wide or arrays[key].dtype != np.dtype(COLUMNS[key]):
                raise ValueError(f"has no column {key} of {wide}")
        for found, what in ((ids, "windows"), (arrays["top_id"], "kept tokens")):
            if found.dtype != np.int32 or found.min() < 0 or found.max() >= n_vocab:
                raise ValueError(f"has {what} outside of its vocabulary")
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError) as e:
        raise ValueError(f"{path}: is no run of refimpl eval, or a damaged one: {e}") from None
    return Run(about, windows, arrays)
