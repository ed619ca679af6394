"""A prompt as ids: text, ids, parts, or the messages of a conversation. A picture or a sound stands in it as soft tokens, between the
markers that the model was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from refimpl.media.parts import Audio, Image
from refimpl.model.soft import NO_SOFT, Soft, SoftTokens
from refimpl.text.chat import ChatError, encode_chat
from refimpl.text.tokenizer import Tokenizer

Part = str | Sequence[int] | Image | Audio
"""Text, token ids, a picture or a sound."""
Prompt = str | Sequence[int] | Sequence[Part] | Sequence[Mapping[str, object]]
"""Text, token ids, a list of parts, or the messages of a conversation ({"role": ..., "content": ...}), rendered by the file's chat
template. The content of a message is text or a list of parts."""
KINDS = {"image": Image, "audio": Audio}


class Projector(Protocol):
    """What turns pictures and sounds into soft tokens (loading/projector.py)."""

    def soft_tokens(self, part: Image | Audio) -> SoftTokens:
        """Those of one; computed only when the model reads them. Raises ValueError for what cannot be opened, seen or heard."""


@dataclass(frozen=True)
class Encoded:
    """Ids, and what the negative ones stand for."""

    ids: list[int]
    soft: Soft = NO_SOFT


def encode_prompt(tokenizer: Tokenizer, template: str | None, prompt: Prompt, projector: Projector | None = None,
                  special: bool = False) -> Encoded:
    """A prompt of any form; the values of ids are not checked. `special`: control tokens in a text count as such, in messages never.
    Raises ChatError or ValueError, also for a picture or a sound without a `projector`.
    """
    if isinstance(prompt, str):
        return Encoded(tokenizer.encode(prompt, special=special))
    if isinstance(prompt, Image | Audio):
        prompt = [prompt]
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, (Sequence, np.ndarray)):
        raise ValueError("expected text, token ids, parts or messages (a list of {'role': ..., 'content': ...}), not "
                         f"{type(prompt).__name__}")
    if any(isinstance(item, Mapping) for item in prompt):
        if not all(isinstance(item, Mapping) for item in prompt):
            raise ValueError("expected messages only (each {'role': ..., 'content': ...}), found something else among them")
        return encode_messages(tokenizer, template, prompt, projector)
    if any(isinstance(item, str | Image | Audio) or is_list_of_ids(item) for item in prompt):
        return encode_parts(tokenizer, prompt, projector, special)
    return Encoded(list(prompt))


def encode_parts(tokenizer: Tokenizer, parts: Sequence[Part], projector: Projector | None, special: bool = False) -> Encoded:
    """The ids of all parts. `<bos>` stands once, before them, where the tokenizer puts one before a text. A picture or a sound gets its
    markers, unless the ids beside it are these already.
    """
    ids, pending, found = tokenizer.encode(""), [], []         # `pending`: the end marker, until it is known what follows
    for n, part in enumerate(parts):
        if isinstance(part, Image | Audio):
            begin, _, end = markers_of(tokenizer, part)
            found.append(_soft_tokens(projector, part))
            ids += pending + [begin] * (ids[-1:] != [begin] or bool(pending)) + found[-1].ids
            pending = [end]
            continue
        if isinstance(part, str):
            piece = tokenizer.encode(part, special=special, bos=False)
        elif is_list_of_ids(part):
            piece = [int(i) for i in part]
        else:
            raise ValueError(f"a part of a prompt is text, a list of ids, an Image or an Audio, not {part!r:.60}")
        if n == 0 and piece[:len(ids)] == ids:
            ids = []
        ids += piece if piece[:1] == pending else pending + piece
        pending = []
    return Encoded(ids + pending, Soft(found))


def encode_messages(tokenizer: Tokenizer, template: str | None, messages: Sequence[Mapping[str, object]],
                    projector: Projector | None = None, *, thinking: bool = False, tools: list[dict] | None = None) -> Encoded:
    """The ids of a conversation, by the chat template (chat.py), and of the pictures and sounds in its messages. Raises ChatError,
    ValueError.
    """
    shown: list[Image | Audio] = []
    ids = encode_chat(tokenizer, template, in_words(messages, shown), thinking=thinking, tools=tools)
    if not shown:
        return Encoded(ids)
    places = {markers_of(tokenizer, part)[1]: KINDS[kind] for kind, part in {_kind(part): part for part in shown}.items()}
    expanded, found, left = [], [], list(shown)
    for i in ids:
        if i not in places:
            expanded.append(i)
            continue
        if not left or not isinstance(left[0], places[i]):
            raise ChatError("the chat template does not write pictures and sounds in the order of the messages")
        begin, _, end = markers_of(tokenizer, left[0])
        found.append(_soft_tokens(projector, left.pop(0)))
        expanded += [begin, *found[-1].ids, end]
    if left:
        raise ChatError(f"the chat template has no place for {'a picture' if isinstance(left[0], Image) else 'a sound'}")
    return Encoded(expanded, Soft(found))


def markers_of(tokenizer: Tokenizer, part: Image | Audio) -> tuple[int, int, int]:
    """Ids of the tokens before its soft tokens, in the place of each in a rendered template, and behind them. Found by their text, as
    no key of the file names them. Raises ChatError for a vocabulary without them.
    """
    kind = _kind(part)
    texts = f"<|{kind}>", f"<|{kind}|>", f"<{kind}|>"
    found = tuple(tokenizer.id_of(text) for text in texts)
    if None in found:
        raise ChatError(f"{part.name}: the vocabulary of this model has no token {texts[found.index(None)]}; it takes no "
                        f"{'pictures' if kind == 'image' else 'sounds'}")
    return found


def is_list_of_ids(value: object) -> bool:
    """A sequence that is no text."""
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes | bytearray)


def _kind(part: Image | Audio) -> str:
    return next(kind for kind, of in KINDS.items() if isinstance(part, of))


def _soft_tokens(projector: Projector | None, part: Image | Audio) -> SoftTokens:
    if projector is None:
        raise ChatError(f"{part.name}: the model needs a projector to take it (--mmproj, projector=load_projector(...))")
    return projector.soft_tokens(part)


def in_words(messages: Sequence[object], shown: list[Image | Audio]) -> list[object]:
    """The messages as plain JSON, for the template; their pictures and sounds are added to `shown`. Raises ChatError."""
    return [_in_words(i, message, shown) for i, message in enumerate(messages)]


def _in_words(i: int, message: object, shown: list[Image | Audio]) -> object:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, Image | Audio):
        content = [content]
    if not isinstance(content, list | tuple):
        return message
    parts = []
    for part in content:
        if isinstance(part, Image | Audio):
            shown.append(part)
            parts.append({"type": _kind(part)})
        elif isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif isinstance(part, Mapping) and part.get("type") == "text":
            parts.append(part)
        else:
            raise ChatError(f"message {i}: a part of its content is text, an Image or an Audio, not {str(part)[:60]!r}")
    return {**message, "content": parts}
