"""What notebooks show: source code with a link, tables, pictures, text with a background colour for every token.

matplotlib and IPython are imported only where they are used.
"""

import ast
import inspect
import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from refimpl.extras import require

PACKAGE = Path(__file__).parent.parent.parent
# Okabe and Ito's eight colours, distinguishable with any colour vision
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PINK, BLACK, YELLOW)
DPI = 150


def source(*functions: Callable | str):
    """The source of functions or classes of the package, as Markdown; each with a link to its line, relative to notebooks/.

    "refimpl.module.name" is read from the file, without importing the module.
    """
    Markdown = require("IPython.display", "notebooks").Markdown

    parts = []
    for function in functions:
        file, lines, first = _read_source(function) if isinstance(function, str) else _source_of(function)
        file = file.relative_to(PACKAGE.parent)
        link = f"[`{file.as_posix()}`](../{file.as_posix()}#L{max(1, first)})"
        parts.append(f"{link}\n\n```python\n{textwrap.dedent(''.join(lines)).rstrip()}\n```")
    return Markdown("\n\n".join(parts))


def deeper(notebook: str, *functions: Callable | str):
    """Where a station is explained: a notebook by its file name ("" for none), and lines of source. As Markdown."""
    Markdown = require("IPython.display", "notebooks").Markdown

    links = [f"[notebook {int(notebook[:2])}]({notebook}.ipynb)"] if notebook else []
    for function in functions:
        file, _, first = _read_source(function) if isinstance(function, str) else _source_of(function)
        name = function.rpartition(".")[2] if isinstance(function, str) else function.__qualname__
        file = file.relative_to(PACKAGE.parent).as_posix()
        links.append(f"[`{name}`](../{file}#L{max(1, first)}) in `{file}`")
    return Markdown("*Deeper:* " + "; ".join(links))


def _source_of(function: Callable) -> tuple[Path, list[str], int]:
    """(file, lines, number of the first line)"""
    function = inspect.unwrap(getattr(function, "py_func", function))      # a kernel's Python body
    return Path(inspect.getsourcefile(function)).resolve(), *inspect.getsourcelines(function)


def _read_source(dotted: str) -> tuple[Path, list[str], int]:
    """The same for a name on the top level of a module. Raises ValueError for one that is not there."""
    module, _, name = dotted.rpartition(".")
    file = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py").resolve()
    text = file.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if getattr(node, "name", None) == name:
            first = min(part.lineno for part in (node, *node.decorator_list))
            return file, text.splitlines(keepends=True)[first - 1:node.end_lineno], first
    raise ValueError(f"{module} has no {name}")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]):
    """A table as Markdown: the first column to the left, the others to the right. Cells are shown by `str`."""
    Markdown = require("IPython.display", "notebooks").Markdown

    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return Markdown("\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines))


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """(figure, axes) of `width` x `height` inches, drawn without a window. `options` are those of matplotlib's `subplots`."""
    Figure = require("matplotlib.figure", "plot").Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, **options)


def picture(fig, alt: str):
    """A figure as a PNG image, in one plain style; `alt` says in words what it shows. Raises ValueError for bars on an axis without 0."""
    for axes in fig.axes:
        for bars in axes.containers:
            low, high = sorted(axes.get_xlim() if getattr(bars, "orientation", "vertical") == "horizontal" else axes.get_ylim())
            if not low <= 0 <= high:
                raise ValueError(f"bars on an axis from {low:g} to {high:g}; they have to stand on 0: {alt}")
        axes.set_title(axes.get_title(), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_fontsize(9)
    return drawn(fig, alt)


def drawn(fig, alt: str):
    """A figure as it is, as a PNG image in 256 colours, a third of the bytes; `alt` as in `picture`."""
    Shown = require("IPython.display", "notebooks").Image
    from PIL import Image

    png, out = io.BytesIO(), io.BytesIO()
    fig.savefig(png, format="png", dpi=DPI)
    Image.open(png).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "png", optimize=True, dpi=(DPI, DPI))
    return Shown(out.getvalue(), format="png", alt=alt)


def legend(axes, **options):
    """A legend without a frame, in small print."""
    axes.legend(frameon=False, fontsize=8, **options)


# ---- text

def text_cells(chunks: Sequence[str], width: int) -> tuple[list[tuple[int, int, int, str]], int]:
    """Lays out `chunks` of text on a page of `width` columns: (chunk, line, column, part) of every run, and the number of lines.

    A newline ends its line; a chunk that reaches over the edge continues in the next line.
    """
    runs, line, column = [], 0, 0
    for i, chunk in enumerate(chunks):
        for part in chunk.replace("\t", "    ").splitlines(keepends=True):
            shown = part.rstrip("\n")
            while shown:
                if column == width:
                    line, column = line + 1, 0
                taken = shown[:width - column]
                runs.append((i, line, column, taken))
                column, shown = column + len(taken), shown[len(taken):]
            if part.endswith("\n"):
                runs.append((i, line, column, "\u21b5"))
                line, column = line + 1, 0
    return runs, line + (column > 0)


def text_figure(chunks: Sequence[str], backs: Sequence[str], inks: Sequence[str], width: int = 96, key: Sequence[tuple[str, str]] = ()):
    """A figure of running text: `backs[i]` is the background colour of chunk i, `inks[i]` the colour of its letters.

    `key` explains colours, (colour, meaning) each. A newline is drawn as an arrow.
    """
    runs, n_lines = text_cells(chunks, width)
    return _boxes([(line, column, part, backs[i], inks[i]) for i, line, column, part in runs], n_lines, width, key)


def lines_figure(lines: Sequence[Sequence[tuple[str, str, str]]], key: Sequence[tuple[str, str]] = ()):
    """A figure of boxes with text, line by line: (text, background colour, colour of its letters) each. `key` as in `text_figure`."""
    boxes = []
    for i, line in enumerate(lines):
        column = 0.0
        for text, back, ink in line:
            boxes.append((i, column, text, back, ink))
            column += len(text) + 0.3
    return _boxes(boxes, len(lines), max(column + len(text) for _, column, text, _, _ in boxes) + 1, key)


def visible(text: str) -> str:
    """Text with its spaces, newlines and tabs drawn."""
    return text.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u2192")


def _boxes(boxes: Sequence[tuple[int, float, str, str, str]], n_lines: int, width: float, key: Sequence[tuple[str, str]]):
    from matplotlib.patches import Rectangle

    n_key, width = bool(key), max(width, 72)
    fig, axes = figure(0.093 * width, 0.23 * (n_lines + n_key) + 0.1)
    axes.set(xlim=(0, width), ylim=(n_lines, -n_key))
    axes.axis("off")
    style = {"family": "monospace", "fontsize": 9, "va": "center_baseline", "parse_math": False}
    for line, column, text, back, ink in boxes:
        axes.add_patch(Rectangle((column + 0.04, line + 0.06), len(text) - 0.08, 0.88, color=back, lw=0))
        for j, letter in enumerate(text):
            axes.text(column + j + 0.5, line + 0.52, letter, color=ink, ha="center", **style)
    x = 0.0
    for colour, meaning in key:
        axes.add_patch(Rectangle((x, -0.85), 2, 0.6, color=colour, lw=0))
        axes.text(x + 2.6, -0.5, meaning, fontsize=8, va="center", parse_math=False)
        x += 5 + 0.75 * len(meaning)
    return fig
