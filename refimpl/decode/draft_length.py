"""How many tokens to draft: a fixed number, or the one that pays best on this machine, for this text, right now."""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Sequence

MOST = 8                    # drafts in a round, at most
RECENT = 9                  # so many of the latest timings count
FADE = 0.97                 # weight of the past at every new observation: some 30 drafts are remembered
PRIOR = 2.0, 0.7            # acceptance is taken for 70 % until it has been seen, with the weight of 2 observations
PLAIN_EVERY = 128           # rounds: one is spent without a draft, because what that costs may have changed
PROBE_SHARE = 0.005         # of the time may go into probes while drafting does not pay
FIRST = 3                   # rounds without a draft, and then with one, in which the costs are found out
DEEPER_EVERY = 16           # rounds: one is spent on one draft more than seems best


def best_depth(verify_K: Sequence[float], draft: float, accepted_K: Sequence[float]) -> int:
    """The number of drafts that gives the most tokens per second; 0 means that plain decoding does. Of equal ones the smaller.

        rate(k) = (1 + a_1 + ... + a_k) / (verify_k + k * draft)

    `verify_K[k]`: seconds that the target takes for k drafts and the token before them, k + 1 rows, k = 0, 1, ...; `draft`: seconds of a
    step of the drafter; `accepted_K[i - 1]`: a_i, how likely drafts 1 to i are all accepted. The 1 is the target's own token.
    """
    rates, expected = [], 1.0
    for k, verify in enumerate(verify_K):
        expected += accepted_K[k - 1] if k else 0.0
        rates.append(expected / (verify + k * draft))
    return max(range(len(rates)), key=lambda k: (rates[k], -k))


class FixedDepth:
    """Always `n` drafts. Raises ValueError unless that is 1 to MOST."""

    def __init__(self, n: int):
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST:
            raise ValueError(f"draft_max={n!r}: expected 'auto' or a number from 1 to {MOST}")
        self.n = n

    def choose(self) -> int:
        """Drafts for the next round."""
        return self.n

    def observe(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float):
        """Learns nothing."""


class AutoDepth:
    """`best_depth` on what has been measured so far: medians of the latest times, fading averages of acceptance.

    The first rounds draft nothing and then one token, so that both costs are known; deeper rounds are entered one step at a time, with
    their cost guessed along a straight line until it has been measured. Now and then a round goes one deeper than seems best: a single
    slow measurement must not close a depth for good. While 0 is best, a single draft is tried so rarely that all such rounds together
    cost PROBE_SHARE of the time even if none is ever accepted. It goes on from one text to the next.
    """

    def __init__(self):
        self.verify: list[deque[float]] = [deque(maxlen=RECENT) for _ in range(MOST + 1)]
        self.draft: deque[float] = deque(maxlen=3 * RECENT)
        weight, share = PRIOR
        self.seen, self.right = [weight] * MOST, [weight * share] * MOST
        self.rounds = self.plain = 0            # rounds in all; rounds without drafts since the last one with some
        self.best, self.patience = 0, 0         # the answer, and while it is 0 the rounds before a single draft is tried

    def accepted(self) -> list[float]:
        """a_1, a_2, ...: how likely drafts 1 to i are all accepted."""
        chances, all_before = [], 1.0
        for seen, right in zip(self.seen, self.right):
            all_before *= right / seen
            chances.append(all_before)
        return chances

    def verify_seconds(self) -> list[float]:
        """Seconds for 0, 1, ... drafts: measured ones, between them along a line, and one further step along the last slope.

        More rows never take less time: where it looks so, the machine was slower when fewer were measured.
        """
        known = [k for k, times in enumerate(self.verify) if times]
        median = {k: statistics.median(self.verify[k]) for k in known}
        times = []
        for k in range(min(known[-1] + 1, MOST) + 1):
            below, above = max(j for j in known if j <= k), min((j for j in known if j >= k), default=None)
            if above is None:
                before = known[-2]
                times.append(median[below] + max(0.0, median[below] - median[before]) / (below - before))
            else:
                share = (k - below) / (above - below) if above > below else 0.0
                times.append(median[below] * (1 - share) + median[above] * share)
        return list(itertools.accumulate(times, max))

    def choose(self) -> int:
        """Drafts for the next round."""
        for k in (0, 1):
            if len(self.verify[k]) < FIRST:
                return k
        if self.plain == 0:                 # plain rounds teach little, and a small model has no time to lose
            self._work_out()
        if self.best == 0:
            return 1 if self.plain >= self.patience else 0
        if self.rounds % PLAIN_EVERY == PLAIN_EVERY - 1:
            return 0
        return min(self.best + 1, MOST) if self.rounds % DEEPER_EVERY == 0 else self.best

    def _work_out(self):
        verify, draft = self.verify_seconds(), statistics.median(self.draft)
        self.best = best_depth(verify, draft, self.accepted()[:len(verify) - 1])
        self.patience = max(DEEPER_EVERY, math.ceil(max(0.0, verify[1] + draft - verify[0]) / (PROBE_SHARE * verify[0])))

    def observe(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float):
        """Learns from a round: how many were drafted, the first how many of them were accepted, and what it took."""
        self.rounds += 1
        self.plain = 0 if drafted else self.plain + 1
        self.verify[drafted].append(verify_seconds)
        if drafted:
            self.draft.append(draft_seconds / drafted)
        for i in range(min(drafted, accepted + 1)):
            self.seen[i] = self.seen[i] * FADE + 1
            self.right[i] = self.right[i] * FADE + (i < accepted)


def depth_of(draft_max: int | str, auto: AutoDepth) -> FixedDepth | AutoDepth:
    """`auto` for "auto", or a fixed number. Raises ValueError for anything else."""
    return auto if draft_max == "auto" else FixedDepth(draft_max)
