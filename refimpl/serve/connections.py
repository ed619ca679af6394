"""The app on a port. uvicorn does the work; two limits that it lacks are here."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from refimpl.serve.settings import Settings

GRACE_SECONDS = 5
"""Answers that are being written may go on for so long once the server is to stop."""
DESCRIPTORS = 1 << 16
"""A connection takes one, and each turn of a conversation on the disk takes one while the conversation goes on; many systems allow 1024."""
BUSY = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: 21\r\n\r\n"
        b"too many connections\n")


def listen(settings: Settings) -> socket.socket:
    """The socket. Raises OSError where the address cannot be had."""
    return socket.create_server((settings.host, settings.port), family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET)


def more_descriptors():
    """Allows as many open files as the system lets this process have, DESCRIPTORS at most. Best effort; Windows has no such limit."""
    try:
        import resource
    except ImportError:
        return
    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def run(app: ASGIApp, settings: Settings, listening: socket.socket):
    """Answers requests until Ctrl-C or SIGTERM; both raise KeyboardInterrupt when that is done, so that the caller can clean up."""
    more_descriptors()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)      # uvicorn raises what it got once more, when it has stopped
    try:
        server(app, settings).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)


def server(app: ASGIApp, settings: Settings) -> uvicorn.Server:
    """The server, not started. Logs with `logging`, warnings and errors only."""
    return uvicorn.Server(uvicorn.Config(
        app, host=settings.host, port=settings.port, http=_protocol(settings), ws="none", loop="asyncio", lifespan="off", log_config=None,
        access_log=False, log_level="warning", server_header=False, limit_concurrency=settings.most_connections,
        timeout_graceful_shutdown=GRACE_SECONDS))


def _protocol(settings: Settings) -> Callable[..., asyncio.Protocol]:
    class Protocol(H11Protocol):
        """Closes a connection that has no whole request headers after `header_seconds`: from its start, or from the last response."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport):
            super().connection_made(transport)
            if len(self.connections) > 2 * settings.most_connections:
                transport.write(BUSY)
                transport.close()
                return
            self._arm()

        def handle_events(self):
            before = self.cycle
            super().handle_events()
            if self.cycle is not before and not self.cycle.response_complete:
                self._disarm()

        def on_response_complete(self):
            self._arm()             # first: the next request may be here already, and begin in the line below
            super().on_response_complete()

        def connection_lost(self, error: Exception | None):
            self._disarm()
            super().connection_lost(error)

        def _arm(self):
            self._disarm()
            self._deadline = self.loop.call_later(settings.header_seconds, self.transport.close)

        def _disarm(self):
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Protocol
