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
    announce_compiling,
    app,
    bar,
    errors,
    fetched,
    refuse_overwriting,
    write,
)


@app.command("eval")
def evaluate(
    positional: Positional = None, model: ModelPath = None,
    file: Annotated[list[Path] | None, typer.Option("-f", "--file", show_default=False, help="text to score; repeat for several documents; "
                                                    "in a .jsonl file every line is one")] = None,
    against: Annotated[str | None, typer.Option("--against", show_default=False, help="compare with another engine (llama.cpp, reference, "
                                                "kernels:exact) on the same file, or with another file on the same engine")] = None,
    base: Annotated[Path | None, typer.Option("--base", show_default=False, help="compare with a run saved by -o, on its text")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", show_default=False, help="save the run, for --base; an interrupted run "
                                                "is resumed")] = None,
    ctx: Annotated[int, typer.Option("-c", "--ctx-size", min=2, help="tokens in a window")] = 512,
    stride: Annotated[int | None, typer.Option("--stride", min=1, show_default=False, help="tokens from one window to the next (default: "
                                               "half a window)")] = None,
    count: Annotated[str, typer.Option("--count", help="tokens to score: every, once; second-half of windows, as llama.cpp")] = "every",
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, show_default=False, help="only this many windows")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template: the plain text")] = False,
    n_top: Annotated[int, typer.Option("--keep-top", min=10, help="with -o: most probable tokens to save for every position")] = 256,
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, help="processes, each with its own model; same results")] = 1,
    threads: Threads = None,
    backend: Annotated[str, typer.Option("--backend", help="kernels, reference, or llama.cpp in a separate process")] = "kernels",
    arithmetic: Arithmetic = None, force: Force = False, as_json: Json = False,
):
    """Measure perplexity, and KL divergence. The divergence from another engine, file or earlier run."""
    from refimpl.cli.show.evaluate import as_text
    from refimpl.lab.evaluate.evaluate import evaluate as measure
    from refimpl.lab.evaluate.logit_sources import other_side, side_of
    from refimpl.lab.evaluate.windows import COUNTS

    if bool(file) == (base is not None):
        raise typer.BadParameter("give the text with -f FILE, or a saved run, which contains one, with --base RUN")
    if against is not None and base is not None:
        raise typer.BadParameter("--against and --base: give one of them")
    if count not in COUNTS:
        raise typer.BadParameter(f"--count {count}: expected {' or '.join(COUNTS)}")
    if stride is not None and (stride > ctx or count == "second-half"):
        raise typer.BadParameter("--stride is at most --ctx-size, and not for --count second-half, whose windows do not overlap")
    if base is not None and (raw or stride is not None):
        raise typer.BadParameter("--base sets the windows: no --raw, --stride")
    if output is not None:
        refuse_overwriting(output, force)
    announce_compiling()
    side = side_of(backend, arithmetic, fetched(model, positional))
    result = measure(side, file or (), against=None if against is None else other_side(against, side), base=base, output=output, n_ctx=ctx,
                     stride=stride, count=count, raw=raw, n_top=n_top, n_windows=chunks, jobs=jobs, threads=threads, progress=bar)
    for note in result["notes"]:
        errors.print(f"note: {note}")
    write((json.dumps(result) if as_json else as_text(result)) + "\n")
