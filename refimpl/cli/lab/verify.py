"""verify."""

import json
from collections.abc import Mapping
from typing import Annotated

import typer

from refimpl.cli.app import Json, ModelPath, Positional, Threads, app, bar, errors, fetched, named, write


@app.command()
def verify(
    positional: Positional = None, model: ModelPath = None,
    sha256: Annotated[list[str] | None, typer.Option("--sha256", show_default=False, help="expected SHA-256 of the file, hexadecimal; for "
                                                     "a split model once for each part")] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="also compute with it, on every instruction set of this machine")] = True,
    server: Annotated[str | None, typer.Option("--server", metavar="URL", show_default=False, help="check a running server instead: is an "
                                               "answer the same alone, beside others and again? Any with OpenAI's API; -m is then what "
                                               "it calls the model, where it asks for that")] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="REFIMPL_API_KEY", show_default=False, help="the server's")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="unknown metadata keys are an error")] = False,
    threads: Threads = None, as_json: Json = False,
):
    """Check a file, and this machine's arithmetic. Without -m: with the built-in model."""
    from refimpl.cli.show.verify import as_text
    from refimpl.files.verify import verify as check

    if server is not None:
        if given := [name for name, value in (("--sha256", sha256), ("--no-run", not run), ("--strict", strict), ("--threads", threads))
                     if value]:
            raise typer.BadParameter(f"{given[0]} is about a file, and cannot be had with --server")
        _verify_server(server, named(model, positional), api_key, as_json)
        return
    for digest in sha256 or ():
        if len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef"):
            raise typer.BadParameter(f"--sha256 {digest}: expected 64 hexadecimal digits")
    path = fetched(model, positional)
    result = check(path, sha256=sha256 or (), strict=strict, run=run, threads=threads, progress=bar, notify=errors.print)
    write((json.dumps(result) if as_json else as_text(result)) + "\n")
    if not result["ok"]:
        raise typer.Exit(1)


def _verify_server(url: str, model: str | None, api_key: str | None, as_json: bool):
    from refimpl.serve.check import check_server

    result = check_server(url, model=model, api_key=api_key, progress=bar)
    write((json.dumps(result) if as_json else _about_server(result)) + "\n")
    if not result["ok"]:
        raise typer.Exit(1)


def _about_server(result: Mapping) -> str:
    if result["ok"]:
        return (f"the same: {result['questions']} answers of {result['url']}, texts and probabilities, alone, again, and beside "
                f"{2 * result['questions'] - 1} others")
    way = "; ".join(f"{way}: {len(questions)} of {result['questions']} differ" for way, questions in result["differ"].items())
    texts = [result["first"][key].get("text") for key in ("at first", "then")]
    return f"not the same: {result['url']}: {way}; question {result['first']['question']}: {texts[0]!r} and then {texts[1]!r}"
