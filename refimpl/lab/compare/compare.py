"""Two traces side by side: the first tensor, in the order of the forward pass, that deviates by more than rounding explains. What comes
before and after the tensors is compared too (stages.py).

The deviation of a row is rms(a - b) / rms(a) over everything but the position; a tensor departs where the deviation of a row exceeds its
tolerance (tolerance.py). The choice of experts cannot be judged that way: where two experts score almost the same, a correct engine may
take either. A row with another choice is a tie if the router's logits of the exchanged experts are closer than their own tolerance,
otherwise it departs. After a tie at position t nothing is judged at positions from t on, which may all have seen it. The same holds for
draft tokens: after one that differs, from logits that agree, nothing is judged.

Towers come first, picture by picture: what they were given, their values, the soft tokens; then the text model with all its rows. A tensor
of a tower has to have as many rows in both traces.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from refimpl.lab.compare import top_logits
from refimpl.lab.compare.diagnoses import Diagnosis, diagnose
from refimpl.lab.compare.judgement import DEPARTS, Comparison, Coverage, Judgement
from refimpl.lab.compare.mismatch import LARGEST, Mismatch, row_errors
from refimpl.lab.compare.names import graph_order, place_of
from refimpl.lab.compare.pairs import Pair, Pairs
from refimpl.lab.compare.stages import SAMPLED, before_tensors, sampled
from refimpl.lab.compare.tolerance import SAFETY, a_priori, carried, measured, replayed
from refimpl.lab.compare.towers.inputs import TowerInput, with_ids_of
from refimpl.lab.compare.trace import Trace, TraceError
from refimpl.loading.model import Model


def compare_with(model: Model, a: Trace, b: Trace, media: Sequence[TowerInput] = ()) -> Comparison:
    """Judges `b` by `a`, with tolerances measured on `model` (tolerance.judge) and its towers, given `media` (towers.inputs.inputs_of)."""
    noise = {}
    if a.ids == with_ids_of(a, b).ids:
        noise = _sum(*(measured(model, a.ids, t.arithmetic, deviations, media=media) for t in (a, b)))
    return compare(a, b, noise)


def compare_steps(model: Model, b: Trace, media: Sequence[TowerInput] = ()) -> Comparison:
    """Judges every step of `b` by what `model` (tolerance.judge) computes from the values that `b` itself has before that step.

    The error of a step does not show in later steps, nor a tie in later rows: whatever departs is a fault of its own. `b` has the ids of a
    trace of ours where there is `media`, which is what the towers start from (`towers.inputs.with_ids_of`, `inputs_of`).
    """
    names = b.names()
    noise = _sum(*(measured(model, b.ids, arithmetic, steps_apart, names, media) for arithmetic in ("exact", b.arithmetic)))
    return compare(replayed(model, b, media), b, noise, steps=True)


def _sum(x: Mapping[str, float], y: Mapping[str, float]) -> dict[str, float]:
    return {name: x[name] + y[name] for name in x}


def compare(a: Trace, b: Trace, noise: Mapping[str, float] | None = None, steps: bool = False) -> Comparison:
    """Judges `b` by `a`. `noise` is the sum of both engines' (tolerance.measured), guessed when None; `steps`: `a` is a replay of `b`.

    Raises TraceError where the two cannot be compared: without a tensor or position in common.
    """
    b = with_ids_of(a, b)
    known = graph_order({*a.names(), *b.names()})
    of_a, of_b = set(a.names()), set(b.names())
    both = graph_order(top_logits.comparable(a, b))
    unknown = sorted((of_a | of_b) - set(known))
    missing = [name for name in known if (name in of_a) != (name in of_b) and not (
        name.startswith("result_output") and any(other.startswith("result_output") for other in both))]
    if b.facts.get("temperature", 0.0) > 0:
        missing.append(f"{SAMPLED} (at temperature {b.facts['temperature']:g} random numbers decide, which are each engine's own)")
    n_tensors = len(judgeable(of_a))
    stages, diagnosis = before_tensors(a, b)
    if diagnosis is not None:
        return Comparison(a.where, b.where, [], stages[-1], diagnosis, missing, unknown, arithmetic=(a.arithmetic, b.arithmetic),
                          stages=stages, coverage=Coverage(0, n_tensors, (), len(a.ids)))
    if not both:
        raise TraceError(f"{a.where} and {b.where} have no tensor in common" + (
            f"; {b.where} has {', '.join(sorted(of_b)[:3])}: refimpl trace --names lists the names" if of_b else ""))
    guessed = noise is None
    if guessed:
        noise = _sum(*(a_priori(both, t.arithmetic) for t in (a, b)))
    judge = _Judge(Pairs(a, b), {name: SAFETY * size for name, size in carried(noise, both).items()}, steps=steps)
    judged, first, mismatch = [], None, None
    for judgement in filter(None, map(judge.judge, both)):
        judged.append(judgement)
        if first is None and judgement.verdict == DEPARTS:
            first, mismatch = judgement, judge.mismatch(judgement)
            diagnosis = other_media(a, b, judgement.name) or diagnose(mismatch)
    if not judged:
        raise TraceError(f"{a.where} and {b.where} have no position in common")
    coverage = Coverage(len(judgeable(j.name for j in judged)), n_tensors, tuple(sorted(judge.seen)), len(a.ids))
    if first is None:
        taken, diagnosis = sampled(a, b, {} if judge.tie else judge.tolerance)
        stages = [*stages, *taken]
        first = taken[0] if diagnosis is not None else None
    return Comparison(a.where, b.where, judged, first, diagnosis, missing, unknown, judge.tie, "guessed" if guessed else "measured",
                      (a.arithmetic, b.arithmetic), stages, coverage, hidden_by_q8(a, b, judged) if first is None else "", mismatch)


def judgeable(names: Iterable[str]) -> list[str]:
    """The names whose values a comparison judges: the largest logits count once, ids and sums beside them do not."""
    return [name for name in graph_order(names) if not name.endswith(("result_output.ids", "result_output.logsumexp"))]


def hidden_by_q8(a: Trace, b: Trace, judged: Sequence[Judgement]) -> str:
    """Why an engine in floating point is not the same as a trace in 8-bit arithmetic, whose tolerances hide its errors; "" for others."""
    if a.arithmetic != "q8" or b.arithmetic == "q8":
        return ""
    return (f"{b.where} rounds as {b.arithmetic}, but {a.where} is of 8-bit arithmetic, whose rounding hides errors of up to "
            f"{max(j.tolerance for j in judged):.1%}; trace again with --arithmetic exact, or add --steps")


def steps_apart(a: Trace, b: Trace) -> dict[str, float]:
    """`deviations` of a replay."""
    return deviations(a, b, steps=True)


def deviations(a: Trace, b: Trace, steps: bool = False) -> dict[str, float]:
    """The largest deviation of a row in every tensor, whatever the choice of experts: `between` of tolerance.measured."""
    judge = _Judge(Pairs(a, b), {}, any_choice=True, steps=steps)
    found = {name: judge.judge(name) for name in graph_order(top_logits.comparable(a, b))}
    return {name: judgement.error for name, judgement in found.items() if judgement is not None and judgement.position >= 0}


def other_media(a: Trace, b: Trace, name: str) -> Diagnosis | None:
    """Is what departs given to a tower, and are the traces of other pictures or sounds?"""
    prefix, _, which = name.partition(".")
    if which not in ("patches", "frames"):
        return None
    found = [next((part for part in t.facts.get("media", ()) if part["name"] == prefix), {}) for t in (a, b)]
    ours, theirs = (str(part.get("sha256", "")) for part in found)
    if not ours or not theirs or ours == theirs:
        return None
    sources = " and ".join(f"{part.get('source')} (SHA-256 {str(part['sha256'])[:12]}...)" for part in found)
    return Diagnosis("another file", f"{prefix} was decoded to other {'pixels' if which == 'patches' else 'samples'}: {sources}")


class _Judge:
    """Judges one tensor after the other, in graph order. A tie ends what can be judged: `end` is the first position it may have changed,
    and other draft tokens end everything. `seen`: positions of the prompt that were judged.
    """

    def __init__(self, pairs: Pairs, tolerance: Mapping[str, float], any_choice: bool = False, steps: bool = False):
        self.pairs, self.tolerance, self.any_choice, self.steps = pairs, tolerance, any_choice, steps
        self.tie, self.end, self.ended, self.seen = "", np.inf, False, set()

    def judge(self, name: str) -> Judgement | None:
        """The verdict on a tensor, None where nothing can be judged."""
        pair = None if self.ended else self._judged_rows(name)
        if pair is None:
            return None
        if place_of(name).is_of_prompt:
            self.seen.update(pair.positions.tolist())
        if not pair.fits:
            return Judgement(name, "departs", np.inf, 0.0, int(pair.positions[0]), ())
        kind = place_of(name).name
        if kind in ("drafted", "emitted"):
            return self._ids(name, pair)
        return self._choice(name, pair) if kind == "ffn_moe_topk" else self._values(name, pair)

    def mismatch(self, judgement: Judgement) -> Mismatch:
        """A tensor that departs and those around it, for diagnoses.py."""
        pair = self._judged_rows(judgement.name)

        def beside(name: str) -> tuple[np.ndarray, np.ndarray] | None:
            other = self.pairs.at(name, pair.positions)
            return None if other is None else (other.ours, other.theirs)
        ids = [self.pairs.a.ids[p] for p in pair.positions] if place_of(judgement.name).is_of_prompt else []
        return Mismatch(judgement.name, pair.ours, pair.theirs, pair.positions, judgement.tolerance, beside, tuple(ids))

    def _judged_rows(self, name: str) -> Pair | None:
        """The rows before a tie; of experts' weights, those with the same experts. None where there are none."""
        pair, place = self.pairs.of(name), place_of(name)
        if pair.fits and place.is_of_prompt:
            pair = pair.rows(pair.positions < self.end)
        elif pair.fits and not place.tower and np.isfinite(self.end):       # drafts and rounds have seen the whole prompt
            return None
        if pair.fits and place.name == "ffn_moe_weights":
            pair = self.pairs.by_expert(name, pair)
        return pair if len(pair.positions) else None

    def _values(self, name: str, pair: Pair) -> Judgement:
        errors = row_errors(pair.ours, pair.theirs, self.pairs.a.resolution + self.pairs.b.resolution)
        row = int(np.argmax(errors))
        ours, theirs = pair.ours[row], pair.theirs[row]
        apart = np.abs(np.asarray(ours, np.float64) - theirs)
        index = np.unravel_index(int(np.argmax(np.where(np.isnan(apart), np.inf, apart))), apart.shape)
        tolerance = self.tolerance.get(name, 0.0)
        return Judgement(name, "departs" if not errors[row] <= tolerance else "same", float(errors[row]), tolerance,
                         int(pair.positions[row]), tuple(map(int, index)), float(ours[index]), float(theirs[index]))

    def _ids(self, name: str, pair: Pair) -> Judgement:
        if np.array_equal(pair.ours, pair.theirs):
            return Judgement(name, "same", 0.0, 0.0, 0)
        self.ended, self.tie = True, f"{name}: other tokens, from logits that agree"
        return Judgement(name, "tie")

    def _choice(self, name: str, pair: Pair) -> Judgement:
        changed = [t for t in range(len(pair.ours)) if set(pair.ours[t]) != set(pair.theirs[t])]
        for t in changed:
            ours, theirs, at = pair.ours[t], pair.theirs[t], int(pair.positions[t])
            if not self.any_choice and not self._tied(name, at, ours, theirs):
                column = int(np.argmax(ours != theirs))
                return Judgement(name, "departs", len(set(ours) - set(theirs)) / len(ours), 0.0, at, (column,), float(ours[column]),
                                 float(theirs[column]))
        if not changed:
            return Judgement(name, "same", 0.0, 0.0, int(pair.positions[0]))
        at = int(pair.positions[changed[0]])
        tie = f"{name}: experts with almost the same score changed places at position {at}"
        self.tie = self.tie or tie + ("" if self.steps else "; nothing is judged from there on")
        self.end = self.end if self.steps else at
        return Judgement(name, "tie", 0.0, 0.0, at)

    def _tied(self, name: str, position: int, ours: np.ndarray, theirs: np.ndarray) -> bool:
        """Do the exchanged experts score almost the same by our router?"""
        logits, a = name.replace("topk", "logits"), self.pairs.a
        if logits not in a.names():
            return False
        value = a.value(logits)
        row = value.array[list(value.positions).index(position)].astype(np.float64)
        if not all(0 <= e < len(row) for e in theirs):
            return False
        taken, instead = set(ours) - set(theirs), set(theirs) - set(ours)
        gap = max(row[list(taken)]) - min(row[list(instead)])
        return gap <= LARGEST * self.tolerance.get(logits, 0.0) * np.sqrt(np.mean(row * row))
