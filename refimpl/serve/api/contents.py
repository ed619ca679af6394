"""What is in messages: a string, or a list of parts, in any of the APIs."""

from __future__ import annotations

import base64
from collections.abc import Mapping

from refimpl.media.parts import Audio, Image
from refimpl.media.patches import TOKENS
from refimpl.serve.errors import bad
from refimpl.text.prompt import Part

BUDGETS = {"low": 70, "auto": TOKENS, None: TOKENS, "high": 1120}        # tokens a picture, by OpenAI's `detail`
SOUNDS = "wav", "mp3", "flac", "ogg"
TEXTS = "text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text"


def text_of(content: object, place: str) -> str:
    """The text of a content; parts are joined by newlines, as llama-server does. Raises ApiError for what is no text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad(place, f"{place} must be a string or a list of parts, not {str(content)[:60]!r}")
    return "\n".join(text_of_part(part, f"{place}.{i}") for i, part in enumerate(content))


def content_of(content: object, place: str) -> str | list[Part]:
    """The text of a content; where pictures or sounds are among its parts, all of them in order. Raises ApiError."""
    if not isinstance(content, list):
        return text_of(content, place)
    return joined([part_of(part, f"{place}.{i}") for i, part in enumerate(content)])


def result_of(content: object, place: str) -> str | list[Part]:
    """What a tool has returned: its text; pictures and sounds behind it, as templates write them. Raises ApiError."""
    content = content_of(content, place)
    if isinstance(content, str):
        return content
    return ["\n".join(part for part in content if isinstance(part, str)), *(part for part in content if not isinstance(part, str))]


def joined(parts: list[Part]) -> str | list[Part]:
    """Texts alone are one text."""
    return "\n".join(parts) if all(isinstance(part, str) for part in parts) else parts


def part_of(part: object, place: str) -> Part:
    """A text, a picture or a sound, in the form of any of the APIs; their bytes are in the request. Raises ApiError."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image_url":                             # chat completions
        inner = part.get("image_url")
        inner = inner if isinstance(inner, Mapping) else {"url": inner}
        return _image(inner.get("url"), inner.get("detail"), f"{place}.image_url")
    if kind == "input_image":                           # responses
        return _image(part.get("image_url"), part.get("detail"), f"{place}.image_url")
    if kind == "image":                                 # Anthropic's messages
        source = part.get("source")
        if not isinstance(source, Mapping) or source.get("type") != "base64":
            raise bad(f"{place}.source", f"{place}.source: only pictures in the request itself can be read, of type base64")
        return Image(_bytes(source.get("data"), f"{place}.source.data"))
    if kind == "input_audio":
        inner = part.get("input_audio")
        if not isinstance(inner, Mapping) or inner.get("format") not in SOUNDS:
            raise bad(f"{place}.input_audio", f"{place}.input_audio must have data, and as format one of {', '.join(SOUNDS)}")
        return Audio(_bytes(inner.get("data"), f"{place}.input_audio.data"))
    return text_of_part(part, place)


def _image(url: object, detail: object, place: str) -> Image:
    if not isinstance(url, str) or not url.startswith("data:"):
        raise bad(place, f"{place}: only data URLs (data:image/png;base64,...) can be read: the server fetches nothing")
    if not isinstance(detail, str | None) or detail not in BUDGETS:
        raise bad(place, f"{place}: detail must be low, auto or high, not {detail!r:.60}")
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise bad(place, f"{place}: a data URL must be in base64")
    return Image(_bytes(data, place), BUDGETS[detail])


def _bytes(data: object, place: str) -> bytes:
    try:
        return base64.b64decode(string(data, place), validate=True)
    except ValueError as error:
        raise bad(place, f"{place} is not base64: {error}") from None


def text_of_part(part: object, place: str) -> str:
    """The text of one part. Raises ApiError."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in TEXTS:
        raise bad(place, f"{place}: text only: a part of type {kind!r:.60} cannot be read")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise bad(place, f"{place}.text must be a string, not {text!r:.60}")
    return text


def objects(value: object, place: str) -> list[Mapping]:
    """A list of objects. Raises ApiError."""
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise bad(place, f"{place} must be a list of objects")
    return value


def string(value: object, place: str) -> str:
    """A string. Raises ApiError."""
    if not isinstance(value, str):
        raise bad(place, f"{place} must be a string, not {str(value)[:60]!r}")
    return value
