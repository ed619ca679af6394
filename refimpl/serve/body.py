"""From the bytes of a request to its fields: bounded in size, depth and time, and refused in one line that names the field."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from refimpl.serve.errors import ApiError
from refimpl.serve.sse import Gone

T = TypeVar("T", bound=msgspec.Struct)
IGNORED_HEADER = "x-refimpl-ignored"
SILENT = frozenset("user metadata store service_tier prompt_cache_key prompt_cache_retention safety_identifier client_metadata "
                   "cache_prompt model cache_control include truncation verbosity prediction background".split())
"""Parameters that change nothing of an answer here: they are accepted and not reported as ignored. Where one asks for what is not done,
its API refuses it."""
MAX_DEPTH = 200


async def read(request: Request, kind: type[T]) -> tuple[T, dict[str, str]]:
    """The fields of a JSON body, and a header that names the parameters that are ignored, if there are any.

    Raises ApiError: 400 broken JSON, invalid UTF-8 or a wrong type, 408 too slow, 413 too large, 415 another content type.
    """
    value = parsed(await _bytes(request))
    try:
        fields = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        param = place.rstrip("`").lstrip(".")
        raise ApiError(400, f"{param or 'the body'}: {message[:1].lower()}{message[1:]}", param or None) from None
    return fields, _ignored(value, {field.encode_name for field in msgspec.structs.fields(kind)})


def parsed(raw: bytes) -> dict[str, object]:
    """A JSON object. Raises ApiError."""
    try:
        value = msgspec.json.decode(raw)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid UTF-8 (byte {error.start} of a string)") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    if _deeper(value, MAX_DEPTH):
        raise ApiError(400, f"the body is nested deeper than {MAX_DEPTH} levels")
    return value


def _deeper(value: object, n: int) -> bool:
    """Is it nested deeper than n levels? Level by level: what follows may recurse, this must not."""
    level = [value]
    while level and n > 0:
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each) if isinstance(inner, dict | list)]
        n -= 1
    return bool(level)


async def _bytes(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":          # a page of another origin can send the other types without asking
        raise ApiError(415, "the Content-Type must be application/json", "Content-Type")
    settings = request.app.state.site.settings
    too_large = ApiError(413, f"the body has more than {settings.max_body} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > settings.max_body:
        raise too_large
    raw = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > settings.max_body:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body was not complete after {settings.body_seconds:g} s", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise Gone from None
    return bytes(raw)


def _ignored(value: dict[str, object], known: Collection[str]) -> dict[str, str]:
    names = sorted(name for name in value if name not in known and name not in SILENT)
    plain = [re.sub(r"[^\w.-]", "?", name[:64], flags=re.ASCII) for name in names[:20]]        # a header must not be broken up by a name
    return {IGNORED_HEADER: ", ".join(plain)} if plain else {}
