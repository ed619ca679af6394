"""POST /v1/responses: OpenAI's newer API, without a memory: nothing is stored, `previous_response_id` is refused."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from refimpl.serve.answering import Answers, streamed
from refimpl.serve.api.responses_input import Tools, chat_of, tools_of
from refimpl.serve.api.responses_output import ItemWriter
from refimpl.serve.asking import (
    Effort,
    OpenSamplingFields,
    TemplateOptions,
    Want,
    chosen_tool,
    constraint_of,
    encoded,
    limit_of,
    shared,
    thinking_of,
)
from refimpl.serve.body import read
from refimpl.serve.errors import ApiError, bad, form
from refimpl.serve.parts import End, Said
from refimpl.serve.settings import Site
from refimpl.serve.sse import Stream, event, unless_gone


class Text(msgspec.Struct):
    """`text`."""

    format: dict[str, Any] | None = None  # noqa: A003
    verbosity: str | None = None


class Fields(OpenSamplingFields, kw_only=True):
    """The parameters that are understood."""

    input: str | list[Any]  # noqa: A003
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    text: Text | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Effort | None = None
    chat_template_kwargs: TemplateOptions | None = None
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None


async def endpoint(request: Request) -> Response:
    """One request."""
    site: Site = request.app.state.site
    fields, ignored = await read(request, Fields)
    tools = tools_of(fields.tools)
    want = await _want(site, fields, tools)
    answers = await Answers.begin(site, want)
    head, headers = _head(site, fields, want), want.headers | ignored
    if fields.stream:
        events = Events(head, tools.namespaces)

        def failed(error: ApiError) -> bytes:
            said = form(request.url.path, error)["error"]
            error = {"code": "server_error" if error.status >= 500 else "invalid_prompt", "message": said["message"]}
            return events.event("response.failed", response={**head, "status": "failed", "error": error})
        return Stream(streamed(answers, events.of(answers), failed), site.settings.ping_seconds, headers)
    return JSONResponse(await unless_gone(request, _whole(answers, head, tools.namespaces)), headers=headers)


async def _want(site: Site, fields: Fields, tools: Tools) -> Want:
    for name in ("previous_response_id", "conversation"):
        if getattr(fields, name) is not None:
            raise bad(name, f"{name}: responses are not stored here; send the whole conversation as input")
    if fields.background:
        raise bad("background", "background is not supported: responses are not stored here")
    thinking = thinking_of(fields.reasoning and fields.reasoning.effort, fields.chat_template_kwargs, "reasoning.effort")
    common = shared(site, fields, None)
    format_ = fields.text and fields.text.format
    if format_ and format_.get("type") == "json_schema" and "schema" not in format_:
        raise bad("text.format", "text.format: schema is missing")
    make, notes = await constraint_of(site, thinking=thinking, tools=tools.chat, choice=chosen_tool(fields.tool_choice, tools.chat),
                                      format_=format_, parallel=fields.parallel_tool_calls is not False, lark=fields.grammar,
                                      regex=fields.regex)
    prompt = await encoded(site, chat_of(fields.instructions, fields.input), tools.chat, thinking)
    limit = limit_of(fields.max_output_tokens, "max_output_tokens", site.default_limit)
    return Want([prompt], max_new_tokens=limit, constraint=make, notes=[*tools.notes, *notes], **common)


def _head(site: Site, fields: Fields, want: Want) -> dict[str, object]:
    """A response before there is anything in it."""
    return {"id": f"resp_{uuid4().hex}", "object": "response", "created_at": int(time.time()), "status": "in_progress", "error": None,
            "incomplete_details": None, "instructions": fields.instructions, "max_output_tokens": fields.max_output_tokens,
            "model": site.settings.name, "output": [], "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": None, "reasoning": {"effort": fields.reasoning and fields.reasoning.effort, "summary": None},
            "store": False, "temperature": want.sampling.temperature,
            "text": {"format": (fields.text and fields.text.format) or {"type": "text"}},
            "tool_choice": fields.tool_choice or "auto", "tools": fields.tools or [], "top_p": want.sampling.top_p,
            "truncation": "disabled", "usage": None, "user": None, "metadata": fields.metadata or {}}


def _ended(head: dict[str, object], output: list[dict], end: End, n_thought: int) -> dict[str, object]:
    incomplete = {"reason": "max_output_tokens"} if end.why == "length" else None
    n_prompt = end.stats.n_prompt
    usage = {"input_tokens": n_prompt, "input_tokens_details": {"cached_tokens": end.stats.reused}, "output_tokens": end.n_generated,
             "output_tokens_details": {"reasoning_tokens": n_thought}, "total_tokens": n_prompt + end.n_generated}
    return {**head, "status": "incomplete" if incomplete else "completed", "incomplete_details": incomplete, "output": output,
            "usage": usage, "completed_at": int(time.time())}


async def _whole(answers: Answers, head: dict[str, object], namespaces: Mapping[str, str]) -> dict[str, object]:
    writer = ItemWriter(namespaces)
    async for _, part in answers:
        if isinstance(part, Said):
            for _ in writer.write(part):
                pass
        elif isinstance(part, End):
            for _ in writer.close(part.why == "length"):
                pass
            end = part
    return _ended(head, writer.items, end, writer.n_thought)


class Events:
    """The response as a stream. Events are numbered, the one that says that it failed too."""

    def __init__(self, head: dict[str, object], namespaces: Mapping[str, str]):
        self._head, self._namespaces, self._number = head, namespaces, 0

    def event(self, name: str, /, **fields: object) -> bytes:
        """One event."""
        self._number += 1
        return event({"type": name, "sequence_number": self._number - 1, **fields}, name)

    async def of(self, answers: Answers) -> AsyncIterator[bytes]:
        """All of them."""
        yield self.event("response.created", response=self._head)
        yield self.event("response.in_progress", response=self._head)
        writer = ItemWriter(self._namespaces)
        async for _, part in answers:
            if isinstance(part, Said):
                for name, fields in writer.write(part):
                    yield self.event(name, **fields)
            elif isinstance(part, End):
                for name, fields in writer.close(part.why == "length"):
                    yield self.event(name, **fields)
                response = _ended(self._head, writer.items, part, writer.n_thought)
                yield self.event(f"response.{response['status']}", response=response)
