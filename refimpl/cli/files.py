"""Commands on files: inspect, convert and synth."""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.app import (
    Context,
    Force,
    Json,
    ModelPath,
    Positional,
    Seed,
    app,
    bar,
    fetched,
    refuse_overwriting,
    write,
)


@app.command()
def inspect(
    positional: Positional = None,
    model: ModelPath = None,
    ctx: Context = None,
    everything: Annotated[bool, typer.Option("--all", help="show all metadata keys")] = False,
    grid: Annotated[bool, typer.Option("--grid", help="instead, for float weights: are they on a Q4_0 quantization grid, and what would "
                                       "the usual conversion lose?")] = False,
    as_json: Json = False,
):
    """Show what is in a file, and whether it fits this machine."""
    path = fetched(model, positional)
    if grid:
        from refimpl.cli.show.inspect import grid_text
        from refimpl.files.qat_grid import describe_grid

        if ctx is not None or path is None:
            raise typer.BadParameter("--grid needs a file of float weights (-m), and takes no -c")
        described = describe_grid(path, bar)
        text = grid_text(described)
    else:
        from refimpl.cli.show.inspect import as_text
        from refimpl.files.inspect import describe

        described = describe(path, ctx)
        text = as_text(described, everything)
    write((json.dumps(described) if as_json else text) + "\n")


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="a Hugging Face directory, a GGUF file (the first part of a split one), or hf:owner/name")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the GGUF file to write")],
    kind: Annotated[str, typer.Option("--type", help="auto: types unchanged, W4A16 as Q4_0; or F32, F16, BF16, Q8_0, Q4_0, Q4_K, ... "
                                      "(norms and router stay F32; embeddings are Q6_K for types smaller than Q8_0)")] = "auto",
    mmproj: Annotated[bool, typer.Option("--mmproj", help="write the part that sees and hears, a projector, instead of the "
                                          "text model")] = False,
    force: Force = False, as_json: Json = False,
):
    """Write a GGUF file, from a Hugging Face directory or a GGUF."""
    from refimpl.cli.show.table import size
    from refimpl.files.convert import convert as run

    refuse_overwriting(output, force)
    source = fetched(model)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # like Ctrl-C: the incomplete file is removed
    try:
        done = run(source, output, kind if kind == "auto" else kind.upper(), bar, mmproj)
    finally:
        signal.signal(signal.SIGTERM, before)
    types = ", ".join(f"{n} {block}" for block, n in done["types"].items())
    write((json.dumps(done) if as_json else f"{done['output']}: {size(done['bytes'])}, tensors: {types}") + "\n")


@app.command()
def synth(
    shape: Annotated[str, typer.Argument(help="E2B, E4B, 12B, 26B-A4B, 31B, or one of them with -assistant: its drafter; "
                                         "-mmproj: its projector")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the file to write")],
    recipe: Annotated[str, typer.Option("--recipe", help="google-q4_0, unsloth-q4_0, q4_k_m, or a single type: q2_k, q3_k, iq4_nl, "
                                                         "iq4_xs, mxfp4; of projectors also bf16, f16, f32, q8_0")] = "google-q4_0",
    layers: Annotated[int | None, typer.Option("--layers", min=2, help="only this many layers", show_default=False)] = None,
    seed: Seed = 0, force: Force = False,
):
    """Write a file of a model's shape with random weights. For measuring speed and memory."""
    from refimpl.cli.show.table import size
    from refimpl.files.synth import synthesise

    refuse_overwriting(output, force)
    synthesise(shape, output, recipe, layers, seed, progress=bar)
    write(f"{output}: {size(output.stat().st_size)}, random weights in the shape of {shape}\n")
