"""One process of an evaluation: the models, loaded, and the figures of a window from their logits.

Against another engine or file (`EvaluationPlan.against`) the divergence is exact; against a run that was kept (`EvaluationPlan.base`) it
lies between two bounds (divergence.py). It is KL(base || this), the base being the other one, in nats.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np

from refimpl.lab.evaluate.divergence import Kept, divergence, divergence_bounds, keep
from refimpl.lab.evaluate.logit_sources import Side, opened
from refimpl.lab.evaluate.saved_runs import COLUMNS, KEPT, read_run
from refimpl.lab.evaluate.windows import Window
from refimpl.progress import Progress, silent

TOP = 10                # the most probable tokens that are compared as a set


@dataclass(frozen=True)
class EvaluationPlan:
    """The work of a process. `n_top` most probable tokens are kept, none for 0; `against` and `base` are None, or one of them is."""

    side: Side
    against: Side | None
    base: Path | None
    windows: tuple[Window, ...]
    n_vocab: int
    n_top: int
    threads: int | None

    @property
    def n_ctx(self) -> int:
        """Tokens of the longest window."""
        return max(len(window.ids) - 1 for window in self.windows)

    def columns(self) -> list[str]:
        """Which figures there will be."""
        compared = self.against is not None or self.base is not None
        return [key for key in COLUMNS if key == "nll" or (key in KEPT and self.n_top) or (key not in KEPT and compared)]


class Worker:
    """The models of a plan, loaded. Use it in a `with` statement."""

    def __init__(self, plan: EvaluationPlan, progress: Progress = silent):
        self.plan, self.stack = plan, ExitStack()
        with self.stack:
            self.base = None if plan.base is None else read_run(plan.base)
            self.own = opened(plan.side, plan.n_ctx, plan.n_vocab, plan.threads, self.stack, progress)
            self.other = plan.against and opened(plan.against, plan.n_ctx, plan.n_vocab, plan.threads, self.stack, progress)
            self.stack = self.stack.pop_all()

    def __enter__(self) -> "Worker":
        """Itself."""
        return self

    def __exit__(self, *error: object):
        """Ends what was started."""
        self.stack.close()

    def measure(self, number: int) -> dict[str, np.ndarray]:
        """The figures of one window, by column. Raises ValueError for logits that are not finite."""
        plan, window = self.plan, self.plan.windows[number]
        ids, first = window.ids[:-1], window.first - 1
        out = {key: np.empty((window.n_counted, *([min(plan.n_top, plan.n_vocab)] if key.startswith("top") else [])), COLUMNS[key])
               for key in plan.columns()}
        kept = None if self.base is None else self.base.kept(number)
        if kept is not None:
            out["base_nll"][:] = self.base.nll(number)
        others = repeat(None) if self.other is None else self._checked(plan.against, self.other.rows(ids, first), number)
        row = 0
        for logit_RV, other_RV in zip(self._checked(plan.side, self.own.rows(ids, first), number), others):
            for i, logit_V in enumerate(logit_RV):
                token = window.ids[window.first + row]
                figures = scores(logit_V, token, plan.n_top)
                if other_RV is not None:
                    figures |= compared(other_RV[i], logit_V, token, figures)
                elif kept is not None:
                    figures |= compared_with_kept(kept(row), logit_V, figures)
                for key in out.keys() & figures.keys():
                    out[key][row] = figures[key]
                row += 1
        return out

    def _checked(self, side: Side, rows: Iterator[np.ndarray], number: int) -> Iterator[np.ndarray]:
        for logit_RV in rows:
            if logit_RV.shape[1] != self.plan.n_vocab:
                raise ValueError(f"{side}: {logit_RV.shape[1]} logits a token, expected {self.plan.n_vocab}")
            if not np.isfinite(logit_RV).all():
                raise ValueError(f"{side}: NaN or infinite logits in window {number}; refimpl verify looks for the cause in a file")
            yield logit_RV


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
