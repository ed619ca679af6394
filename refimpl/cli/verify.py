"""verify."""

import json
from typing import Annotated

import typer

from refimpl.cli.app import Json, ModelPath, Positional, Threads, app, bar, errors, fetched, write


@app.command()
def verify(
    positional: Positional = None, model: ModelPath = None,
    sha256: Annotated[list[str] | None, typer.Option("--sha256", show_default=False, help="expected SHA-256 of the file, hexadecimal; for "
                                                     "a split model once for each part")] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="also compute with it, on every instruction set of this machine")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="unknown metadata keys are an error")] = False,
    threads: Threads = None, as_json: Json = False,
):
    """Check a file, and this machine's arithmetic. Without -m: with the built-in model."""
    from refimpl.cli.show.verify import as_text
    from refimpl.files.verify import verify as check

    for digest in sha256 or ():
        if len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef"):
            raise typer.BadParameter(f"--sha256 {digest}: expected 64 hexadecimal digits")
    path = fetched(model, positional)
    result = check(path, sha256=sha256 or (), strict=strict, run=run, threads=threads, progress=bar, notify=errors.print)
    write((json.dumps(result) if as_json else as_text(result)) + "\n")
    if not result["ok"]:
        raise typer.Exit(1)
