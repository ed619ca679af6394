"""Who computes what answers are compared with: this process, or many through Dask (lab/cluster.py). The positions are the same, bit for
bit, because they depend on the tokens alone, and neither kernels nor seeds on threads or on what was computed before.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

from refimpl.host import default_threads
from refimpl.lab.compare import tolerance
from refimpl.lab.evaluate.logit_sources import Side, identified, located, side_of
from refimpl.lab.evaluate.work import Workers
from refimpl.lab.judge.ask import Asked
from refimpl.lab.judge.measure import Position, Read, measured, together
from refimpl.lab.judge.vocabulary import Vocabulary
from refimpl.lab.judge.yardstick import Yardstick
from refimpl.loading.model import Model
from refimpl.progress import Progress, silent

Compute = Callable[[Sequence[Sequence[Read]], Yardstick, Vocabulary], Iterator[tuple[int, list[Position]]]]
"""(number, positions) of each list of answers that have the same tokens, in any order."""


@contextlib.contextmanager
def team(workers: Workers, file: str | None) -> Iterator[Compute]:
    """Those who compute. `file`: the model as it was named on the command line, for other processes. Raises ClusterError, and Failed (both
    ValueErrors) where one of them could not.
    """
    if workers.near and workers.jobs == 1:          # Dask takes seconds to start
        yield here
        return
    from refimpl.lab.cluster import Failed, connected

    side = identified(side_of("kernels", "exact", file), hashed=not workers.near, near=workers.near)
    with connected(workers.cluster, workers.jobs, workers.threads or max(1, default_threads() // workers.jobs)) as cluster:
        def elsewhere(tasks: Sequence[Sequence[Read]], yardstick: Yardstick,
                      vocabulary: Vocabulary) -> Iterator[tuple[int, list[Position]]]:
            given = (side, yardstick.arithmetic, yardstick.kv_type)
            for n, result in cluster.each(measured_there, ((n, (*given, reads)) for n, reads in enumerate(tasks))):
                if isinstance(result, Failed):
                    raise result
                yield n, result
        try:
            yield elsewhere
        finally:
            if not workers.near:
                cluster.on_all(_opened.cache_clear)


def here(tasks: Sequence[Sequence[Read]], yardstick: Yardstick, vocabulary: Vocabulary) -> Iterator[tuple[int, list[Position]]]:
    """In this process."""
    for n, reads in enumerate(tasks):
        yield n, measured(reads, yardstick, vocabulary)


def measure(asked: Sequence[Asked], yardstick: Yardstick, vocabulary: Vocabulary, compute: Compute = here,
            progress: Progress = silent) -> list[Position]:
    """All positions with probabilities, in the order of the answers."""
    tasks, found = together(asked, vocabulary), {}
    with progress("answers computed", len(tasks)) as advance:
        for n, positions in compute(tasks, yardstick, vocabulary):
            found[n] = positions
            advance(1)
    return [position for n in sorted(found) for position in found[n]]


# ---- inside of another process

def measured_there(task: tuple[Side, str, str, Sequence[Read]], threads: int) -> list[Position]:
    """`measured` in one of several processes, which keeps its model."""
    side, arithmetic, kv_type, reads = task
    model, vocabulary = _opened(side, threads)
    return measured(reads, Yardstick(model, arithmetic, kv_type), vocabulary)


@functools.lru_cache(1)
def _opened(side: Side, threads: int) -> tuple[Model, Vocabulary]:
    model = tolerance.judge(located(side), threads=threads)
    return model, Vocabulary(model.tokenizer)
