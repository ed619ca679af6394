"""Perplexity of a model on a text, and its distance from another engine or file: KL divergence, agreement.

Window by window (windows.py), and within a window some rows of logits at a time: memory does not grow with the text, and hardly with the
vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from refimpl.host import available
from refimpl.lab.evaluate.evaluation import Cutting, Evaluation
from refimpl.lab.evaluate.logit_sources import Side
from refimpl.lab.evaluate.measure import TOP
from refimpl.lab.evaluate.saved_runs import parts_folder, write_run
from refimpl.lab.evaluate.work import Workers, measured
from refimpl.lab.failures import FAILURES, line_of
from refimpl.loading.memory import needed, refuse_unless_it_fits
from refimpl.loading.model import CHUNK
from refimpl.model.weights import weights_from_gguf
from refimpl.progress import silent


def evaluate(side: Side, texts: Sequence[Path] = (), *, against: Side | None = None, base: Path | None = None, output: Path | None = None,
             n_ctx: int = 512, stride: int | None = None, count: str = "every", raw: bool = False, n_top: int = 256,
             n_windows: int | None = None, jobs: int = 1, threads: int | None = None, cluster: str = "local",
             progress: Callable[..., AbstractContextManager] = silent) -> dict[str, object]:
    """Every figure of an evaluation, as plain data.

    `texts` are files (windows.read_documents); with `base`, a run that was kept, its own windows are taken and there are none. `n_ctx`,
    `stride`, `count`, `raw` and `n_windows` are those of evaluation.Cutting. `output` keeps the run, with the `n_top` most probable tokens
    of a row, and its state meanwhile. `jobs`, `threads` and `cluster` are those of work.Workers; each process has the models. Raises
    ValueError (ClusterError, MissingExtra among them), with one line; GGUFError; OSError.
    """
    workers = Workers(cluster, jobs, threads)
    if output is not None and Path(output).is_dir():
        raise ValueError(f"{output} is a folder; a run is kept in a file")
    if output is not None and n_top < TOP:
        raise ValueError(f"n_top={n_top}: a run keeps at least the {TOP} most probable tokens")
    todo = Evaluation(side, texts, Cutting(n_ctx, stride, count, raw, n_windows), against, base, 0 if output is None else n_top,
                      hashed=output is not None or not workers.near, near=workers.near)
    if output is not None:
        todo.resume(parts_folder(output))
    missing = todo.missing()
    if workers.near and jobs > 1 and missing:
        check_memory(todo, min(jobs, len(missing)))
    try:
        with progress("tokens", todo.n_tokens) as step:
            step(sum(todo.windows[number].n_counted for number in todo.parts))
            for number, part in measured(todo.tasks(missing, todo.n_ctx, threads), len(missing), workers, progress):
                if isinstance(part, Exception):
                    raise part
                todo.add(number, part)
                step(todo.windows[number].n_counted)
    except FAILURES as e:
        if output is None or not todo.parts:
            raise
        raise ValueError(f"{line_of(e)}; {len(todo.parts)} of {len(todo.windows)} windows are done and kept in {todo.journal.folder}: "
                         "the same command goes on from there") from e
    if output is not None:
        write_run(output, todo.identity(), todo.windows, todo.in_order())
        todo.journal.close()
    kept = {} if base is None else {"path": str(base), "n_top": todo.base.about["n_top"], "model": todo.base.about["model"]}
    return todo.about | {"against": str(against) if against else None, "base": kept or None,
                         "output": None if output is None else str(output), "notes": todo.notes} | todo.result()


def check_memory(evaluation: Evaluation, jobs: int):
    """Every process has the models once. Raises MemoryRefusal."""
    if evaluation.side.engine == "kernels":
        from refimpl.kernels.machine.tiles import held_bytes

        weights = weights_from_gguf(evaluation.file, evaluation.config)
        one = needed(weights, evaluation.config, evaluation.n_ctx, CHUNK, np.dtype(np.float16), held_bytes)
        refuse_unless_it_fits(one, available() // jobs, f"{evaluation.file.path}, {jobs} times")
