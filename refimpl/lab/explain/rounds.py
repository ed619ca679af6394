"""Draft and verify, round by round: what was drafted, what was kept, and what it took. The loop is the real one (decode/speculative.py)."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.decode.draft_length import MOST, AutoDepth, FixedDepth, best_depth
from refimpl.decode.drafter import Drafter
from refimpl.decode.generate import plain
from refimpl.decode.sampling import Sampler, Sampling
from refimpl.decode.speculative import DraftStats, accept, speculative
from refimpl.loading.model import Model


@dataclass(frozen=True)
class Round:
    """The ids drafted, and those the target emitted: the accepted drafts and its own choice behind them."""

    drafted: list[int]
    emitted: list[int]

    @property
    def n_accepted(self) -> int:
        """Drafts that the target chose too."""
        return sum(a == b for a, b in zip(self.drafted, self.emitted))


@dataclass(frozen=True)
class Run:
    """A generation: its ids, the logits behind each of them, float32 (T, V), and the rounds behind the first token (none for plain)."""

    ids: list[int]
    logit_TV: np.ndarray
    rounds: list[Round]
    seconds: float


class Witness(Sampler):
    """A sampler that keeps the logits of every choice it makes."""

    def __init__(self, sampling: Sampling, suppress):
        super().__init__(sampling, suppress)
        self.seen: list[np.ndarray] = []

    def pick(self, logits_V: np.ndarray) -> int:
        """As Sampler has it."""
        self.seen.append(logits_V.copy())
        return super().pick(logits_V)


class Stubborn:
    """A drafter at its real cost that proposes one and the same token whatever comes: as good as useless."""

    def __init__(self, drafter: Drafter, token: int):
        self.drafter, self.token, self.target, self.auto = drafter, token, drafter.target, AutoDepth()

    def draft(self, token, state_C, cache, n: int, min_p: float) -> list[int]:
        """As Drafter has it."""
        return [self.token] * len(self.drafter.draft(token, state_C, cache, n, min_p))


def run(model: Model, ids: Sequence[int], n_new: int, drafter: Drafter | Stubborn | None = None,
        depth: FixedDepth | AutoDepth | None = None, **sampling) -> Run:
    """`n_new` tokens after `ids`, with a drafter (`depth` says how many drafts a round has) or without. `sampling` as in Sampling; greedy
    unless a temperature is given. It does not stop at the end of a text, so that all runs are of one length.
    """
    witness = Witness(Sampling(**{"temperature": 0.0, "top_k": 0, "top_p": 1.0} | sampling), model.tokenizer.suppress)
    cache, rounds = model.new_cache(len(ids) + n_new), []

    def decide(drafted, chosen, end):
        emitted = accept(drafted, chosen, end)
        rounds.append(Round(list(drafted), emitted))
        return emitted

    state_D = model.prefill(ids, cache)[-1]
    began = time.perf_counter()
    tokens = plain(model, cache, witness, state_D) if drafter is None else speculative(
        model, drafter, cache, witness, state_D, n_new, depth, 0.0, DraftStats(), end=(), decide=decide)
    made = [token for _, token in zip(range(n_new), tokens)]
    return Run(made, np.stack(witness.seen), rounds, time.perf_counter() - began)


def acceptance(rounds: Sequence[Round], n_draft: int) -> tuple[list[float], float]:
    """(a_1 ... a_n, alpha): the share of rounds in which drafts 1 to i were all accepted, and of drafts that came to be judged.

    A draft is judged if all before it were accepted. Rounds cut short, at the end of a text, do not count.
    """
    accepted = [r.n_accepted for r in rounds if len(r.drafted) == n_draft]
    judged = sum(min(n + 1, n_draft) for n in accepted)
    return [sum(n >= i for n in accepted) / len(accepted) for i in range(1, n_draft + 1)], sum(accepted) / judged


def tokens_per_round(rounds: Sequence[Round], n_draft: int) -> float:
    """Tokens that a round of `n_draft` drafts gave, on average. Rounds cut short do not count."""
    return statistics.fmean(len(r.emitted) for r in rounds if len(r.drafted) == n_draft)


def expected_tokens(alpha: float, n_draft: int) -> float:
    """(1 - alpha^(n + 1)) / (1 - alpha): tokens of a round if each draft were accepted with probability alpha, whatever came before.

    Leviathan et al. 2023 (arXiv:2211.17192), section 3.1, equation 1.
    """
    return (1 - alpha ** (n_draft + 1)) / (1 - alpha) if alpha < 1 else n_draft + 1.0


# ---- what it costs on this machine

@dataclass(frozen=True)
class Costs:
    """Seconds of a call of 1, 2, ... rows, head included, and of a step of the drafter: the quickest of several turns."""

    verify: list[float]
    draft: float


def costs(model: Model, drafter: Drafter, ids: Sequence[int], turns: int = 15) -> Costs:
    """Measures both behind `ids`, each once in every turn, with other tokens of the text in the rows every time. Commits nothing.

    The quickest turn is the one that other programs on the machine disturbed least.
    """
    cache = model.new_cache(len(ids) + MOST + 1)
    state_D, ids_T = model.prefill(ids, cache)[-1], model.checked(ids)
    verify: list[list[float]] = [[] for _ in range(MOST + 1)]
    draft: list[float] = []
    for turn in range(turns + 1):
        for n_draft, times in enumerate(verify):
            first = (turn * 7) % (len(ids) - MOST)
            began = time.perf_counter()
            model.head(model.forward(ids_T[first:first + n_draft + 1], cache))
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        drafter.draft(int(ids_T[-1]), state_D, cache, MOST)
        draft.append((time.perf_counter() - began) / MOST)
    return Costs([min(times[1:]) for times in verify], min(draft[1:]))


class Charged(AutoDepth):
    """The automatic depth, charged with costs measured before instead of those of the moment, which other programs may disturb."""

    def __init__(self, costs: Costs):
        super().__init__()
        self.costs = costs

    def observe(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float):
        """As AutoDepth has it."""
        super().observe(drafted, accepted, drafted * self.costs.draft, self.costs.verify[drafted])


def rates(verify: Sequence[float], draft: float, accepted: Sequence[float]) -> list[float]:
    """Tokens per unit of cost with 0, 1, ... drafts, as `best_depth` has it (decode/draft_length.py)."""
    expected = np.cumsum([1.0, *accepted, *[0.0] * len(verify)])
    return [float(tokens / (cost + n * draft)) for n, (tokens, cost) in enumerate(zip(expected, verify))]


def best(verify: Sequence[float], draft: float, accepted: Sequence[float]) -> int:
    """`best_depth` among as many drafts as both lists have."""
    return best_depth(verify[:len(accepted) + 1], draft, accepted)
