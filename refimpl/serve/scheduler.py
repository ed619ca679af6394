"""Which rows are computed when: continuous batching (Yu et al. 2022, "Orca", section 3.1) over one forward pass.

Every call takes all answers that are being written one step further, and reads of the prompts that are being read as much as keeps the
writers from waiting long. Between calls a picture or sound that somebody has to read is computed, in slices (slices.py). It decides about
time and memory only: nothing here can change a bit of an answer (decode/run.py).
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from refimpl.decode.draft_length import N_TIMINGS, AutoDraftLength, DraftLength, FixedDraftLength
from refimpl.decode.drafter import Drafter
from refimpl.decode.generate import make_room
from refimpl.decode.prefixes import Prefixes, n_common
from refimpl.decode.request import Done, Event, Failed, Reading, Request, Stats
from refimpl.decode.run import Run, check_prompt, step
from refimpl.kernels.cores.threads import layer
from refimpl.loading.model import CHUNK, Model
from refimpl.model.blocks import BLOCK
from refimpl.model.cache import cache_bytes
from refimpl.model.soft import SoftTokens
from refimpl.serve.slices import Sliced

FIRST = 4               # tokens of a prompt that are read beside answers before it is known what they cost
LEAST_SPARE = 0.5       # of the time of a call with answers alone: so much is spared for others, however long that takes


class Busy(Exception):
    """As many requests are waiting as may wait. `retry_after`: seconds after which there may be a place."""

    def __init__(self, n_waiting: int, retry_after: float):
        super().__init__(f"{n_waiting} requests are waiting already; try again later")
        self.retry_after = retry_after


@dataclass(eq=False)
class Ticket:
    """A request and how far it is. `tell` is called with its events, by whoever calls `Scheduler.step`."""

    request: Request
    tell: Callable[[Event], None]
    number: int
    run: Run | None = None          # from the moment it has a place to its end: whoever asked may hold the ticket for longer
    paused: bool = False
    gone: bool = False
    since: float = field(default_factory=time.monotonic)
    common: dict[int, int] = field(default_factory=dict)        # number of another one -> how many ids both begin with

    @property
    def state(self) -> str:
        """ "waiting", "reading" or "writing"."""
        run = self.run              # which may be gone in the next line, as others ask for this
        return "waiting" if run is None or self.paused else "reading" if run.reading else "writing"


def _cautious(values: Sequence[float]) -> float:
    """A value that few of these exceed."""
    return sorted(values)[(3 * len(values)) // 4]


class Costs:
    """Seconds of calls, from the latest ones: with answers alone, by their number, and of prompts beside them."""

    def __init__(self):
        self._alone: dict[int, deque[float]] = {}
        self._read: deque[tuple[int, float]] = deque(maxlen=N_TIMINGS)      # rows of prompts and the seconds that they took, beside answers

    def alone(self, n_writing: int) -> float:
        """Seconds of a call for so many answers; of the nearest number that is known, 0 if none is."""
        known = min(self._alone, key=lambda n: abs(n - n_writing), default=None)
        return 0.0 if known is None else statistics.median(self._alone[known])

    def spare(self, n_writing: int, latency: float) -> float:
        """Seconds from one step of these answers to the next that others may have. Where there are none, somebody may come."""
        return max(latency - self.alone(n_writing), LEAST_SPARE * self.alone(n_writing)) if n_writing else latency

    def observe(self, n_writing: int, n_read: int, seconds: float):
        """Takes in a call. What prompts cost that are read alone says little about it."""
        if n_read == 0:
            self._alone.setdefault(n_writing, deque(maxlen=N_TIMINGS)).append(seconds)
        elif n_writing:
            self._read.append((n_read, max(0.0, seconds - self.alone(n_writing))))

    def n_rows(self, n_writing: int, seconds: float) -> int:
        """How many tokens of prompts can be read in so much time beside so many answers, at least one: as few rows may cost next to
        nothing and more of them much, no more than twice as many as were tried lately.
        """
        if not n_writing:
            return CHUNK
        if not self._read:
            return FIRST
        a_row = _cautious([took / n for n, took in self._read])
        most = min(CHUNK - n_writing, 2 * max(n for n, _ in self._read))
        return int(min(most, max(1.0, seconds / max(a_row, 1e-9))))


class Scheduler:
    """The requests of one model. One thread calls `submit`, `cancel` and `step`.

    running  those that have a place; of those that read, who was served last is last
    waiting  those that have none: the longest first
    """

    def __init__(self, model: Model, prefixes: Prefixes, n_ctx: int, *, drafter: Drafter | None = None, draft_max: int | str = "auto",
                 most_running: int = 8, most_waiting: int = 64, latency: float = 0.2):
        """`prefixes.budget` is for all that is running and remembered together. `latency`: seconds that answers should wait at most for
        their next token.
        """
        self.model, self.prefixes, self.n_ctx, self.drafter, self.ram = model, prefixes, n_ctx, drafter, prefixes.budget
        self.most_running, self.most_waiting, self.latency = most_running, most_waiting, latency
        self.running: list[Ticket] = []
        self.waiting: deque[Ticket] = deque()
        self.costs, self._draft_max, self._number = Costs(), draft_max, 0
        self._lengths: dict[int, DraftLength] = {}
        self._sliced: tuple[SoftTokens, Sliced] | None = None   # what is being computed
        self._took: deque[float] = deque(maxlen=N_TIMINGS)      # seconds that answers took, from place to end

    def submit(self, request: Request, tell: Callable[[Event], None]) -> Ticket:
        """Queues a request. Raises Busy; ContextFull, ValueError or MemoryRefusal for one that could never run."""
        check_prompt(self.model, request.ids, self.n_ctx, request.soft)
        if len(self.waiting) >= self.most_waiting:
            took = statistics.median(self._took) if self._took else 1.0
            raise Busy(len(self.waiting), max(1.0, took * len(self.waiting) / self.most_running))
        if not self.running:
            make_room(self.model, self.prefixes, min(self.n_ctx, len(request.ids) + max(0, request.max_new_tokens)))
        self._number += 1
        ticket = Ticket(request, tell, self._number)
        self.waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket):
        """Nobody wants the answer any more: its place is free at the next step."""
        ticket.gone = True

    @property
    def has_work(self) -> bool:
        """Is there anything to do?"""
        return bool(self.running or self.waiting)

    def spare(self) -> float:
        """Seconds from one call to the next that those that write can spare for others. (Numba's layer "workqueue" computes one thing at a
        time, from its beginning to its end.)
        """
        n_writing = sum(not ticket.run.reading for ticket in self.running)
        return math.inf if layer() == "workqueue" else self.costs.spare(n_writing, self.latency)

    def step(self, share: float = 1.0) -> bool:
        """One call of the forward pass, after a slice of a picture where somebody has to read one. `share`: so much of `spare` may be used.
        False where there is nothing to do.
        """
        for ticket in [ticket for ticket in (*self.running, *self.waiting) if ticket.gone]:
            self._end(ticket)
        self._keep_within_memory()
        self._admit()
        self._compute_soft_tokens(share)
        if not self.running:
            return False
        part = self._part(share if self._sliced is None else share / 2)
        if not part:
            return True
        runs = [ticket.run for ticket, _ in part]
        n_read = sum(n for _, n in part)
        started = time.perf_counter()
        try:
            made = step(self.model, runs, [n for _, n in part], self._draft_length(sum(run.drafts for run in runs)))
        except Exception as error:          # of the model itself: nobody can go on
            for ticket in list(self.running):
                self._fail(ticket, error)
            return True
        n_writing = sum(not n for _, n in part)
        self.costs.observe(n_writing, n_read, time.perf_counter() - started)
        for (ticket, n), tokens in zip(part, made):
            self._tell(ticket, n, tokens)
        if n_read:                          # who was read first last time is last this time
            last = [ticket for ticket, n in part if n]
            self.running = [ticket for ticket in self.running if ticket not in last] + [ticket for ticket in last if ticket in self.running]
        return True

    def close(self):
        """Ends everything; what has been read and written is remembered."""
        for ticket in (*self.running, *self.waiting):
            self._end(ticket)
        self._drop_slices()

    # ---- what is computed

    def _compute_soft_tokens(self, share: float):
        """A slice of what the first one that reads has to read next, short enough for those that write and the prompts of others."""
        pending = [(ticket, part) for ticket in self.running if (part := self._next(ticket, CHUNK)[1]) is not None]
        if self._sliced is not None and all(part is not self._sliced[0] for _, part in pending):
            self._drop_slices()                 # nobody wants it any more
        if not pending:
            return
        if self._sliced is None:
            part = pending[0][1]
            self._sliced = part, Sliced(lambda pause: part.compute(lambda name, value: pause(name)))
        part, sliced = self._sliced
        others = any(ticket.run.reading and self._next(ticket, 1)[0] for ticket in self.running)
        try:
            ended = sliced.go_on(self.spare() * (share / 2 if others else share))
        except Exception as error:
            ended = True
            for ticket, its in pending:
                if its is part:
                    self._fail(ticket, error)
        if ended:
            self._sliced = None

    def _drop_slices(self):
        if self._sliced is not None:
            self._sliced[1].drop()
            self._sliced = None

    def _next(self, ticket: Ticket, most: int) -> tuple[int, SoftTokens | None]:
        """How many tokens of its prompt can be read, at most so many, and what has to be computed before the one behind them."""
        run = ticket.run
        n = min(most, run.n_unread)
        return ticket.request.soft.unknown(run.ids[run.cache.length:run.cache.length + n])

    def _part(self, share: float) -> list[tuple[Ticket, int]]:
        """Who takes part in the next call, and how many tokens of its prompt each reads: 0 for those that write."""
        writing = [ticket for ticket in self.running if not ticket.run.reading]
        seconds = self.costs.spare(len(writing), self.latency) * share
        left, part = self.costs.n_rows(len(writing), seconds), [(ticket, 0) for ticket in writing]
        for ticket in self.running:
            if ticket.run.reading and left > 0 and (n := self._next(ticket, left)[0]):
                part.append((ticket, n))
                left -= n
        return part

    def _draft_length(self, n_drafting: int) -> DraftLength:
        """Drafting costs something else for each number of sequences that draft together."""
        if n_drafting not in self._lengths:
            auto = self.drafter.auto if n_drafting == 1 and self.drafter is not None else AutoDraftLength()
            self._lengths[n_drafting] = auto if self._draft_max == "auto" else FixedDraftLength(self._draft_max)
        return self._lengths[n_drafting]

    def _tell(self, ticket: Ticket, n_read: int, tokens: Sequence):
        run = ticket.run
        if run.error is not None:
            self._fail(ticket, run.error)
            return
        if n_read and run.stats.n_generated == len(tokens):         # nothing was written before
            ticket.tell(Reading(min(run.cache.length, run.stats.n_prompt), run.stats.n_prompt, run.stats.reused))
        if n_read and not run.reading and self.waiting:
            self.prefixes.keep(run.ids[:run.cache.length], run.cache, ended=False)      # perhaps somebody waits for that (`_admit`)
        for token in tokens:
            ticket.tell(token)
        if run.stats.stop:
            self._end(ticket)

    # ---- who has a place

    def _admit(self):
        """Gives places to those that wait, as far as there are any and memory allows; at least one always runs."""
        for ticket in list(self.waiting):
            if len(self.running) >= self.most_running:
                return
            if any(self._shared(ticket, other) for other in self.running):
                continue                    # what it has in common with another is soon there to be used
            if self.running and not self._has_room(ticket):
                return                      # those behind it wait too: otherwise a long one might never run
            self.waiting.remove(ticket)
            try:
                if ticket.run is None:
                    ticket.run = Run(self.model, ticket.request, self.n_ctx, self.prefixes, self.drafter)
                    ticket.tell(Reading(ticket.run.cache.length, ticket.run.stats.n_prompt, ticket.run.stats.reused))
                else:
                    ticket.run.resume()
                    ticket.paused = False
            except Exception as error:
                ticket.run = None
                ticket.tell(Failed(error))
                continue
            ticket.since = time.monotonic()
            self.running.append(ticket)

    def _shared(self, ticket: Ticket, other: Ticket) -> bool:
        """Is the other one reading what this one would have to read as well? A block at least."""
        if ticket.run is not None or other.state != "reading" or other.run.cache.length >= other.run.stats.n_prompt:
            return False
        if other.number not in ticket.common:
            ticket.common[other.number] = n_common(ticket.request.ids, other.request.ids)
        return ticket.common[other.number] - other.run.cache.length >= BLOCK

    def _has_room(self, ticket: Ticket) -> bool:
        ids = ticket.request.ids if ticket.run is None else ticket.run.ids
        need = cache_bytes(self.model.config, min(self.n_ctx, len(ids) + BLOCK), CHUNK, self.model.backend.kv_type)
        return self._n_bytes() + need <= self.ram

    def _keep_within_memory(self):
        """What is remembered gets what the running ones leave; where they take too much, the one that was asked last has to wait."""
        while self._n_bytes() > self.ram and len(self.running) > 1:
            ticket = max(self.running, key=lambda ticket: ticket.number)
            self.running.remove(ticket)
            ticket.run.pause()
            ticket.paused = True
            self.waiting.appendleft(ticket)
        self.prefixes.resize(max(0, self.ram - self._n_bytes()))

    def _n_bytes(self) -> int:
        return sum(ticket.run.cache.n_bytes for ticket in self.running)

    def _end(self, ticket: Ticket):
        """Its place is free."""
        if ticket in self.running:
            self.running.remove(ticket)
            ticket.run.close("gone")
            self._took.append(time.monotonic() - ticket.since)
        elif ticket in self.waiting:
            self.waiting.remove(ticket)
        if ticket.run is not None:
            ticket.run.stats.stop = ticket.run.stats.stop or "gone"
        stats = Stats(len(ticket.request.ids), stop="gone") if ticket.run is None else ticket.run.stats
        ticket.run = None
        ticket.tell(Done(stats))

    def _fail(self, ticket: Ticket, error: Exception):
        self.running.remove(ticket)
        ticket.run = None
        ticket.tell(Failed(error))
