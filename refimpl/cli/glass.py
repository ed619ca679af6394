"""glass."""

from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.app import (
    Arithmetic,
    CacheDisk,
    Context,
    Draft,
    DraftHead,
    DraftMax,
    Failure,
    Force,
    MinP,
    ModelPath,
    NewTokens,
    Positional,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
    Verbose,
    app,
    bar,
    drafting_of,
    errors,
    fetched,
    load,
    refuse_overwriting,
    replacing,
)
from refimpl.cli.run import read_prompt, refuse_without_template
from refimpl.cli.serve import serve

NEW = 128               # tokens, where nothing else is said


@app.command()
def glass(
    positional: Positional = None,
    model: ModelPath = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="text to continue, for a page with a recorded run; - reads standard "
                                               "input")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="read the prompt from a file")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="PAGE", help="the page to write, one HTML file")] = None,
    predict: NewTokens = NEW,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is a message: apply the file's chat template")] = False,
    think: Annotated[bool, typer.Option("--think", help="with --chat: let the model think first")] = False,
    ctx: Context = None, temp: Temperature = None, top_k: TopK = None, top_p: TopP = None, min_p: MinP = None, seed: Seed = 0,
    draft: Draft = None, draft_max: DraftMax = "auto", draft_head: DraftHead = None,
    port: Annotated[int | None, typer.Option("--port", min=0, max=65535, show_default=False, help="without -o: where the page is served "
                                             "(default: 8080)")] = None,
    threads: Threads = None, arithmetic: Arithmetic = None, cache_disk: CacheDisk = "50G", force: Force = False, verbose: Verbose = False,
):
    """See how each token comes about, in a browser.

    With -p TEXT -o PAGE: runs the model once and writes one HTML file with the run in it, which needs no server and loads nothing. Without
    them: serves the page, as refimpl serve does.
    """
    if prompt is None and file is None and output is None:
        if chat or think or force or seed or predict != NEW or any(value is not None for value in (temp, top_k, top_p, min_p)):
            raise typer.BadParameter("settings of a text are for a recorded run, -p TEXT -o PAGE; the page that is served has its own")
        serve(positional, model, port=8080 if port is None else port, ctx=ctx, draft=draft, draft_max=draft_max, draft_head=draft_head,
              threads=threads, arithmetic=arithmetic, cache_disk=cache_disk, verbose=verbose)
        return
    if output is None or (prompt is None) == (file is None):
        raise typer.BadParameter("a recorded run needs a text, -p TEXT or -f FILE, and a page to write, -o PAGE")
    if port is not None:
        raise typer.BadParameter("--port is for the page that is served; -o PAGE writes a file")
    if think and not chat:
        raise typer.BadParameter("--think needs --chat")
    from refimpl.decode.sampling import Sampling

    refuse_overwriting(output, force)
    text = read_prompt(prompt, file)
    path = fetched(model, positional)
    room = ctx if ctx is not None else len(text.encode()) + max(0, predict) + 256
    m = load(path, "kernels", arithmetic, threads, room, verbose, cache_disk)
    if chat:
        refuse_without_template(m)
    drafting = drafting_of(m, path, draft, draft_max, 0.0, draft_head)
    sampling = Sampling.from_metadata(m.file.metadata, temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    page = recorded(m, text, chat, think, sampling, predict, n_ctx=ctx, **drafting)
    with replacing(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    errors.print(f"{output}: {len(page) / 1e6:.2f} MB; open it in any browser")


def recorded(m, text: str, chat: bool, think: bool, sampling, n_new: int, **options: object) -> str:
    """The page of a run that is made now, of at most `n_new` tokens (-1: until it ends). `options` as in `write`."""
    from refimpl.lab.glass.record import most_tokens
    from refimpl.lab.glass.written import write
    from refimpl.serve.page.files import in_one_file
    from refimpl.text.prompt import encode_messages

    template = m.file.metadata.get("tokenizer.chat_template")
    said = encode_messages(m.tokenizer, template, [{"role": "user", "content": text}], thinking=think) if chat else m.encoded(text)
    room = min(most_tokens(m), m.config.n_ctx - 1) - len(said.ids)
    if room < 1:
        raise Failure(f"the prompt has {len(said.ids)} tokens; of this model texts of less than {room + len(said.ids)} can be looked at")
    if not 0 <= n_new <= room:
        errors.print(f"note: at most {room} new tokens, so that the text can be looked at")
        n_new = room
    with bar("tokens", n_new) as advance:
        record = write(m, said, sampling, n_new, advance=advance, **options)
    return in_one_file(record, f"{m.name}: {' '.join(text.split())[:60]}")
