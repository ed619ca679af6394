"""How far a correct engine may be away: the tolerance of every tensor, from the rounding of its arithmetic.

An engine that rounds every value to p significant bits makes, at every step of the graph, a relative error of up to the unit roundoff
u = 2^-p (Higham, Accuracy and Stability of Numerical Algorithms, section 2.2), and adds up its sums in an order of its own, which is as
much again, relative to the size of the row. How these errors grow on their way through norms, attention and experts depends on the model,
so it is measured and not bounded: the model runs in exact arithmetic, and again with every named value v of a row moved by

    u * (|v| + rms(row)) * r,     r uniform in [-1, 1],

and what then lies between the two runs, tensor by tensor, is the noise of an engine of that arithmetic. For `q8` the second run is our own
8-bit arithmetic, which rounds activations as ggml does, moved by float16's roundoff besides, because llama.cpp keeps keys and values in
float16 and looks GELU up in a table of float16. The largest row counts; rows behind an expert that changed places do not (compare.py);
several seeds, the worst of them.

Two engines are each away from exact arithmetic, so the tolerance is SAFETY times the sum of both noises. SAFETY = 5: the largest
error of a correct engine was 2.4 times that sum in 60 runs (random models of the five shapes, transformers in float32 and bfloat16, our
arithmetics and backends), where steps that have no name here (softmax, the cosines, the parts of an expert) are rounded too.

Without the model the noise is guessed: `a_priori`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from refimpl.decode.drafter import Drafter, load_drafter
from refimpl.decode.model import Model, load
from refimpl.lab.names import graph_order
from refimpl.lab.trace import Trace, trace
from refimpl.model.backend import kernel_backend, reference_backend
from refimpl.model.gemma4 import Tap, no_tap

SAFETY = 5
ROUNDOFF = {"exact": 2.0**-24, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "q8": 2.0**-11}
Q8_STEP = 3 / 127 / 12**0.5             # rms of rounding to 8 bits, relative to rms: largest of 32 at 3 rms, uniform in a step
MEASURED_POSITIONS = 48
SEEDS = (0, 1)


def perturbing(roundoff: float, seed: int) -> Tap:
    """A tap that moves every value as rounding would."""
    random = np.random.default_rng(seed)

    def move(name: str, value: np.ndarray):
        if value.dtype.kind == "f":
            rms = np.sqrt(np.mean(value.astype(np.float64) ** 2, axis=tuple(range(1, value.ndim)), keepdims=True))
            value += (roundoff * (np.abs(value) + rms) * random.uniform(-1, 1, value.shape)).astype(value.dtype)
    return move


def measured(model: Model, ids: Sequence[int], arithmetic: str, between: Callable[[Trace, Trace], Mapping[str, float]],
             positions: Sequence[int] | None = None) -> dict[str, float]:
    """The noise of an engine of this arithmetic on the first of `ids`, by tensor. `model` computes in exact arithmetic, and its weights are
    quantized as in the file; `between` gives the largest row's deviation of a trace from another.
    """
    ids = list(ids)[:MEASURED_POSITIONS]
    right, noise = trace(model, ids), {}
    engine = in_q8(model) if arithmetic == "q8" else model
    for seed in SEEDS:
        moved = trace(engine, ids, tap=perturbing(ROUNDOFF[arithmetic], seed))
        for name, error in between(right, moved).items():
            noise[name] = max(noise.get(name, 0.0), error)
    return carried(noise, graph_order(right.names()))


def carried(noise: Mapping[str, float], order: Sequence[str]) -> dict[str, float]:
    """The noise of all tensors in `order`: where none could be measured, the largest one before it."""
    found, largest = {}, 0.0
    for name in order:
        found[name] = noise.get(name, largest)
        largest = max(largest, found[name])
    return found


def a_priori(order: Sequence[str], arithmetic: str) -> dict[str, float]:
    """A guess of the noise where there is no model to measure it with: independent errors of n steps add up to sqrt(n) of one."""
    step = Q8_STEP if arithmetic == "q8" else 2 * ROUNDOFF[arithmetic]
    return {name: float(step * np.sqrt(1 + i)) for i, name in enumerate(order)}


def in_q8(model: Model) -> Model:
    """The same weights in 8-bit arithmetic."""
    backend = model.backend
    other = (kernel_backend("q8", backend.threads) if backend.name == "kernels" else reference_backend("q8", backend.prepare))
    return Model(model.file, model.config, model.weights, model.tokenizer, other)


def judge(path: Path | str | None, **options) -> Model:
    """The model in exact arithmetic, its weights as in the file: by the kernels, or the reference where they cannot."""
    try:
        return load(path, arithmetic="exact", **options)
    except ValueError as error:
        if "backend='reference'" not in str(error):
            raise
        return load(path, backend="reference", weights="quantized")
