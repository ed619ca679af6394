"""How far a correct engine may be away: the tolerance of every tensor, from the rounding of its arithmetic.

An engine that rounds every value to p significant bits makes, at every step of the graph, a relative error of up to the unit roundoff
u = 2^-p (Higham, Accuracy and Stability of Numerical Algorithms, section 2.2), and adds up its sums in an order of its own, which is as
much again, relative to the size of the row. How these errors grow on their way through norms, attention and experts depends on the model,
so it is measured and not bounded: the model runs in exact arithmetic, and again with every named value v of a row moved by

    u * (|v| + rms(row)) * r,     r uniform in [-1, 1],

and what then lies between the two runs, tensor by tensor, is the noise of an engine of that arithmetic. For `q8` the second run is our own
8-bit arithmetic, which rounds activations as ggml does, moved by float16's roundoff besides, because llama.cpp keeps keys and values in
float16 and looks GELU up in a table of float16. The largest row counts; rows after an expert that changed places do not (compare.py);
several seeds, the worst of them.

Two engines are each away from exact arithmetic, so the tolerance is SAFETY times the sum of both noises. SAFETY = 5: the largest
error of a correct engine was 2.4 times that sum in 136 comparisons (random models of the five shapes and the one that ships, transformers
in float32 and bfloat16, llama.cpp, our arithmetics and backends), where steps without a name (softmax, cosines, the parts of an expert)
are rounded too.

Without the model the noise is guessed: `a_priori`.

Step by step (`replayed`) the growth is left out: every named value is computed from the other engine's values before it and compared with
its own, so that each step has the rounding of that step alone. The noise is measured in the same way, on a run of ours in which every
value is moved once more after it was kept: a step has roundings inside that have no name, which stand for one of its inputs.

Of pictures and sounds a piece is measured (`towers.inputs.shortened`). How a tower grows errors depends on its norms of queries and keys:
its scores are not scaled, so with weights of 0.35 there a random one of true depth gives back 1e-6 for float32's rounding, with weights of
2 it gives back 0.13. Such a tower hides mistakes; step by step it does not.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np

from refimpl.formats.hashing import files_hash
from refimpl.lab.compare.names import graph_order
from refimpl.lab.compare.record import trace
from refimpl.lab.compare.towers.inputs import TowerInput, shortened
from refimpl.lab.compare.trace import Trace, TraceError
from refimpl.loading.model import Model, load
from refimpl.loading.projector import Projector, load_projector
from refimpl.model.backend import kernel_backend, reference_backend
from refimpl.model.tap import Look, no_tap

SAFETY = 5
ROUNDOFF = {"exact": 2.0**-24, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "q8": 2.0**-11}
Q8_STEP = 3 / 127 / 12**0.5             # rms of rounding to 8 bits, relative to rms: largest of 32 at 3 rms, uniform in a step
MEASURED_POSITIONS = 48
SEEDS = (0, 1)


def perturbing(roundoff: float, seed: int) -> Look:
    """A tap that moves every value as rounding would."""
    random = np.random.default_rng(seed)

    def move(name: str, value: np.ndarray):
        if value.dtype.kind == "f":
            rms = np.sqrt(np.mean(value.astype(np.float64) ** 2, axis=tuple(range(1, value.ndim)), keepdims=True))
            value += (roundoff * (np.abs(value) + rms) * random.uniform(-1, 1, value.shape)).astype(value.dtype)
    return move


def measured(model: Model, ids: Sequence[int], arithmetic: str, between: Callable[[Trace, Trace], Mapping[str, float]],
             names: Collection[str] | None = None, media: Sequence[TowerInput] = ()) -> dict[str, float]:
    """The noise of an engine of this arithmetic on the first of `ids` and pieces of `media`, by tensor. `model` computes in exact
    arithmetic, and its weights are quantized as in the file; `between` gives the largest row's deviation of a trace from another. With
    `names`, the tensors that a trace has, the noise of single steps between these.
    """
    ids, media = shortened(ids, media, MEASURED_POSITIONS)
    right, noise = trace(model, ids, media=media) if names is None else None, {}
    engine, moved_media = model, media
    if arithmetic == "q8":
        engine, moved_media = in_q8(model), [replace(part, projector=in_q8(part.projector)) for part in media]
    for seed in SEEDS:
        move = perturbing(ROUNDOFF[arithmetic], seed)
        moved = trace(engine, ids, before=move, after=no_tap if names is None else move, media=moved_media)
        if names is not None:
            moved = replace(moved, arrays={name: moved.arrays[name] for name in names if name in moved.arrays})
            right = replayed(model, moved, media)
        for name, error in between(right, moved).items():
            noise[name] = max(noise.get(name, 0.0), error)
    return carried(noise, graph_order(right.names()))


def replayed(model: Model, theirs: Trace, media: Sequence[TowerInput] = ()) -> Trace:
    """What `model` computes at every step from their values before it: a run in which each value, once kept, gives way to theirs."""
    done: dict[str, int] = {}

    def give_way(name: str, value: np.ndarray):
        first = done.get(name, 0)
        done[name] = first + len(value)
        if name in theirs.names():
            other = theirs.value(name)
            rows = np.flatnonzero((other.positions >= first) & (other.positions < first + len(value)))
            if not other.index and other.array[0].size == value[0].size:
                value[other.positions[rows] - first] = other.array[rows].reshape(-1, *value.shape[1:])

    return replace(trace(model, theirs.ids, after=give_way, media=media), where="one step from its own values")


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


def in_q8(model: Model | Projector) -> Model | Projector:
    """The same weights in 8-bit arithmetic."""
    other, backend = copy(model), model.backend
    other.backend = kernel_backend("q8", backend.threads) if backend.name == "kernels" else reference_backend("q8", backend.prepare)
    return other


def judge(path: Path | str | None, **options) -> Model:
    """The model in exact arithmetic, its weights as in the file: by the kernels, or the reference where they cannot."""
    try:
        return load(path, arithmetic="exact", **options)
    except ValueError as error:
        if "backend='reference'" not in str(error):
            raise
        return load(path, backend="reference", weights="quantized")


def model_of(a: Trace, b: Trace, path: Path | None) -> tuple[Model | None, str]:
    """(the model to judge by, ""), or (None, why not): `path`, else the one that `a` was made of, if it is still there and the same.

    Raises TraceError where a model that was asked for is another one.
    """
    named = a.facts.get("model") or b.facts.get("model")
    if path is None and (not named or not Path(named).exists()):
        return None, f"the model is not there any more ({named})" if named else "neither trace names its model"
    model = judge(path or named)
    sha256 = a.facts.get("model_sha256") or b.facts.get("model_sha256")
    if sha256 and files_hash(model.file.files()) != sha256:
        if path is not None:
            raise TraceError(f"{path} is not the model of {a.where}: its SHA-256 does not begin with {sha256[:12]}")
        return None, f"{named} is not the model any more that the trace was made of"
    return model, ""


def projector_of(model: Model, a: Trace, b: Trace, path: Path | None) -> tuple[Projector | None, str]:
    """(the towers to judge by, ""), or (None, why not): `path`, else those that `a` was made with. Exact, as `model`."""
    named = path or a.facts.get("projector") or b.facts.get("projector")
    if not named or not Path(named).exists():
        return None, f"the projector is not there any more ({named})" if named else "neither trace names its projector"
    sha256 = a.facts.get("projector_sha256") or b.facts.get("projector_sha256")
    projector = load_projector(named, target=model)
    if sha256 and files_hash(projector.file.files()) != sha256:
        if path is not None:
            raise TraceError(f"{path} is not the projector of {a.where}: its SHA-256 does not begin with {sha256[:12]}")
        return None, f"{named} is not the projector any more that the trace was made with"
    return projector, ""
