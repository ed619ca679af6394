"""Two traces side by side: the first tensor, in the order of the forward pass, that is further away than rounding explains.

The deviation of a row is rms(a - b) / rms(a) over everything but the position; a tensor departs where a row's deviation exceeds its
tolerance (rounding.py). Which experts are chosen cannot be judged that way: where two experts are as good as equal, a correct engine may
take the other one. So a row whose choice differs is a tie if the logits of the exchanged experts are closer than their own tolerance, else
it departs; and behind a tie in row t nothing is judged any more in the rows from t on, which may all have seen it. The same holds for
drafted tokens: behind one that differs, where all logits agree, nothing is judged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from refimpl.lab.compare import top_logits
from refimpl.lab.compare.diagnoses import Symptom, symptom_of
from refimpl.lab.compare.mismatch import Scene, row_errors
from refimpl.lab.compare.names import graph_order, place_of
from refimpl.lab.compare.tolerance import SAFETY, a_priori, carried, measured, replayed
from refimpl.lab.compare.trace import Trace, TraceError, Value
from refimpl.loading.model import Model

LARGEST = 4             # the error of the largest of some hundred elements, in units of their rms


@dataclass(frozen=True)
class Judgement:
    """One tensor: its deviation and tolerance, where the deviation is largest, and "same", "departs" or "tie"."""

    name: str
    verdict: str
    error: float = 0.0
    tolerance: float = 0.0
    position: int = -1
    index: tuple[int, ...] = ()
    ours: float = 0.0
    theirs: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """All judgements in graph order. `first` is the first that departs, None where none does; `symptom` says what it looks like."""

    a: str
    b: str
    judged: list[Judgement]
    first: Judgement | None
    symptom: Symptom | None
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    tie: str = ""
    tolerance_from: str = ""


def compare_with(model: Model, a: Trace, b: Trace) -> Comparison:
    """Judges `b` by `a`, with tolerances measured on `model` (rounding.judge)."""
    return compare(a, b, {} if a.ids != b.ids else _sum(*(measured(model, a.ids, t.arithmetic, deviations) for t in (a, b))))


def compare_steps(model: Model, b: Trace) -> Comparison:
    """Judges every step of `b` by what `model` (rounding.judge) makes of the values that `b` itself has before it.

    An error of one step does not show in the next ones, nor a tie in the rows behind it: whatever departs is a fault of its own.
    """
    names = b.names()
    noise = _sum(*(measured(model, b.ids, arithmetic, steps_apart, names) for arithmetic in ("exact", b.arithmetic)))
    return compare(replayed(model, b), b, noise, steps=True)


def _sum(x: Mapping[str, float], y: Mapping[str, float]) -> dict[str, float]:
    return {name: x[name] + y[name] for name in x}


def compare(a: Trace, b: Trace, noise: Mapping[str, float] | None = None, steps: bool = False) -> Comparison:
    """Judges `b` by `a`. `noise` is the sum of both engines' (rounding.py: measured), guessed when None; `steps`: `a` is a replay of `b`.

    Raises TraceError where the two cannot be compared: of different models, or without a common tensor or position.
    """
    ours, theirs = (trace.facts.get("model_sha256") for trace in (a, b))
    if ours and theirs and ours != theirs:
        raise TraceError(f"{a.where} and {b.where} are of different models: SHA-256 {ours[:12]}... and {theirs[:12]}...")
    known = graph_order({*a.names(), *b.names()})
    of_a, of_b = set(a.names()), set(b.names())
    both = graph_order(top_logits.comparable(a, b))
    unknown = sorted((of_a | of_b) - set(known))
    missing = [name for name in known if (name in of_a) != (name in of_b) and not (
        name.startswith("result_output") and any(other.startswith("result_output") for other in both))]
    where = first_difference(a.ids, b.ids)
    if where is not None:
        first = Judgement("ids", "departs", 1.0, 0.0, where, (), *(float(t.ids[where]) if where < len(t.ids) else -1.0 for t in (a, b)))
        return Comparison(a.where, b.where, [first], first, Symptom("tokens", token_words(a, b, where)), missing, unknown)
    if not both:
        raise TraceError(f"{a.where} and {b.where} have no tensor in common" + (
            f"; {b.where} has {', '.join(sorted(of_b)[:3])}: refimpl trace --names lists the names" if of_b else ""))
    guessed = noise is None
    if guessed:
        noise = {name: sum(a_priori(both, t.arithmetic)[name] for t in (a, b)) for name in both}
    judge = _Judge(a, b, {name: SAFETY * size for name, size in carried(noise, both).items()}, steps=steps)
    judged = [judge.judge(name) for name in both]
    judged = [judgement for judgement in judged if judgement is not None]
    if not judged:
        raise TraceError(f"{a.where} and {b.where} have no position in common")
    first = next((judgement for judgement in judged if judgement.verdict == "departs"), None)
    symptom = None if first is None else symptom_of(judge.scene(first))
    return Comparison(a.where, b.where, judged, first, symptom, missing, unknown, judge.tie, "guessed" if guessed else "measured")


def steps_apart(a: Trace, b: Trace) -> dict[str, float]:
    """`deviations` of a replay."""
    return deviations(a, b, steps=True)


def deviations(a: Trace, b: Trace, steps: bool = False) -> dict[str, float]:
    """The largest deviation of a row in every tensor, whatever the choice of experts: `between` of rounding.measured."""
    judge = _Judge(a, b, {}, any_choice=True, steps=steps)
    found = {name: judge.judge(name) for name in graph_order(top_logits.comparable(a, b))}
    return {name: judgement.error for name, judgement in found.items() if judgement is not None and judgement.position >= 0}


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two lists of ids differ first, None where they do not."""
    if tuple(a) == tuple(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def token_words(a: Trace, b: Trace, where: int) -> str:
    """What differs in the token ids."""
    if where == min(len(a.ids), len(b.ids)):
        return f"the prompts have {len(a.ids)} and {len(b.ids)} tokens"
    return f"the prompts differ: token {where} is {a.ids[where]} and {b.ids[where]}"


def _like(array: np.ndarray, other: Value) -> np.ndarray:
    """The part of `array` that `other` has, where that is not all of it."""
    if not other.index or array[0].size != np.prod(other.shape):
        return array
    return array.reshape(len(array), *other.shape)[np.ix_(np.arange(len(array)), *other.index)]


class _Judge:
    """The state of a comparison: tolerances, and the positions behind a tie."""

    def __init__(self, a: Trace, b: Trace, tolerance: Mapping[str, float], any_choice: bool = False, steps: bool = False):
        self.a, self.b, self.tolerance, self.any_choice, self.steps = a, b, tolerance, any_choice, steps
        self.tie, self.end, self.ended = "", np.inf, False
        self._pairs: dict[str, tuple] = {}

    def pair(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ours, theirs, positions) of a tensor where both have it, in one layout; of other shapes where they do not fit."""
        if name not in self._pairs and name.endswith(f"{top_logits.FULL}.top"):
            self._pairs = {name: top_logits.pair(self.a, self.b, name)}
        if name not in self._pairs:
            x, y = self.a.value(name), self.b.value(name)
            positions, rows_x, rows_y = np.intersect1d(x.positions, y.positions, return_indices=True)
            ours, theirs = x.array[rows_x], y.array[rows_y]
            ours, theirs = _like(ours, y), _like(theirs, x)
            if ours.shape != theirs.shape and ours.size == theirs.size:
                theirs = theirs.reshape(ours.shape)
            self._pairs = {name: (ours, theirs, positions)}       # one at a time
        return self._pairs[name]

    def judge(self, name: str) -> Judgement | None:
        """The verdict on a tensor, None where there is nothing to judge (any more)."""
        ours, theirs, positions = self.pair(name)
        place = place_of(name)
        if self.ended or not len(positions):
            return None
        if ours.shape != theirs.shape:
            return Judgement(name, "departs", np.inf, 0.0, int(positions[0]), ())
        if place.stage[0] < 0:
            inside = positions < self.end
            ours, theirs, positions = ours[inside], theirs[inside], positions[inside]
            if not len(positions):
                return None
        elif np.isfinite(self.end):
            return None
        if place.name in ("drafted", "emitted"):
            return self._ids(name, ours, theirs)
        if place.name == "ffn_moe_topk":
            return self._choice(name, ours, theirs, positions)
        if place.name == "ffn_moe_weights":
            ours, theirs, positions = self._by_expert(name, ours, theirs, positions)
            if not len(positions):
                return None
        errors = row_errors(ours, theirs, self.a.resolution + self.b.resolution)
        row = int(np.argmax(errors))
        apart = np.abs(np.asarray(ours[row], np.float64) - theirs[row])
        index = np.unravel_index(int(np.argmax(np.where(np.isnan(apart), np.inf, apart))), apart.shape)
        tolerance = self.tolerance.get(name, 0.0)
        verdict = "departs" if not errors[row] <= tolerance else "same"
        return Judgement(name, verdict, float(errors[row]), tolerance, int(positions[row]), tuple(map(int, index)),
                         float(ours[row][index]), float(theirs[row][index]))

    def _ids(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> Judgement:
        if np.array_equal(ours, theirs):
            return Judgement(name, "same", 0.0, 0.0, 0)
        self.ended, self.tie = True, f"{name}: other tokens, from logits that agree"
        return Judgement(name, "tie")

    def _choice(self, name: str, ours: np.ndarray, theirs: np.ndarray, positions: np.ndarray) -> Judgement:
        changed = [t for t in range(len(ours)) if set(ours[t]) != set(theirs[t])]
        for t in changed:
            if not self.any_choice and not self._tied(name, int(positions[t]), ours[t], theirs[t]):
                column = int(np.argmax(ours[t] != theirs[t]))
                return Judgement(name, "departs", len(set(ours[t]) - set(theirs[t])) / ours.shape[1], 0.0, int(positions[t]), (column,),
                                 float(ours[t][column]), float(theirs[t][column]))
        if not changed:
            return Judgement(name, "same", 0.0, 0.0, int(positions[0]))
        at = int(positions[changed[0]])
        what = f"{name}: as good as equal experts changed places at position {at}"
        self.tie = self.tie or what + ("" if self.steps else "; nothing is judged from there on")
        self.end = self.end if self.steps else at
        return Judgement(name, "tie", 0.0, 0.0, at)

    def _tied(self, name: str, position: int, ours: np.ndarray, theirs: np.ndarray) -> bool:
        """Are the exchanged experts as good as equal by our router?"""
        logits = name.replace("topk", "logits")
        if logits not in self.a.names():
            return False
        value = self.a.value(logits)
        row = value.array[list(value.positions).index(position)].astype(np.float64)
        if not all(0 <= e < len(row) for e in theirs):
            return False
        taken, instead = set(ours) - set(theirs), set(theirs) - set(ours)
        gap = max(row[list(taken)]) - min(row[list(instead)])
        return gap <= LARGEST * self.tolerance.get(logits, 0.0) * np.sqrt(np.mean(row * row))

    def _by_expert(self, name: str, ours: np.ndarray, theirs: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Weights in the order of the experts' ids, as two engines may list equal choices in another order, of rows with the same ones."""
        ids = name.replace("weights", "topk")
        if ids not in self.a.names() or ids not in self.b.names():
            return ours, theirs, positions
        id_a, id_b, at = self.pair(ids)
        rows = np.isin(at, positions)
        order_a, order_b = np.argsort(id_a[rows], axis=1), np.argsort(id_b[rows], axis=1)
        same = (np.take_along_axis(id_a[rows], order_a, axis=1) == np.take_along_axis(id_b[rows], order_b, axis=1)).all(axis=1)
        ours, theirs = (np.take_along_axis(w, o, axis=1)[same] for w, o in ((ours, order_a), (theirs, order_b)))
        return ours, theirs, positions[same]

    def scene(self, judgement: Judgement) -> Scene:
        """The departing tensor and what is around it, for symptoms.py."""
        ours, theirs, positions = self.pair(judgement.name)
        if ours.shape == theirs.shape and place_of(judgement.name).stage[0] < 0:
            inside = positions < self.end
            ours, theirs, positions = ours[inside], theirs[inside], positions[inside]
            if place_of(judgement.name).name == "ffn_moe_weights":
                ours, theirs, positions = self._by_expert(judgement.name, ours, theirs, positions)

        def beside(name: str) -> tuple[np.ndarray, np.ndarray] | None:
            if name not in self.a.names() or name not in self.b.names():
                return None
            x, y, at = self.pair(name)
            rows = np.isin(at, positions)
            return (x[rows], y[rows]) if x.shape == y.shape and rows.sum() == len(positions) else None
        return Scene(judgement.name, ours, theirs, positions, judgement.tolerance, beside)
