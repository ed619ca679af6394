"""From texts to windows of token ids: what is run, and which tokens of it count.

A document is what the model is shown first (`prefix`, which never counts) and the tokens to be scored. Where the model has a chat
template, a text is taken as its answer to the request REQUEST, and a conversation gives one document for every turn of the model, with
all turns before it as the prefix: an instruction-tuned model predicts nothing well outside of a conversation. Otherwise, and on demand, the
prefix is <bos>.

    every         windows of n_ctx tokens, each `stride` after the one before, with the prefix in front of each; every token of the document
                  counts once, in the first window that reaches it, and so has at least n_ctx - stride tokens of context there
                  (or all that there is)
    second-half   as llama.cpp's perplexity has it: windows side by side, the first token of each replaced by <bos>, what makes no whole
                  window left out; of n_ctx tokens the last n_ctx - n_ctx // 2 - 1 count
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.text.chat import encode_chat
from refimpl.text.tokenizer import BYTE, SPACE, Tokenizer

COUNTS = ("every", "second-half")
REQUEST = "Write a text."
MODEL_ROLES = ("assistant", "model")


@dataclass(frozen=True)
class Document:
    """One text. `name` is where it came from."""

    name: str
    prefix: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """`ids[:-1]` are run, `ids[first:]` count: each is predicted at the position before it. `document` is the index of its document."""

    document: int
    ids: tuple[int, ...]
    first: int

    @property
    def n_counted(self) -> int:
        """Tokens that count."""
        return len(self.ids) - self.first


def read_documents(paths: Sequence[Path], tokenizer: Tokenizer, template: str | None) -> list[Document]:
    """The documents of text files, one each, and of files whose names end in .jsonl, one a line: {"text": "..."} or {"messages": [...]}.

    `template` None: as raw text. Raises ValueError, naming file and line, for what is no such thing; OSError.
    """
    found = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: at byte {e.start}: not UTF-8 text") from None
        if Path(path).suffix != ".jsonl":
            found.append(_of_text(str(path), text, tokenizer, template))
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                found += _of_line(f"{path}:{number}", line, tokenizer, template)
    found = [document for document in found if document.ids]
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no text in there")
    return found


def _of_text(name: str, text: str, tokenizer: Tokenizer, template: str | None) -> Document:
    if template is None:
        return Document(name, (tokenizer.bos,), tuple(tokenizer.encode(text, bos=False)))
    return Document(name, tuple(encode_chat(tokenizer, template, [{"role": "user", "content": REQUEST}])),
                    tuple(tokenizer.encode(text.strip(), bos=False)))


def _of_line(name: str, line: str, tokenizer: Tokenizer, template: str | None) -> list[Document]:
    try:
        content = json.loads(line)
    except ValueError:
        content = None
    text, messages = (content.get("text"), content.get("messages")) if isinstance(content, dict) else (None, None)
    if isinstance(text, str) and messages is None:
        return [_of_text(name, text, tokenizer, template)]
    plain = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages)
    if text is not None or not plain:
        raise ValueError(f'{name}: expected {{"text": "..."}} or {{"messages": [{{"role": "...", "content": "..."}}, ...]}}')
    if template is None:
        raise ValueError(f"{name}: a conversation needs a file with a chat template, and no --raw")
    if messages[0]["role"] in MODEL_ROLES:
        raise ValueError(f"{name}: the first message is the model's own, with nothing to answer")
    return [Document(f"{name}, message {i}", tuple(encode_chat(tokenizer, template, messages[:i])),
                     tuple(tokenizer.encode(message["content"].strip(), bos=False)))
            for i, message in enumerate(messages) if message["role"] in MODEL_ROLES]


def cut(documents: Sequence[Document], n_ctx: int, stride: int, count: str, bos: int) -> list[Window]:
    """The windows of all documents; none crosses from one into the next. Raises ValueError where nothing can be counted."""
    if count == "second-half":
        windows = [window for i, document in enumerate(documents) for window in _second_halves(i, document, n_ctx, bos)]
        if not windows:
            raise ValueError(f"no text makes a whole window of {n_ctx} tokens; a smaller context (-c) helps")
        return windows
    return [window for i, document in enumerate(documents) for window in _every(i, document, n_ctx, stride)]


def _every(i: int, document: Document, n_ctx: int, stride: int) -> list[Window]:
    prefix, ids = document.prefix, document.ids
    width = n_ctx + 1 - len(prefix)                     # the last token is predicted, and not run
    if not prefix:
        raise ValueError(f"{document.name}: the chat template makes nothing of what goes before it")
    if width < 1:
        raise ValueError(f"{document.name}: what goes before it takes {len(prefix)} tokens of a context of {n_ctx}; "
                         "a larger one (-c) helps")
    stride = min(stride, width)
    windows, low, done = [], 0, 0
    while done < len(ids):
        end = min(low + width, len(ids))
        windows.append(Window(i, prefix + ids[low:end], len(prefix) + done - low))
        low, done = low + stride, end
    return windows


def _second_halves(i: int, document: Document, n_ctx: int, bos: int) -> list[Window]:
    if document.prefix != (bos,):
        raise ValueError(f"{document.name}: the second halves of windows are for raw text: --raw")
    ids = (*document.prefix, *document.ids)
    return [Window(i, (bos, *ids[low + 1:low + n_ctx]), n_ctx // 2 + 1) for low in range(0, len(ids) - n_ctx + 1, n_ctx)]


def bytes_of(ids: np.ndarray, tokenizer: Tokenizer, token_type_V: np.ndarray) -> int:
    """Bytes of text that these tokens stand for, in UTF-8."""
    distinct, times = np.unique(ids, return_counts=True)
    sizes = [1 if token_type_V[i] == BYTE else len(tokenizer.token(i).replace(SPACE, " ").encode()) for i in distinct.tolist()]
    return int(np.dot(times, sizes))
