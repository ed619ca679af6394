"""A comparison for people, for programs, and as a picture."""

import os
from pathlib import Path

import numpy as np

from refimpl.lab.compare.compare import Comparison, Judgement
from refimpl.lab.compare.names import NAMES, place_of
from refimpl.lab.compare.trace import TraceError

AROUND = 3              # rows of the table before the first tensor that departs, and after it


def as_text(result: Comparison, everything: bool = False) -> str:
    """The verdict, and the tensors around the first that departs (or all)."""
    judged, lines = result.judged, [f"{result.a}  against  {result.b}"]
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
        width = max(len(j.name) for j in shown)
        lines += ["", f"{'tensor':{width}}  {'apart':>8}  {'allowed':>8}  verdict"]
        lines += [f"{j.name:{width}}  {_number(j.error)}  {_number(j.tolerance)}  {j.verdict}{'  <- first' if j is result.first else ''}"
                  for j in shown]
        lines.append("")
    if result.tie:
        lines.append(f"tie: {result.tie}")
    if result.first is None:
        lines.append(f"the same within rounding: {len(judged)} tensors, tolerances {result.tolerance_from}"
                     + ("" if everything or not shown else "; the nearest to theirs are shown"))
        return "\n".join(lines)
    first, symptom = result.first, result.symptom
    if first.name == "ids":
        return "\n".join([*lines, f"departs: {symptom.text}"])
    departs = sum(j.verdict == "departs" for j in judged)
    lines += [f"departs first: {first.name}, {place_words(first)}", f"looks like:    {symptom.kind}: {symptom.text}",
              f"{at} tensors before it agree, {departs - 1} of {len(judged) - at - 1} behind it depart too; "
              f"tolerances {result.tolerance_from}"]
    return "\n".join(lines)


def place_words(first: Judgement) -> str:
    """Where, and by how much."""
    where = f"position {first.position}" + (f", element {', '.join(map(str, first.index))}" if first.index else "")
    values = f": {first.ours:.7g} and {first.theirs:.7g}" if first.index else ""
    return f"{where}{values} (row apart by {first.error:.2g} of its size, allowed {first.tolerance:.2g})"


def _number(x: float) -> str:
    return f"{x:8.1e}" if np.isfinite(x) else f"{'inf':>8}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def figures(result: Comparison) -> dict[str, object]:
    """The same for programs."""
    def row(j: Judgement) -> dict[str, object]:
        return {"name": j.name, "verdict": j.verdict, "error": j.error if np.isfinite(j.error) else None, "tolerance": j.tolerance,
                "position": j.position, "index": list(j.index), "a": _finite(j.ours), "b": _finite(j.theirs)}
    return {"a": result.a, "b": result.b, "same": result.first is None, "first": None if result.first is None else row(result.first),
            "kind": None if result.symptom is None else result.symptom.kind,
            "text": None if result.symptom is None else result.symptom.text, "tie": result.tie or None,
            "tolerances": result.tolerance_from, "not_compared": result.missing, "unknown": result.unknown,
            "tensors": [row(j) for j in result.judged]}


def _finite(x: float) -> float | None:
    return x if np.isfinite(x) else None


def plot(result: Comparison, path: str | os.PathLike | None = None):
    """A heat map of deviation over tolerance, layers down and tensors across, the first departure framed. Returns the figure; written to
    `path` where there is one. Raises TraceError without matplotlib.
    """
    try:
        from matplotlib.colors import TwoSlopeNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise TraceError("matplotlib is missing: pip install 'refimpl[plot]'") from None
    cells, rows, columns = {}, [], []
    for j in result.judged:
        place = place_of(j.name)
        if place is None or not j.tolerance and j.verdict == "same":
            continue
        row = place.prefix + ("around" if place.layer is None else f"layer {place.layer}")
        if row not in rows:
            rows.append(row)
        if place.name not in columns:
            columns.append(place.name)
        times = j.error / j.tolerance if j.tolerance else np.inf
        cells[row, place.name] = float(np.clip(np.log10(max(times, 1e-6)), -2, 4)), j is result.first
    order = [name.name for name in NAMES if name.name in columns]
    grid = np.array([[cells.get((row, column), (np.nan,))[0] for column in order] for row in rows])
    figure = Figure(figsize=(2 + 0.34 * len(order), 1.6 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="RdBu_r", norm=TwoSlopeNorm(0, -2, 4), aspect="auto")
    axes.set_xticks(range(len(order)), order, rotation=90, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    verdict = "the same within rounding" if result.first is None else f"departs first at {result.first.name}"
    axes.set_title(f"{result.b}: {verdict}", fontsize=9)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("deviation / tolerance, log10")
    for (row, column), (_, first) in cells.items():
        if first:
            x, y = order.index(column), rows.index(row)
            axes.plot([x - .5, x + .5, x + .5, x - .5, x - .5], [y - .5, y - .5, y + .5, y + .5, y - .5], color="black", linewidth=2)
    if path is not None:
        temporary = Path(path).with_name(f".{Path(path).stem}.tmp{Path(path).suffix}")
        try:
            figure.savefig(temporary, dpi=110)
            os.replace(temporary, path)
        except (OSError, ValueError) as error:
            temporary.unlink(missing_ok=True)
            raise TraceError(f"{path}: the picture cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return figure
