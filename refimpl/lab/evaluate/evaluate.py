"""Perplexity of a model on a text, and its distance from another engine or file: KL divergence, agreement.

Window by window (windows.py), and within a window some rows of logits at a time: memory does not grow with the text, and hardly with the
vocabulary. A window's figures depend on nothing but the window, so that any number of processes, and a run that was killed and
resumed, give the same numbers; they are added up in the order of the text.

worker.py measures a window.
"""

import concurrent.futures
import hashlib
import multiprocessing
import multiprocessing.util
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from refimpl.formats.gguf import GGUFFile, open_gguf
from refimpl.formats.hashing import file_hash
from refimpl.host import available, default_threads
from refimpl.lab.evaluate.logit_sources import Side
from refimpl.lab.evaluate.saved_runs import Journal, read_run, write_run
from refimpl.lab.evaluate.summary import summary
from refimpl.lab.evaluate.windows import COUNTS, cut, read_documents
from refimpl.lab.evaluate.worker import TOP, EvaluationPlan, Worker
from refimpl.loading.memory import needed, refuse_unless_it_fits
from refimpl.loading.model import CHUNK
from refimpl.model.config import Config, config_from_gguf
from refimpl.model.weights import vocabulary_size, weights_from_gguf
from refimpl.progress import silent
from refimpl.text.templates import CONTINUATION_TEMPLATE
from refimpl.text.tokenizer import Tokenizer


def evaluate(side: Side, texts: Sequence[Path] = (), *, against: Side | None = None, base: Path | None = None, output: Path | None = None,
             n_ctx: int = 512, stride: int | None = None, count: str = "every", raw: bool = False, n_top: int = 256,
             n_windows: int | None = None, jobs: int = 1, threads: int | None = None,
             progress: Callable[..., AbstractContextManager] = silent) -> dict[str, object]:
    """Every figure of an evaluation, as plain data.

    `texts` are files (windows.read_documents); with `base`, a run that was kept, its own windows are taken and there are none. `raw`: no
    chat template. `n_ctx`, `stride` (None: half of it) and `count` say how windows are cut, `n_windows` takes the first ones only. `output`
    keeps the run, with the `n_top` most probable tokens of a row, and its state meanwhile. `jobs` processes, each with the models and
    with `threads` threads (None: the cores shared out). Raises ValueError, with one line; OSError.
    """
    if bool(texts) == (base is not None) or against is not None and base is not None:
        raise ValueError("an evaluation needs a text, or a run to compare with, which has its own; and one thing to compare with")
    if count not in COUNTS or n_ctx < 2 or stride is not None and not 1 <= stride <= n_ctx or jobs < 1:
        raise ValueError(f"count={count!r}, n_ctx={n_ctx}, stride={stride}, jobs={jobs}: no windows or processes can be made of that")
    if output is not None and Path(output).is_dir():
        raise ValueError(f"{output} is a folder; a run is kept in a file")
    if output is not None and n_top < TOP:
        raise ValueError(f"n_top={n_top}: a run keeps at least the {TOP} most probable tokens")
    file = open_gguf(side.path)
    config = config_from_gguf(file.metadata, file.tensors.keys(), vocabulary_size(file), file.path)
    tokenizer, notes = Tokenizer.from_metadata(file.metadata, str(file.path)), []
    if base is None:
        windows, documents, about = _windows_of(texts, file, tokenizer, n_ctx, stride, count, raw, notes)
    else:
        run = read_run(base)
        windows, documents = run.windows, run.about["documents"]
        about = {key: run.about[key] for key in ("n_ctx", "stride", "count", "form", "documents")}
        _same_vocabulary(base, run.about["vocabulary"], file)
    if against is not None:
        _same_vocabulary(against.path, vocabulary_hash(open_gguf(against.path)), file)
    plan = EvaluationPlan(side, against, base, tuple(windows[:n_windows]), config.n_vocab, 0 if output is None else n_top,
                threads if threads is not None or jobs == 1 else max(1, default_threads() // jobs))
    if plan.n_ctx > config.n_ctx:
        raise ValueError(f"{file.path}: a window of {plan.n_ctx} tokens, the model's context is {config.n_ctx}")
    about |= {"model": str(side), "n_vocab": config.n_vocab, "n_top": min(n_top, config.n_vocab), "vocabulary": vocabulary_hash(file),
              "windows": len(plan.windows)}
    parts = _measured(plan, about, output, jobs, file, config, progress, notes)
    columns = {key: np.concatenate([part[key] for part in parts]) for key in plan.columns()}
    kept = {} if base is None else {"n_top": run.about["n_top"], "model": run.about["model"]}
    result = summary(columns, plan.windows, documents, tokenizer, np.asarray(file.metadata["tokenizer.ggml.token_type"]), TOP)
    return about | {"against": str(against) if against else None, "base": kept and {"path": str(base)} | kept or None,
                    "output": None if output is None else str(output), "notes": notes} | result


def _windows_of(texts, file: GGUFFile, tokenizer: Tokenizer, n_ctx: int, stride: int | None, count: str, raw: bool, notes: list[str]):
    """(windows, names of documents, how they were cut)."""
    template = file.metadata.get("tokenizer.chat_template")
    trained = isinstance(template, str) and template != CONTINUATION_TEMPLATE
    chat = trained and not raw
    if raw and trained:
        notes.append("raw text: the perplexity of an instruction-tuned model means nothing on it; compare engines with it, not models")
    stride = max(1, n_ctx // 2) if stride is None else stride
    documents = read_documents(texts, tokenizer, template if chat else None)
    windows = cut(documents, n_ctx, stride, count, tokenizer.bos)
    return windows, [document.name for document in documents], {
        "n_ctx": n_ctx, "stride": n_ctx if count == "second-half" else stride, "count": count, "form": "chat" if chat else "raw",
        "documents": [document.name for document in documents]}


def vocabulary_hash(file: GGUFFile) -> str:
    """SHA-256 of the tokens in order: models with the same one can be compared."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    return hashlib.sha256("\n".join(map(repr, tokens)).encode()).hexdigest() if tokens is not None else ""


def _same_vocabulary(path: Path, theirs: str, file: GGUFFile):
    if theirs != vocabulary_hash(file):
        raise ValueError(f"{path}: has another vocabulary than {file.path}; only models with the same one can be compared")


def _measured(plan: EvaluationPlan, about, output: Path | None, jobs: int, file: GGUFFile, config: Config, progress, notes) -> list[dict]:
    """The figures of all windows, in their order: taken up from disk, or measured now."""
    done, journal = {}, None
    if output is not None:
        digest = hashlib.sha256(repr([(window.ids, window.first) for window in plan.windows]).encode()).hexdigest()
        hashes = {"sha256": file_hash(plan.side.path), "tokens": digest, "against": str(plan.against),
                  "against_sha256": plan.against and file_hash(plan.against.path), "base_sha256": plan.base and file_hash(plan.base)}
        journal = Journal(output, about | hashes, plan.windows)
        done = journal.done()
        if done:
            notes.append(f"resumed: {len(done)} of {len(plan.windows)} windows were done")
    missing = [number for number in range(len(plan.windows)) if number not in done]
    if missing and jobs > 1:
        _check_memory(plan, file, config, min(jobs, len(missing)))
    with progress("tokens", sum(window.n_counted for window in plan.windows)) as step:
        step(sum(plan.windows[number].n_counted for number in done))
        for number, part in _each(plan, missing, jobs, progress):
            if journal is not None:
                journal.add(number, part)
            done[number] = part
            step(plan.windows[number].n_counted)
    parts = [done[number] for number in range(len(plan.windows))]
    if journal is not None:
        columns = {key: np.concatenate([part[key] for part in parts]) for key in plan.columns()}
        write_run(output, about | hashes, plan.windows, columns)
        journal.close()
    return parts


def _each(plan: EvaluationPlan, numbers: list[int], jobs: int, progress) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Measures windows, in any order."""
    if not numbers:
        return
    if jobs == 1:
        worker = Worker(plan, progress)
        with worker:
            for number in numbers:
                yield number, worker.measure(number)
        return
    pool = concurrent.futures.ProcessPoolExecutor(min(jobs, len(numbers)), multiprocessing.get_context("spawn"), _start_worker, (plan,))
    try:
        waiting = {pool.submit(_measure, number): number for number in numbers}
        for future in concurrent.futures.as_completed(waiting):
            yield waiting[future], future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise ValueError(f"one of {jobs} processes ended; if memory ran out, fewer (--jobs) help") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _check_memory(plan: EvaluationPlan, file: GGUFFile, config: Config, jobs: int):
    """Every process has the models once."""
    if plan.side.engine == "kernels":
        from refimpl.kernels.machine.tiles import held_bytes

        one = needed(weights_from_gguf(file, config), config, plan.n_ctx, CHUNK, np.dtype(np.float16), held_bytes)
        refuse_unless_it_fits(one, available() // jobs, f"{file.path}, {jobs} times")


# ---- inside of a process

_plan: EvaluationPlan | None = None
_worker: Worker | None = None


def _start_worker(plan: EvaluationPlan):
    global _plan
    _plan = plan
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # Ctrl-C is for the one that started us


def _measure(number: int) -> dict[str, np.ndarray]:
    global _worker
    if _worker is None:
        _worker = Worker(_plan)
        multiprocessing.util.Finalize(None, _worker.stack.close, exitpriority=10)       # such a process runs no other handlers at its end
    return _worker.measure(number)
