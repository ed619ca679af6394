"""Notebooks: the executed file is the source with its outputs, nothing is defined in it, and it runs now and shows the same.

The first is executed, with its exercises; the others under `-m exhaustive`. Whatever a notebook imports from the package must exist
for all of them, and so must whatever their pages link to.
"""

import ast
import base64
import importlib
import inspect
import io
import json
import os
import re
import sys
from html.parser import HTMLParser

import nbformat
import pytest
from cli import assert_one_line, run

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "notebooks"))
import build  # noqa: E402  (a script, no package)

from refimpl.lab.explain import show  # noqa: E402

SOURCES = build.sources()
MOST_BYTES = 600_000
FAST = ("00",)
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
    now, before = build.execute(build.with_exercises(build.read(source))), stored(source)
    now.cells = now.cells[:len(before.cells)]
    assert not list(build.differences(before, now))


@notebooks
def test_it_ends_with_three_exercises_whose_answers_are_folded(source):
    *_, last = build.read(source).cells
    exercises = last.source.partition("## Exercises\n")[2]
    assert last.cell_type == "markdown" and len(re.findall(r"^\*\*[123]\. ", exercises, re.MULTILINE)) == 3
    assert len(re.findall(r"^<details><summary>Answer</summary>\n\n.+?\n\n</details>$", exercises, re.MULTILINE | re.DOTALL)) == 3
    codes = build.with_exercises(build.read(source)).cells[len(build.read(source).cells):]
    assert len(codes) == 3 and all(ast.parse(cell.source) for cell in codes)


@notebooks
def test_pictures_are_sharp_and_said_in_words(source):
    from PIL import Image

    for i, cell in enumerate(stored(source).cells):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                alt = output.metadata.get("image/png", {}).get("alt", "") or output.metadata.get("alt", "")
                assert len(alt) > 20, f"cell {i} of {source.stem}: a picture without words"
                png = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
                assert min(png.info.get("dpi", (0,))) > 149, f"cell {i} of {source.stem}: {png.info.get('dpi')} dpi"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.alts = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        of = dict(attributes)
        self.ids |= {of["id"]} if "id" in of else set()
        self.links += [of["href"]] if tag == "a" and "href" in of else []
        self.alts += [of.get("alt")] if tag == "img" else []


def test_links_of_the_pages_lead_somewhere(tmp_path):
    code, out, err = run("notebooks", tmp_path / "pages", "--html")
    assert code == 0 and "index.html" in out, err
    pages = {path.resolve(): Page(path.read_text()) for path in (tmp_path / "pages").rglob("*.html")}
    assert {f"{path.stem}.html" for path in SOURCES} | {"index.html"} <= {path.name for path in pages}
    wrong, n_lines = [], 0
    for path, page in pages.items():
        for link in page.links:
            if link.startswith("https://"):
                continue
            name, _, place = link.partition("#")
            there = (path.parent / name).resolve() if name else path
            n_lines += bool(re.fullmatch(r"L\d+", place))
            if there not in pages or place and place not in pages[there].ids:
                wrong.append(f"{path.name}: {link}")
    assert not wrong and n_lines > 50
    texts = {path.stem: path.read_text() for path in pages}
    assert "weights               bits per byte" in texts["02_quantization_aware_training"], "lines of an output stay lines"
    for name, text in texts.items():
        assert not re.search(r"<script|src=.https?:", text), f"{name} needs more than itself"
    for source in SOURCES:
        formulas = len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", "".join(
            re.sub(r"```.*?```|`[^`]+`", "", cell.source, flags=re.DOTALL) for cell in build.read(source).cells
            if cell.cell_type == "markdown"), re.DOTALL))
        assert texts[source.stem].count("<math ") == formulas, source.stem
    assert not [path.name for path, page in pages.items() if not all(alt and "No description" not in alt for alt in page.alts)]
    assert sum(len(page.alts) for page in pages.values()) > 30


@notebooks
def test_links_name_what_is_there(source):
    """A link to a line of source: the file has what the link names, or begins the code below it. (Its line may have moved a little.)"""
    for cell in stored(source).cells:
        for output in cell.get("outputs", []):
            text = output.get("data", {}).get("text/markdown", "")
            for name, path in re.findall(r"\[`([\w.]+)`\]\(\.\./(refimpl/[\w/]+\.py)#L\d+\)", text):
                words = (build.HERE.parent / path).read_text()
                assert re.search(rf"^\s*(def|class) {name.rpartition('.')[2]}\b", words, re.MULTILINE), f"{source.stem}: {name} in {path}"
            for path, code in re.findall(r"\]\(\.\./(refimpl/[\w/]+\.py)#L\d+\)\n\n```python\n(.+?)\n```", text, re.DOTALL):
                lines = {line.strip() for line in (build.HERE.parent / path).read_text().splitlines()}
                gone = [line for line in code.splitlines() if line.strip() not in lines]
                assert not gone, f"{source.stem} shows what {path} no longer says: {gone[0]!r}; python notebooks/build.py {source.stem[:2]}"


def test_they_can_be_taken_along(tmp_path):
    folder = tmp_path / "mine"
    code, out, err = run("notebooks", folder, "--no-open")
    assert code == 0 and f"{len(SOURCES)} notebooks" in out, err
    for path in folder.glob("*.ipynb"):
        text = json.dumps(json.loads(path.read_text()), ensure_ascii=False)
        assert "](../" not in text
        for linked in re.findall(r"\]\((source/[\w/.-]+)", text):
            assert (folder / linked).is_file(), linked
    (folder / "00_one_token.ipynb").write_text("mine")
    assert_one_line(run("notebooks", folder, "--no-open"), 1, "exists; --force")
    assert (folder / "00_one_token.ipynb").read_text() == "mine"
    assert_one_line(run("notebooks", folder / "00_one_token.ipynb", "--no-open"), 1, "is a file")


def test_a_puzzle_is_solved_by_what_computes_the_same():
    from refimpl.lab.compare.known_bugs import BUGS
    from refimpl.lab.explain import puzzles

    assert all(name in BUGS for name in puzzles.PUZZLES)
    assert "departs first at kqv_out-0" in puzzles.grade(3) and "solved" not in puzzles.grade(3, "self.window + 2", "self.window + 3")
    assert "is solved" in puzzles.grade(3, "pos - self.window + 2", "pos + 1 - self.window")
    with pytest.raises(puzzles.WrongAnswer, match="is 0 times"):
        puzzles.grade(3, "no such words", "")
    with pytest.raises(puzzles.WrongAnswer, match="does not run"):
        puzzles.grade(3, "self.window + 2", "self.window +")
    with pytest.raises(ValueError, match="there are 1 to"):
        puzzles.grade(99)


def test_bars_stand_on_zero():
    fig, axes = show.figure(2, 2)
    axes.bar([0, 1], [0.8, 0.9])
    assert show.picture(fig, "two bars").data
    axes.set_ylim(0.7, 1)
    with pytest.raises(ValueError, match="have to stand on 0"):
        show.picture(fig, "two bars that lie")


def test_words_are_taken_over_without_executing(tmp_path):
    """And links lead to where things are now. Where a code cell changed, it has to be executed."""
    source = tmp_path / SOURCES[0].name
    text = SOURCES[0].read_text(encoding="utf-8")
    moved = re.sub(r"(refimpl/reference/ops.py#L)\d+", r"\g<1>9999", SOURCES[0].with_suffix(".ipynb").read_text(encoding="utf-8"))
    source.with_suffix(".ipynb").write_text(moved, encoding="utf-8")
    source.write_text(text.replace("This is the map.", "This is a map."), encoding="utf-8")
    told = nbformat.writes(build.retold(source))
    assert "This is a map." in told and "#L9999" in moved and "#L9999" not in told
    source.write_text(text.replace('text = "for i', 'text = "for j'), encoding="utf-8")
    with pytest.raises(ValueError, match="not what was executed"):
        build.retold(source)


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
