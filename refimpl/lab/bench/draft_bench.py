"""How much faster with a drafter: plain and speculative decoding in turn, with the same model, the same cache lengths, the same machine.

A file with random contents accepts nothing, so its speed with a real drafter has to be estimated. A SIMULATION does that: the drafter
drafts, the target verifies, the rest is rolled back, all at their real cost. Only how many drafts are accepted is decided with given
chances, and the tokens in the rows are replaced by random ones, so that the experts they need are as different as those of unrelated
words. (In a random model the drafts would be a single token again and again, and share their experts.)

The first run of each way is not counted. "auto" has learnt what a round costs by then, as it would in the first answer of a chat.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import numpy as np

from refimpl.decode.draft_length import AutoDepth, depth_of
from refimpl.decode.drafter import Drafter, load_drafter
from refimpl.decode.generate import plain
from refimpl.decode.sampling import Sampler, Sampling
from refimpl.decode.speculative import DraftStats, figures, speculative
from refimpl.lab.bench.bench import PAUSE, Plan, machine, random_ids, spread
from refimpl.loading.model import Model, load
from refimpl.progress import silent

GOLDEN = (5**0.5 - 1) / 2
CONTEXT = 16                # tokens that everything starts from at depth 0


@dataclass(frozen=True)
class Simulation:
    """Chances that drafts 1 to i are all accepted, by i. Raises ValueError unless they lie in 0..1 and do not rise."""

    chances: tuple[float, ...]

    def __post_init__(self):
        """Checks them."""
        if not self.chances or not all(0 <= chance <= 1 for chance in self.chances) or list(self.chances) != sorted(self.chances)[::-1]:
            raise ValueError(f"acceptance {', '.join(map(str, self.chances))}: expected chances of 0 to 1, each at most the one before it "
                             "(that all drafts up to here are accepted)")


class RandomRows:
    """A drafter at its real cost, whose proposals are replaced by random tokens."""

    def __init__(self, drafter: Drafter, ids: Sequence[int], rng: np.random.Generator):
        self.target, self.drafter, self.ids, self.rng = drafter.target, drafter, np.array(ids), rng

    def draft(self, token, state_C, cache, n: int, min_p: float) -> list[int]:
        """As Drafter has it."""
        drafted = self.drafter.draft(token, state_C, cache, n, min_p)
        return self.ids[self.rng.integers(len(self.ids), size=len(drafted))].tolist()


def by_chance(simulation: Simulation, ids: Sequence[int], rng: np.random.Generator) -> Callable[..., list[int]]:
    """An `accept` with given chances. It makes the target's choice in as many rows as the real one would.

    Instead of dice it takes the fractional parts of multiples of the golden ratio, from a random one on, which fill 0..1 evenly in short
    runs too: so that these have the chances asked for.
    """
    turns = itertools.count(int(rng.integers(1 << 20)))

    def decide(drafted: Sequence[int], chosen: Iterable[int], end: Collection[int]) -> list[int]:
        u = next(turns) * GOLDEN % 1
        n = sum(u < chance for chance in simulation.chances[:len(drafted)])
        for _ in zip(range(n + 1), chosen):
            pass
        return [*drafted[:n], ids[int(rng.integers(len(ids)))]]
    return decide


def draft_bench(path: str | os.PathLike | None, drafter_path: str | os.PathLike | None, plan: Plan, depths: Sequence[int | str], *,
                chances: Sequence[float] | None = None, min_p: float = 0.0, head: str | int | None = None, temperature: float = 0.0,
                prompt: str | None = None, threads: int | None = None, backend: str = "kernels", arithmetic: str | None = None,
                progress: Callable[..., AbstractContextManager] = silent) -> dict[str, object]:
    """Tokens per second without a drafter and with each of `depths` ("auto" or a number of drafts), in turn, and their ratios.

    `plan.n_new` tokens after `prompt`, or after `plan.depth` (at least CONTEXT) random ones; `chances` makes it a simulation. The other
    arguments are those of `load`, `load_drafter` and `stream`. Raises ValueError with one line for what cannot be measured.
    """
    ways = {"plain": None} | {str(depth): depth for depth in depths}
    for depth in depths:
        depth_of(depth, AutoDepth())
    simulation = None if chances is None else Simulation(tuple(chances))
    model = load(path, backend=backend, arithmetic=arithmetic, threads=threads, progress=progress)
    drafter = load_drafter(drafter_path, model, head=head, progress=progress)
    plan = Plan(0, plan.n_new, max(plan.depth, CONTEXT), plan.repetitions, plan.seed)
    _, context, ids = random_ids(model, plan)
    if prompt is not None:
        context = model.tokenizer.encode(prompt)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    stats: dict[str, DraftStats] = {way: DraftStats() for way in ways}
    with progress("decode", (plan.repetitions + 1) * len(ways)) as step:
        for turn in range(plan.repetitions + 1):
            for way, depth in ways.items():
                time.sleep(PAUSE)
                found = DraftStats()
                took = _run(model, drafter, depth, context, ids, plan, simulation, min_p, temperature, turn, found)
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


def _run(model: Model, drafter: Drafter, depth, context, ids, plan: Plan, simulation, min_p, temperature, turn: int, stats) -> float:
    """Seconds for `plan.n_new` tokens behind the context."""
    cache = model.new_cache(len(context) + plan.n_new)
    state_D = model.prefill(context, cache)[-1]
    sampler, rng = Sampler(Sampling(temperature=temperature, seed=turn), model.tokenizer.suppress), np.random.default_rng(turn)
    began = time.perf_counter()
    if depth is None:
        tokens = plain(model, cache, sampler, state_D)
    elif simulation is None:
        tokens = speculative(model, drafter, cache, sampler, state_D, plan.n_new, depth_of(depth, drafter.auto), min_p, stats, end=())
    else:
        made = RandomRows(drafter, ids, rng)
        tokens = speculative(model, made, cache, sampler, state_D, plan.n_new, depth_of(depth, drafter.auto), min_p,
                             stats, decide=by_chance(simulation, ids, rng), end=())
    for _ in zip(range(plan.n_new), tokens):
        pass
    return time.perf_counter() - began
