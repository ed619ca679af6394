"""Leaves threads out while other programs hold cores.

A parallel step ends when its last thread does. A thread that shares its core with another program waits milliseconds for its turn, a step
takes a tenth of one, so all threads run at the pace of that one: fewer threads with cores of their own are faster. Linux says how long each
thread has been ready to run and waited for a core (the second number of /proc/self/task/*/schedstat, in ns). Where there is no such file
(macOS, Windows) all threads compute, always. Bits do not depend on the number of threads.

Measured on 2 cores of Zen 1, one taken by another program, new tokens/s of 6 layers of the 26B-A4B, in turn: 5.9 with two threads, 7.6 with
this; 14 when nothing else runs, so that a core alone is at its limit. With both cores taken: no difference.
"""

import time
from collections.abc import Callable
from pathlib import Path

EVERY = 0.1                     # seconds between two looks, of 0.03 ms for each thread
NOTICEABLE = 0.25               # waiting of all threads together, as a share of the time: one of two on a core that another program uses
FEW = 16                        # rows: the steps of more take longer than a turn of another program, and are shared in pieces (pieces.py)
FIRST_PAUSE, LAST_PAUSE = 0.5, 8.0          # seconds after which one more thread is tried again; twice as many each time that it waits
TASKS = Path("/proc/self/task")


def waited(tasks: Path = TASKS) -> dict[str, int]:
    """Nanoseconds for which each thread of this process has waited for a core, by its id; {} where the system does not say."""
    found = {}
    try:
        for task in tasks.iterdir():
            found[task.name] = int((task / "schedstat").read_bytes().split()[1])
    except (OSError, ValueError, IndexError):           # a thread that ends meanwhile, too: then this look sees nothing
        return {}
    return found


class Watch:
    """How many threads may compute now. `read` is `waited`, `clock` gives seconds."""

    def __init__(self, read: Callable[[], dict[str, int]] = waited, clock: Callable[[], float] = time.monotonic):
        self.read, self.clock = read, clock
        self.looked, self.before = clock(), read()
        self.out, self.alone = 0, 0             # threads left out; looks in a row at which the last thread waited, too
        self.pause, self.until = FIRST_PAUSE, self.looked       # the next change that is only a trial comes after `until`
        self.tried = False                      # was the last change one thread more?

    def allowed(self, n: int, rows: int = 1) -> int:
        """At most n threads and at least one for a computation of `rows` rows of activations; n where these are not FEW.

        To be called whenever a computation begins. Takes a look every EVERY seconds.
        """
        if rows > FEW:
            return n
        now = self.clock()
        if n > 1 and now - self.looked >= EVERY:
            waits, seconds = self.read(), now - self.looked
            share = sum(ns - self.before.get(task, ns) for task, ns in waits.items()) / seconds / 1e9
            self.looked, self.before, self.out = now, waits, min(self.out, n - 1)
            if seconds < 10 * EVERY:            # else this process has done something else meanwhile
                self._decide(share >= NOTICEABLE, n - 1, now)
        return max(n - self.out, 1)

    def _decide(self, crowded: bool, most: int, now: float):
        self.alone = self.alone + 1 if crowded and self.out == most else 0
        if crowded and self.out < most and (self.out or self.tried or now >= self.until):
            self._change(self.out + 1, now, self.tried)
        elif self.alone == 2:                   # all cores are taken: then many threads get a larger part of them than one
            self._change(0, now, True)
        elif not crowded and now >= self.until:
            if self.out:
                self._change(self.out - 1, now, False)
                self.tried = True
            else:
                self.pause, self.tried = FIRST_PAUSE, False

    def _change(self, out: int, now: float, in_vain: bool):
        self.pause = min(2 * self.pause, LAST_PAUSE) if in_vain else self.pause
        self.out, self.until, self.tried = out, now + self.pause, False


WATCH = Watch()         # of this process
