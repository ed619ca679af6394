"""Texts in messages: a string, or a list of parts, in any of the APIs."""

from __future__ import annotations

from collections.abc import Mapping

from refimpl.serve.errors import bad

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
