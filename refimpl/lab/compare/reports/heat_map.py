"""A comparison as a heat map of layers and tensors, by matplotlib."""

import os
from pathlib import Path

import numpy as np

from refimpl.extras import require
from refimpl.lab.compare.judgement import Comparison
from refimpl.lab.compare.reports.data import LEAST, MOST, excess, grid_of
from refimpl.lab.compare.trace import TraceError


def plot(result: Comparison, path: str | os.PathLike | None = None):
    """A heat map of deviation over tolerance, layers down and tensors across, the first departure framed. Returns the figure; written to
    `path` where there is one. Raises MissingExtra without matplotlib, TraceError where it cannot be written or no tensor was compared.
    """
    require("matplotlib", "plot")
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    grid = grid_of(result)
    if not grid.cells:
        raise TraceError(f"no tensor was compared, so there is nothing to draw: {result.diagnosis.text if result.diagnosis else ''}")
    values = np.array([[excess(grid.cells[row, column]) if (row, column) in grid.cells else np.nan for column in grid.columns]
                       for row in grid.rows])
    figure = Figure(figsize=(2 + 0.34 * len(grid.columns), 1.6 + 0.28 * len(grid.rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu_r", norm=TwoSlopeNorm(0, LEAST, MOST), aspect="auto")
    axes.set_xticks(range(len(grid.columns)), grid.columns, rotation=90, fontsize=8)
    axes.set_yticks(range(len(grid.rows)), grid.rows, fontsize=8)
    verdict = "the same within rounding" if result.first is None else f"departs first at {result.first.name}"
    axes.set_title(f"{result.b}: {verdict}", fontsize=9, parse_math=False)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("deviation / tolerance, log10")
    for (row, column), judgement in grid.cells.items():
        if judgement is result.first:
            x, y = grid.columns.index(column), grid.rows.index(row)
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
