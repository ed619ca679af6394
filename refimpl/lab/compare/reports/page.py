"""A comparison as one HTML page that needs no other file: the grid, the tensor that departs, and code that would make such a mistake.

Names, texts and paths come from files of others: the template escapes all of them (jinja2's autoescape), and the page runs no script.
"""

from functools import cache
from importlib.resources import files

import numpy as np

from refimpl.lab.compare.judgement import Comparison
from refimpl.lab.compare.mismatch import Mismatch
from refimpl.lab.compare.reports.data import LEAST, MOST, excess, grid_of
from refimpl.lab.compare.reports.junit_xml import numbers
from refimpl.lab.compare.reports.likely import code_of, likely
from refimpl.media.images import data_url

PIXELS = 512            # of a picture, at most, each way: several elements share one where there are more
BLUE, WHITE, RED = (np.array(rgb, float) for rgb in ((5, 48, 97), (247, 247, 247), (103, 0, 31)))


def as_html(result: Comparison) -> str:
    """The page."""
    grid = grid_of(result)
    mistakes = [(name, *code_of(bug)) for name, bug in likely(result)]
    picture = None if result.mismatch is None or result.first.name != result.mismatch.name else picture_of(result.mismatch)
    return _template().render(
        result=result, grid=grid, mistakes=mistakes, picture=picture, numbers=numbers, seen=result.coverage,
        colour=lambda j: "#{:02x}{:02x}{:02x}".format(*colours(np.array(excess(j)))),
        shape=None if picture is None else result.mismatch.ours.shape)


def picture_of(s: Mismatch) -> str | None:
    """Positions down and elements across, each as far as it is away, in units of the tolerance: a PNG as a data URL. None where the shapes
    differ.
    """
    if s.ours.shape != s.theirs.shape or s.ours.dtype.kind != "f":
        return None
    a, b = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (s.ours, s.theirs))
    rms = np.sqrt(np.mean(a * a, axis=1, keepdims=True)) + 1e-30
    apart = np.where(np.isfinite(b), np.abs(a - b), np.inf) / (rms * max(s.tolerance, 1e-30))
    for axis in (0, 1):
        step = -(-apart.shape[axis] // PIXELS)
        apart = np.maximum.reduceat(apart, np.arange(0, apart.shape[axis], step), axis=axis)
    return data_url(colours(np.clip(np.log10(np.maximum(apart, 1e-9)), LEAST, MOST)))


def colours(value: np.ndarray) -> np.ndarray:
    """uint8 (..., 3): blue at LEAST, white at 0, red at MOST."""
    part = np.asarray(value / np.where(value < 0, -LEAST, MOST))[..., None]
    return np.rint(WHITE + np.abs(part) * (np.where(part < 0, BLUE, RED) - WHITE)).astype(np.uint8)


@cache
def _template():
    import jinja2

    text = (files("refimpl.lab.compare.reports") / "page.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(text)
