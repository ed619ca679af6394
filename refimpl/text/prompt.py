"""A prompt as ids: text, ids, parts, or the messages of a conversation. A picture or a sound stands in it as soft tokens, between the
markers that the model was trained with. A video is pictures, each behind its time as text ("00:05 "), with a space between them: as
transformers' Gemma4Processor writes it, but for the placeholder's own id, which no model reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from refimpl.media.parts import Audio, Image, Still, Video
from refimpl.model.soft import NO_SOFT, Soft, SoftTokens
from refimpl.text.chat import ChatError, encode_chat
from refimpl.text.tokenizer import Tokenizer

Media = Image | Audio | Video
Part = str | Sequence[int] | Media
"""Text, token ids, a picture, a sound or a video."""
Prompt = str | Sequence[int] | Sequence[Part] | Sequence[Mapping[str, object]]
"""Text, token ids, a list of parts, or the messages of a conversation ({"role": ..., "content": ...}), rendered by the file's chat
template. The content of a message is text or a list of parts."""
KINDS = {"image": Image | Video, "audio": Audio}


class Projector(Protocol):
    """What turns pictures and sounds into soft tokens (loading/projector.py)."""

    def soft_tokens(self, part: Image | Audio) -> SoftTokens:
        """Those of one; computed only when the model reads them. Raises ValueError for what cannot be opened, seen or heard."""

    def stills(self, video: Video) -> Sequence[Still]:
        """The frames of a video, each as a picture. Raises as `soft_tokens`."""


@dataclass(frozen=True)
class Encoded:
    """Ids, and what the negative ones stand for."""

    ids: list[int]
    soft: Soft = NO_SOFT


def encode_prompt(tokenizer: Tokenizer, template: str | None, prompt: Prompt, projector: Projector | None = None,
                  special: bool = False) -> Encoded:
    """A prompt of any form; the values of ids are not checked. `special`: control tokens in a text count as such, in messages never.
    Raises ChatError or ValueError, also for a picture, a sound or a video without a `projector`.
    """
    if isinstance(prompt, str):
        return Encoded(tokenizer.encode(prompt, special=special))
    if isinstance(prompt, Media):
        prompt = [prompt]
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, (Sequence, np.ndarray)):
        raise ValueError("expected text, token ids, parts or messages (a list of {'role': ..., 'content': ...}), not "
                         f"{type(prompt).__name__}")
    if any(isinstance(item, Mapping) for item in prompt):
        if not all(isinstance(item, Mapping) for item in prompt):
            raise ValueError("expected messages only (each {'role': ..., 'content': ...}), found something else among them")
        return encode_messages(tokenizer, template, prompt, projector)
    if any(isinstance(item, str | Media) or is_list_of_ids(item) for item in prompt):
        return encode_parts(tokenizer, prompt, projector, special)
    return Encoded(list(prompt))


def encode_parts(tokenizer: Tokenizer, parts: Sequence[Part], projector: Projector | None, special: bool = False) -> Encoded:
    """The ids of all parts. `<bos>` stands once, before them, where the tokenizer puts one before a text. A picture or a sound gets its
    markers, unless the ids beside it are these already.
    """
    ids, pending, found = tokenizer.encode(""), [], []         # `pending`: the end marker, until it is known what follows
    for n, part in enumerate(in_pictures(parts, projector)):
        if isinstance(part, Media):
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
            raise ValueError(f"a part of a prompt is text, a list of ids, an Image, an Audio or a Video, not {part!r:.60}")
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
    shown: list[Media] = []
    words = in_words(messages, shown)
    markers = {_place(part): markers_of(tokenizer, part) for part in shown}
    pictures: list[Image | Audio] = []                          # in their order, one for each place

    def spread(prompt: str) -> str:
        """The rendered prompt, in which a video has a place for each of its frames."""
        texts, left = re.split(f"({'|'.join(map(re.escape, markers))})", prompt), list(shown)
        for n in range(1, len(texts), 2):
            if not left or texts[n] != _place(left[0]):
                raise ChatError("the chat template does not write pictures and sounds in the order of the messages")
            parts = in_pictures([left.pop(0)], projector)
            pictures.extend(part for part in parts if not isinstance(part, str))
            texts[n] = "".join(part if isinstance(part, str) else _place(part) for part in parts)
        if left:
            raise ChatError(f"the chat template has no place for {_called(left[0])}{_of_a_tool(messages, left[0])}")
        return "".join(texts)

    ids = encode_chat(tokenizer, template, words, thinking=thinking, tools=tools, changed=spread if shown else str)
    begins, expanded, found = {place: (begin, end) for begin, place, end in markers.values()}, [], []
    for i in ids:
        if i in begins:
            begin, end = begins[i]
            found.append(_soft_tokens(projector, pictures[len(found)]))
            expanded += [begin, *found[-1].ids, end]
        else:
            expanded.append(i)
    return Encoded(expanded, Soft(found))


def in_pictures(parts: Sequence[Part], projector: Projector | None) -> list[Part]:
    """The parts, with frames and their times for each video. A text before a video and its first time are one text."""
    found: list[Part] = []
    for part in parts:
        if not isinstance(part, Video):
            found.append(part)
            continue
        for n, still in enumerate(_needed(projector, part).stills(part)):
            time = f"{' ' * (n > 0)}{still.stamp} "
            if found and isinstance(found[-1], str):
                found[-1] += time
            else:
                found.append(time)
            found.append(still)
    return found


def markers_of(tokenizer: Tokenizer, part: Media) -> tuple[int, int, int]:
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


def _kind(part: Media) -> str:
    return next(kind for kind, of in KINDS.items() if isinstance(part, of))


def _place(part: Media) -> str:
    """What a template writes where the part stands."""
    return f"<|{_kind(part)}|>"


def _called(part: Media) -> str:
    return "a video" if isinstance(part, Video) else "a sound" if isinstance(part, Audio) else "a picture"


def _of_a_tool(messages: Sequence[Mapping[str, object]], part: Media) -> str:
    """Whose it is and what helps, where a tool has returned it; otherwise empty."""
    returned = any(message.get("role") == "tool" and part in message["content"] for message in messages if _has_parts(message))
    return " in what a tool returns, which Google's later templates have: a newer file of the model helps" if returned else ""


def _needed(projector: Projector | None, part: Media) -> Projector:
    if projector is None:
        raise ChatError(f"{part.name}: the model needs a projector to take it (--mmproj, projector=load_projector(...))")
    return projector


def _soft_tokens(projector: Projector | None, part: Image | Audio) -> SoftTokens:
    return _needed(projector, part).soft_tokens(part)


def in_words(messages: Sequence[object], shown: list[Media]) -> list[object]:
    """The messages as plain JSON, for the template; their pictures and sounds are added to `shown`. To a template a video is a picture.
    Raises ChatError.
    """
    return [_in_words(i, message, shown) for i, message in enumerate(messages)]


def _has_parts(message: Mapping[str, object]) -> bool:
    return isinstance(message.get("content"), list | tuple)


def _in_words(i: int, message: object, shown: list[Media]) -> object:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, Media):
        content = [content]
    if not isinstance(content, list | tuple):
        return message
    parts = []
    for part in content:
        if isinstance(part, Media):
            shown.append(part)
            parts.append({"type": _kind(part)})
        elif isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif isinstance(part, Mapping) and part.get("type") == "text":
            parts.append(part)
        else:
            raise ChatError(f"message {i}: a part of its content is text, an Image, an Audio or a Video, not {str(part)[:60]!r}")
    return {**message, "content": parts}
