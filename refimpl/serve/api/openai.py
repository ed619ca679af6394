"""What OpenAI's chat and its older completions have in common: fields, the way from a request to a response, and its objects."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from refimpl.serve.answering import Answers, streamed
from refimpl.serve.asking import OpenSamplingFields, Want
from refimpl.serve.body import read
from refimpl.serve.errors import ApiError, bad, form
from refimpl.serve.parts import End, Progress
from refimpl.serve.settings import Site
from refimpl.serve.sse import DONE, Stream, event, unless_gone

FINGERPRINT = "refimpl"
FINISH = {"stop_string": "stop"}


class StreamOptions(msgspec.Struct):
    """`stream_options`."""

    include_usage: bool | None = None


class Schema(msgspec.Struct, kw_only=True):
    """`response_format.json_schema`."""

    name: str | None = None
    schema: dict[str, Any] | bool


class Format(msgspec.Struct):
    """`response_format`."""

    type: str  # noqa: A003
    json_schema: Schema | None = None


class CompletionFields(OpenSamplingFields, kw_only=True):
    """The parameters that both understand."""

    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None
    return_token_ids: bool | None = None
    response_format: Format | None = None


F = TypeVar("F", bound=CompletionFields)


@dataclass
class Head:
    """What all objects of one response begin with."""

    id: str  # noqa: A003
    created: int
    site: Site

    def object(self, kind: str, choices: list[dict], **more: object) -> dict[str, object]:  # noqa: A003
        """One of them."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.site.settings.name, "system_fingerprint": FINGERPRINT,
                "choices": choices, **more}


async def respond(request: Request, kind: type[F], prefix: str, want_of: Callable[[Site, F], Awaitable[Want]],
                  whole: Callable[[Answers, F, Head], Awaitable[dict]],
                  events: Callable[[Answers, F, Head], AsyncIterator[bytes]]) -> Response:
    """Answers one request: with the object that `whole` makes of the answers, or the `events` of a stream. `prefix` begins its id."""
    site: Site = request.app.state.site
    fields, ignored = await read(request, kind)
    want = await want_of(site, fields)
    answers = await Answers.begin(site, want)
    head, headers = Head(f"{prefix}-{uuid4().hex}", int(time.time()), site), want.headers | ignored
    if fields.stream:
        def failed(error: ApiError) -> bytes:
            return event(form(request.url.path, error)) + DONE
        return Stream(streamed(answers, events(answers, fields, head), failed), site.settings.ping_seconds, headers)
    return JSONResponse(await unless_gone(request, whole(answers, fields, head)), headers=headers)


def schema_of(format_: Format | None) -> Mapping[str, object] | None:
    """`response_format` as `constraint_of` takes it. Raises ApiError."""
    if format_ is None or format_.type != "json_schema":
        return None if format_ is None else {"type": format_.type}
    if format_.json_schema is None:
        raise bad("response_format", "response_format: json_schema is missing")
    return {"type": "json_schema", "schema": format_.json_schema.schema}


def progress_of(part: Progress) -> dict[str, int]:
    """llama-server's `prompt_progress`."""
    reading = part.reading
    return {"total": reading.n_prompt, "cache": reading.reused, "processed": reading.n_read, "time_ms": round(part.seconds * 1000)}


def usage(answers: Answers, ends: list[End]) -> dict[str, object]:
    """Tokens of a response. A prompt counts once, however many answers it has."""
    n_generated = sum(end.n_generated for end in ends)
    cached = min((end.stats.reused for end in ends), default=0)
    return {"prompt_tokens": answers.n_prompt, "completion_tokens": n_generated, "total_tokens": answers.n_prompt + n_generated,
            "prompt_tokens_details": {"cached_tokens": cached}}
