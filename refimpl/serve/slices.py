"""A long computation in slices: it has a thread of its own, which runs only while somebody waits for it.

So at any moment one thing is computed, and whoever asked for it decides when it goes on. The computation says where it may stop, by calling
a function that it is given.
"""

import threading
import time
from collections.abc import Callable


class Dropped(BaseException):
    """Raised inside of a computation that nobody wants any more."""


class Sliced:
    """`compute(pause)`, from one slice to the next; it calls `pause()` at its ends of steps."""

    def __init__(self, compute: Callable[[Callable[[], None]], object]):
        self._compute, self._error, self._until, self._dropped = compute, None, 0.0, False
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True, name="refimpl slices")
        self.ended = False

    def go_on(self, seconds: float) -> bool:
        """Runs it for so long, to its next pause. Has it ended? Raises what it has raised."""
        self._until = time.monotonic() + seconds
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

    def _pause(self):
        if time.monotonic() >= self._until:
            self._mine.release()
            self._theirs.acquire()
            if self._dropped:
                raise Dropped

    def _run(self):
        self._theirs.acquire()
        try:
            self._compute(self._pause)
        except Dropped:
            pass
        except BaseException as error:
            self._error = error
        self.ended = True
        self._mine.release()
