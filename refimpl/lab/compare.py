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

from refimpl.lab.names import graph_order, place_of
from refimpl.lab.rounding import SAFETY, a_priori
from refimpl.lab.symptoms import Scene, Symptom, row_errors, symptom_of
from refimpl.lab.trace import Trace, TraceError, Value

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


def compare(a: Trace, b: Trace, noise: Mapping[str, float] | None = None) -> Comparison:
    """Judges `b` by `a`. `noise` is the sum of both engines' (rounding.py: measured), guessed when None.

    Raises TraceError where the two cannot be compared: of different models, or without a common tensor or position.
    """
    for key in ("model_sha256",):
        if a.facts.get(key) and b.facts.get(key) and a.facts[key] != b.facts[key]:
            raise TraceError(f"{a.where} and {b.where} are of different models: SHA-256 {a.facts[key][:12]}... and {b.facts[key][:12]}...")
    known = graph_order({*a.names(), *b.names()})
    of_a, of_b = set(a.names()), set(b.names())
    both = [name for name in graph_order(of_a) if name in of_b]
    unknown = sorted((of_a | of_b) - set(known))
    missing = [name for name in known if (name in of_a) != (name in of_b)]
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
    judge = _Judge(a, b, {name: SAFETY * noise[name] for name in both if name in noise})
    judged = [judge.judge(name) for name in both]
    judged = [judgement for judgement in judged if judgement is not None]
    if not judged:
        raise TraceError(f"{a.where} and {b.where} have no position in common")
    first = next((judgement for judgement in judged if judgement.verdict == "departs"), None)
    symptom = None if first is None else symptom_of(judge.scene(first))
    return Comparison(a.where, b.where, judged, first, symptom, missing, unknown, judge.tie, "guessed" if guessed else "measured")


def deviations(a: Trace, b: Trace) -> dict[str, float]:
    """The largest deviation of a row in every tensor, whatever the choice of experts: `between` of rounding.measured."""
    judge = _Judge(a, b, {}, any_choice=True)
    found = {name: judge.judge(name) for name in graph_order(a.names()) if name in b.names()}
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

    def __init__(self, a: Trace, b: Trace, tolerance: Mapping[str, float], any_choice: bool = False):
        self.a, self.b, self.tolerance, self.any_choice = a, b, tolerance, any_choice
        self.tie, self.end, self.ended = "", np.inf, False
        self._pairs: dict[str, tuple] = {}

    def pair(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ours, theirs, positions) of a tensor where both have it, in one layout; of other shapes where they do not fit."""
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
            ours, theirs = self._by_expert(name, ours, theirs)
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
        self.end = positions[changed[0]]
        self.tie = self.tie or f"{name}: as good as equal experts changed places at position {self.end}; nothing is judged from there on"
        return Judgement(name, "tie", 0.0, 0.0, int(self.end))

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

    def _by_expert(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights in the order of the experts' ids, as two engines may list equal choices in another order."""
        ids = name.replace("weights", "topk")
        if ids not in self.a.names() or ids not in self.b.names():
            return ours, theirs
        id_a, id_b, _ = self.pair(ids)
        order = (np.argsort(i[:len(ours)], axis=1) for i in (id_a, id_b))
        return tuple(np.take_along_axis(w, o, axis=1) for w, o in zip((ours, theirs), order))

    def scene(self, judgement: Judgement) -> Scene:
        """The departing tensor and what is around it, for symptoms.py."""
        ours, theirs, positions = self.pair(judgement.name)
        if ours.shape == theirs.shape and place_of(judgement.name).stage[0] < 0:
            inside = positions < self.end
            ours, theirs, positions = ours[inside], theirs[inside], positions[inside]
            if place_of(judgement.name).name == "ffn_moe_weights":
                ours, theirs = self._by_expert(judgement.name, ours, theirs)

        def beside(name: str) -> tuple[np.ndarray, np.ndarray] | None:
            if name not in self.a.names() or name not in self.b.names():
                return None
            x, y, at = self.pair(name)
            rows = np.isin(at, positions)
            return (x[rows], y[rows]) if x.shape == y.shape and rows.sum() == len(positions) else None
        return Scene(judgement.name, ours, theirs, positions, judgement.tolerance, beside)
