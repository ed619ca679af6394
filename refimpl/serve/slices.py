"""A long computation in slices: it has a thread of its own, which runs only while somebody waits for it.

So at any moment one thing is computed, and whoever asked for it decides when it goes on. The computation says where it may stop, by calling
a function that it is given, with a name of what comes to an end there: what followed it the last time says how long the next step takes.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

Compute = Callable[[Callable[..., None]], object]
MOST_WAITING = 8


_NUMBER = re.compile(r"\d+")


class Dropped(BaseException):
    """Raised inside of a computation that nobody wants any more."""


class Sliced:
    """`compute(pause)`, from one slice to the next; it calls `pause(name)`, or `pause()`, at its ends of steps."""

    def __init__(self, compute: Compute):
        self._compute, self._error, self._until, self._dropped = compute, None, 0.0, False
        self._since, self._last = 0.0, ""               # the beginning of this step, and the name of the one before it
        self._after: dict[str, float] = {}              # seconds of the step that followed a name
        self.result: object = None              # what it returned, once it has ended
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True, name="refimpl slices")
        self.ended = False

    def go_on(self, seconds: float) -> bool:
        """Runs it for a step, and for as many more as fit into so much time. Has it ended? Raises what it has raised."""
        self._since = time.monotonic()
        self._until = self._since + seconds
        if self._thread.ident is None:
            self._thread.start()
        if not self.ended:
            self._theirs.release()
            self._mine.acquire()
        if self._error is not None:
            raise self._error
        return self.ended

    def drop(self):
        """Ends it at its pause."""
        if self._thread.ident is not None and not self.ended:
            self._dropped = True
            self._theirs.release()
            self._thread.join()

    def _pause(self, name: str = ""):
        now, name = time.monotonic(), _NUMBER.sub("", name)
        self._after[self._last], self._since, self._last = now - self._since, now, name
        if now + self._after.get(name, max(self._after.values())) >= self._until:
            self._mine.release()
            self._theirs.acquire()
            if self._dropped:
                raise Dropped

    def _run(self):
        self._theirs.acquire()
        try:
            self.result = self._compute(self._pause)
        except Dropped:
            pass
        except BaseException as error:
            self._error = error
        self.ended = True
        self._mine.release()


class Aside:
    """Computations that are done beside everything else, one after the other, a slice at a time. One thread calls these functions."""

    def __init__(self):
        self._waiting: deque[tuple[Sliced, Future]] = deque()

    def add(self, compute: Compute, future: Future):
        """Queues one; `future` gets its result, or what it raised. Raises ValueError where too many wait."""
        if len(self._waiting) >= MOST_WAITING:
            raise ValueError(f"{MOST_WAITING} texts are waiting to be looked at already; try again later")
        self._waiting.append((Sliced(compute), future))

    def go_on(self, seconds: float) -> bool:
        """A slice of the first one. False where there is none."""
        if not self._waiting:
            return False
        sliced, future = self._waiting[0]
        if future.cancelled():                  # whoever asked is gone
            sliced.drop()
            self._waiting.popleft()
            return True
        try:
            ended = sliced.go_on(seconds)
        except Exception as error:
            self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
            return True
        if ended:
            self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                future.set_result(sliced.result)
        return True

    def close(self):
        """Ends all of them."""
        for sliced, future in self._waiting:
            sliced.drop()
            future.cancel()
        self._waiting.clear()

    def __bool__(self) -> bool:
        return bool(self._waiting)
