"""Executes the notebooks and writes them: `python notebooks/build.py [01 02 ...]`, all of them when none is named. With `--text` only the
words are taken over, and the lines that links name; nothing is executed.

NN_name.py is the source (jupytext's percent format), NN_name.ipynb the same cells with what they showed. Nothing in an .ipynb depends on
who wrote it or when: no times, no random cell ids, no kernel by name. It carries the SHA-256 of the sources it was executed from, and the
Python version, because the standard library's text, which some notebooks read, belongs to one.

A cell whose output is another on another machine (seconds, rounding errors) bears the tag "machine"; one that depends on the standard
library's text bears the tag "text".
"""

import argparse
import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
CELL_SECONDS = 300          # far more than any cell takes; a hang must end
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
LINE = re.compile(r"#L\d+")  # of a link to a line of source, which moves with every change above it
LINK = re.compile(r"\[`(?P<name>[\w./]+)`\]\(\.\./(?P<path>refimpl/[\w/.-]+)#L(?P<line>\d+)\)((?P<gap>\n\n```python\n)(?P<first>[^\n]+))?")
NEAR = 0.01                 # relative difference of printed numbers that counts as none


class ThisPython(KernelSpecManager):
    """One kernel: the Python that runs this, whatever kernels are installed on the machine."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The same whatever the name."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


class Kernel(AsyncKernelManager):
    """Starts that kernel; the client ends it."""

    def __init__(self, **options):
        super().__init__(kernel_spec_manager=ThisPython(), **options)


def sources() -> list[Path]:
    """Every notebook's source, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read(source: Path) -> NotebookNode:
    """The notebook in a percent file, not executed."""
    text = jupytext.read(source, fmt="py:percent")
    cells = [{"cell_type": cell.cell_type, "id": f"cell-{i:02d}", "source": cell.source,
              "metadata": {"tags": list(cell.metadata.tags)} if "tags" in cell.metadata else {}}
             | ({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {}) for i, cell in enumerate(text.cells)]
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    return nbformat.from_dict({"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells})


def digest(notebook: NotebookNode) -> str:
    """SHA-256 over kind, tags and source of all cells."""
    parts = [(cell.cell_type, cell.metadata.get("tags", []), cell.source) for cell in notebook.cells]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def with_exercises(notebook: NotebookNode) -> NotebookNode:
    """The notebook with a cell more for each piece of code in its exercises."""
    exercises = notebook.cells[-1].source.partition("## Exercises")[2]
    codes = re.findall(r"^```python\n(.*?)^```$", exercises, re.MULTILINE | re.DOTALL)
    cells = [{"cell_type": "code", "id": f"exercise-{i}", "metadata": {}, "source": code.rstrip(), "outputs": [], "execution_count": None}
             for i, code in enumerate(codes, 1)]
    return nbformat.from_dict(notebook | {"cells": [*notebook.cells, *cells]})


def execute(notebook: NotebookNode) -> NotebookNode:
    """Runs all cells in a fresh kernel of this Python, with this checkout's package. Raises CellExecutionError where a cell does."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    client = NotebookClient(notebook, kernel_manager_class=Kernel, kernel_name="python3", timeout=CELL_SECONDS, record_timing=False,
                            resources={"metadata": {"path": str(HERE)}})
    client.execute(env=env)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.refimpl = {"python": platform.python_version(), "sources": digest(notebook)}
    return notebook


def retold(source: Path) -> NotebookNode:
    """The executed notebook with the words of its source as they are now, and links to the lines where things are now. Raises ValueError
    where a code cell changed.
    """
    notebook, stored = read(source), nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    codes, before = ([cell for cell in found.cells if cell.cell_type == "code"] for found in (notebook, stored))
    if [(cell.source, cell.metadata) for cell in codes] != [(cell.source, cell.metadata) for cell in before]:
        raise ValueError(f"{source.name}: a code cell is not what was executed; run it without --text")
    for new, old in zip(codes, before):
        new.outputs, new.execution_count = old.outputs, old.execution_count
        for output in new.outputs:
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = LINK.sub(_moved, output.data["text/markdown"])
    notebook.metadata = stored.metadata | {"refimpl": stored.metadata.refimpl | {"sources": digest(notebook)}}
    return nbformat.from_dict(notebook)


def _moved(link: re.Match) -> str:
    """A link to where its name, or the first line of the code below it, is now; as it was where that is in no place or in several."""
    lines = (HERE.parent / link["path"]).read_text(encoding="utf-8").splitlines()
    name = link["name"].rpartition(".")[2]
    if name.isidentifier():
        found = [i for i, line in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", line)]
    else:
        found = [i for i, line in enumerate(lines, 1) if line.strip() == (link["first"] or "").strip()]
    line = found[0] if len(found) == 1 else int(link["line"])
    return f"[`{link['name']}`](../{link['path']}#L{line}){link['gap'] or ''}{link['first'] or ''}"


def write(notebook: NotebookNode, path: Path):
    """Writes an .ipynb by way of a temporary name in the same folder."""
    nbformat.validate(notebook)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def differences(stored: NotebookNode, now: NotebookNode) -> Iterator[str]:
    """What cells show now and did not when they were stored, one line for each cell.

    The words of every text must be the same, and its numbers within 1 %; of pictures there must be as many. Cells tagged "machine" are
    compared by the kinds of their outputs alone, and so are cells tagged "text" where the Python is another.
    """
    same_python = stored.metadata.refimpl.python == now.metadata.refimpl.python
    for i, (old, new) in enumerate(zip(stored.cells, now.cells, strict=True)):
        tags = set(new.metadata.get("tags", []))
        loose = "machine" in tags or "text" in tags and not same_python
        ours, theirs = ([text for text in _shown(cell) if not loose or text[0] not in "@#"] for cell in (old, new))
        kinds = [[text[0] for text in _shown(cell)] for cell in (old, new)]
        if kinds[0] != kinds[1] or not all(map(_alike, ours, theirs)):
            yield f"cell {i} ({new.source.splitlines()[0] if new.source else 'empty'}) shows something else than what is stored"


def _shown(cell: NotebookNode) -> list[str]:
    """What a code cell shows, each with a mark in front: * a picture, # Markdown, @ plain text. Messages on stderr do not count."""
    shown = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if output.output_type == "stream":
            if output.name == "stdout":
                shown.append("@" + output.text)
        elif "image/png" in data:
            shown.append("*")
        elif "text/markdown" in data:
            shown.append("#" + LINE.sub("", data["text/markdown"]))
        else:
            shown.append("@" + data.get("text/plain", output.output_type))
    return shown


def _alike(a: str, b: str) -> bool:
    """The same words, and numbers that are nearly the same."""
    ours, theirs = ([float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (a, b))
    return NUMBER.sub("0", a) == NUMBER.sub("0", b) and all(abs(x - y) <= NEAR * max(abs(x), abs(y)) for x, y in zip(ours, theirs))


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog="python notebooks/build.py", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="how their file names begin: 03, or 03_attention_in_gemma4")
    parser.add_argument("--text", action="store_true", help="only the words of the sources and the lines of links; executes nothing")
    args = parser.parse_args()
    chosen = [path for path in sources() if not args.names or any(path.stem.startswith(name) for name in args.names)]
    if not chosen:
        parser.error(f"there is no notebook {' or '.join(args.names)}; there are {', '.join(path.stem for path in sources())}")
    for path in chosen:
        write(retold(path) if args.text else execute(read(path)), path.with_suffix(".ipynb"))
        sys.stdout.write(f"{path.with_suffix('.ipynb').name}: {path.with_suffix('.ipynb').stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    main()
