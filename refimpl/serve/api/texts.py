"""What is not about answers: text to token ids and back, prompts of templates, the model, slots, health, metrics."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from refimpl.serve.api.chat import messages_of
from refimpl.serve.asking import MAX_MESSAGES, TemplateOptions, Tool, checked_ids, thinking_of
from refimpl.serve.body import read
from refimpl.serve.errors import ApiError, bad
from refimpl.serve.settings import Site
from refimpl.text.chat import render_chat
from refimpl.text.prompt import in_words

STARTED = int(time.time())


class TokenizeFields(msgspec.Struct):
    """llama-server's; vLLM calls the text `prompt`. `add_special`: <bos> in front; `parse_special`: control tokens in the text are such."""

    content: str | None = None
    prompt: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeFields(msgspec.Struct):
    """Both servers'."""

    tokens: list[int]


class TemplateFields(msgspec.Struct):
    """As in a chat."""

    messages: list[Any]
    tools: list[Tool] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateOptions | None = None


async def tokenize(request: Request) -> Response:
    """POST /tokenize."""
    site: Site = request.app.state.site
    fields, ignored = await read(request, TokenizeFields)
    text = fields.content if fields.content is not None else fields.prompt
    if text is None:
        raise bad("content", "content is missing: the text to tokenize")
    ids = await run_sync(lambda: site.tokenizer.encode(text, special=fields.parse_special, bos=fields.add_special))
    tokens = [{"id": i, "piece": site.tokenizer.decode([i], special=True)} for i in ids] if fields.with_pieces else ids
    return JSONResponse({"tokens": tokens, "count": len(ids), "max_model_len": site.engine.n_ctx}, headers=ignored)


async def detokenize(request: Request) -> Response:
    """POST /detokenize. Control tokens are shown."""
    site: Site = request.app.state.site
    fields, ignored = await read(request, DetokenizeFields)
    text = site.tokenizer.decode(checked_ids(site, fields.tokens, "tokens"), special=True)
    return JSONResponse({"content": text, "prompt": text}, headers=ignored)


async def apply_template(request: Request) -> Response:
    """POST /apply-template: the prompt of a chat, as text."""
    site: Site = request.app.state.site
    fields, ignored = await read(request, TemplateFields)
    messages, t = in_words(messages_of(fields.messages), []), site.tokenizer
    if len(messages) > MAX_MESSAGES:
        raise bad("messages", f"messages: at most {MAX_MESSAGES} are accepted, not {len(messages)}")
    thinking = thinking_of(fields.reasoning_effort, fields.chat_template_kwargs)
    prompt = await run_sync(lambda: render_chat(site.template, messages, bos_token=t.token(t.bos), eos_token=t.token(t.eos),
                                                thinking=thinking, tools=msgspec.to_builtins(fields.tools)))
    return JSONResponse({"prompt": prompt}, headers=ignored)


async def models(request: Request) -> Response:
    """GET /v1/models, in OpenAI's and Anthropic's form at once."""
    entry = _model(request.app.state.site)
    return JSONResponse({"object": "list", "data": [entry], "has_more": False, "first_id": entry["id"], "last_id": entry["id"]})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    entry = _model(request.app.state.site)
    if (name := request.path_params["id"]) != entry["id"]:
        raise ApiError(404, f"there is no model {name[:100]!r}; this server has {entry['id']!r}", code="model_not_found")
    return JSONResponse(entry)


def _model(site: Site) -> dict[str, object]:
    name, engine = site.settings.name, site.engine
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "refimpl",
            "type": "model", "display_name": name, "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(STARTED)),
            "max_model_len": engine.n_ctx, "meta": {"n_ctx": engine.n_ctx, "n_ctx_train": engine.model.config.n_ctx,
                                                    "n_vocab": site.tokenizer.n_vocab}}


async def health(request: Request) -> Response:
    """GET /health."""
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """GET /metrics."""
    return Response(request.app.state.site.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def slots(request: Request) -> Response:
    """GET /slots: what runs and what waits."""
    return JSONResponse(request.app.state.site.engine.slots())


async def no_embeddings(request: Request) -> Response:
    """POST /v1/embeddings."""
    raise ApiError(404, "there are no embeddings here: the mean state of a decoder is worth little; use a model made for them")


async def nothing_stored(request: Request) -> Response:
    """/v1/responses/{id}."""
    raise ApiError(404, "responses are not stored here; send the whole conversation as input")
