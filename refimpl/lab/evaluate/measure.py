"""The figures of a window, from the logits of a model; the models that a process has open.

Against another engine or file (`WindowTask.other`) the divergence is exact; against a run that was kept (`WindowTask.kept`) it lies
between two bounds (divergence.py). It is KL(base || this), the base being the other one, in nats. What a window gives depends on the task
alone: not on the process, nor on what it did before.
"""

import functools
import json
import multiprocessing.util
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from refimpl.lab.bench.bench import machine
from refimpl.lab.evaluate.divergence import Kept, divergence, divergence_bounds, keep
from refimpl.lab.evaluate.logit_sources import LogitSource, Side, opened
from refimpl.lab.evaluate.run_files import COLUMNS, KEPT, Part
from refimpl.lab.evaluate.saved_runs import kept_rows
from refimpl.lab.evaluate.windows import Window
from refimpl.progress import Progress, silent

TOP = 10                # the most probable tokens that are compared as a set


@dataclass(frozen=True)
class WindowTask:
    """A window to be measured, with all that it takes. `number` is for messages.

    `n_top` most probable tokens are kept, none for 0. `other` and `kept` (columns of `saved_runs.Run.kept`) are None, or one of them is.
    `n_ctx` is the context for which models are opened, at least the window's; `threads` None: what the process has.
    """

    number: int
    window: Window
    own: Side
    other: Side | None
    kept: Mapping[str, np.ndarray] | None
    n_ctx: int
    n_vocab: int
    n_top: int
    threads: int | None

    def columns(self) -> list[str]:
        """Which figures there will be."""
        compared = self.other is not None or self.kept is not None
        return [key for key in COLUMNS if key == "nll" or (key in KEPT and self.n_top) or (key not in KEPT and compared)]


class OpenModels:
    """The models of a process: those of the last task stay open for the next one. Close it."""

    def __init__(self, progress: Progress = silent):
        self.progress, self._open = progress, {}

    def take(self, task: WindowTask, threads: int | None) -> list[LogitSource]:
        """The sources of a task, its own first."""
        keys = [(side, task.n_ctx, task.n_vocab, threads) for side in (task.own, task.other) if side is not None]
        for key in self._open.keys() - set(keys):
            self._open.pop(key)[1].close()
        for key in keys:
            if key not in self._open:
                with ExitStack() as stack:
                    self._open[key] = opened(*key, stack, self.progress), stack.pop_all()
        return [self._open[key][0] for key in keys]

    def close(self):
        """Ends what was started."""
        while self._open:
            self._open.popitem()[1][1].close()


_models = OpenModels()


def measure_here(task: WindowTask, threads: int) -> Part:
    """`measure` in one of several processes, which keeps its models; `threads` is what it has."""
    _close_at_exit()
    return measure(task, _models, task.threads or threads)


def close_here():
    """Closes the models that `measure_here` has kept in this process."""
    _models.close()


@functools.cache
def _close_at_exit():
    multiprocessing.util.Finalize(None, _models.close, exitpriority=10)         # such a process may run no other handlers at its end


def measure(task: WindowTask, models: OpenModels, threads: int | None) -> Part:
    """The figures of one window. Raises ValueError for logits that are not finite, and as `logit_sources.opened`."""
    window, sources = task.window, models.take(task, threads)
    ids, first = window.ids[:-1], window.first - 1
    out = {key: np.empty((window.n_counted, *([min(task.n_top, task.n_vocab)] if key.startswith("top") else [])), COLUMNS[key])
           for key in task.columns()}
    kept = None if task.kept is None else kept_rows(task.kept)
    if kept is not None:
        out["base_nll"][:] = task.kept["nll"]
    others = repeat(None) if task.other is None else _checked(task, task.other, sources[1].rows(ids, first))
    row, own, seconds = 0, _checked(task, task.own, sources[0].rows(ids, first)), 0.0
    while True:
        began = time.perf_counter()
        logit_RV = next(own, None)
        seconds += time.perf_counter() - began
        if logit_RV is None:
            return Part(out, seconds, about_machine(threads))
        other_RV = next(others)
        for i, logit_V in enumerate(logit_RV):
            token = window.ids[window.first + row]
            figures = scores(logit_V, token, task.n_top)
            if other_RV is not None:
                figures |= compared(other_RV[i], logit_V, token, figures)
            elif kept is not None:
                figures |= compared_with_kept(kept(row), logit_V, figures)
            for key in out.keys() & figures.keys():
                out[key][row] = figures[key]
            row += 1


def _checked(task: WindowTask, side: Side, rows: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for logit_RV in rows:
        if logit_RV.shape[1] != task.n_vocab:
            raise ValueError(f"{side}: {logit_RV.shape[1]} logits a token, expected {task.n_vocab}")
        if not np.isfinite(logit_RV).all():
            raise ValueError(f"{side}: NaN or infinite logits in window {task.number}; refimpl verify looks for the cause in a file")
        yield logit_RV


@functools.cache
def about_machine(threads: int | None) -> str:
    """What computes here, as JSON."""
    return json.dumps({"host": platform.node()} | machine(threads or 1))


def scores(logit_V: np.ndarray, token: int, n_top: int) -> dict[str, object]:
    """The figures of one row alone. At least TOP of the most probable tokens are found, for comparisons."""
    kept = keep(logit_V, max(n_top, TOP))
    return {"nll": kept.log_sum - float(logit_V[token]), "log_sum": kept.log_sum, "most_probable": kept.id_K,
            "top_id": kept.id_K[:n_top], "top_logit": kept.logit_K[:n_top]}


def compared(base_V: np.ndarray, logit_V: np.ndarray, token: int, figures: dict[str, object]) -> dict[str, object]:
    """The figures of a row beside a whole one of the base."""
    base = scores(base_V, token, 0)
    exact = divergence(base_V, logit_V, base["log_sum"], figures["log_sum"])
    return {"base_nll": base["nll"], "kl_low": exact, "kl_high": exact} | agreement(base["most_probable"], figures["most_probable"])


def compared_with_kept(base: Kept, logit_V: np.ndarray, figures: dict[str, object]) -> dict[str, object]:
    """The figures of a row beside what was kept of the base's."""
    low, high = divergence_bounds(base, logit_V, figures["log_sum"])
    return {"kl_low": low, "kl_high": high} | agreement(base.id_K, figures["most_probable"])


def agreement(base_K: np.ndarray, own_K: np.ndarray) -> dict[str, int]:
    """Whether the most probable token is the same, and how many of the TOP most probable are."""
    return {"same_top": int(base_K[0] == own_K[0]), "shared_top": len(np.intersect1d(base_K[:TOP], own_K[:TOP]))}
