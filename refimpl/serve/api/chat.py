"""POST /v1/chat/completions: OpenAI's chat API, with llama-server's `reasoning_content`, `timings` and `return_progress`, and vLLM's
`return_token_ids`, to which the rounds of drafting are added.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from refimpl.lab.glass.record import round_as_json
from refimpl.serve.answering import Answers, spelled, timings
from refimpl.serve.api.contents import content_of, objects, result_of, string, text_of
from refimpl.serve.api.openai import FINISH, CompletionFields, Head, progress_of, respond, schema_of, usage
from refimpl.serve.asking import (
    MAX_TOP,
    Effort,
    TemplateOptions,
    Tool,
    Want,
    chosen_tool,
    constraint_of,
    encoded,
    limit_of,
    shared,
    thinking_of,
)
from refimpl.serve.errors import bad
from refimpl.serve.parts import Block, End, Progress, Said, append
from refimpl.serve.settings import Site
from refimpl.serve.sse import DONE, event
from refimpl.text.answer import CallArguments, CallStart, Content, Piece, Thought

ROLES = "system", "developer", "user", "assistant", "tool"


class Fields(CompletionFields, kw_only=True):
    """The parameters that are understood."""

    messages: list[Any]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    reasoning: Effort | None = None
    chat_template_kwargs: TemplateOptions | None = None
    thinking_budget_tokens: int | None = None
    thinking_token_budget: int | None = None


async def endpoint(request: Request) -> Response:
    """One request."""
    return await respond(request, Fields, "chatcmpl", _want, _whole, _events)


def messages_of(value: object) -> list[dict]:
    """Messages as a template takes them: contents are strings, or parts where there are pictures. Raises ApiError."""
    messages = []
    for i, message in enumerate(objects(value, "messages")):
        place, role = f"messages.{i}", message.get("role")
        if role not in ROLES:
            raise bad(f"{place}.role", f"{place}.role must be one of {', '.join(ROLES)}, not {role!r:.60}")
        kept = {key: string(message[key], f"{place}.{key}") for key in ("name", "tool_call_id", "reasoning_content", "reasoning")
                if message.get(key) is not None}
        if message.get("tool_calls"):
            kept["tool_calls"] = objects(message["tool_calls"], f"{place}.tool_calls")
        content = {"user": content_of, "tool": result_of}.get(role, text_of)
        messages.append({"role": role, "content": content(message.get("content"), f"{place}.content"), **kept})
    if not messages:
        raise bad("messages", "messages must hold at least one message")
    return messages


async def _want(site: Site, fields: Fields) -> Want:
    if fields.top_logprobs is not None and not 0 <= fields.top_logprobs <= MAX_TOP:
        raise bad("top_logprobs", f"top_logprobs must be from 0 to {MAX_TOP}")
    if fields.top_logprobs and not fields.logprobs:
        raise bad("top_logprobs", "top_logprobs needs logprobs to be true")
    tools = msgspec.to_builtins(fields.tools or [])
    thinking = thinking_of(fields.reasoning_effort or (fields.reasoning and fields.reasoning.effort), fields.chat_template_kwargs)
    common = shared(site, fields, fields.n)
    choice = chosen_tool(fields.tool_choice, tools)
    make, notes = await constraint_of(site, thinking=thinking, tools=tools, choice=choice, parallel=fields.parallel_tool_calls is not False,
                                      format_=schema_of(fields.response_format), lark=fields.grammar, regex=fields.regex,
                                      budget=_budget(fields))
    limit = limit_of(fields.max_tokens, "max_tokens", site.default_limit) if fields.max_completion_tokens is None else \
        limit_of(fields.max_completion_tokens, "max_completion_tokens")
    prompt = await encoded(site, messages_of(fields.messages), tools, thinking)
    n_top = (fields.top_logprobs or 0) if fields.logprobs else -1
    return Want([prompt], max_new_tokens=limit, n_top=n_top, constraint=make, notes=notes, **common)


def _budget(fields: Fields) -> int:
    """Tokens of thoughts, -1 for no limit: as llama-server calls it, or vLLM."""
    if fields.thinking_token_budget is not None:
        return limit_of(fields.thinking_token_budget, "thinking_token_budget")
    return limit_of(fields.thinking_budget_tokens, "thinking_budget_tokens")


async def _whole(answers: Answers, fields: Fields, head: Head) -> dict[str, object]:
    """The response that is not streamed."""
    n = len(answers)
    blocks: list[list[Block]] = [[] for _ in range(n)]
    tokens, ends = [[] for _ in range(n)], [None] * n
    async for i, part in answers:
        if isinstance(part, Said):
            tokens[i] += part.tokens
            for piece in part.pieces:
                append(blocks[i], piece)
        elif isinstance(part, End):
            ends[i] = part
    choices = []
    for i, end in enumerate(ends):
        message = {"role": "assistant", "content": _joined(blocks[i], "content"), "refusal": None}
        if (thought := _joined(blocks[i], "thought")) is not None:
            message["reasoning_content"] = thought
        if calls := [block for block in blocks[i] if block.kind == "call"]:
            message["tool_calls"] = [{"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": call.text}}
                                     for call in calls]
        elif message["content"] is None:
            message["content"] = ""
        choices.append({"index": i, "message": message, "finish_reason": FINISH.get(end.why, end.why),
                        "logprobs": _logprobs(head.site, tokens[i]) if fields.logprobs else None,
                        **(_written(head.site, tokens[i]) if fields.return_token_ids else {})})
    return head.object("chat.completion", choices, usage=usage(answers, ends), timings=timings(ends[0]))


async def _events(answers: Answers, fields: Fields, head: Head) -> AsyncIterator[bytes]:
    """The response in chunks."""
    def chunk(i: int, delta: dict, finish: str | None = None, tokens=(), **more: object) -> bytes:
        logprobs = _logprobs(head.site, tokens) if fields.logprobs and tokens else None
        choice = {"index": i, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        if fields.return_token_ids and tokens:
            choice |= _written(head.site, tokens)
        return event(head.object("chat.completion.chunk", [choice], **more))

    for i in range(len(answers)):
        yield chunk(i, {"role": "assistant", "content": ""})
    ends: list[End] = []
    async for i, part in answers:
        if isinstance(part, Progress) and fields.return_progress:
            yield chunk(i, {}, prompt_progress=progress_of(part))
        elif isinstance(part, Said):
            tokens = part.tokens
            for delta in filter(None, map(_delta, part.pieces)):
                yield chunk(i, delta, tokens=tokens)
                tokens = ()
            if tokens and (fields.logprobs or fields.return_token_ids):
                yield chunk(i, {}, tokens=tokens)
        elif isinstance(part, End):
            ends.append(part)
            yield chunk(i, {}, FINISH.get(part.why, part.why), timings=timings(part))
    if fields.stream_options is not None and fields.stream_options.include_usage:
        yield event(head.object("chat.completion.chunk", [], usage=usage(answers, ends)))
    yield DONE


def call_id() -> str:
    """A new one."""
    return f"call_{uuid4().hex[:24]}"


def _delta(piece: Piece) -> dict[str, object] | None:
    if isinstance(piece, Content):
        return {"content": piece.text}
    if isinstance(piece, Thought):
        return {"reasoning_content": piece.text}
    if isinstance(piece, CallStart):
        function = {"name": piece.name, "arguments": ""}
        return {"tool_calls": [{"index": piece.index, "id": call_id(), "type": "function", "function": function}]}
    if isinstance(piece, CallArguments):
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.json}}]}
    return None


def _written(site: Site, tokens) -> dict[str, object]:
    """The ids, and the rounds of drafting that begin with some of them: (index among these, what was drafted)."""
    rounds = [[n, round_as_json(site.tokenizer, token.round)] for n, token in enumerate(tokens) if token.round is not None]
    return {"token_ids": [token.id for token in tokens], "rounds": rounds}


def _joined(blocks: list[Block], kind: str) -> str | None:
    texts = [block.text for block in blocks if block.kind == kind]
    return "".join(texts) if texts else None


def _logprobs(site: Site, tokens) -> dict[str, object]:
    def entry(i: int, logprob: float) -> dict[str, object]:
        text, raw = spelled(site.tokenizer, i)
        return {"token": text, "logprob": logprob, "bytes": raw}

    return {"content": [{**entry(token.id, token.logprob), "top_logprobs": [entry(*top) for top in token.top]} for token in tokens],
            "refusal": None}
