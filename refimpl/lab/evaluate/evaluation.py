"""One file on one engine and the windows of a text: what is to be measured, what has been, what comes out.

A window's figures depend on nothing but the window, so that any number of processes, and a run that was killed and resumed, give the same
numbers; they are added up in the order of the text.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import refimpl
from refimpl.formats.gguf import GGUFFile, open_gguf
from refimpl.formats.hashing import code_hash, file_hash
from refimpl.lab.evaluate.logit_sources import Side, identified
from refimpl.lab.evaluate.measure import TOP, WindowTask
from refimpl.lab.evaluate.run_files import Part
from refimpl.lab.evaluate.saved_runs import Journal, Run, read_run
from refimpl.lab.evaluate.summary import summary
from refimpl.lab.evaluate.windows import COUNTS, cut, read_documents
from refimpl.model.config import config_from_gguf
from refimpl.model.weights import vocabulary_size
from refimpl.text.templates import CONTINUATION_TEMPLATE
from refimpl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Cutting:
    """How texts become windows (windows.py): `stride` None is half of `n_ctx`, `raw` no chat template, `n_windows` the first ones only."""

    n_ctx: int = 512
    stride: int | None = None
    count: str = "every"
    raw: bool = False
    n_windows: int | None = None

    def __post_init__(self):
        if self.count not in COUNTS or self.n_ctx < 2 or self.stride is not None and not 1 <= self.stride <= self.n_ctx:
            raise ValueError(f"count={self.count!r}, n_ctx={self.n_ctx}, stride={self.stride}: no windows can be made of that")


class Evaluation:
    """What `evaluate` and `sweep` measure. `notes` are for the user; `parts` are the figures that there are, by the window's number."""

    def __init__(self, side: Side, texts: Sequence[Path], cutting: Cutting, against: Side | None = None, base: Path | None = None,
                 n_top: int = 0, hashed: bool = False, near: bool = True):
        """Reads texts and headers. `texts` are files (windows.read_documents); with `base`, a run that was kept, its own windows are taken.

        `n_top` most probable tokens are kept. `hashed`: files are known by their SHA-256, `near`: by stamps. Raises ValueError, GGUFError,
        OSError.
        """
        if bool(texts) == (base is not None) or against is not None and base is not None:
            raise ValueError("an evaluation needs a text, or a run to compare with, which has its own; and one thing to compare with")
        self.notes, self.parts, self.n_top = [], {}, n_top
        self.side, self.base_path = identified(side, hashed, near), base
        self.against = None if against is None else identified(against, hashed, near)
        self.file = open_gguf(side.path)
        self.config = config_from_gguf(self.file.metadata, self.file.tensors.keys(), vocabulary_size(self.file), self.file.path)
        self.tokenizer = Tokenizer.from_metadata(self.file.metadata, str(self.file.path))
        self.base: Run | None = None if base is None else read_run(base)
        if self.base is None:
            windows, cut_as = _windows_of(texts, self.file, self.tokenizer, cutting, self.notes)
        else:
            windows = self.base.windows
            cut_as = {key: self.base.about[key] for key in ("n_ctx", "stride", "count", "form", "documents")}
            _same_vocabulary(base, self.base.about["vocabulary"], self.file)
        if against is not None:
            with open_gguf(against.path) as other:
                _same_vocabulary(against.path, vocabulary_hash(other), self.file)
        self.windows, self.journal = windows[:cutting.n_windows], None
        self.n_ctx = max(len(window.ids) - 1 for window in self.windows)
        if self.n_ctx > self.config.n_ctx:
            raise ValueError(f"{self.file.path}: a window of {self.n_ctx} tokens, the model's context is {self.config.n_ctx}")
        self.about = cut_as | {"model": str(side), "n_vocab": self.config.n_vocab, "n_top": min(n_top, self.config.n_vocab),
                               "vocabulary": vocabulary_hash(self.file), "windows": len(self.windows)}

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return sum(window.n_counted for window in self.windows)

    def identity(self) -> dict[str, object]:
        """What the figures depend on: of two evaluations with the same one they are equal. The sides must be hashed."""
        windows = hashlib.sha256(repr([(window.ids, window.first) for window in self.windows]).encode()).hexdigest()
        return self.about | {"refimpl": refimpl.__version__, "code": code_hash(), "sha256": self.side.sha256, "tokens": windows,
                             "against": str(self.against), "against_sha256": self.against and self.against.sha256,
                             "base_sha256": self.base_path and file_hash(self.base_path)}

    def resume(self, folder: Path):
        """Keeps every finished window in `folder` from now on, and takes up those that are there. Raises ValueError as `Journal`."""
        self.journal = Journal(folder, self.identity(), self.windows)
        self.parts = self.journal.done()
        if self.parts:
            self.notes.append(f"resumed: {len(self.parts)} of {len(self.windows)} windows were done")

    def missing(self) -> list[int]:
        """The windows that have no figures yet."""
        return [number for number in range(len(self.windows)) if number not in self.parts]

    def tasks(self, numbers: Sequence[int], n_ctx: int, threads: int | None) -> Iterator[tuple[int, WindowTask]]:
        """(number, task) of these windows, with models opened for a context of `n_ctx`, at least the evaluation's own."""
        for number in numbers:
            kept = None if self.base is None else self.base.kept(number)
            yield number, WindowTask(number, self.windows[number], self.side, self.against, kept, n_ctx, self.config.n_vocab, self.n_top,
                                     threads)

    def add(self, number: int, part: Part):
        """A window is done. Raises OSError where it cannot be kept."""
        if self.journal is not None:
            self.journal.add(number, part, self.about["documents"][self.windows[number].document])
        self.parts[number] = part

    def result(self) -> dict[str, object]:
        """The figures of all windows together, when all are there."""
        parts = self.in_order()
        columns = {key: np.concatenate([part.columns[key] for part in parts]) for key in parts[0].columns}
        token_types = np.asarray(self.file.metadata["tokenizer.ggml.token_type"])
        return summary(columns, self.windows, self.about["documents"], self.tokenizer, token_types, TOP)

    def in_order(self) -> list[Part]:
        """The figures of all windows, when all are there."""
        return [self.parts[number] for number in range(len(self.windows))]


def _windows_of(texts: Sequence[Path], file: GGUFFile, tokenizer: Tokenizer, cutting: Cutting, notes: list[str]):
    """(windows, how they were cut)."""
    template = file.metadata.get("tokenizer.chat_template")
    trained = isinstance(template, str) and template != CONTINUATION_TEMPLATE
    chat = trained and not cutting.raw
    if cutting.raw and trained:
        notes.append("raw text: the perplexity of an instruction-tuned model means nothing on it; compare engines with it, not models")
    stride = max(1, cutting.n_ctx // 2) if cutting.stride is None else cutting.stride
    documents = read_documents(texts, tokenizer, template if chat else None)
    windows = cut(documents, cutting.n_ctx, stride, cutting.count, tokenizer.bos)
    return windows, {"n_ctx": cutting.n_ctx, "stride": cutting.n_ctx if cutting.count == "second-half" else stride, "count": cutting.count,
                     "form": "chat" if chat else "raw", "documents": [document.name for document in documents]}


def vocabulary_hash(file: GGUFFile) -> str:
    """SHA-256 of the tokens in order: models with the same one can be compared."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    return hashlib.sha256("\n".join(map(repr, tokens)).encode()).hexdigest() if tokens is not None else ""


def _same_vocabulary(path: Path, theirs: str, file: GGUFFile):
    if theirs != vocabulary_hash(file):
        raise ValueError(f"{path}: has another vocabulary than {file.path}; only models with the same one can be compared")
