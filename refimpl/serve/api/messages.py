"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from refimpl.serve.answering import Answers, streamed
from refimpl.serve.api.anthropic_input import chat_of, choice_of, tools_of
from refimpl.serve.asking import SamplingFields, Want, checked_stops, constraint_of, encoded, limit_of, sampling_of, seed_of
from refimpl.serve.body import read
from refimpl.serve.errors import ApiError, bad, form
from refimpl.serve.parts import Block, End, Progress, Said, append, kind_of
from refimpl.serve.settings import Site
from refimpl.serve.sse import ANTHROPIC_PING, Stream, event, unless_gone
from refimpl.text.answer import CallArguments, CallEnd, CallStart, Piece
from refimpl.text.prompt import Encoded

SIGNATURE = "refimpl"
"""Of a thought. It is not checked, but clients give a thought without one back as text."""
STOPS = {"stop": "end_turn", "stop_string": "stop_sequence", "length": "max_tokens", "tool_calls": "tool_use"}


class Thinking(msgspec.Struct):
    """`thinking`."""

    type: str  # noqa: A003
    budget_tokens: int | None = None
    display: str | None = None


class OutputConfig(msgspec.Struct):
    """`output_config`."""

    format: dict[str, Any] | None = None  # noqa: A003
    effort: str | None = None


class PromptFields(SamplingFields, kw_only=True):
    """What the prompt is made of."""

    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class Fields(PromptFields, kw_only=True):
    """The parameters that are understood; `seed` is an extension."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    seed: int | None = None


async def endpoint(request: Request) -> Response:
    """One request."""
    site: Site = request.app.state.site
    fields, ignored = await read(request, Fields)
    want = await _want(site, fields)
    answers = await Answers.begin(site, want)
    headers, ident = want.headers | ignored, f"msg_{uuid4().hex[:24]}"
    if fields.stream:
        def failed(error: ApiError) -> bytes:
            return event(form(request.url.path, error), "error")
        events = streamed(answers, _events(answers, ident, site), failed)
        return Stream(events, site.settings.ping_seconds, headers, ANTHROPIC_PING)
    return JSONResponse(await unless_gone(request, _whole(answers, ident, site)), headers=headers)


async def count_tokens(request: Request) -> Response:
    """How long the prompt is."""
    fields, ignored = await read(request, PromptFields)
    prompt = await _prompt(request.app.state.site, fields)
    return JSONResponse({"input_tokens": len(prompt.ids)}, headers=ignored)


async def _prompt(site: Site, fields: PromptFields) -> Encoded:
    return await encoded(site, chat_of(fields.system, fields.messages), tools_of(fields.tools), _thinking(fields))


def _thinking(fields: PromptFields) -> bool:
    kind = "disabled" if fields.thinking is None else fields.thinking.type
    if kind not in ("enabled", "adaptive", "disabled"):
        raise bad("thinking.type", f"thinking.type must be enabled, adaptive or disabled, not {kind!r:.60}")
    return kind != "disabled"


async def _want(site: Site, fields: Fields) -> Want:
    tools, thinking = tools_of(fields.tools), _thinking(fields)
    choice, parallel = choice_of(fields.tool_choice, tools)
    format_ = fields.output_config and fields.output_config.format
    if format_ and (format_.get("type") != "json_schema" or "schema" not in format_):
        raise bad("output_config.format", 'output_config.format must be {"type": "json_schema", "schema": ...}')
    if fields.max_tokens < 0:
        raise bad("max_tokens", "max_tokens must be at least 0")
    stops = checked_stops(tuple(fields.stop_sequences or ()), "stop_sequences")
    budget = limit_of(fields.thinking and fields.thinking.budget_tokens, "thinking.budget_tokens")
    make, notes = await constraint_of(site, thinking=thinking, tools=tools, choice=choice, parallel=parallel, format_=format_,
                                      budget=budget)
    return Want([await _prompt(site, fields)], sampling_of(site, fields), seed_of(fields.seed), stops=stops, constraint=make, notes=notes,
                max_new_tokens=limit_of(fields.max_tokens, "max_tokens"))


def _message(ident: str, site: Site, content: list, usage: dict, end: End | None = None) -> dict[str, object]:
    return {"id": ident, "type": "message", "role": "assistant", "model": site.settings.name, "content": content,
            **_stop(end), "usage": usage}


def _stop(end: End | None) -> dict[str, object]:
    return {"stop_reason": end and STOPS[end.why], "stop_sequence": (end and end.stopped_by) or None}


def _usage(n_prompt: int, reused: int, n_generated: int) -> dict[str, int]:
    return {"input_tokens": n_prompt - reused, "cache_creation_input_tokens": 0, "cache_read_input_tokens": reused,
            "output_tokens": n_generated}


async def _whole(answers: Answers, ident: str, site: Site) -> dict[str, object]:
    blocks: list[Block] = []
    async for _, part in answers:
        if isinstance(part, Said):
            for piece in part.pieces:
                append(blocks, piece)
        elif isinstance(part, End):
            end = part
    usage = _usage(end.stats.n_prompt, end.stats.reused, end.n_generated)
    return _message(ident, site, [_block(block) for block in blocks], usage, end)


def _block(block: Block) -> dict[str, object]:
    if block.kind == "call":
        return {"type": "tool_use", "id": _tool_id(), "name": block.name, "input": msgspec.json.decode(block.text or "{}")}
    if block.kind == "thought":
        return {"type": "thinking", "thinking": block.text, "signature": SIGNATURE}
    return {"type": "text", "text": block.text}


async def _events(answers: Answers, ident: str, site: Site) -> AsyncIterator[bytes]:
    started, writer = False, BlockWriter()
    async for _, part in answers:
        if isinstance(part, Progress) and not started:          # not before: only now it is known what was read already
            started = True
            usage = _usage(part.reading.n_prompt, part.reading.reused, 0)
            yield _event("message_start", message=_message(ident, site, [], usage))
        elif isinstance(part, Said):
            for piece in part.pieces:
                for chunk in writer.write(piece):
                    yield chunk
        elif isinstance(part, End):
            for chunk in writer.close():
                yield chunk
            usage = _usage(part.stats.n_prompt, part.stats.reused, part.n_generated)
            yield _event("message_delta", delta=_stop(part), usage=usage)
            yield _event("message_stop")


class BlockWriter:
    """Pieces to the events of content blocks."""

    def __init__(self):
        self._index, self._kind = -1, ""            # "" : no block is open

    def write(self, piece: Piece) -> list[bytes]:
        """The events of one piece."""
        kind = kind_of(piece)
        if isinstance(piece, CallEnd):
            return self.close()
        if isinstance(piece, CallArguments):
            return [self._delta({"type": "input_json_delta", "partial_json": piece.json})]
        if isinstance(piece, CallStart):
            return self._open("call", {"type": "tool_use", "id": _tool_id(), "name": piece.name, "input": {}})
        if kind == "thought":
            opened = [] if self._kind == kind else self._open(kind, {"type": "thinking", "thinking": "", "signature": ""})
            return [*opened, self._delta({"type": "thinking_delta", "thinking": piece.text})]
        opened = [] if self._kind == kind else self._open(kind, {"type": "text", "text": ""})
        return [*opened, self._delta({"type": "text_delta", "text": piece.text})]

    def close(self) -> list[bytes]:
        """The end of the block that is open, if one is."""
        if not self._kind:
            return []
        signed = [self._delta({"type": "signature_delta", "signature": SIGNATURE})] if self._kind == "thought" else []
        self._kind = ""
        return [*signed, _event("content_block_stop", index=self._index)]

    def _open(self, kind: str, block: Mapping) -> list[bytes]:
        ended = self.close()
        self._index, self._kind = self._index + 1, kind
        return [*ended, _event("content_block_start", index=self._index, content_block=block)]

    def _delta(self, delta: Mapping) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _event(name: str, /, **fields: object) -> bytes:
    return event({"type": name, **fields}, name)


def _tool_id() -> str:
    return f"toolu_{uuid4().hex[:24]}"
