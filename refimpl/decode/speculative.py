"""Draft, verify, accept: the same tokens as the plain loop, several at a time.

In a round the drafter proposes k tokens, and the target runs the latest token and all of them in one call. The row of every token gives
the target's own choice of the next; proposals are accepted as long as they are what the target chose. The choice behind the last
accepted one is emitted too, so a round gives 1 to k + 1 tokens.

Why the text does not change: each row has the very bits that it has alone (kernels and reference do not depend on the number of rows),
the target's choice is made by the same sampler with one draw for each emitted token, and rows behind the first difference are never
committed to the cache. So it holds for any drafter and any temperature. (Leviathan et al. 2023, arXiv:2211.17192, accept by the ratio of
both models' probabilities, which keeps the distribution but not the text.)
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from refimpl.decode.draft_length import AutoDepth, FixedDepth
from refimpl.decode.drafter import Drafter
from refimpl.decode.sampling import Sampler
from refimpl.loading.model import Model
from refimpl.model.cache import Cache
from refimpl.model.tap import Look, both, no_tap


@dataclass
class DraftStats:
    """What drafting did. `proposed[i]`, `accepted[i]`: rounds in which draft i + 1 was made, and in which it was accepted.

    `experts`: distinct experts that calls with drafts used, summed over their layers with experts, `expert_layers` layers in all.
    """

    rounds: int = 0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    experts: int = 0
    expert_layers: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    @property
    def n_proposed(self) -> int:
        """Drafts in all."""
        return sum(self.proposed)

    @property
    def n_accepted(self) -> int:
        """Accepted ones."""
        return sum(self.accepted)

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a round gave, on average: 1 and the accepted drafts."""
        return 1 + self.n_accepted / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """By position: the share of drafts made there that were accepted (and so all before them)."""
        return [a / p for a, p in zip(self.accepted, self.proposed)]

    @property
    def experts_per_layer(self) -> float:
        """Distinct experts that a call with drafts used in a layer, on average; 0 for a model without experts."""
        return self.experts / self.expert_layers if self.expert_layers else 0.0

    def add(self, drafted: int, accepted: int):
        """Counts a round."""
        self.rounds += 1
        more = drafted - len(self.proposed)
        self.proposed += [0] * more
        self.accepted += [0] * more
        for i in range(drafted):
            self.proposed[i] += 1
            self.accepted[i] += i < accepted

    def merge(self, other: "DraftStats"):
        """Adds the figures of another run."""
        for ours, theirs in ((self.proposed, other.proposed), (self.accepted, other.accepted)):
            ours += [0] * (len(theirs) - len(ours))
            ours[:len(theirs)] = [a + b for a, b in zip(ours, theirs)]
        for name in ("rounds", "experts", "expert_layers", "draft_seconds", "verify_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def look(self, name: str, value: np.ndarray):
        """A tap: counts distinct experts."""
        if name.startswith("ffn_moe_topk-"):
            self.experts += len(set(value.ravel().tolist()))
            self.expert_layers += 1


def figures(stats: DraftStats) -> dict[str, object]:
    """The statistics of drafting, for programs."""
    return {"rounds": stats.rounds, "proposed": stats.n_proposed, "accepted": stats.n_accepted,
            "acceptance": [round(share, 4) for share in stats.acceptance], "tokens_per_round": round(stats.tokens_per_round, 3),
            "experts_per_layer": round(stats.experts_per_layer, 2), "draft_seconds": round(stats.draft_seconds, 4),
            "verify_seconds": round(stats.verify_seconds, 4)}


def accept(drafted: Sequence[int], chosen: Iterable[int], end: Collection[int] = ()) -> list[int]:
    """The ids that a round emits: the target's choices, row by row, up to the first that is no accepted draft.

    `chosen` are the target's choices behind the latest token and behind each draft. They are taken one by one, so that no choice is made
    (and no random number drawn) in a row that does not count. An id of `end` is the last. The number of accepted drafts is one less
    than the length, or equal to it where the last emitted id is itself a draft that ends the text.
    """
    emitted = []
    for i, token in enumerate(chosen):
        emitted.append(token)
        if token in end or i == len(drafted) or token != drafted[i]:
            break
    return emitted


def speculative(model: Model, drafter: Drafter, cache: Cache, sampler: Sampler, state_D: np.ndarray, limit: int,
                depth: FixedDepth | AutoDepth, min_p: float, stats: DraftStats, *, end: Collection[int],
                decide: Callable[..., list[int]] = accept, watch: Callable[[int], Look] = lambda round_: no_tap) -> Iterator[int]:
    """Yields at most `limit` chosen ids, as the plain loop would; an id of `end` among them is the last.

    `state_D` is the state behind the last token in the cache. Every round is committed before its ids are yielded, and nothing that was
    not accepted ever is: wherever the caller stops, the cache holds the tokens yielded so far, but for the latest, and at most
    accepted ones behind them. `decide` is `accept`, or what a simulation has in its place. `watch(i)` is the
    tap of the target's call in round i.
    """
    latest, left = sampler.pick(model.head(state_D[None])[0]), limit - 1
    yield latest
    while left > 0 and latest not in end:
        room = min(left - 1, cache.n_ctx - cache.length - 1, cache.max_rows - 1)
        began = time.perf_counter()
        n = min(depth.choose(), room)
        drafted = drafter.draft(latest, state_D, cache, n, min_p) if n else []
        drafted_at = time.perf_counter()
        tap = watch(stats.rounds)
        state_TD = model.forward(np.array([latest, *drafted]), cache, both(stats.look, tap) if drafted else tap)
        logit_TV = model.head(state_TD)
        tap("result_output", logit_TV)
        verified_at = time.perf_counter()
        emitted = decide(drafted, map(sampler.pick, logit_TV), end)
        cache.advance(len(emitted))
        n_accepted = sum(a == b for a, b in zip(drafted, emitted))
        stats.add(len(drafted), n_accepted)
        stats.draft_seconds += drafted_at - began
        stats.verify_seconds += verified_at - drafted_at
        depth.observe(len(drafted), n_accepted, drafted_at - began, verified_at - drafted_at)
        latest, state_D, left = emitted[-1], state_TD[len(emitted) - 1], left - len(emitted)
        yield from emitted
