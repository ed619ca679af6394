"""`refimpl notebooks`: copies the notebooks, with the sources they link to, out of the package; as pages with --html."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.app import Failure, Force, app, replacing, write
from refimpl.cli.show.notebook_pages import SOURCE, pages

PACKAGE = Path(__file__).parent.parent
COPIED = "source"           # folder beside the copied notebooks for the sources that they link to


def folder_of_notebooks() -> Path:
    """In a wheel they are in the package, in a checkout beside it. Raises Failure where there are none."""
    for folder in (PACKAGE / "notebooks", PACKAGE.parent / "notebooks"):
        if any(folder.glob("00_*.ipynb")):
            return folder
    raise Failure(f"{PACKAGE / 'notebooks'}: the notebooks are missing; install the package again")


def linked_sources(texts: list[str]) -> list[str]:
    """Paths of the package's files that notebooks link to, as "refimpl/...". Raises Failure for one that is not there."""
    paths = sorted({match[1] for text in texts for match in SOURCE.finditer(text)})
    for path in paths:
        if not (PACKAGE.parent / path).is_file():
            raise Failure(f"a notebook links to {path}, which does not exist")
    return paths


@app.command()
def notebooks(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="where to write them", show_default=True)] = Path("refimpl-notebooks"),
    html: Annotated[bool, typer.Option("--html", help="write HTML pages instead, for any browser (needs nbconvert)")] = False,
    no_open: Annotated[bool, typer.Option("--no-open", help="do not start JupyterLab, where it is installed")] = False,
    force: Force = False,
):
    """Copy the notebooks that explain everything, and open them."""
    stored = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder_of_notebooks().glob("[0-9][0-9]_*.ipynb"))}
    sources = linked_sources(list(stored.values()))
    if html:
        files = pages(stored, sources, PACKAGE.parent)
    else:
        files = {f"{name}.ipynb": SOURCE.sub(rf"]({COPIED}/\1\2)", text) for name, text in stored.items()}
        files |= {f"{COPIED}/{path}": (PACKAGE.parent / path).read_text(encoding="utf-8") for path in sources}
    if folder.is_file():
        raise Failure(f"{folder}: is a file; give the name of a folder")
    there = [name for name in files if (folder / name).exists()]
    if there and not force:
        raise Failure(f"{folder / there[0]} exists; --force overwrites it, and what you changed in it")
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    first = folder / "index.html" if html else folder
    write(f"{folder}: {len(stored)} notebooks{' as pages' if html else ''}\n")
    if html or no_open:
        write(f"open {first} in a browser\n" if html else "")
    elif importlib.util.find_spec("jupyterlab") is None:
        write("VS Code opens them, or JupyterLab: pip install jupyterlab\n")
    else:
        os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", str(folder)])
