"""Commands about files: inspect and synth."""

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.app import (
    Context,
    Json,
    ModelPath,
    Seed,
    app,
    bar,
    write,
)


@app.command()
def inspect(
    model: ModelPath = None,
    ctx: Context = None,
    grid: Annotated[bool, typer.Option("--grid", help="of float weights instead: do they lie on the Q4_0 grid, and what would the usual "
                                       "conversion lose?")] = False,
    as_json: Json = False,
):
    """Show what is in a file: metadata, layers, tensor types and sizes, and the memory it will need."""
    if grid:
        from refimpl.lab.grid import as_text, describe_grid

        if ctx is not None or model is None:
            raise typer.BadParameter("--grid wants a file of float weights (-m), and no -c")
        with contextlib.ExitStack() as stack:
            described = describe_grid(model, lambda total: stack.enter_context(bar("tensors", total)))
    else:
        from refimpl.lab.inspect import as_text, describe

        described = describe(model, ctx)
    write((json.dumps(described) if as_json else as_text(described)) + "\n")


@app.command()
def synth(
    shape: Annotated[str, typer.Argument(help="E2B, E4B, 12B, 26B-A4B, 31B, or one of them with -assistant: its drafter")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the file to write")],
    recipe: Annotated[str, typer.Option("--recipe", help="google-q4_0, unsloth-q4_0 or q4_k_m")] = "google-q4_0",
    layers: Annotated[int | None, typer.Option("--layers", min=2, help="only so many layers", show_default=False)] = None,
    seed: Seed = 0,
):
    """Write a file of a true shape with random contents, to measure speed and memory with."""
    from refimpl.lab.synth import synthesise

    with contextlib.ExitStack() as stack:
        synthesise(shape, output, recipe, layers, seed, begin=lambda total: stack.enter_context(bar("MB written", total, 10**6)))
