"""What an evaluation keeps: a file for each window while it runs, so that it can be resumed, and one file of all at the end.

    RUN              Parquet (run_files.py): the windows and the figures of their tokens, so that another file or engine can be held
                     against them later (`--base RUN`)
    RUN.parts/       while it runs: about.json, which says what is being measured, and one Parquet file for each finished window

Every file appears under its name when it is complete. A part that cannot be read is as good as none.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.lab.evaluate.divergence import Kept
from refimpl.lab.evaluate.run_files import COLUMNS, KEPT, Part, read_windows, write_windows
from refimpl.lab.evaluate.windows import Window

VERSION = 2


class Journal:
    """The finished windows, on disk."""

    def __init__(self, folder: Path, about: Mapping[str, object], windows: Sequence[Window]):
        """Resumes what is there. Raises ValueError where it belongs to another evaluation than `about`."""
        self.folder, self.windows, self.about = folder, windows, about
        note = folder / "about.json"
        text = json.dumps(about, indent=1, sort_keys=True)
        if folder.exists():
            try:
                there = json.loads(note.read_text("utf-8"))
            except (OSError, ValueError):
                there = None
            if there is None and any(folder.glob("[0-9]*.parquet")) or there is not None and there != json.loads(text):
                differ = sorted(key for key in about if there is None or there.get(key) != json.loads(text)[key])
                raise ValueError(f"{folder} holds another evaluation (other {', '.join(differ)}); delete it, or name another output")
        folder.mkdir(exist_ok=True, parents=True)
        temporary = note.with_name(f".about.{secrets.token_hex(4)}.tmp")
        temporary.write_text(text, "utf-8")
        os.replace(temporary, note)

    def done(self) -> dict[int, Part]:
        """The figures of every finished window, by its number."""
        found = {}
        for number, window in enumerate(self.windows):
            try:
                _, windows, parts = read_windows(self._part(number))
            except (OSError, ValueError):
                continue
            if len(windows) == 1 and windows[0].ids == window.ids and windows[0].first == window.first:
                found[number] = parts[0]
        return found

    def add(self, number: int, part: Part, document: str):
        """A window of the document of this name is done."""
        window = self.windows[number]
        write_windows(self._part(number), {}, [Window(0, window.ids, window.first)], [part], [document])

    def close(self):
        """Removes the parts: all is in the output."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:06d}.parquet"


def parts_folder(output: Path) -> Path:
    """Where the finished windows of an output are."""
    return output.with_name(output.name + ".parts")


@dataclass(frozen=True)
class Run:
    """A run that was read: what it says of itself, its windows, and their figures."""

    about: dict[str, object]
    windows: list[Window]
    parts: list[Part]

    def kept(self, number: int) -> dict[str, np.ndarray]:
        """The columns of a window that a comparison needs: nll and KEPT."""
        return {key: self.parts[number].columns[key] for key in ("nll", *KEPT)}


def kept_rows(columns: Mapping[str, np.ndarray]) -> Callable[[int], Kept]:
    """A function from the row of a window to what is kept of it. `columns` as of `Run.kept`."""
    log_sum, top_id, top_logit = (columns[key] for key in KEPT)
    return lambda row: Kept(float(log_sum[row]), top_id[row], top_logit[row])


def write_run(path: Path, about: Mapping[str, object], windows: Sequence[Window], parts: Sequence[Part]):
    """`path` as a whole. OSError names it."""
    write_windows(path, {**about, "version": VERSION}, windows, parts, about["documents"])


def read_run(path: Path) -> Run:
    """A run written by `write_run`. Raises ValueError, in one line, for anything else; OSError."""
    about, windows, parts = read_windows(path)
    try:
        if about["version"] != VERSION:
            raise ValueError(f"has version {about['version']}, expected {VERSION}")
        n_vocab, n_top, documents = int(about["n_vocab"]), int(about["n_top"]), about["documents"]
        if not windows or any(not 0 <= window.document < len(documents) for window in windows):
            raise ValueError("has no windows, or some of no document")
        for window, part in zip(windows, parts):
            ids = np.array(window.ids)
            for key in ("nll", *KEPT):
                wide = (window.n_counted, n_top) if key.startswith("top") else (window.n_counted,)
                if part.columns[key].shape != wide or part.columns[key].dtype != np.dtype(COLUMNS[key]):
                    raise ValueError(f"has no column {key} of {wide}")
            for found, what in ((ids, "windows"), (part.columns["top_id"], "kept tokens")):
                if found.min() < 0 or found.max() >= n_vocab:
                    raise ValueError(f"has {what} outside of its vocabulary")
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError) as e:
        raise ValueError(f"{path}: is no run of refimpl eval, or a damaged one: {e}") from None
    return Run(about, windows, parts)
