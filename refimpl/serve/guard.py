"""Who may ask: the Host header against DNS rebinding, the API key, and what is counted of every request."""

from __future__ import annotations

import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from refimpl.serve.errors import ApiError, response
from refimpl.serve.settings import Settings, Site

OPEN = "/health", "/", "/page/"     # need no key: probes have none, nor has a browser before it has the page that asks for it


class Guard:
    """Refuses requests before anything of them is read. CORS is left to Starlette, which stands before it."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings
        self._names = {name.lower() for name in (settings.host, *settings.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        error = self._host(headers.get("host", "")) or (None if _is_open(scope["path"]) else self._key(headers))
        await (self.app if error is None else response(scope["path"], error))(scope, receive, send)

    def _host(self, value: str) -> ApiError | None:
        """A page whose name was made to point here (DNS rebinding) sends that name. An address cannot be made to point anywhere."""
        name = value.lower().rpartition(":")[0] if value.rpartition(":")[2].isdecimal() and not value.endswith("]") else value.lower()
        known = name == "localhost" or name.endswith(".localhost") or name in self._names or "*" in self._names or _is_address(name)
        if known:
            return None
        return ApiError(403, f"the host {value[:100]!r} is not known here; --allowed-host allows it", code="unknown_host")

    def _key(self, headers: Headers) -> ApiError | None:
        if self.settings.api_key is None:
            return None
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if hmac.compare_digest(given.encode("latin-1"), self.settings.api_key.encode()):       # in a time that says nothing about the key
            return None
        return ApiError(401, "wrong or missing API key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'", code="invalid_api_key",
                        headers={"WWW-Authenticate": "Bearer"})


class Counting:
    """Counts requests by endpoint and status."""

    def __init__(self, app: ASGIApp, site: Site, routes: list[Route]):
        self.app, self.metrics, self.routes = app, site.metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        """One request. One that ends without a response was given up by its client: 499, nginx's number for that."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499

        async def counting_send(message: Message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counting_send)
        finally:
            # paths that are none are counted together: a scanner must not fill the memory
            path = next((route.path for route in self.routes if route.matches(scope)[0] != Match.NONE), "other")
            self.metrics.requests.labels(path, status).inc()


def _is_open(path: str) -> bool:
    return any(path == one or one.endswith("/") and len(one) > 1 and path.startswith(one) for one in OPEN)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
