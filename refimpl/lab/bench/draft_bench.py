"""Speed-up by a drafter: plain and speculative decoding in turn, with the same model, cache lengths and machine.

A file with random weights accepts nothing, so its speed with a real drafter is estimated by a SIMULATION: the drafter drafts and the target
verifies at their real cost, but the number of accepted draft tokens follows given chances, and the tokens in the rows are random, so that
their experts differ as much as those of unrelated tokens. (A random model would draft one and the same token, which shares its experts.)

The first run of each draft length is not counted; in it "auto" learns the cost of a round, as in the first answer of a chat.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial

import numpy as np

from refimpl.decode.draft_length import AutoDraftLength, draft_length_of
from refimpl.decode.draft_stats import DraftStats, ExpertCounter, figures
from refimpl.decode.drafter import Drafter, load_drafter
from refimpl.decode.generate import plain
from refimpl.decode.sampling import Sampler, Sampling
from refimpl.decode.speculative import speculative
from refimpl.lab.bench.bench import PAUSE, Plan, random_ids, spread
from refimpl.lab.bench.machine import machine
from refimpl.loading.model import Model, load
from refimpl.model.cache import Cache
from refimpl.progress import silent

GOLDEN = (5**0.5 - 1) / 2
CONTEXT = 16                # tokens of context at depth 0


class Simulated:
    """Drafter and sampler of a simulation, at the real cost of both: random draft tokens, accepted with given chances.

    In place of random numbers it takes fractional parts of multiples of the golden ratio, which fill 0..1 evenly even in short runs, so
    that each run has the acceptance asked for.
    """

    def __init__(self, drafter: Drafter, sampler: Sampler, chances: Sequence[float], ids: Sequence[int], rng: np.random.Generator):
        self.drafter, self.sampler, self.chances, self.ids, self.rng = drafter, sampler, chances, np.array(ids), rng
        self.turns = itertools.count(int(rng.integers(1 << 20)))
        self.choices = iter(())             # the target's, in the next round

    def draft(self, token: int, state_C: np.ndarray, cache: Cache, n: int, min_p: float) -> list[int]:
        """As in Drafter."""
        drafted = [self._random() for _ in self.drafter.draft(token, state_C, cache, n, min_p)]
        u = next(self.turns) * GOLDEN % 1
        n_accepted = sum(u < chance for chance in self.chances[:len(drafted)])
        other = self._random()
        if drafted[n_accepted:n_accepted + 1] == [other]:
            other = (other + 1) % self.drafter.target.config.n_vocab
        self.choices = iter([*drafted[:n_accepted], other])
        return drafted

    def pick(self, logit_V: np.ndarray) -> int:
        """As in Sampler."""
        self.sampler.pick(logit_V)
        token = next(self.choices, None)
        return self._random() if token is None else token

    def _random(self) -> int:
        return int(self.ids[self.rng.integers(len(self.ids))])


def check_chances(chances: Sequence[float]):
    """Raises ValueError for what are no chances that draft tokens 1 to i are all accepted."""
    if not (len(chances) and 1 >= max(chances) >= min(chances) >= 0 and list(chances) == sorted(chances)[::-1]):
        raise ValueError(f"acceptance {', '.join(map(str, chances))}: expected chances of 0 to 1, each at most the one before it "
                         "(that all draft tokens up to here are accepted)")


def draft_bench(path: str | os.PathLike | None, drafter_path: str | os.PathLike | None, plan: Plan, lengths: Sequence[int | str], *,
                chances: Sequence[float] | None = None, min_p: float = 0.0, head: str | int | None = None, temperature: float = 0.0,
                prompt: str | None = None, threads: int | None = None, backend: str = "kernels", arithmetic: str | None = None,
                progress: Callable[..., AbstractContextManager] = silent) -> dict[str, object]:
    """Tokens per second without a drafter and with each draft length of `lengths` ("auto" or 1 to 8), in turn, and their ratios.

    `plan.n_new` tokens after `prompt`, or after `plan.depth` (at least CONTEXT) random ones; `chances` (that draft tokens 1 to i are all
    accepted, by i) make it a simulation. The other arguments are those of `load`, `load_drafter` and `stream`. Raises ValueError with one
    line for what cannot be measured.
    """
    ways = {"plain": None} | {str(length): length for length in lengths}
    for length in lengths:
        draft_length_of(length, AutoDraftLength())
    if chances is not None:
        check_chances(chances)
    model = load(path, backend=backend, arithmetic=arithmetic, threads=threads, progress=progress)
    model.wait_until_kept()
    drafter = load_drafter(drafter_path, model, head=head, progress=progress)
    plan = Plan(0, plan.n_new, max(plan.depth, CONTEXT), plan.repetitions, plan.seed)
    _, context, ids = random_ids(model, plan)
    if prompt is not None:
        context = model.tokenizer.encode(prompt)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    stats: dict[str, DraftStats] = {way: DraftStats() for way in ways}
    with progress("decode", (plan.repetitions + 1) * len(ways)) as step:
        for turn in range(plan.repetitions + 1):
            for way, length in ways.items():
                time.sleep(PAUSE)
                found = DraftStats()
                took = _run(model, drafter, length, context, ids, plan, chances, min_p, temperature, turn, found)
                step(1)
                if turn:                                # the first is not counted
                    seconds[way].append(took)
                    stats[way].merge(found)
    results = {}
    for way, runs in seconds.items():
        results[way] = {"seconds": runs, "tokens_per_second": spread([plan.n_new / run for run in runs])}
        if way != "plain":
            pairs = [b / a for a, b in zip(runs, seconds["plain"])]
            results[way] |= {"ratio": {"of_medians": statistics.median(seconds["plain"]) / statistics.median(runs), "min": min(pairs),
                                       "max": max(pairs)}, "draft": figures(stats[way])}
    return {"model": {"path": str(model.file.path), "name": model.name}, "drafter": {"path": str(drafter.file.path)},
            "plan": asdict(plan) | {"temperature": temperature, "simulated_acceptance": chances}, "machine": machine(model.backend.threads),
            "decode": results}


def _run(model: Model, drafter: Drafter, draft_max, context, ids, plan: Plan, chances, min_p, temperature, turn: int, stats) -> float:
    """Seconds for `plan.n_new` tokens after the context."""
    cache = model.new_cache(len(context) + plan.n_new)
    state_D = model.prefill(context, cache)[-1]
    sampler, rng = Sampler(Sampling(temperature=temperature, seed=turn), model.tokenizer.suppress), np.random.default_rng(turn)
    started = time.perf_counter()
    if draft_max is None:
        for _ in itertools.islice(plain(model, cache, sampler, state_D), plan.n_new):
            pass
    else:
        length = draft_length_of(draft_max, drafter.auto)
        if chances is not None:
            drafter = sampler = Simulated(drafter, sampler, chances, ids, rng)
        first = sampler.pick(model.head(state_D[None])[0])
        for done in speculative(ExpertCounter(model, stats), partial(drafter.draft, min_p=min_p), cache, sampler, first, state_D,
                                plan.n_new - 1, length):
            stats.add(done)
    return time.perf_counter() - started
