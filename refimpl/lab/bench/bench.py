"""How fast: tokens of a prompt per second, and new tokens per second as a share of what reading the weights allows.

A decoded token has to read every weight that it uses, and all visible keys and values, once. Decoding can therefore not be faster
than the bandwidth of memory divided by these bytes, however it computes; how near it comes is the figure to look at. Beside another
engine the two take turns, run by run, so that whatever else the machine does meets both.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from refimpl.formats.gguf import GGUFFile
from refimpl.formats.matrix import stored_bytes
from refimpl.host import available
from refimpl.kernels.cores.threads import prepare, running, slow_layer_warning
from refimpl.lab.bench.bandwidth import BUFFER_BYTES, Traffic, bytes_per_token, read_bandwidth
from refimpl.lab.bench.machine import machine
from refimpl.lab.bench.predict import outlined, prompt_seconds, step_seconds
from refimpl.lab.bench.speed import Speed, heads_of, mean_of, measure_rest, measure_speed
from refimpl.lab.engines import LLAMACPP, TIMED, known
from refimpl.lab.llamacpp.client import LlamaCpp
from refimpl.loading.memory import MemoryRefusal
from refimpl.loading.model import Model, float32_bytes, load
from refimpl.progress import silent
from refimpl.text.tokenizer import NORMAL

OPPONENTS = {LLAMACPP: LlamaCpp}            # by the names of lab.engines.TIMED
PAUSE = 0.05                # seconds before a run, in which the threads of the other engine go to sleep


@dataclass(frozen=True)
class Plan:
    """What is measured, `repetitions` times: a prompt of `n_prompt` tokens, and `n_new` single tokens after `depth` others; 0: not that."""

    n_prompt: int = 512
    n_new: int = 64
    depth: int = 0
    repetitions: int = 5
    seed: int = 0

    @property
    def n_ctx(self) -> int:
        """The context that it takes."""
        return max(self.n_prompt, self.depth + self.n_new)


class Engine(Protocol):
    """An engine with a model loaded, to be timed."""

    kv_bytes: float         # of one number of a key or a value

    def measure(self, context: Sequence[int], ids: Sequence[int], together: bool) -> float:
        """Seconds that `ids` take after `context`, in one call or one by one, logits for the last one of each call."""


class ModelEngine:
    """A model of this package as an Engine."""

    def __init__(self, model: Model, n_ctx: int):
        self.model, self.n_ctx = model, n_ctx
        self.kv_bytes = model.backend.kv_type.itemsize

    def measure(self, context: Sequence[int], ids: Sequence[int], together: bool) -> float:
        """As in Engine."""
        cache = self.model.new_cache(self.n_ctx)
        if len(context):
            self.model.prefill(context, cache)
        began = time.perf_counter()
        for call in [ids] if together else [[new] for new in ids]:
            self.model.head(self.model.prefill(call, cache)[-1:])
        return time.perf_counter() - began


def bench(path: str | os.PathLike | None, plan: Plan, *, threads: int | None = None, backend: str = "kernels",
          arithmetic: str | None = None, opponent: str | None = None, progress: Callable[..., AbstractContextManager] = silent,
          loaded: Callable[[Model], None] = lambda model: None) -> dict[str, object]:
    """Every figure of a run, as plain data: model, machine, each single measurement in seconds, medians, bandwidth.

    `threads`, `backend` and `arithmetic` are those of `load`; `opponent` is one of lab.engines.TIMED, or None. `loaded` is
    called with the model before anything is measured. With the kernels, ours are held against a prediction (predict.py). Raises ValueError
    (GGUFError, LlamaCppError, MemoryRefusal among them) with one line for what cannot be measured.
    """
    if not plan.n_prompt and not plan.n_new:
        raise ValueError("nothing to measure: the prompt and the new tokens are both 0")
    if opponent is not None:
        _find(opponent)
    n_threads = prepare(threads) if backend == "kernels" else threads or 1
    model = load(path, backend=backend, arithmetic=arithmetic, threads=n_threads, progress=progress)
    model.wait_until_kept()
    loaded(model)
    prompt, context, new = random_ids(model, plan)
    engines: dict[str, Engine] = {"refimpl": ModelEngine(model, plan.n_ctx)}
    facts, tests, buffer_bytes = {}, [], min(BUFFER_BYTES, available() // 4)
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(n_threads))         # for the reference, whose linear algebra would take all cores
        if opponent is not None:
            _check_memory(opponent, model.file)
            engines[opponent] = stack.enter_context(OPPONENTS[opponent](model.file.path, plan.n_ctx, n_threads))
            facts = engines[opponent].facts
        speeds = [] if backend != "kernels" else [_speed(model, progress)]
        bandwidths = read_bandwidth(n_threads, buffer_bytes)
        if plan.n_prompt:
            tests.append(compare("prompt", engines, [], prompt, True, plan.repetitions, progress))
        if plan.n_new:
            tests.append(compare("decode", engines, context, new, False, plan.repetitions, progress))
        bandwidths += read_bandwidth(n_threads, buffer_bytes)
        if speeds:
            _predict(tests, model, plan, mean_of(*speeds, _speed(model, progress)))
    if plan.n_new:
        for name, engine in engines.items():
            held = model.backend.held if name == "refimpl" else stored_bytes
            traffic = bytes_per_token(model.file, model.config, plan.depth, plan.n_new, engine.kv_bytes, held)
            _hold_against(tests[-1]["engines"][name], traffic, max(bandwidths))
    warning = slow_layer_warning()
    return {
        "model": {"path": str(model.file.path), "name": model.name, "bytes": model.file.n_bytes,
                  "parameters": float32_bytes(model.file) // 4},
        "plan": asdict(plan) | {"backend": backend, "arithmetic": model.backend.arithmetic, "threads": n_threads},
        "machine": machine(n_threads), "opponent": {"name": opponent} | facts if opponent else None,
        "bandwidth": {"bytes_per_second": max(bandwidths), "passes": bandwidths, "buffer_bytes": buffer_bytes, "threads": n_threads},
        "tests": tests, "notes": [warning] if warning else []}


def _speed(model: Model, progress) -> Speed:
    """The parts that the model is made of, now."""
    return measure_speed(outlined(model.file).work.types, heads_of(model.config), model.backend, progress)


def _predict(tests: list[dict[str, object]], model: Model, plan: Plan, speed: Speed):
    """Adds what the speed of its parts lets expect to each result of ours."""
    shape = outlined(model.file)
    rest = measure_rest(shape.config, shape.weights, model.backend)
    for test in tests:
        seconds = (prompt_seconds(shape, speed, rest, plan.n_prompt) / plan.n_prompt if test["test"] == "prompt" else
                   step_seconds(shape, speed, rest, plan.depth + plan.n_new // 2))
        run = test["engines"]["refimpl"]
        run["predicted_tokens_per_second"] = 1 / seconds
        run["predicted_to_measured"] = 1 / seconds / run["tokens_per_second"]["median"]


def _find(opponent: str):
    """Before a large file is loaded for nothing."""
    OPPONENTS[known(opponent, TIMED)].check()


def _check_memory(opponent: str, file: GGUFFile):
    """The other engine holds the weights once more: in the mapped file, or rearranged as ours are."""
    free = available()
    if file.n_bytes > free:
        raise MemoryRefusal(f"{file.path}: {opponent} beside refimpl needs another {file.n_bytes / 1e9:.2f} GB, this machine has "
                            f"{free / 1e9:.2f} GB free; a smaller file helps")


def random_ids(model: Model, plan: Plan) -> tuple[list[int], list[int], list[int]]:
    """Ids of normal tokens for the prompt, the context and the new tokens. The same seed gives the same ones."""
    ordinary = np.flatnonzero(np.asarray(model.file.metadata["tokenizer.ggml.token_type"]) == NORMAL)
    if not len(ordinary):
        raise ValueError(f"{model.file.path}: the vocabulary has no normal tokens to make a prompt of")
    rng = np.random.default_rng(plan.seed)
    prompt, context, new = (rng.choice(ordinary, n).tolist() for n in (plan.n_prompt, plan.depth, plan.n_new))
    return prompt, context, new


def compare(name: str, engines: dict[str, Engine], context: list[int], ids: list[int], together: bool, repetitions: int,
            progress=silent) -> dict[str, object]:
    """Runs one test, the engines in turn, after a run of each that is not counted. With two engines: how much faster the first one is."""
    seconds: dict[str, list[float]] = {engine: [] for engine in engines}
    with progress(name, (repetitions + 1) * len(engines)) as step:
        for engine in engines.values():
            engine.measure([], ids if together else ids[:2], together)
            step(1)
        for _ in range(repetitions):
            for engine in engines:
                time.sleep(PAUSE)
                seconds[engine].append(engines[engine].measure(context, ids, together))
                step(1)
    test = {"test": name, "tokens": len(ids), "depth": len(context), "engines": {
        engine: {"seconds": runs, "tokens_per_second": spread([len(ids) / run for run in runs]),
                 "ms_per_token": 1000 * statistics.median(runs) / len(ids)} for engine, runs in seconds.items()}}
    if len(engines) == 2:
        ours, theirs = seconds.values()
        pairs = [b / a for a, b in zip(ours, theirs)]
        test["ratio"] = {"of_medians": statistics.median(theirs) / statistics.median(ours), "min": min(pairs), "max": max(pairs),
                         "pairs": pairs}
    return test


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _hold_against(result: dict[str, object], traffic: Traffic, bandwidth: float):
    result["bytes_per_token"] = {"weights": traffic.weights, "kv": traffic.kv, "total": traffic.total}
    result["tokens_per_second_at_most"] = bandwidth / traffic.total
    result["share_of_bandwidth"] = result["tokens_per_second"]["median"] * traffic.total / bandwidth
