"""Notebooks as HTML pages, with the sources they link to as pages too, a mark at every line.

A page needs no other: formulas are MathML, which browsers draw themselves; nbconvert's scripts, which would fetch MathJax, are left out.
"""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from refimpl.extras import require

NOTEBOOK = re.compile(r"\]\(([0-9][0-9]_\w+)\.ipynb\)")
NO_WORDS = 'alt="No description has been provided for this image"'     # nbconvert does not look at what the notebook says
SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL)
CODE_STYLE = """<style>.jp-RenderedMarkdown pre, .jp-RenderedMarkdown code { font-family: monospace; font-size: 13px; }
.jp-RenderedMarkdown pre { white-space: pre; overflow-x: auto; }</style>
"""                                     # nbconvert has none for code outside of cells
FORMULA = re.compile(r"```.*?```|`[^`]+`|\$\$(?P<display>.+?)\$\$|\$(?P<inline>[^$]+?)\$", re.DOTALL)      # or code, which stays
# from notebooks/ to a file of the package, and maybe a line of it
SOURCE = re.compile(r"\]\(\.\./(refimpl/[\w/.-]+)((?:#L\d+)?)\)")


def pages(notebooks: Mapping[str, str], sources: Sequence[str], root: Path) -> dict[str, str]:
    """File name -> page: index.html, one for each notebook (name -> .ipynb as text), one for each source ("refimpl/...", below `root`).

    Links lead from page to page. Raises MissingExtra without nbconvert or latex2mathml.
    """
    HTMLExporter, convert = require("nbconvert", "notebooks").HTMLExporter, require("latex2mathml.converter", "notebooks").convert
    import nbformat

    exporter, files, titles = HTMLExporter(), {}, {}
    exporter.log.setLevel("ERROR")              # it says that words for pictures are missing, which are filled in below
    for name, text in notebooks.items():
        linked, words = nbformat.reads(text, as_version=4), []
        for cell in linked.cells:
            cell.source = _to_pages(cell.source)
            if cell.cell_type == "markdown":
                cell.source = FORMULA.sub(partial(_drawn, convert), cell.source)
            for output in cell.get("outputs", ()):
                if "image/png" in output.get("data", {}):
                    words.append(output.metadata.get("image/png", {}).get("alt", ""))
                if "text/markdown" in output.get("data", {}):
                    output.data["text/markdown"] = _to_pages(output.data["text/markdown"])
        titles[name] = re.search(r"^# (.+)$", linked.cells[0].source, re.MULTILINE)[1]
        page, _ = exporter.from_notebook_node(linked, resources={"metadata": {"name": titles[name]}})
        page = SCRIPT.sub("", page).replace("</head>", f"{CODE_STYLE}</head>", 1)
        files[f"{name}.html"] = "".join(part + after for part, after in zip(page.split(NO_WORDS), [*map(_alt, words), ""], strict=True))
    items = "\n".join(f'<li><a href="{name}.html">{html.escape(title)}</a></li>' for name, title in titles.items())
    files["index.html"] = _page("Notebooks of refimpl", f"<h1>Notebooks of refimpl</h1>\n<ul style='list-style: none'>\n{items}\n</ul>")
    return files | {f"source/{path}.html": _source_page(path, (root / path).read_text(encoding="utf-8")) for path in sources}


def _drawn(convert: Callable[..., str], found: re.Match) -> str:
    """A formula as MathML, which `convert` makes, and code as it is."""
    formula = found["display"] or found["inline"]
    if formula is None:
        return found[0]
    drawn = convert(" ".join(formula.split()), display="block" if found["display"] else "inline")
    return drawn.replace("*", "&#42;").replace("_", "&#95;")             # which are not Markdown's


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
