"""A comparison as plain data, and as a grid of layers and tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.lab.compare.judgement import SAME, Comparison, Judgement
from refimpl.lab.compare.names import NAMES, TOWERS, place_of
from refimpl.lab.compare.reports.likely import likely

LEAST, MOST = -2, 6         # log10 of deviation / tolerance, as colours show it


def figures(result: Comparison) -> dict[str, object]:
    """A comparison as plain data, for JSON."""
    def row(j: Judgement) -> dict[str, object]:
        return {"name": j.name, "verdict": j.verdict, "error": j.error if np.isfinite(j.error) else None, "tolerance": j.tolerance,
                "position": j.position, "index": list(j.index), "a": _finite(j.ours), "b": _finite(j.theirs)}
    seen = result.coverage
    return {"a": result.a, "b": result.b, "verdict": result.verdict, "same": result.verdict == SAME,
            "first": None if result.first is None else row(result.first),
            "kind": None if result.diagnosis is None else result.diagnosis.kind,
            "text": (result.undecided or None) if result.diagnosis is None else result.diagnosis.text,
            "likely": [name for name, _ in likely(result)], "tie": result.tie or None,
            "tolerances": result.tolerance_from, "arithmetic": list(result.arithmetic),
            "coverage": {"tensors": [seen.tensors, seen.n_tensors], "positions": list(seen.positions), "prompt": seen.n_positions},
            "not_compared": result.missing, "unknown": result.unknown,
            "stages": [row(j) for j in result.stages], "tensors": [row(j) for j in result.judged]}


def _finite(x: float) -> float | None:
    return x if np.isfinite(x) else None


@dataclass(frozen=True)
class Grid:
    """Layers down, tensors across: (row, column) -> judgement."""

    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Judgement]


def grid_of(result: Comparison) -> Grid:
    """The judgements that have a tolerance, or depart, in the order of the forward pass."""
    cells: dict[tuple[str, str], Judgement] = {}
    for j in result.judged:
        place = place_of(j.name)
        if place is not None and (j.tolerance or j.verdict != SAME):
            cells[place.prefix + ("around" if place.layer is None else f"layer {place.layer}"), place.name] = j
    present, towers = {column for _, column in cells}, {place_of(j.name).tower for j in cells.values()} - {""}
    tables = (*(TOWERS[tower] for tower in TOWERS if tower in towers), NAMES)
    columns = dict.fromkeys(name.name for names in tables for name in names if name.name in present)
    return Grid(list(dict.fromkeys(row for row, _ in cells)), list(columns), cells)


def excess(j: Judgement) -> float:
    """log10 of deviation / tolerance, from LEAST to MOST."""
    times = j.error / j.tolerance if j.tolerance else np.inf
    return float(np.clip(np.log10(max(times, 1e-6)), LEAST, MOST))


def text_of(maker: Callable[[Comparison], str]) -> Callable[[Comparison, Path], None]:
    """What writes a comparison as text to a path."""
    def write(result: Comparison, path: Path):
        path.write_text(maker(result), encoding="utf-8", errors="backslashreplace")
    return write
