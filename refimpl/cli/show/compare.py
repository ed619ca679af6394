"""The verdict of `compare`, and the names of a trace's values, as text."""

from collections.abc import Sequence

import numpy as np

from refimpl.cli.show.table import table
from refimpl.lab.compare.diagnoses import Diagnosis
from refimpl.lab.compare.judgement import Comparison, Judgement
from refimpl.lab.compare.names import NAMES, TOWERS, Name
from refimpl.lab.compare.reports.likely import likely
from refimpl.lab.compare.tolerance import SAFETY

AROUND = 3              # rows of the table before and after the first tensor that departs


def as_text(result: Comparison, everything: bool = False) -> str:
    """What it was judged at, the verdict, and the tensors around the first that departs (or all)."""
    judged, lines = result.judged, [judged_at(result), f"{result.a}  against  {result.b}", coverage(result)]
    if result.unknown:
        lines.append(f"not compared, no known name: {_some(result.unknown)}")
    if result.missing:
        lines.append(f"not compared, in one of them only: {_some(result.missing)}")
    at = judged.index(result.first) if result.first in judged else None
    if everything:
        shown = judged
    elif at is None:
        shown = sorted((j for j in judged if j.tolerance), key=lambda j: -j.error / j.tolerance)[:AROUND]
    else:
        shown = judged[max(0, at - AROUND):at + AROUND + 1]
    if shown:
        rows = [(j.name, _number(j.error), _number(j.tolerance), j.verdict + ("  <- first" if j is result.first else "")) for j in shown]
        lines += ["", table(("tensor", "deviation", "tolerance", "verdict"), rows, left=(0, 3)), ""]
    if result.tie:
        lines.append(f"tie: {result.tie}")
    nearest = "" if everything or not shown else "; those nearest to their tolerances are shown"
    if result.undecided:
        lines.append(f"nothing departs, but that does not make it the same: {result.undecided}{nearest}")
    elif result.first is None:
        seen = result.coverage
        where_compared = "" if len(seen.positions) == seen.n_positions and seen.tensors == seen.n_tensors else ", where it was compared"
        lines.append(f"the same within rounding{where_compared}: {len(judged)} tensors, tolerances {result.tolerance_from}{nearest}")
    elif at is None:
        agree = ", ".join(j.name for j in result.stages if j.verdict == "same")
        lines.append(f"departs: {result.first.name}: {result.diagnosis.text}")
        lines += [f"the same: {agree}"] * bool(agree) + ["so tensors were not compared"] * (not judged)
    else:
        departs = sum(j.verdict == "departs" for j in judged)
        lines += [f"departs first: {result.first.name}, {where(result.first)}",
                  f"looks like:    {in_words(result.diagnosis)}",
                  *(f"as where:      {name} (--html shows the code)" for name, _ in likely(result)[:1]),
                  f"{at} tensors before it agree, {departs - 1} of {len(judged) - at - 1} after it depart too; "
                  f"tolerances {result.tolerance_from}"]
    return "\n".join(lines)


def in_words(diagnosis: Diagnosis) -> str:
    """The kind and what is known of it; a place says its kind itself."""
    return diagnosis.text if diagnosis.kind.startswith("one ") else f"{diagnosis.kind}: {diagnosis.text}"


def judged_at(result: Comparison) -> str:
    """The arithmetic of both, and what is allowed because of it."""
    ours, theirs = result.arithmetic
    if not result.judged:
        return f"judged: {theirs} against {ours}, only what comes before the tensors"
    why = {"measured": "measured on the model", "guessed": "guessed, without the model"}[result.tolerance_from]
    most = max(j.tolerance for j in result.judged)
    return f"judged: {theirs} against {ours}; tolerances are {SAFETY} times the rounding errors of both, {why}: up to {most:.1e}"


def coverage(result: Comparison) -> str:
    """How much of the two was compared."""
    seen = result.coverage
    few = f" ({ranges(seen.positions)})" if 0 < len(seen.positions) < seen.n_positions else ""
    return f"compared: {seen.tensors} of {seen.n_tensors} tensors, {len(seen.positions)} of {seen.n_positions} positions{few}"


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as 0-2, 7."""
    among = set(numbers)
    starts, ends = ([n for n in numbers if n + step not in among] for step in (-1, 1))
    return _some([str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends)])


def where(first: Judgement) -> str:
    """Position and element, and the difference."""
    place = f"position {first.position}" + (f", element {', '.join(map(str, first.index))}" if first.index else "")
    values = f": {first.ours:.7g} and {first.theirs:.7g}" if first.index else ""
    return f"{place}{values} (deviation of the row {first.error:.2g}, tolerance {first.tolerance:.2g})"


def _number(x: float) -> str:
    return f"{x:.1e}" if np.isfinite(x) else "inf"


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# ---- trace --names

def names_text() -> str:
    """All names of the forward pass, with their places in transformers."""
    below = {"": "model.layers.N", "image": "vision_tower.encoder.layers.N", "audio": "audio_tower.layers.N"}
    parts = [(names_table(NAMES, "name (as in llama.cpp's graph)", below[""]))]
    parts += [names_table(names, f"name, after {tower}0., {tower}1., ...", below[tower]) for tower, names in TOWERS.items()]
    return "\n\n".join(parts)


def names_table(names: Sequence[Name], head: str, below: str) -> str:
    """The names of one part."""
    only = {"": "", "dense": " (layers without experts)", "experts": " (layers with experts)"}
    rows = [(name.name + "-N" * name.layered, name.shape, in_transformers(name), name.what + only[name.only]) for name in names]
    return table((head, "shape", f"transformers, below {below}", "what it is"), rows, left=(0, 1, 2, 3))


def in_transformers(name: Name) -> str:
    """A module, and which side of it."""
    if not name.module:
        return ""
    side, _, item = name.side.partition(" ")
    words = {"in": ", input", "out": "", "rotated": ", after its rotation", "logits": ", after the soft cap"}[side]
    return ("the layer" if name.module == "." else name.module) + (f", item {item} of its {side}put" if item else words)
