"""bench."""

import json
from typing import Annotated

import typer

from refimpl.cli.app import (
    Arithmetic,
    BackendName,
    DraftHead,
    DraftMinP,
    Failure,
    Json,
    ModelPath,
    Positional,
    Threads,
    announce_compiling,
    app,
    bar,
    chances_argument,
    errors,
    fetched,
    number_or_word,
    write,
)


@app.command()
def bench(
    positional: Positional = None, model: ModelPath = None,
    n_prompt: Annotated[int, typer.Option("-p", "--n-prompt", min=0, help="tokens of the prompt; 0 skips this test")] = 512,
    n_new: Annotated[int, typer.Option("-n", "--n-gen", min=0, help="new tokens; 0 skips this test")] = 64,
    depth: Annotated[int, typer.Option("-d", "--n-depth", min=0, help="tokens of context before the new ones")] = 0,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="runs of each test")] = 5,
    threads: Threads = None,
    versus: Annotated[str | None, typer.Option("--vs", help="llama.cpp: measure it in turn, on the same file and ids")] = None,
    draft: Annotated[str | None, typer.Option("--draft", show_default=False, help="measure new tokens with and without this drafter; "
                                              "built-in: the built-in model's")] = None,
    draft_max: Annotated[str, typer.Option("--draft-max", help="with --draft: draft tokens per step; to compare: auto,1,2")] = "auto",
    draft_min_p: DraftMinP = 0.0, draft_head: DraftHead = None,
    accept: Annotated[str | None, typer.Option("--accept", show_default=False, help="with --draft: a SIMULATION with the chances that the "
                                               "first draft token, the first two, ... are accepted: .84,.60,.39")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", show_default=False, help="with --draft: the text to continue")] = None,
    temp: Annotated[float, typer.Option("--temp", min=0.0, help="with --draft: temperature")] = 0.0,
    kernels: Annotated[bool, typer.Option("--kernels", help="measure matrix products of each weight type instead, without a model, on one "
                                          "thread and on all")] = False,
    types: Annotated[str | None, typer.Option("--types", show_default=False, help="with --kernels: only these types: Q4_0,Q4_K")] = None,
    rows: Annotated[str | None, typer.Option("--rows", show_default=False, help="with --kernels: rows of activations (default: "
                                             "1,4,5,32,512)")] = None,
    server: Annotated[list[str] | None, typer.Option("--server", show_default=False, help="measure this running server instead (OpenAI's "
                                                     "API); given several times: they take turns")] = None,
    streams: Annotated[str, typer.Option("--streams", help="with --server: answers at a time")] = "1,4",
    backend: BackendName = "kernels", arithmetic: Arithmetic = None, as_json: Json = False,
):
    """Measure the speed of a prompt and of new tokens. Also in percent of the memory bandwidth; with --draft, the speed-up by drafting;
    with --kernels, of matrix products alone; with --server, of servers.
    """
    from refimpl.cli.chosen import chosen
    from refimpl.cli.show.bench import as_text, draft_text
    from refimpl.lab.bench.bench import Plan
    from refimpl.lab.bench.bench import bench as measure
    from refimpl.lab.engines import TIMED

    if versus is not None and versus not in TIMED:
        raise typer.BadParameter(f"--vs: unknown engine {versus!r}; choose from {', '.join(TIMED)}")
    if not n_prompt and not n_new:
        raise typer.BadParameter("-p and -n are both 0: nothing to measure")
    if draft is not None and (versus is not None or not n_new):
        raise typer.BadParameter("--draft measures new tokens of refimpl alone: no --vs, and -n of at least 1")
    if draft is None and (accept is not None or prompt is not None):
        raise typer.BadParameter("--accept and --prompt need --draft")
    if not kernels and (types is not None or rows is not None):
        raise typer.BadParameter("--types and --rows need --kernels")
    if kernels and any(option is not None for option in (model, positional, versus, draft)):
        raise typer.BadParameter("--kernels measures products without a model: no -m, --vs or --draft")
    if server and (kernels or any(option is not None for option in (model, positional, versus, draft))):
        raise typer.BadParameter("--server measures what runs there: no -m, --vs, --draft or --kernels")
    if kernels:
        _bench_kernels(types, rows, threads, repetitions, as_json)
        return
    if server:
        _bench_servers(server, streams, n_prompt, n_new, repetitions, as_json)
        return
    model = fetched(model, positional)
    announce_compiling()
    if draft is not None:
        from refimpl.lab.bench.draft_bench import draft_bench

        lengths = [number_or_word(word) for word in draft_max.split(",")]
        result = draft_bench(
            model, draft, Plan(0, n_new, depth, repetitions), lengths, chances=chances_argument(accept),
            min_p=draft_min_p, head=number_or_word(draft_head), temperature=temp, prompt=prompt, threads=threads, backend=backend,
            arithmetic=arithmetic, progress=bar)
        write((json.dumps(result) if as_json else draft_text(result)) + "\n")
        return
    result = measure(model, Plan(n_prompt, n_new, depth, repetitions), threads=threads, backend=backend, arithmetic=arithmetic,
                     opponent=versus, progress=bar, loaded=lambda m: errors.print(chosen(m, threads)) if backend == "kernels" else None)
    for note in result["notes"]:
        errors.print(f"note: {note}")
    write((json.dumps(result) if as_json else as_text(result)) + "\n")


def _bench_kernels(types: str | None, rows: str | None, threads: int | None, repetitions: int, as_json: bool):
    from refimpl.cli.show.bench import kernels_text
    from refimpl.lab.bench.kernels_bench import measure_kernels

    chosen = {} if types is None else {"types": types.split(",")}
    chosen |= {} if rows is None else {"rows": _numbers("--rows", rows)}
    announce_compiling()
    result = measure_kernels(**chosen, threads=threads, repetitions=repetitions, progress=bar)
    write((json.dumps(result) if as_json else kernels_text(result)) + "\n")


def _bench_servers(urls: list[str], streams: str, n_prompt: int, n_new: int, repetitions: int, as_json: bool):
    from refimpl.cli.show.bench import servers_text
    from refimpl.lab.bench.servers_bench import Plan, servers_bench

    numbers = _numbers("--streams", streams)
    if not n_prompt or n_new < 2 or min(numbers) < 1:
        raise typer.BadParameter("--server: -p and --streams of at least 1, -n of at least 2")
    plan = Plan(tuple(numbers), n_prompt, n_new, repetitions)
    result = servers_bench(urls, plan, progress=bar)
    write((json.dumps(result) if as_json else servers_text(result)) + "\n")


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise Failure(f"{option} {text}: expected numbers with commas between them, 1,512") from None
