"""POST /v1/completions: OpenAI's older API, which continues text or token ids."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response

from refimpl.decode.request import Token
from refimpl.serve.answering import Answers, spelled, timings
from refimpl.serve.api.openai import FINISH, CompletionFields, Head, progress_of, respond, schema_of, usage
from refimpl.serve.asking import MAX_TOP, Want, checked_ids, constraint_of, limit_of, shared
from refimpl.serve.errors import bad
from refimpl.serve.parts import End, Progress, Said
from refimpl.serve.settings import MAX_CHOICES, Site
from refimpl.serve.sse import DONE, event
from refimpl.text.prompt import Encoded

DEFAULT_MAX_TOKENS = 16
"""What OpenAI documents. A text has no end of a turn: without a limit most would fill the context."""


class Fields(CompletionFields, kw_only=True):
    """The parameters that are understood."""

    prompt: str | list[str | int | list[int]]
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


async def endpoint(request: Request) -> Response:
    """One request."""
    return await respond(request, Fields, "cmpl", _want, _whole, _events)


async def _want(site: Site, fields: Fields) -> Want:
    for name, senseless in (("echo", fields.echo), ("suffix", fields.suffix), ("best_of", (fields.best_of or 1) != 1)):
        if senseless:
            raise bad(name, f"{name} is not supported; leave it out")
    if fields.logprobs is not None and not 0 <= fields.logprobs <= MAX_TOP:
        raise bad("logprobs", f"logprobs must be from 0 to {MAX_TOP}")
    prompts = _prompts(fields.prompt)
    common = shared(site, fields, fields.n, len(prompts))
    encoded = [Encoded(checked_ids(site, prompt, "prompt") if isinstance(prompt, list) else await run_sync(site.tokenizer.encode, prompt))
               for prompt in prompts]
    make, _ = await constraint_of(site, thinking=False, tools=[], format_=schema_of(fields.response_format), lark=fields.grammar,
                                  regex=fields.regex)
    limit = DEFAULT_MAX_TOKENS if fields.max_tokens is None else limit_of(fields.max_tokens, "max_tokens")
    n_top = -1 if fields.logprobs is None else fields.logprobs
    return Want(encoded, max_new_tokens=limit, n_top=n_top, constraint=make, raw=True, **common)


def _prompts(prompt: str | list) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(isinstance(item, int) for item in prompt):
        return [prompt]
    if not prompt or any(isinstance(item, int) for item in prompt):
        raise bad("prompt", "prompt must be a string, a list of strings, a list of token ids or a list of such lists, and not be empty")
    if len(prompt) > MAX_CHOICES:
        raise bad("prompt", f"prompt: at most {MAX_CHOICES} are accepted, not {len(prompt)}")
    return prompt


async def _whole(answers: Answers, fields: Fields, head: Head) -> dict[str, object]:
    n = len(answers)
    texts, tokens, ends = [""] * n, [[] for _ in range(n)], [None] * n
    async for i, part in answers:
        if isinstance(part, Said):
            texts[i] += _text(part)
            tokens[i] += part.tokens
        elif isinstance(part, End):
            ends[i] = part
    choices = [{"index": i, "text": texts[i], "finish_reason": FINISH.get(end.why, end.why),
                "logprobs": _logprobs(head.site, tokens[i], 0) if fields.logprobs is not None else None} for i, end in enumerate(ends)]
    return head.object("text_completion", choices, usage=usage(answers, ends), timings=timings(ends[0]))


async def _events(answers: Answers, fields: Fields, head: Head) -> AsyncIterator[bytes]:
    offsets, ends = [0] * len(answers), []

    def chunk(i: int, text: str, finish: str | None = None, tokens: Sequence[Token] = (), **more: object) -> bytes:
        logprobs = _logprobs(head.site, tokens, offsets[i]) if fields.logprobs is not None and tokens else None
        offsets[i] += sum(len(spelled(head.site.tokenizer, token.id)[0]) for token in tokens)
        return event(head.object("text_completion", [{"index": i, "text": text, "finish_reason": finish, "logprobs": logprobs}], **more))

    async for i, part in answers:
        if isinstance(part, Progress) and fields.return_progress:
            yield chunk(i, "", prompt_progress=progress_of(part))
        elif isinstance(part, Said):
            yield chunk(i, _text(part), tokens=part.tokens)
        elif isinstance(part, End):
            ends.append(part)
            yield chunk(i, "", FINISH.get(part.why, part.why), timings=timings(part))
    if fields.stream_options is not None and fields.stream_options.include_usage:
        yield event(head.object("text_completion", [], usage=usage(answers, ends)))
    yield DONE


def _text(part: Said) -> str:
    return "".join(piece.text for piece in part.pieces)


def _logprobs(site: Site, tokens: Sequence[Token], offset: int) -> dict[str, list]:
    """The older form. Offsets count the characters of the tokens' own texts."""
    texts = [spelled(site.tokenizer, token.id)[0] for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top = [{spelled(site.tokenizer, i)[0]: logprob for i, logprob in reversed(token.top)} for token in tokens]
    return {"tokens": texts, "token_logprobs": [token.logprob for token in tokens], "top_logprobs": top, "text_offset": offsets}
