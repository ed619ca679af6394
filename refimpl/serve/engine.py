"""The scheduler in a thread of its own, for code that runs in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future

from refimpl.decode.request import Done, Event, Failed, Request
from refimpl.serve.scheduler import Scheduler, Ticket
from refimpl.serve.slices import Aside, Compute
from refimpl.text.prompt import Projector


class Engine:
    """Answers requests. `close` ends it: what has been read is remembered then."""

    def __init__(self, scheduler: Scheduler, projector: Projector | None = None):
        """Starts the thread. `projector`: the model's, for pictures and sounds in requests."""
        self.scheduler, self.projector = scheduler, projector
        self.model, self.drafter, self.n_ctx = scheduler.model, scheduler.drafter, scheduler.n_ctx
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()        # for the thread, which alone touches the scheduler
        self._aside, self._closed = Aside(), False
        self._thread = threading.Thread(target=self._work, name="refimpl-engine", daemon=True)
        self._thread.start()

    async def submit(self, request: Request) -> Answer:
        """Queues a request. Raises Busy, ContextFull, ValueError or MemoryRefusal as `Scheduler.submit` does."""
        answer = Answer(self)
        answer.ticket = await asyncio.wrap_future(self._soon(lambda: self.scheduler.submit(request, answer.tell)))
        return answer

    async def aside(self, compute: Compute) -> object:
        """What `compute(pause)` returns, which may use the model: it is run between the calls for answers, in slices that end at its
        `pause()`, so that nobody who writes waits long. Raises what it raises, and ValueError where too many wait.
        """
        future: Future[object] = Future()
        await asyncio.wrap_future(self._soon(lambda: self._aside.add(compute, future)))
        return await asyncio.wrap_future(future)

    def slots(self) -> list[dict[str, object]]:
        """What runs and what waits, in order."""
        return [_slot(ticket) for ticket in (*self.scheduler.running, *self.scheduler.waiting)]

    @property
    def n_running(self) -> int:
        """Requests that have a place."""
        return len(self.scheduler.running)

    @property
    def n_waiting(self) -> int:
        """Requests that have none yet."""
        return len(self.scheduler.waiting)

    def cancel(self, ticket: Ticket):
        """Nobody wants this answer any more."""
        self.scheduler.cancel(ticket)
        with self._changed:
            self._changed.notify()

    def close(self):
        """Ends what runs, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _soon(self, call: Callable[[], object]):
        """Has the thread make this call between two steps. Returns a future of its result."""
        future: Future[object] = Future()

        def run():
            if not future.set_running_or_notify_cancel():
                return                      # whoever asked has been cancelled
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        with self._changed:
            if self._closed:
                raise RuntimeError("the server is being stopped")
            self._calls.append(run)
            self._changed.notify()
        return future

    def _work(self):
        while True:
            with self._changed:
                closed = self._closed
            while self._calls:
                self._calls.popleft()()
            if closed:
                self._aside.close()
                self.scheduler.close()
                return
            share = 0.5 if self._aside else 1.0             # of the time that answers can spare
            worked = self.scheduler.step(share)
            if not (self._aside.go_on(self.scheduler.spare() * share) or worked):
                with self._changed:
                    if not self._calls and not self._closed and not self.scheduler.has_work:
                        self._changed.wait()


class Answer:
    """The events of one request: `async for event in answer` yields Reading and Token, and ends after Done or Failed."""

    def __init__(self, engine: Engine):
        """Belongs to the running event loop."""
        self._engine, self._loop, self.ticket = engine, asyncio.get_running_loop(), None
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def tell(self, event: Event):
        """Called by the engine's thread."""
        with contextlib.suppress(RuntimeError):         # the loop has been closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self):
        """Frees its place at the next step. Harmless afterwards."""
        self._engine.cancel(self.ticket)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            event = await self._events.get()
            yield event
            if isinstance(event, Done | Failed):
                return


def _slot(ticket: Ticket) -> dict[str, object]:
    run = ticket.run
    return {"id": ticket.number, "state": ticket.state, "n_prompt": len(ticket.request.ids),
            "n_read": run.cache.length if run is not None else 0, "reused": run.stats.reused if run is not None else 0,
            "n_generated": run.stats.n_generated if run is not None else 0}
