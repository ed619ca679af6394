"""Answers that take long: server-sent events with pings, and an end to the work as soon as the client is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import StreamingResponse

T = TypeVar("T")
PING, ANTHROPIC_PING = b": ping\n\n", b'event: ping\ndata: {"type": "ping"}\n\n'
DONE = b"data: [DONE]\n\n"


class Gone(Exception):
    """The client has closed the connection."""


def event(value: object, name: str = "") -> bytes:
    """One event."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + msgspec.json.encode(value) + b"\n\n"


class Stream(StreamingResponse):
    """Sends the events of `events`, and `ping` whenever there is none for `seconds`. Closes `events` however it ends."""

    def __init__(self, events: AsyncIterator[bytes], seconds: float, headers: Mapping[str, str], ping: bytes = PING):
        # no buffering in proxies: nginx knows the second header
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(_with_pings(events, ping, seconds), headers=headers, media_type="text/event-stream")

    async def stream_response(self, send):
        """As it is, but the iterator is closed at once where sending is cancelled, not some time later."""
        async with contextlib.aclosing(self.body_iterator):
            await super().stream_response(send)


async def _with_pings(events: AsyncIterator[bytes], ping: bytes, seconds: float) -> AsyncIterator[bytes]:
    task = None
    try:
        while True:
            task = task or asyncio.ensure_future(anext(events, None))
            done, _ = await asyncio.wait({task}, timeout=seconds)
            if not done:
                yield ping
                continue
            chunk, task = task.result(), None
            if chunk is None:
                return
            yield chunk
    finally:
        if task is not None and not task.done():
            task.cancel()           # which ends `events` too, from the inside
        else:
            await events.aclose()


async def unless_gone(request: Request, work: Coroutine[object, object, T]) -> T:
    """What `work` returns. Raises Gone, and ends `work`, if the client closes the connection before. The body must have been read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        await _ended(task)
        await _ended(gone)


async def _disconnect(request: Request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _ended(task: asyncio.Future):
    """Cancels a task and waits for its end."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
