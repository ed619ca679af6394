"""Notebooks as HTML pages, with the sources they link to as pages too, a mark at every line."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from refimpl.extras import require

NOTEBOOK = re.compile(r"\]\(([0-9][0-9]_\w+)\.ipynb\)")
NO_WORDS = 'alt="No description has been provided for this image"'     # nbconvert does not look at what the notebook says
# from notebooks/ to a file of the package, and maybe a line of it
SOURCE = re.compile(r"\]\(\.\./(refimpl/[\w/.-]+)((?:#L\d+)?)\)")


def pages(notebooks: Mapping[str, str], sources: Sequence[str], root: Path) -> dict[str, str]:
    """File name -> page: index.html, one for each notebook (name -> .ipynb as text), one for each source ("refimpl/...", below `root`).

    Links lead from page to page. Raises MissingExtra without nbconvert.
    """
    HTMLExporter = require("nbconvert", "notebooks").HTMLExporter
    import nbformat

    exporter, files, titles = HTMLExporter(), {}, {}
    exporter.log.setLevel("ERROR")              # it says that words for pictures are missing, which are filled in below
    for name, text in notebooks.items():
        linked, words = json.loads(text), []
        for cell in linked["cells"]:
            cell["source"] = _to_pages("".join(cell["source"]))
            for output in cell.get("outputs", ()):
                if "image/png" in output.get("data", {}):
                    words.append(output["metadata"].get("image/png", {}).get("alt", ""))
                if "text/markdown" in output.get("data", {}):
                    output["data"]["text/markdown"] = _to_pages("".join(output["data"]["text/markdown"]))
        titles[name] = re.search(r"^# (.+)$", "".join(linked["cells"][0]["source"]), re.MULTILINE)[1]
        page, _ = exporter.from_notebook_node(nbformat.from_dict(linked), resources={"metadata": {"name": titles[name]}})
        files[f"{name}.html"] = "".join(part + after for part, after in zip(page.split(NO_WORDS), [*map(_alt, words), ""], strict=True))
    items = "\n".join(f'<li><a href="{name}.html">{html.escape(title)}</a></li>' for name, title in titles.items())
    files["index.html"] = _page("Notebooks of refimpl", f"<h1>Notebooks of refimpl</h1>\n<ul style='list-style: none'>\n{items}\n</ul>")
    return files | {f"source/{path}.html": _source_page(path, (root / path).read_text(encoding="utf-8")) for path in sources}


def _alt(words: str) -> str:
    return f'alt="{html.escape(words)}"'


def _to_pages(markdown: str) -> str:
    return SOURCE.sub(r"](source/\1.html\2)", NOTEBOOK.sub(r"](\1.html)", markdown))


def _source_page(path: str, text: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_for_filename

    formatter = HtmlFormatter(linenos="inline", linespans="L")
    code = highlight(text, get_lexer_for_filename(path, stripnl=False), formatter).replace('id="L-', 'id="L')
    return _page(path, f"<style>{formatter.get_style_defs()}</style>\n<h1><code>{path}</code></h1>\n{code}")


def _page(title: str, body: str) -> str:
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{html.escape(title)}</title></head>\n'
            f'<body style="font-family: sans-serif; margin: 2em">\n{body}\n</body>\n</html>\n')
