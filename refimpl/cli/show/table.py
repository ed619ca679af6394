"""Tables and sizes, in one style for all commands."""

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

WIDE = 10_000       # tables are never folded: a terminal may wrap lines, a file keeps them


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "", left: Sequence[int] = (0,)) -> str:
    """A table as plain text without trailing blanks: heading, rule, one line for each row. Columns with an index in `left` are
    left-aligned, the others right-aligned; cells are converted by `str`.
    """
    drawn = Table(title=title or None, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False,
                  header_style="")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i in left else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*map(str, row))
    out = io.StringIO()
    Console(file=out, width=WIDE, color_system=None, markup=False, highlight=False, emoji=False).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def size(n_bytes: float) -> str:
    """Bytes in decimal units: 1.23 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes} B"
