"""The verdict of `compare`, and the names of a trace's values, as text."""

from collections.abc import Sequence

import numpy as np

from refimpl.cli.show.table import table
from refimpl.lab.compare.compare import Comparison, Judgement
from refimpl.lab.compare.names import NAMES, TOWERS, Name

AROUND = 3              # rows of the table before and after the first tensor that departs


def as_text(result: Comparison, everything: bool = False) -> str:
    """The verdict, and the tensors around the first that departs (or all)."""
    judged, lines = result.judged, [f"{result.a}  against  {result.b}", *_arithmetic(result)]
    if result.unknown:
        lines.append(f"not compared, no known name: {_some(result.unknown)}")
    if result.missing:
        lines.append(f"not compared, in one of them only: {_some(result.missing)}")
    at = judged.index(result.first) if result.first is not None else None
    if everything:
        shown = judged
    elif at is None:
        shown = sorted((j for j in judged if j.tolerance), key=lambda j: -j.error / j.tolerance)[:AROUND]
    else:
        shown = judged[max(0, at - AROUND):at + AROUND + 1]
    if shown and (at is None or result.first.name != "ids"):
        rows = [(j.name, _number(j.error), _number(j.tolerance), j.verdict + ("  <- first" if j is result.first else "")) for j in shown]
        lines += ["", table(("tensor", "deviation", "tolerance", "verdict"), rows, left=(0, 3)), ""]
    if result.tie:
        lines.append(f"tie: {result.tie}")
    if result.first is None:
        lines.append(f"the same within rounding: {len(judged)} tensors, tolerances {result.tolerance_from}"
                     + ("" if everything or not shown else "; those nearest to their tolerances are shown"))
        return "\n".join(lines)
    if result.first.name == "ids":
        return "\n".join([*lines, f"departs: {result.diagnosis.text}"])
    departs = sum(j.verdict == "departs" for j in judged)
    return "\n".join([*lines, f"departs first: {result.first.name}, {where(result.first)}",
                      f"looks like:    {result.diagnosis.kind}: {result.diagnosis.text}",
                      f"{at} tensors before it agree, {departs - 1} of {len(judged) - at - 1} after it depart too; "
                      f"tolerances {result.tolerance_from}"])


def _arithmetic(result: Comparison) -> list[str]:
    """The arithmetic of the tolerances, with a warning if it hides errors of a float engine."""
    ours, theirs = result.arithmetic
    if not ours:
        return []
    line = f"judged at the rounding of {ours} and {theirs}"
    if ours == "q8" and theirs != "q8":
        line += ": hides errors of up to some percent; refimpl trace --arithmetic exact judges closely"
    return [line]


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
