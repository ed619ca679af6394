"""generate."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.app import (
    Arithmetic,
    BackendName,
    CacheDisk,
    Context,
    Draft,
    DraftHead,
    DraftMax,
    DraftMinP,
    Failure,
    Json,
    Lock,
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
    named,
    write,
)
from refimpl.cli.senses import (
    Images,
    ImageTokens,
    Mmproj,
    MmprojQ8,
    Sounds,
    Videos,
    n_tokens_of,
    opened,
    projector_of,
    refuse_useless_q8,
)
from refimpl.media.patches import TOKENS
from refimpl.text.prompt import Encoded, encode_messages, encode_prompt


@app.command()
def generate(
    positional: Positional = None,
    model: ModelPath = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="text to continue; - reads standard input")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="read the prompt from a file")] = None,
    predict: NewTokens = 128,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is a message: apply the file's chat template")] = False,
    think: Annotated[bool, typer.Option("--think", help="with --chat: let the model think first")] = False,
    special: Annotated[bool, typer.Option("--special", help="parse special tokens in the prompt, and show them in the text")] = False,
    mmproj: Mmproj = None, mmproj_q8: MmprojQ8 = False, image: Images = None, audio: Sounds = None, video: Videos = None,
    image_tokens: ImageTokens = TOKENS,
    ctx: Context = None, temp: Temperature = None, top_k: TopK = None, top_p: TopP = None, min_p: MinP = None, seed: Seed = 0,
    draft: Draft = None, draft_max: DraftMax = "auto", draft_min_p: DraftMinP = 0.0, draft_head: DraftHead = None,
    threads: Threads = None, backend: BackendName = "kernels", arithmetic: Arithmetic = None,
    cache_disk: CacheDisk = "50G", lock: Lock = False, as_json: Json = False, verbose: Verbose = False,
):
    """Continue a prompt."""

    if (prompt is None) == (file is None):
        raise typer.BadParameter("give the text with -p TEXT, -p - or -f FILE")
    if think and not chat:
        raise typer.BadParameter("--think needs --chat")
    text = read_prompt(prompt, file)
    if mmproj_q8 and not (image or audio or video):
        raise typer.BadParameter("--mmproj-q8 needs --image, --audio or --video: without them no projector is loaded")
    asked = named(model, positional)
    refuse_useless_q8(mmproj_q8, mmproj, asked, needed=True)
    seen, model = opened(image, audio, video, image_tokens), fetched(model, positional)
    # a token has a byte or more, 256 for a template
    room = ctx if ctx is not None else len(text.encode()) + max(0, predict) + 256 + n_tokens_of(seen)
    m = load(model, backend, arithmetic, threads, room, verbose, cache_disk, lock)
    if chat:
        refuse_without_template(m)
    drafting = drafting_of(m, model, draft, draft_max, draft_min_p, draft_head)
    projector = projector_of(m, model, asked, mmproj, needed=True, q8=mmproj_q8) if seen else None
    if chat:
        said = encode_messages(m.tokenizer, m.file.metadata["tokenizer.chat_template"], [{"role": "user", "content": [*seen, text]}],
                               projector, thinking=think)
    else:
        said = encode_prompt(m.tokenizer, None, [*seen, text], projector, special)
    show, show_rest = (lambda chunk: None) if as_json else write, lambda: None
    if chat and not as_json and not special:
        from refimpl.cli.conversation.turns import Shown

        shown = Shown()
        show, show_rest = shown.push, shown.finish
    out, interrupted = answer(m, said, show, echo="" if as_json or chat else text, max_new_tokens=predict, n_ctx=ctx,
                              special=special, temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, **drafting)
    if as_json:
        write(json.dumps({"model": m.name, "prompt_ids": said.ids, "ids": out.ids, "text": out.text} | report(out.stats)) + "\n")
    else:
        show_rest()
        write("\n")
        show_stop(m, out.stats, ctx, verbose)
    if verbose:
        show_stats(out.stats)
    if interrupted:
        raise typer.Exit(130)


# ---- helpers

def refuse_without_template(m):
    """Before anything is asked."""
    if not m.file.metadata.get("tokenizer.chat_template"):
        raise Failure(f"{m.file.path}: the file has no chat template; an instruction-tuned model (-it in its name) has one; "
                      "refimpl generate continues text")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from -p, standard input or a file."""
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise Failure(f"{file}: at byte {e.start}: not UTF-8 text") from None
    if prompt != "-":
        if any(0xD800 <= ord(c) < 0xE000 for c in prompt):          # what Python makes of other bytes in an argument
            raise Failure("-p: not UTF-8 text")
        return prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise Failure(f"standard input: at byte {e.start}: not UTF-8 text") from None


def answer(m, prompt: Encoded, show: Callable[[str], None], *, echo: str = "", **options):
    """Runs the prompt with a progress bar, then prints `echo` and shows the answer token by token. Returns (Output, was it interrupted)."""
    from refimpl.decode.generate import Output, PromptDone, Text, events
    from refimpl.decode.prefixes import Nothing
    from refimpl.decode.request import Stats

    new_ids, chunks, stats, interrupted = [], [], Stats(), False
    try:
        for event in events(m, prompt, progress=bar, **({"drafter": None, "prefixes": Nothing(m)} | options)):
            if isinstance(event, PromptDone):
                stats = event.stats
                write(echo)
            elif isinstance(event, Text):
                new_ids += event.ids
                chunks.append(event.text)
                show(event.text)
    except KeyboardInterrupt:
        if not stats.n_prompt:              # before the first token
            raise
        stats.stop, interrupted = "interrupted", True
    return Output(new_ids, "".join(chunks), stats), interrupted


def show_stop(m, stats, n_ctx: int | None, verbose: bool):
    """Prints why a text was cut, on a terminal or with -v."""
    if not (verbose or sys.stdout.isatty()):
        return
    if stats.stop == "limit":
        errors.print(f"stopped at {stats.n_generated} tokens (-n)")
    elif stats.stop == "context":
        errors.print(f"the context of {min(n_ctx or m.config.n_ctx, m.config.n_ctx)} tokens is full (-c)")


def report(stats) -> dict[str, object]:
    """The statistics of a run for --json."""
    from refimpl.decode.draft_stats import figures

    return {"n_prompt": stats.n_prompt, "n_generated": stats.n_generated, "prompt_seconds": round(stats.prompt_seconds, 4),
            "decode_seconds": round(stats.decode_seconds, 4), "prompt_per_second": round(stats.prompt_per_second, 2),
            "decode_per_second": round(stats.decode_per_second, 2), "stop": stats.stop} | (
            {"draft": figures(stats.draft)} if stats.draft else {})


def show_stats(stats):
    """Prints the statistics of a run (-v)."""
    errors.print(f"prompt {stats.n_prompt} tokens, {stats.prompt_per_second:.1f}/s; new {stats.n_generated} tokens, "
                 f"{stats.decode_per_second:.1f}/s; stopped by {stats.stop}")
    show_drafting(stats)


def show_drafting(stats):
    """Prints the statistics of a run's drafting, if there was any (-v)."""
    if stats.draft and stats.draft.rounds:
        d = stats.draft
        shares = ", ".join(f"{100 * share:.0f} %" for share in d.acceptance) or "none made"
        experts = f"; {d.experts_per_layer:.1f} distinct experts a layer" if d.expert_layers else ""
        errors.print(f"{d.rounds} rounds of {d.tokens_per_round:.2f} tokens, {d.n_accepted} of {d.n_proposed} draft tokens accepted, "
                     f"by position {shares}{experts}; draft {d.draft_seconds:.2f} s, verify {d.verify_seconds:.2f} s, "
                     f"other {max(0.0, stats.decode_seconds - d.draft_seconds - d.verify_seconds):.2f} s")
