"""The app: which path is answered by what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from refimpl.serve.api import chat, completions, glass, messages, page, responses, texts
from refimpl.serve.asking import NOTES_HEADER, SEED_HEADER
from refimpl.serve.body import IGNORED_HEADER
from refimpl.serve.errors import ApiError, explained, response
from refimpl.serve.guard import Counting, Guard
from refimpl.serve.settings import Settings, Site
from refimpl.serve.sse import Gone

if TYPE_CHECKING:
    from refimpl.serve.engine import Engine

Handler = Callable[[Request], Awaitable[Response]]
ENDPOINTS: dict[tuple[str, str], Handler] = {
    ("POST", "/v1/chat/completions"): chat.endpoint,
    ("POST", "/v1/completions"): completions.endpoint,
    ("POST", "/v1/responses"): responses.endpoint,
    ("GET", "/v1/responses/{id}"): texts.nothing_stored,
    ("DELETE", "/v1/responses/{id}"): texts.nothing_stored,
    ("POST", "/v1/messages"): messages.endpoint,
    ("POST", "/v1/messages/count_tokens"): messages.count_tokens,
    ("POST", "/v1/embeddings"): texts.no_embeddings,
    ("GET", "/v1/models"): texts.models,
    ("GET", "/v1/models/{id:path}"): texts.model,
    ("POST", "/tokenize"): texts.tokenize,
    ("POST", "/detokenize"): texts.detokenize,
    ("POST", "/apply-template"): texts.apply_template,
    ("GET", "/health"): texts.health,
    ("GET", "/metrics"): texts.metrics,
    ("GET", "/slots"): texts.slots,
    ("GET", "/"): page.index,
    ("GET", "/page/{name}"): page.file,
    ("GET", "/glass/about"): glass.about,
    ("POST", "/glass/inspect"): glass.inspect,
    ("POST", "/glass/block"): glass.block,
}


def make_app(engine: Engine, settings: Settings) -> Starlette:
    """The app that answers with `engine`. Whoever made the engine closes it."""
    site = Site(engine, settings)
    routes = [Route(path, _refusing(handler), methods=[method]) for (method, path), handler in ENDPOINTS.items()]
    middleware = [Middleware(Counting, site=site, routes=routes)]
    if settings.cors:
        middleware.append(Middleware(CORSMiddleware, allow_origins=list(settings.cors), allow_methods=["GET", "POST"], allow_headers=["*"],
                                     expose_headers=[SEED_HEADER, IGNORED_HEADER, NOTES_HEADER]))
    middleware.append(Middleware(Guard, settings=settings))
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _no_such_endpoint})
    app.state.site = site
    return app


def _refusing(handler: Handler) -> Handler:
    """The handler, whose exceptions become responses."""
    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except Gone:
            return Response(status_code=499)            # nobody reads it; nginx's number for that
        except Exception as error:
            return response(request.url.path, explained(error))
    return endpoint


async def _no_such_endpoint(request: Request, error: HTTPException) -> Response:
    path = request.url.path
    known = {404: f"there is nothing at {path[:200]}", 405: f"{request.method} is not for {path[:200]}"}
    return response(path, ApiError(error.status_code, known.get(error.status_code, str(error.detail)), headers=dict(error.headers or {})))
