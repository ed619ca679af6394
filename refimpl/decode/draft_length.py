"""How many tokens to draft: a fixed number, or the one that gives the most tokens per second on this machine, for this text, right now."""

import itertools
import math
import operator
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

MAX_DRAFT = 8               # draft tokens in a round
N_TIMINGS = 9               # latest timings of which the median counts
DECAY = 0.97                # weight of earlier observations at every new one: an average over some 30 draft tokens
PRIOR = 2.0, 0.7            # before anything is observed: weight of 2 observations, acceptance of 70 %
PLAIN_EVERY = 128           # rounds: one goes without a draft, since the cost of that may have changed
PROBE_SHARE = 0.005         # share of the time that may go into probes while drafting does not pay
PROBE_EVERY = 64            # rounds: one verifies a token that cost nothing, though it does not seem to pay
N_FIRST = 3                 # rounds with no draft token, then with one, that measure the costs
LONGER_EVERY = 16           # rounds: one drafts a token more than seems best
DRAFTER = "drafter"         # the source of draft tokens that take time; those of others cost nothing


def best_draft_length(verify_K: Sequence[float], draft: float, accepted_K: Sequence[float]) -> int:
    """The draft length with the most tokens per second, the smallest of equal ones; 0 means plain decoding.

        rate(k) = (1 + a_1 + ... + a_k) / (verify_k + k * draft)

    `verify_K[k]`: seconds of the target for k + 1 rows, k draft tokens and the token before them, k = 0, 1, ...; `draft`: seconds of one
    step of the drafter; `accepted_K[i - 1]`: a_i, the probability that draft tokens 1 to i are all accepted. The 1 is the target's own
    token.
    """
    rate_K = rates(verify_K, draft, accepted_K)
    return max(range(len(rate_K)), key=lambda k: (rate_K[k], -k))


def rates(verify_K: Sequence[float], draft: float, accepted_K: Sequence[float]) -> list[float]:
    """rate(0), rate(1), ... as above."""
    expected_K = itertools.accumulate(accepted_K[:len(verify_K) - 1], initial=1.0)
    return [expected / (verify + k * draft) for k, (expected, verify) in enumerate(zip(expected_K, verify_K))]


class FixedDraftLength:
    """Always `n` draft tokens. Raises ValueError unless that is 1 to MAX_DRAFT."""

    def __init__(self, n: int):
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_DRAFT:
            raise ValueError(f"draft_max={n!r}: expected 'auto' or a number from 1 to {MAX_DRAFT}")
        self.n = n

    def choose(self) -> int:
        """The draft length of the next round."""
        return self.n

    def source(self, n_draft: int, offers: Mapping[str, int]) -> tuple[str, int]:
        """The first that offers anything, and how many of its tokens."""
        return next(((name, min(n, self.n)) for name, n in offers.items() if n), (DRAFTER, n_draft))

    def observe(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float, source: str = DRAFTER):
        """Ignores what a round took."""

    def judge(self, drafted: int, accepted: int, source: str = DRAFTER):
        """Ignores what was accepted."""

    def cost(self, drafted: int, steps: Sequence[float], verify_seconds: float):
        """Ignores what a call took."""


class Acceptance:
    """How many of the draft tokens of one source are accepted, by position: averages that decay."""

    def __init__(self):
        weight, share = PRIOR
        self.judged, self.right = [weight] * MAX_DRAFT, [weight * share] * MAX_DRAFT

    def accepted(self) -> list[float]:
        """a_1, a_2, ...: the probability that draft tokens 1 to i are all accepted."""
        return list(itertools.accumulate((right / judged for judged, right in zip(self.judged, self.right)), operator.mul))

    def judge(self, drafted: int, accepted: int):
        """Takes in a round."""
        for i in range(min(drafted, accepted + 1)):
            self.judged[i] = self.judged[i] * DECAY + 1
            self.right[i] = self.right[i] * DECAY + (i < accepted)


class AutoDraftLength:
    """`best_draft_length` of what was measured so far: medians of the latest timings, decaying averages of acceptance.

    The first rounds draft nothing and then one token, to measure both costs. Length grows by one token at a time; the cost of the next
    length is extrapolated until it is measured. Every LONGER_EVERY rounds one drafts a token more than seems best, so that a single slow
    measurement does not rule out a length for good. While 0 is best, one token is drafted so rarely that all such rounds take PROBE_SHARE
    of the time even if none is accepted. Measurements carry over from one text to the next.
    """

    def __init__(self):
        self.verify: list[deque[float]] = [deque(maxlen=N_TIMINGS) for _ in range(MAX_DRAFT + 1)]       # seconds, by draft length
        self.draft: deque[float] = deque(maxlen=3 * N_TIMINGS)                                          # seconds of a drafter's step
        self.sources: dict[str, Acceptance] = {DRAFTER: Acceptance()}
        self.rounds = self.plain = 0            # rounds in all; rounds without a draft since the last one with a draft
        self.best, self.probe_after = 0, 0      # the best length; while it is 0, plain rounds before one token is drafted

    def accepted(self) -> list[float]:
        """a_1, a_2, ...: the probability that draft tokens 1 to i are all accepted."""
        return self.sources[DRAFTER].accepted()

    def verify_seconds(self) -> list[float]:
        """Seconds for 0, 1, ... draft tokens: measured, interpolated between measurements, and one length further extrapolated.

        More rows never take less time: where measurements say so, the machine was slower when fewer rows were measured.
        """
        known = [k for k, times in enumerate(self.verify) if times]
        median = {k: statistics.median(self.verify[k]) for k in known}
        times = []
        for k in range(min(known[-1] + 1, MAX_DRAFT) + 1):
            below, above = max(j for j in known if j <= k), min((j for j in known if j >= k), default=None)
            if above is None:
                before = known[-2]
                times.append(median[below] + max(0.0, median[below] - median[before]) / (below - before))
            else:
                share = (k - below) / (above - below) if above > below else 0.0
                times.append(median[below] * (1 - share) + median[above] * share)
        return list(itertools.accumulate(times, max))

    def choose(self) -> int:
        """The draft length of the next round."""
        for k in (0, 1):
            if len(self.verify[k]) < N_FIRST:
                return k
        if not self.draft:                  # others have drafted so far, at no cost
            return 1
        if self.plain == 0:                 # after plain rounds little has changed, and a small model has no time to lose
            self._update()
        if self.best == 0:
            return 1 if self.plain >= self.probe_after else 0
        if self.rounds % PLAIN_EVERY == PLAIN_EVERY - 1:
            return 0
        return min(self.best + 1, MAX_DRAFT) if self.rounds % LONGER_EVERY == 0 else self.best

    def _update(self):
        verify, draft = self.verify_seconds(), statistics.median(self.draft)
        self.best = best_draft_length(verify, draft, self.accepted()[:len(verify) - 1])
        self.probe_after = max(LONGER_EVERY, math.ceil(max(0.0, verify[1] + draft - verify[0]) / (PROBE_SHARE * verify[0])))

    def source(self, n_draft: int, offers: Mapping[str, int]) -> tuple[str, int]:
        """Who drafts in a round, and how many tokens: the drafter its `n_draft`, or the source in `offers` (name -> how many tokens it has,
        which cost nothing) that gives more tokens per second.
        """
        offers = {name: n for name, n in offers.items() if n}
        if not offers:
            return DRAFTER, n_draft
        if any(len(self.verify[k]) < N_FIRST for k in (0, 1)):
            return (DRAFTER, 0) if len(self.verify[0]) < N_FIRST else (next(iter(offers)), 1)
        verify, draft = self.verify_seconds(), statistics.median(self.draft) if self.draft else 0.0
        best, best_rate = (DRAFTER, n_draft), (rates(verify, draft, self.accepted())[:n_draft + 1] or [0.0])[-1]
        for name, n in offers.items():
            accepted = self._acceptance(name).accepted()[:min(n, len(verify) - 1)]
            rate_K = rates(verify[:len(accepted) + 1], 0.0, accepted)
            k = max(range(len(rate_K)), key=rate_K.__getitem__)
            if k and rate_K[k] >= best_rate:
                best, best_rate = (name, k), rate_K[k]
        if best == (DRAFTER, 0) and self.rounds % PROBE_EVERY == 0:
            return next(iter(offers)), 1
        return best

    def observe(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float, source: str = DRAFTER):
        """Takes in a round: how many tokens were drafted, how many of them accepted, and the seconds of drafting and verifying."""
        self.cost(drafted, [draft_seconds / drafted] if drafted and source == DRAFTER else [], verify_seconds)
        self.judge(drafted, accepted, source)

    def cost(self, drafted: int, steps: Sequence[float], verify_seconds: float):
        """Takes in what a call took, in which each sequence had so many draft tokens: steps of the drafter, and the target."""
        self.rounds += 1
        self.plain = 0 if drafted else self.plain + 1
        self.verify[drafted].append(verify_seconds)
        self.draft.extend(steps)

    def judge(self, drafted: int, accepted: int, source: str = DRAFTER):
        """Takes in how many of the tokens that were drafted in a round were accepted."""
        self._acceptance(source).judge(drafted, accepted)

    def _acceptance(self, source: str) -> Acceptance:
        return self.sources.setdefault(source, Acceptance())


DraftLength = FixedDraftLength | AutoDraftLength


def draft_length_of(draft_max: int | str, auto: AutoDraftLength) -> DraftLength:
    """`auto` for "auto", or a fixed length. Raises ValueError for anything else."""
    return auto if draft_max == "auto" else FixedDraftLength(draft_max)
