"""A comparison as plain data and as a picture. (As text: cli/show/compare.py.)"""

import os
from pathlib import Path

import numpy as np

from refimpl.extras import require
from refimpl.lab.compare.compare import Comparison, Judgement
from refimpl.lab.compare.names import NAMES, TOWERS, place_of
from refimpl.lab.compare.trace import TraceError


def figures(result: Comparison) -> dict[str, object]:
    """A comparison as plain data, for JSON."""
    def row(j: Judgement) -> dict[str, object]:
        return {"name": j.name, "verdict": j.verdict, "error": j.error if np.isfinite(j.error) else None, "tolerance": j.tolerance,
                "position": j.position, "index": list(j.index), "a": _finite(j.ours), "b": _finite(j.theirs)}
    return {"a": result.a, "b": result.b, "same": result.first is None, "first": None if result.first is None else row(result.first),
            "kind": None if result.diagnosis is None else result.diagnosis.kind,
            "text": None if result.diagnosis is None else result.diagnosis.text, "tie": result.tie or None,
            "tolerances": result.tolerance_from, "arithmetic": list(result.arithmetic), "not_compared": result.missing,
            "unknown": result.unknown,
            "tensors": [row(j) for j in result.judged]}


def _finite(x: float) -> float | None:
    return x if np.isfinite(x) else None


def plot(result: Comparison, path: str | os.PathLike | None = None):
    """A heat map of deviation over tolerance, layers down and tensors across, the first departure framed. Returns the figure; written to
    `path` where there is one. Raises MissingExtra without matplotlib, TraceError where it cannot be written.
    """
    require("matplotlib", "plot")
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

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
        cells[row, place.name] = float(np.clip(np.log10(max(times, 1e-6)), -2, 6)), j is result.first
    order = [*dict.fromkeys(name.name for names in (NAMES, *TOWERS.values()) for name in names if name.name in columns)]
    grid = np.array([[cells.get((row, column), (np.nan,))[0] for column in order] for row in rows])
    figure = Figure(figsize=(2 + 0.34 * len(order), 1.6 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="RdBu_r", norm=TwoSlopeNorm(0, -2, 6), aspect="auto")
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
