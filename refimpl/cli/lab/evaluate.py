"""eval and sweep."""

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
    named,
    refuse_overwriting,
    write,
)

Cluster = Annotated[str, typer.Option("--cluster", metavar="local|ADDRESS", help="who measures: processes of this machine (-j), or the "
                                      "workers of the Dask scheduler at an address; same results")]
Jobs = Annotated[int, typer.Option("-j", "--jobs", min=1, help="processes of this machine, each with its own model; same results")]
Window = Annotated[int, typer.Option("-c", "--ctx-size", min=2, help="tokens in a window")]
Stride = Annotated[int | None, typer.Option("--stride", min=1, show_default=False, help="tokens from one window to the next (default: half "
                                            "a window)")]
Count = Annotated[str, typer.Option("--count", help="tokens to score: every, once; second-half of windows, as llama.cpp")]
Chunks = Annotated[int | None, typer.Option("--chunks", min=1, show_default=False, help="only this many windows")]
Raw = Annotated[bool, typer.Option("--raw", help="no chat template: the plain text")]


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
    ctx: Window = 512, stride: Stride = None, count: Count = "every", chunks: Chunks = None, raw: Raw = False,
    n_top: Annotated[int, typer.Option("--keep-top", min=10, help="with -o: most probable tokens to save for every position")] = 256,
    jobs: Jobs = 1, cluster: Cluster = "local", threads: Threads = None,
    backend: Annotated[str, typer.Option("--backend", help="kernels, reference, or llama.cpp in a separate process")] = "kernels",
    arithmetic: Arithmetic = None, force: Force = False, as_json: Json = False,
):
    """Measure perplexity, and KL divergence. The divergence from another engine, file or earlier run."""
    from refimpl.cli.show.evaluate import as_text
    from refimpl.lab.evaluate.evaluate import evaluate as measure
    from refimpl.lab.evaluate.logit_sources import other_side, side_of

    if bool(file) == (base is not None):
        raise typer.BadParameter("give the text with -f FILE, or a saved run, which contains one, with --base RUN")
    if against is not None and base is not None:
        raise typer.BadParameter("--against and --base: give one of them")
    _check_windows(ctx, stride, count)
    check_workers(cluster, jobs)
    if base is not None and (raw or stride is not None):
        raise typer.BadParameter("--base sets the windows: no --raw, --stride")
    if output is not None:
        refuse_overwriting(output, force)
    announce_compiling()
    side = side_of(backend, arithmetic, named(model, positional))
    result = measure(side, file or (), against=None if against is None else other_side(against, side), base=base, output=output, n_ctx=ctx,
                     stride=stride, count=count, raw=raw, n_top=n_top, n_windows=chunks, jobs=jobs,
                     threads=threads, cluster=cluster, progress=bar)
    for note in result["notes"]:
        errors.print(f"note: {note}")
    write((json.dumps(result) if as_json else as_text(result)) + "\n")


@app.command()
def sweep(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", show_default=False, help="GGUF files, Hugging Face "
                                                       "directories, hf:owner/name (default: the built-in model)")] = None,
    file: Annotated[list[Path] | None, typer.Option("-f", "--file", "--text", show_default=False, help="text to score; repeat for several, "
                                                    "each is a row")] = None,
    types: Annotated[str | None, typer.Option("--types", show_default=False, help="convert the models first and measure these: "
                                              "q4_0,q4_k,... or all")] = None,
    engines: Annotated[str, typer.Option("--engines", help="kernels, kernels:exact, reference, llama.cpp, ... with commas")] = "kernels",
    against: Annotated[str | None, typer.Option("--against", show_default=False, help="compare with this file, in float32, or with another "
                                                "engine on the same file (default with --types: what they were made from)")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", show_default=False, help="write the table to a Parquet file; an "
                                                "interrupted sweep is resumed")] = None,
    ctx: Window = 512, stride: Stride = None, count: Count = "every", chunks: Chunks = None, raw: Raw = False,
    jobs: Jobs = 1, cluster: Cluster = "local", threads: Threads = None, force: Force = False, as_json: Json = False,
):
    """Measure models x engines x texts into one table. Perplexity, KL divergence, bits a weight, speed."""
    from refimpl.cli.show.evaluate import as_table
    from refimpl.files.convert import output_types
    from refimpl.lab.evaluate.evaluation import Cutting
    from refimpl.lab.evaluate.sweep import Sweep
    from refimpl.lab.evaluate.sweep import sweep as measure
    from refimpl.lab.evaluate.work import Workers

    if not file:
        raise typer.BadParameter("give the text with -f FILE")
    _check_windows(ctx, stride, count)
    check_workers(cluster, jobs)
    if output is not None:
        refuse_overwriting(output, force)
    kinds = [kind for kind in output_types() if kind != "auto"] if types == "all" else _words(types)
    plan = Sweep(models or [None], file, [kind if kind == "auto" else kind.upper() for kind in kinds], _words(engines), against,
                 Cutting(ctx, stride, count, raw, chunks))
    announce_compiling()
    result = measure(plan, output, Workers(cluster, jobs, threads), bar)
    for note in result["notes"]:
        errors.print(f"note: {note}")
    write((json.dumps(result) if as_json else as_table(result)) + "\n")
    for line in result["errors"]:
        errors.print(f"refimpl: {line}")
    raise typer.Exit(1 if result["errors"] else 0)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _check_windows(ctx: int, stride: int | None, count: str):
    from refimpl.lab.evaluate.windows import COUNTS

    if count not in COUNTS:
        raise typer.BadParameter(f"--count {count}: expected {' or '.join(COUNTS)}")
    if stride is not None and (stride > ctx or count == "second-half"):
        raise typer.BadParameter("--stride is at most --ctx-size, and not for --count second-half, whose windows do not overlap")


def check_workers(cluster: str, jobs: int):
    """Raises BadParameter for both."""
    if cluster != "local" and jobs > 1:
        raise typer.BadParameter("--jobs is for --cluster local; a scheduler has as many workers as were started")
