"""/glass/...: what the page shows of the inside of a run. Nothing is stored: whoever asks sends the conversation and the answer's ids."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import msgspec
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from refimpl.decode.sampling import Sampling
from refimpl.lab.glass.record import most_tokens, record
from refimpl.lab.glass.taken_apart import taken_apart, tensors
from refimpl.serve.api.chat import messages_of
from refimpl.serve.asking import TemplateOptions, checked_ids, encoded, thinking_of
from refimpl.serve.body import read
from refimpl.serve.settings import Site
from refimpl.serve.sse import unless_gone
from refimpl.text.templates import CONTINUATION_TEMPLATE


class InspectFields(msgspec.Struct, kw_only=True):
    """A conversation up to an answer, and the ids of the answer (chat completions with `return_token_ids`)."""

    messages: list[Any]
    token_ids: list[int]
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateOptions | None = None


class BlockFields(msgspec.Struct, kw_only=True):
    """Which block of which tensor."""

    tensor: str
    row: int = 0
    block: int = 0


async def inspect(request: Request) -> Response:
    """POST /glass/inspect: the record of a text (lab/glass/record.py)."""
    site: Site = request.app.state.site
    fields, ignored = await read(request, InspectFields)
    thinking = thinking_of(fields.reasoning_effort, fields.chat_template_kwargs)
    prompt = await encoded(site, messages_of(fields.messages), [], thinking)
    ids = [*prompt.ids, *checked_ids(site, fields.token_ids, "token_ids")]
    made = await unless_gone(request, site.engine.aside(lambda pause: record(site.engine.model, ids, len(prompt.ids), prompt.soft, pause)))
    return Response(msgspec.json.encode(made), media_type="application/json", headers=ignored)


async def block(request: Request) -> Response:
    """POST /glass/block: one block of weights (lab/glass/taken_apart.py)."""
    site: Site = request.app.state.site
    fields, ignored = await read(request, BlockFields)
    found = await run_sync(lambda: taken_apart(site.engine.model, fields.tensor, fields.row, fields.block))
    return JSONResponse(found, headers=ignored)


async def about(request: Request) -> Response:
    """GET /glass/about: what the page has to know before anything is asked."""
    site: Site = request.app.state.site
    model, projector = site.engine.model, site.projector
    chosen = asdict(Sampling.from_metadata(model.file.metadata))
    return JSONResponse({
        "name": site.settings.name, "n_ctx": site.engine.n_ctx, "limit": site.default_limit, "most_tokens": most_tokens(model),
        "continues": site.template == CONTINUATION_TEMPLATE, "thinks": "enable_thinking" in (site.template or ""),
        "sees": getattr(projector, "sees", False), "hears": getattr(projector, "hears", False),
        "drafts": site.engine.drafter is not None,
        "sampling": {name: chosen[name] for name in ("temperature", "top_k", "top_p", "min_p")},
        "tensors": await run_sync(lambda: tensors(model))})
