"""Notebooks: the executed file is the source with its outputs, nothing is defined in it, and it runs now and shows the same.

The two fastest are executed; the others under `-m exhaustive`. Whatever a notebook imports from the package must exist for all of them.
"""

import ast
import importlib
import inspect
import os
import sys

import nbformat
import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notebooks"))
import build  # noqa: E402  (a script, no package)

from refimpl.lab.explain import show  # noqa: E402

SOURCES = build.sources()
MOST_BYTES = 600_000
FAST = ("01", "03")
notebooks = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def stored(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def test_every_notebook_has_both_files():
    executed = sorted(path.with_suffix(".py") for path in build.HERE.glob("*.ipynb"))
    assert SOURCES and executed == SOURCES


@notebooks
def test_the_executed_file_has_the_cells_of_the_source(source):
    ours, theirs = build.read(source), stored(source)
    for i, (a, b) in enumerate(zip(ours.cells, theirs.cells)):
        assert (a.cell_type, a.id, a.metadata, a.source) == (b.cell_type, b.id, b.metadata, b.source), f"cell {i} of {source.stem}.ipynb"
    assert len(ours.cells) == len(theirs.cells)
    assert theirs.metadata.refimpl.sources == build.digest(ours), "the outputs are those of other sources: python notebooks/build.py"


@notebooks
def test_it_was_executed_from_top_to_bottom_without_an_error(source):
    cells = [cell for cell in stored(source).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3, "a notebook shows pictures"
    for output in outputs:
        assert output.output_type in ("display_data", "execute_result", "stream"), output
        assert output.output_type != "stream" or output.name == "stdout", f"a message on stderr was stored: {output.text}"


@notebooks
def test_it_defines_nothing(source):
    for cell in build.read(source).cells:
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(cell.source)):
                assert not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)), cell.source


@notebooks
def test_its_file_is_small_and_the_same_whoever_writes_it(source):
    path = source.with_suffix(".ipynb")
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert text == nbformat.writes(nbformat.from_dict(stored(source))) + "\n"
    assert set(stored(source).metadata) == {"kernelspec", "language_info", "refimpl"}
    assert str(build.HERE.parent) not in text, "a path of this machine"


@notebooks
def test_what_it_uses_of_the_package_exists(source):
    """Imports, and names looked up in imported modules, without running the cells."""
    modules = {}
    trees = [ast.parse(cell.source) for cell in build.read(source).cells if cell.cell_type == "code"]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("refimpl"):
            for alias in node.names:
                found = getattr(importlib.import_module(node.module), alias.name, None)
                found = importlib.import_module(f"{node.module}.{alias.name}") if found is None else found
                modules |= {alias.asname or alias.name: found} if inspect.ismodule(found) else {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{modules[node.value.id].__name__} has no {node.attr}"


@notebooks
def test_it_needs_no_torch(source):
    """Nobody installs gigabytes to read a notebook. What it shows by name, without importing it, exists."""
    for cell in build.read(source).cells:
        for node in ast.walk(ast.parse(cell.source)) if cell.cell_type == "code" else ():
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)] if isinstance(node, ast.ImportFrom) else []
            assert not [m for m in modules if m.startswith(("torch", "transformers", "refimpl.tiny.training"))], cell.source
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "source":
                for name in (part.value for part in node.args if isinstance(part, ast.Constant)):
                    assert show.source(name).data


@pytest.mark.parametrize("source", [pytest.param(source, marks=() if source.stem.startswith(FAST) else pytest.mark.exhaustive,
                                                 id=source.stem) for source in SOURCES])
def test_it_runs_now_and_shows_what_is_stored(source):
    assert not list(build.differences(stored(source), build.execute(build.read(source))))


def test_a_difference_is_seen():
    def one(text, tags=(), python="3.11.1"):
        cell = {"cell_type": "code", "id": "a", "source": "x", "execution_count": 1, "metadata": {"tags": list(tags)}, "outputs": [
            {"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {"text/markdown": text}}]}
        return nbformat.from_dict({"nbformat": 4, "nbformat_minor": 5, "metadata": {"refimpl": {"python": python}}, "cells": [cell]})

    def differ(a, b):
        return len(list(build.differences(a, b)))
    assert differ(one("8 of 128 experts"), one("8 of 128 experts")) == 0
    assert differ(one("8 of 128 experts"), one("7 of 128 experts")) == 1
    assert differ(one("8 of 128 experts"), one("8 of 128 specialists")) == 1
    assert differ(one("1.000 bits"), one("1.001 bits")) == 0
    assert differ(one("0.2 ms", ["machine"]), one("0.7 ms", ["machine"])) == 0
    assert differ(one("4 tokens", ["text"]), one("5 tokens", ["text"])) == 1
    assert differ(one("4 tokens", ["text"]), one("5 tokens", ["text"], "3.14.0")) == 0


def test_the_kernel_is_this_python_whatever_is_installed(tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text('{"argv": ["/no/such/python"], "display_name": "trap", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    cell = {"cell_type": "code", "id": "a", "source": "import sys; print(sys.executable)", "metadata": {}, "outputs": [],
            "execution_count": None}
    notebook = build.execute(nbformat.from_dict({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]}))
    assert notebook.cells[0].outputs[0].text.strip() == sys.executable
