"""Answers on their way. A `Run` is one of them; `step` takes any number of them one call of the forward pass further.

What a run gives does not depend on the runs beside it: each row has the bits that it has alone, and all else is the run's own.
"""

import contextlib
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from refimpl.decode.draft_length import DRAFTER, MAX_DRAFT, DraftLength
from refimpl.decode.draft_stats import DraftStats, counting_experts
from refimpl.decode.drafter import Drafter
from refimpl.decode.prefixes import POINT, Nothing, Prefixes
from refimpl.decode.repeats import Repeats
from refimpl.decode.request import FORCED, REPEAT, Request, Stats, Token
from refimpl.decode.sampling import Sampler
from refimpl.decode.speculative import Round, Speculation
from refimpl.loading.model import Model
from refimpl.model.cache import ContextFull
from refimpl.model.soft import NO_SOFT, Soft
from refimpl.model.tap import no_tap

NOTHING = [], 0.0, DRAFTER          # draft tokens, the seconds that they took, and their source


class Run:
    """An answer on its way.

    ids    the prompt's, then those of the answer, without an end-of-generation id
    cache  holds the keys and values of the ids that have been read
    stats  what it takes; `stats.stop` says why it has ended, "" while it has not
    error  why it cannot go on, None while it can
    round  the latest round of decoding, None before the first
    """

    def __init__(self, model: Model, request: Request, n_ctx: int, prefixes: Nothing | Prefixes, drafter: Drafter | None = None,
                 draft_min_p: float = 0.0):
        """The prompt must have been checked (`check_prompt`). `prefixes`: what need not be read again, and what remembers what has been.
        With a `drafter`, the model's, tokens may be drafted, down to the probability `draft_min_p`.
        """
        self.model, self.request, self.prefixes, self.ids = model, request, prefixes, list(request.ids)
        self.uses_drafter = drafter is not None and DRAFTER in request.drafts
        self._draft = partial(drafter.draft, min_p=draft_min_p) if self.uses_drafter else None
        repeats, ids = Repeats(), self.ids          # not self below: a cycle would keep the cache until Python looks for cycles
        self._free = {name: offer for name, offer in ((FORCED, lambda n: request.constraint.forced()[:n]),
                                                      (REPEAT, lambda n: repeats.offer(ids, n))) if name in request.drafts}
        self.drafts = self.uses_drafter or bool(self._free)
        self._sampler = Sampler(request.sampling, model.tokenizer.suppress, request.constraint)
        self._limit = n_ctx if request.max_new_tokens == -1 else request.max_new_tokens
        self.error: Exception | None = None
        self.round: Round | None = None
        self._sequence: Speculation | None = None       # once the prompt has been read
        self._drafted = NOTHING
        self._n_read = len(self.ids)                    # what has to be read before there can be new tokens
        self._n_ctx = n_ctx
        found = prefixes.find(self.ids, n_ctx)
        self.cache = found.cache
        self.stats = Stats(len(self.ids), found.cache.length, found.why, draft=DraftStats() if self.drafts else None)
        self._started = time.perf_counter()

    @property
    def reading(self) -> bool:
        """Is the prompt still being read, or read again after a pause?"""
        return self._sequence is None or self.cache.length < self._n_read

    @property
    def n_unread(self) -> int:
        """So many tokens have to be read before there can be new ones."""
        return self._n_read - self.cache.length if self.reading else 0

    def pause(self):
        """Gives the cache back; what has been read is remembered as far as there is room, also on the disk."""
        self.prefixes.keep(self.ids, self.cache)
        self.cache = self.model.new_cache(self._n_ctx)

    def resume(self):
        """Goes on after a pause. What is not remembered any more is read again."""
        if self._sequence is None:
            self.cache = self.prefixes.find(self.ids, self._n_ctx).cache
        else:
            self._n_read = len(self.ids) - 1            # all but the latest token, which has not been run
            self.cache = self._sequence.cache = self.prefixes.find(self.ids, self._n_ctx).cache

    def propose(self, n_draft: int, draft_length: DraftLength):
        """Drafts for the next call: at most `n_draft` tokens by the drafter, or some of a source that costs nothing, whichever
        `draft_length` says.
        """
        started, sequence, ids = time.perf_counter(), self._sequence, []
        room = min(sequence.room(self._limit - self.stats.n_generated), MAX_DRAFT)
        free = {name: offer(room) for name, offer in self._free.items()} if room else {}
        source, n = draft_length.source(min(n_draft, room) if self.uses_drafter else 0, {name: len(ids) for name, ids in free.items()})
        if source != DRAFTER:
            ids = free[source][:n]
        elif n:
            ids = self._draft(sequence.token, sequence.state_D, sequence.cache, n)
        self._drafted = ids, time.perf_counter() - started, source

    def begin(self, n_read: int) -> list[int]:
        """The ids to run next: of the prompt about `n_read`, of a picture all, then the latest token and what was drafted."""
        if self.reading:
            length = self.cache.length
            end = min(length + min(n_read, self.cache.max_rows), self._n_read, (length // POINT + 1) * POINT)
            return self.ids[length:self.request.soft.cut(self.ids, length, end)]
        return [self._sequence.token, *self._drafted[0]]

    def n_logits(self, n_rows: int) -> int:
        """Of how many of the `n_rows` rows that `begin` gave, the last ones, logits are needed."""
        if self.reading:
            return int(self._sequence is None and self.cache.length + n_rows == self._n_read and self._limit > 0)
        return n_rows

    def finish(self, state_TD: np.ndarray, logit_NV: np.ndarray, seconds: float) -> list[Token]:
        """What the states of these ids, and the logits of the last of them, make of it: the new tokens."""
        if not self.reading:
            (drafted, draft_seconds, source), self._drafted = self._drafted, NOTHING
            self.round = self._sequence.finish(drafted, state_TD, logit_NV, draft_seconds, seconds, source)
            if self.drafts:
                self.stats.draft.add(self.round)
            return self._emit(self.round.emitted, logit_NV)
        self.cache.advance(len(state_TD))
        if self.cache.length < self._n_read:
            if self.cache.length % POINT == 0:
                self.prefixes.keep(self.ids[:self.cache.length], self.cache, ended=False)
            return []
        if self._sequence is not None:
            return []
        now = time.perf_counter()
        self.stats.prompt_seconds, self._started = now - self._started, now
        if self._limit == 0:
            self.stats.stop = "limit"
            return []
        first = self._sampler.pick(logit_NV[0])
        self._sequence = Speculation(self.cache, self._sampler, first, state_TD[-1], self.model.tokenizer.end_of_generation)
        return self._emit([first], logit_NV)

    def close(self, stop: str):
        """Remembers what has been read and written. `stop`: why it ends, where it has not ended by itself."""
        self.stats.stop = self.stats.stop or stop
        self.prefixes.keep(self.ids, self.cache)

    def _emit(self, emitted: Sequence[int], logit_NV: np.ndarray) -> list[Token]:
        tokens, stats = [], self.stats
        for new, logit_V in zip(emitted, logit_NV):
            if new in self.model.tokenizer.end_of_generation:
                stats.stop = "end"
                break
            tokens.append(token_of(new, logit_V, self.request.n_top, None if tokens else self.round))
            self.ids.append(new)
            stats.n_generated += 1
            if (len(self.ids) - 1) % POINT == 0:
                self.prefixes.keep(self.ids, self.cache, ended=False)
        stats.decode_seconds = time.perf_counter() - self._started
        if not stats.stop:
            if stats.n_generated == self._limit:
                stats.stop = "limit"
            elif len(self.ids) - 1 == self.cache.n_ctx:         # the newest token has no place any more
                stats.stop = "context"
        return tokens


def check_prompt(model: Model, ids: Sequence[int], n_ctx: int, soft: Soft = NO_SOFT):
    """Raises ContextFull if the prompt does not fit in a context of `n_ctx` tokens, ValueError if it is empty or has an id that is none."""
    if len(ids) > n_ctx:
        raise ContextFull(f"the prompt has {len(ids)} tokens, the context holds {n_ctx}")
    model.checked(ids, soft)


def step(model: Model, runs: Sequence[Run], n_read: Sequence[int], draft_length: DraftLength) -> list[list[Token]]:
    """One call of the forward pass for all `runs`, which have not ended. Returns the new tokens of each.

    `n_read`: how many tokens of its prompt each may read. `draft_length` says how many are drafted, where no prompt is read beside it. A
    run that cannot go on has its `error`; the others do not notice.
    """
    drafting = [run for run in runs if run.drafts] if not any(run.reading for run in runs) else []
    n_draft = draft_length.choose() if any(run.uses_drafter for run in drafting) else 0
    for run in drafting:
        with _errors_of(run):
            run.propose(n_draft, draft_length)
    parts = [(run, run.begin(n)) for run, n in zip(runs, n_read) if run.error is None]
    counted = [run.stats.draft for run, ids in parts if run in drafting and len(ids) > 1]
    if not parts:
        return [[] for _ in runs]
    started = time.perf_counter()
    state_TD = model.forward_together(np.array([i for _, ids in parts for i in ids]), [(run.cache, len(ids)) for run, ids in parts],
                                      counting_experts(counted) if counted else no_tap,
                                      Soft.of(run.request.soft for run, _ in parts if run.reading))
    ends = np.cumsum([len(ids) for _, ids in parts])
    n_logits = [run.n_logits(len(ids)) for run, ids in parts]
    wanted_N = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, n_logits)])
    logit_NV = model.head(state_TD[wanted_N]) if len(wanted_N) else np.empty((0, model.config.n_vocab), np.float32)
    seconds = time.perf_counter() - started
    tokens, first = {}, 0
    for (run, ids), end, n in zip(parts, ends, n_logits):
        with _errors_of(run):
            tokens[run] = run.finish(state_TD[end - len(ids):end], logit_NV[first:first + n], seconds)
        first += n
    observe(draft_length, [run.round for run in drafting if run.error is None])
    return [tokens.get(run, []) for run in runs]


@contextlib.contextmanager
def _errors_of(run: Run):
    """What its constraint or sampler raises is this run's error, and nobody else's."""
    try:
        yield
    except Exception as error:
        run.error = error


def observe(draft_length: DraftLength, rounds: Sequence[Round]):
    """Takes in the rounds of one call: the costs are those of the call, for as many sequences as these."""
    if not rounds:
        return
    n_drafted = sum(len(done.drafted) for done in rounds)
    for done in rounds:
        draft_length.judge(len(done.drafted), done.n_accepted, done.source)
    by_drafter = [done for done in rounds if done.source == DRAFTER and done.drafted]
    steps = [sum(done.draft_seconds for done in by_drafter) / max(len(done.drafted) for done in by_drafter)] if by_drafter else []
    draft_length.cost(round(n_drafted / len(rounds)), steps, rounds[0].verify_seconds)


def token_of(new: int, logit_V: np.ndarray, n_top: int, done: Round | None = None) -> Token:
    """The token, with the logarithm of its probability and the `n_top` most probable ones; -1: alone. `done`: the round that begins with
    it.
    """
    if n_top < 0:
        return Token(new, round=done)
    logit_V = logit_V.astype(np.float64)
    log_sum = logit_V.max() + np.log(np.exp(logit_V - logit_V.max()).sum())
    n_top = min(n_top, len(logit_V))
    id_K = np.flatnonzero(logit_V >= np.partition(logit_V, -n_top)[-n_top]) if n_top else np.arange(0)
    id_K = id_K[np.lexsort((id_K, -logit_V[id_K]))][:n_top]             # of equal ones the lower id first
    return Token(new, float(logit_V[new] - log_sum), [(int(i), float(logit_V[i] - log_sum)) for i in id_K], done)
