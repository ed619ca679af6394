"""Who measures windows: this process, or many through Dask (lab/cluster.py). The figures are the same."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from refimpl.host import default_threads
from refimpl.lab.evaluate.measure import OpenModels, WindowTask, close_here, measure, measure_here
from refimpl.lab.evaluate.run_files import Part
from refimpl.lab.failures import FAILURES
from refimpl.progress import Progress, silent

LOCAL = "local"


@dataclass(frozen=True)
class Workers:
    """`cluster`: "local" for `jobs` processes of this machine (1: this one itself, which starts at once), or the address of a Dask
    scheduler. `threads` in each; None: the cores shared out, or what a worker elsewhere was started with.
    """

    cluster: str = LOCAL
    jobs: int = 1
    threads: int | None = None

    def __post_init__(self):
        if self.jobs < 1 or self.jobs > 1 and self.cluster != LOCAL:
            raise ValueError(f"jobs={self.jobs}, cluster={self.cluster!r}: at least one process is needed, and a scheduler has its own")

    @property
    def near(self) -> bool:
        """Whether all of them are of this machine."""
        return self.cluster == LOCAL


IN_THIS_PROCESS = Workers()


def measured(tasks: Iterable[tuple[object, WindowTask]], n: int, workers: Workers,
             progress: Progress = silent) -> Iterator[tuple[object, Part | Exception]]:
    """(key, figures, or why there are none) of every (key, task), in any order; `n` is how many there are.

    Raises ClusterError where the workers fail, and what is no failure of a single task.
    """
    if not n:
        return
    jobs = min(workers.jobs, n)
    if workers.near and jobs == 1:          # Dask takes seconds to start
        with contextlib.closing(OpenModels(progress)) as models:
            for key, task in tasks:
                try:
                    result = measure(task, models, task.threads)
                except FAILURES as e:
                    result = e
                yield key, result
        return
    from refimpl.lab.cluster import connected

    with connected(workers.cluster, jobs, workers.threads or max(1, default_threads() // jobs)) as cluster:
        try:
            yield from cluster.each(measure_here, tasks)
        finally:
            if not workers.near:
                cluster.on_all(close_here)
