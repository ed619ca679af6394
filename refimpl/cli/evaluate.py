"""eval."""

import json
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.app import (
    Arithmetic,
    Force,
    Json,
    ModelPath,
    Positional,
    Threads,
    app,
    bar,
    errors,
    fetched,
    refuse_overwriting,
    tell_of_compiling,
    write,
)


@app.command("eval")
def evaluate(
    positional: Positional = None, model: ModelPath = None,
    file: Annotated[list[Path] | None, typer.Option("-f", "--file", show_default=False, help="text to score, a document; can be given "
                                                    "several times; of a .jsonl every line is one")] = None,
    against: Annotated[str | None, typer.Option("--against", show_default=False, help="compare with another engine (llama.cpp, reference, "
                                                "kernels:exact) on the same file, or with another file on the same engine")] = None,
    base: Annotated[Path | None, typer.Option("--base", show_default=False, help="compare with a run kept by -o, on its text")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", show_default=False, help="keep the run, to compare with; after an "
                                                "interruption it is continued")] = None,
    ctx: Annotated[int, typer.Option("-c", "--ctx-size", min=2, help="tokens of a window")] = 512,
    stride: Annotated[int | None, typer.Option("--stride", min=1, show_default=False, help="tokens from one window to the next (default: "
                                               "half a window)")] = None,
    count: Annotated[str, typer.Option("--count", help="every: each token once; second-half: as llama.cpp's perplexity counts")] = "every",
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, show_default=False, help="only so many windows")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template: the text as it is")] = False,
    n_top: Annotated[int, typer.Option("--keep-top", min=10, help="with -o: most probable tokens to keep of every position")] = 256,
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, help="processes, each with the model; the numbers stay the same")] = 1,
    threads: Threads = None,
    backend: Annotated[str, typer.Option("--backend", help="kernels, reference, or llama.cpp in a process of its own")] = "kernels",
    arithmetic: Arithmetic = None, force: Force = False, as_json: Json = False,
):
    """Measure perplexity, and KL divergence from another engine. On a text; the other may be a file or an earlier run, too."""
    from refimpl.cli.show.evaluate import as_text
    from refimpl.lab.evaluate.evaluate import evaluate as measure
    from refimpl.lab.evaluate.logit_sources import other_side, side_of
    from refimpl.lab.evaluate.windows import COUNTS

    if bool(file) == (base is not None):
        raise typer.BadParameter("give the text with -f FILE, or a run that has its own with --base RUN")
    if against is not None and base is not None:
        raise typer.BadParameter("--against and --base: compare with one of them")
    if count not in COUNTS:
        raise typer.BadParameter(f"--count {count}: expected {' or '.join(COUNTS)}")
    if stride is not None and (stride > ctx or count == "second-half"):
        raise typer.BadParameter("--stride is at most a window, and not for --count second-half, whose windows lie side by side")
    if base is not None and (raw or stride is not None):
        raise typer.BadParameter("--base has its own windows: no --raw, --stride")
    if output is not None:
        refuse_overwriting(output, force)
    tell_of_compiling()
    side = side_of(backend, arithmetic, fetched(model, positional))
    result = measure(side, file or (), against=None if against is None else other_side(against, side), base=base, output=output, n_ctx=ctx,
                     stride=stride, count=count, raw=raw, n_top=n_top, n_windows=chunks, jobs=jobs, threads=threads, progress=bar)
    for note in result["notes"]:
        errors.print(f"note: {note}")
    write((json.dumps(result) if as_json else as_text(result)) + "\n")
