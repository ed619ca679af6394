"""Speculative decoding: draft, verify, accept. The same tokens as plain decoding, several at a time.

In a round the drafter proposes k tokens, and the target runs the latest token and all of them in one call. Each row gives the target's own
choice of the next token; draft tokens are accepted as long as they are what the target chose. The target's choice after the last accepted
one is emitted too, so that a round gives 1 to k + 1 tokens.

Why the text does not change: each row has the very bits that it has alone (in kernels and reference a row does not depend on the other
rows), the same sampler makes the target's choices with one draw for each emitted token, and rows after the first difference are never
committed to the cache. So it holds for any drafter and any temperature. (Leviathan et al. 2023, arXiv:2211.17192, accept by the ratio of
both models' probabilities, which keeps the distribution but not the text.)
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.decode.draft_length import DRAFTER, DraftLength
from refimpl.decode.sampling import Sampler
from refimpl.loading.model import Model
from refimpl.model.cache import Cache


def accept(drafted: Sequence[int], chosen: Iterable[int], end: Collection[int] = ()) -> list[int]:
    """The ids that a round emits: the target's choices, row by row, up to the first that is not the draft token.

    `chosen` are the target's choices after the latest token and after each draft token. They are taken one by one, so that no choice is
    made (and no random number drawn) in a row that does not count. An id of `end` is the last one emitted.
    """
    emitted = []
    for i, token in enumerate(chosen):
        emitted.append(token)
        if token in end or i == len(drafted) or token != drafted[i]:
            break
    return emitted


@dataclass(frozen=True)
class Round:
    """The draft tokens, the ids emitted (accepted draft tokens and the target's choice after them), the seconds of both models, and who
    drafted.
    """

    drafted: list[int]
    emitted: list[int]
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    source: str = DRAFTER

    @property
    def n_accepted(self) -> int:
        """Draft tokens that the target chose too."""
        return sum(a == b for a, b in zip(self.drafted, self.emitted))


class Speculation:
    """A sequence between rounds.

    token    the latest one, which the target has not run
    state_D  the target's final normed state before it
    """

    def __init__(self, cache: Cache, sampler: Sampler, token: int, state_D: np.ndarray, end: Collection[int] = ()):
        """An id of `end` is the last one emitted."""
        self.cache, self.token, self.state_D, self._sampler, self._end = cache, token, state_D, sampler, end

    def room(self, limit: int) -> int:
        """How many tokens may be drafted, so that `limit` ids are emitted at most and all have a place."""
        return max(0, min(limit - 1, self.cache.n_ctx - self.cache.length - 1, self.cache.max_rows - 1))

    def finish(self, drafted: list[int], state_TD: np.ndarray, logit_TV: np.ndarray, draft_seconds: float, verify_seconds: float,
               source: str = DRAFTER) -> Round:
        """What the target's states and logits of the latest token and the draft tokens make of these. Commits what is emitted but for its
        last id.
        """
        emitted = accept(drafted, map(self._sampler.pick, logit_TV), self._end)
        self.cache.advance(len(emitted))
        self.token, self.state_D = emitted[-1], state_TD[len(emitted) - 1]
        return Round(drafted, emitted, draft_seconds, verify_seconds, source)


def speculative(model: Model, draft: Callable[[int, np.ndarray, Cache, int], list[int]], cache: Cache, sampler: Sampler, token: int,
                state_D: np.ndarray, limit: int, draft_length: DraftLength, end: Collection[int] = ()) -> Iterator[Round]:
    """Yields rounds that emit at most `limit` ids after `token`, as plain decoding would; an id of `end` is the last. `draft(token,
    state_D, cache, n)` proposes up to n ids (`Drafter.draft`); `token` and `state_D` as in Speculation.

    A round is committed before it is yielded, and rejected draft tokens never are: whenever the caller stops, the cache holds the tokens up
    to the latest yielded one, without that one.
    """
    sequence = Speculation(cache, sampler, token, state_D, end)
    while limit > 0 and sequence.token not in end:
        started = time.perf_counter()
        n = min(draft_length.choose(), sequence.room(limit))
        drafted = draft(sequence.token, sequence.state_D, cache, n) if n else []
        drafted_at = time.perf_counter()
        state_TD = model.forward(np.array([sequence.token, *drafted]), cache)
        logit_TV = model.head(state_TD)
        done = sequence.finish(drafted, state_TD, logit_TV, drafted_at - started, time.perf_counter() - drafted_at)
        draft_length.observe(len(drafted), done.n_accepted, done.draft_seconds, done.verify_seconds)
        limit -= len(done.emitted)
        yield done
