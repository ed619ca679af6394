"""judge: any engine, over HTTP."""

import json
from typing import Annotated

import typer

from refimpl.cli.app import MODEL, Json, Threads, announce_compiling, app, bar, errors, fetched, write
from refimpl.cli.lab.compare import exits_3
from refimpl.cli.lab.evaluate import Cluster, Jobs, check_workers

Key = Annotated[str | None, typer.Option("--api-key", envvar="REFIMPL_API_KEY", show_default=False, help="the endpoint's")]


@app.command()
def judge(
    url: Annotated[str, typer.Argument(metavar="URL", help="the endpoint: http://127.0.0.1:8080, with or without /v1")],
    file: Annotated[str | None, typer.Option("-m", "--file", show_default=False, help="the model that it has. " + MODEL)] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", show_default=False, help="what the endpoint calls the model "
                                              "(default: the first that it lists)")] = None,
    arithmetic: Annotated[str | None, typer.Option("--arithmetic", show_default=False, help="what it computes in: q8 (8-bit activations, "
                                                   "as llama.cpp does), float32, bfloat16, float16 (default: q8 for engines of GGUF "
                                                   "files, else bfloat16)")] = None,
    kv: Annotated[str, typer.Option("--kv", help="what it keeps keys and values in: f16, q8_0, q4_0")] = "f16",
    ask: Annotated[str | None, typer.Option("--ask", show_default=False, help="only these questions, with commas between them (default: "
                                            "template,ids,probabilities,chat,window,again,company,picture,sampling)")] = None,
    long: Annotated[bool, typer.Option("--long", help="also a text of 33,000 tokens, where model and endpoint have room for it")] = False,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, max=86400, help="seconds for one answer")] = 300,
    mmproj: Annotated[str | None, typer.Option("--mmproj", "-mm", metavar="FILE", show_default=False, help="send pictures too; the "
                                              "projector that the endpoint has: GGUF file, directory or hf:..., or built-in")] = None,
    jobs: Jobs = 1, cluster: Cluster = "local", api_key: Key = None, threads: Threads = None, as_json: Json = False,
):
    """Judge any engine over HTTP.

    Are its template, token ids and probabilities those of this file?

    Exit status 0: nothing departs; 1: something does; 3: could not be judged. How: refimpl/lab/judge/README.md.
    """
    from refimpl.cli.show.judge import as_text
    from refimpl.lab.compare import tolerance
    from refimpl.lab.evaluate.work import Workers
    from refimpl.lab.judge.http import Http
    from refimpl.lab.judge.judge import QUESTIONS, collect
    from refimpl.lab.judge.judge import judge as judged
    from refimpl.lab.judge.work import team
    from refimpl.lab.judge.yardstick import ARITHMETICS, KV_TYPES
    from refimpl.loading.projector import load_projector

    questions = QUESTIONS if ask is None else tuple(word.strip() for word in ask.split(","))
    for option, value, known in [("--ask", word, QUESTIONS) for word in questions] + [("--kv", kv, KV_TYPES)] \
            + ([] if arithmetic is None else [("--arithmetic", arithmetic, ARITHMETICS)]):
        if value not in known:
            raise typer.BadParameter(f"{option} {value}: choose from {', '.join(known)}")
    check_workers(cluster, jobs)
    try:
        http = Http(url, api_key, timeout)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with exits_3(as_json):
        announce_compiling()
        m = tolerance.judge(fetched(file), threads=threads, progress=bar)
        for note in (*m.notes, *m.tokenizer.warnings):
            errors.print(f"note: {note}")
        projector = None if mmproj is None else load_projector(mmproj, m, progress=bar)
        with team(Workers(cluster, jobs, threads), file) as compute:
            end, found = collect(http, m, name=model, questions=questions, long=long, projector=projector, progress=bar)
            result = judged(end, found, m, arithmetic=arithmetic, kv_type=kv, questions=questions, compute=compute, progress=bar)
    write((json.dumps(result.figures()) if as_json else as_text(result)) + "\n")
    if result.status:
        raise typer.Exit(result.status)
