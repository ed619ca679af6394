"""Statistics of speculative decoding, gathered from its rounds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from refimpl.decode.speculative import Round
from refimpl.loading.model import Model
from refimpl.model.cache import Cache
from refimpl.model.tap import Look, no_tap


@dataclass
class DraftStats:
    """Sums over rounds. `proposed[i]`, `accepted[i]`: rounds in which draft token i + 1 was proposed, and in which it was accepted.

    `experts`: distinct experts that calls with draft tokens used, summed over the `expert_layers` layers of these calls.
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
        """Draft tokens in all."""
        return sum(self.proposed)

    @property
    def n_accepted(self) -> int:
        """Accepted draft tokens in all."""
        return sum(self.accepted)

    @property
    def tokens_per_round(self) -> float:
        """Tokens emitted per round, on average: 1 and the accepted draft tokens."""
        return 1 + self.n_accepted / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """By position: the share of draft tokens there that were accepted (and so all before them)."""
        return [a / p for a, p in zip(self.accepted, self.proposed)]

    @property
    def experts_per_layer(self) -> float:
        """Distinct experts that a call with draft tokens used in a layer, on average; 0 for a model without experts."""
        return self.experts / self.expert_layers if self.expert_layers else 0.0

    def add(self, done: Round):
        """Counts a round."""
        self.rounds += 1
        self.draft_seconds += done.draft_seconds
        self.verify_seconds += done.verify_seconds
        more = len(done.drafted) - len(self.proposed)
        self.proposed += [0] * more
        self.accepted += [0] * more
        for i in range(len(done.drafted)):
            self.proposed[i] += 1
            self.accepted[i] += i < done.n_accepted

    def merge(self, other: "DraftStats"):
        """Adds the sums of another run."""
        for ours, theirs in ((self.proposed, other.proposed), (self.accepted, other.accepted)):
            ours += [0] * (len(theirs) - len(ours))
            ours[:len(theirs)] = [a + b for a, b in zip(ours, theirs)]
        for name in ("rounds", "experts", "expert_layers", "draft_seconds", "verify_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class ExpertCounter:
    """A model, as `speculative` uses it, that counts into `stats` the distinct experts of calls with draft tokens."""

    def __init__(self, model: Model, stats: DraftStats):
        self.model, self.look, self.head = model, counting_experts([stats]), model.head

    def forward(self, ids_T: np.ndarray, cache: Cache) -> np.ndarray:
        """As in Model."""
        return self.model.forward(ids_T, cache, self.look if len(ids_T) > 1 else no_tap)


def counting_experts(all_stats: Sequence[DraftStats]) -> Look:
    """A tap that counts the distinct experts of a call into all of these."""
    def look(name: str, value: np.ndarray):
        if name.startswith("ffn_moe_topk-"):
            for stats in all_stats:
                stats.experts += len(set(value.ravel().tolist()))
                stats.expert_layers += 1
    return look


def figures(stats: DraftStats) -> dict[str, object]:
    """The statistics as JSON."""
    return {"rounds": stats.rounds, "proposed": stats.n_proposed, "accepted": stats.n_accepted,
            "acceptance": [round(share, 4) for share in stats.acceptance], "tokens_per_round": round(stats.tokens_per_round, 3),
            "experts_per_layer": round(stats.experts_per_layer, 2), "draft_seconds": round(stats.draft_seconds, 4),
            "verify_seconds": round(stats.verify_seconds, 4)}
