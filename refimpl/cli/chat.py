"""chat."""

import contextlib
import sys
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
    drafting_of,
    errors,
    fetched,
    load,
    n_bytes,
    named,
)
from refimpl.cli.run import read_prompt, refuse_without_template
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

CacheRam = Annotated[str | None, typer.Option("--cache-ram", metavar="SIZE", show_default=False, help="memory for what has been read and "
                                              "need not be read again: 2G, 500M (default: a quarter of what is free)")]
CacheDir = Annotated[str | None, typer.Option("--cache-dir", metavar="DIR", show_default=False, help="keep what has been read there, to "
                                              "know it after a restart (default: the cache folder); none: only in memory")]
CacheRead = Annotated[str, typer.Option("--cache-read", metavar="SIZE", help="what has been read, of all models, may take on the disk; "
                                        "the least recently used goes first")]
SessionName = Annotated[str | None, typer.Option("--session", metavar="NAME", show_default=False, help="go on where the conversation of "
                                                 "this name was left, and keep it on disk (/sessions lists them)")]


@app.command()
def chat(
    positional: Positional = None,
    model: ModelPath = None,
    system: Annotated[str | None, typer.Option("--system", "-sys", "--system-prompt", help="instruction before the conversation")] = None,
    think: Annotated[bool, typer.Option("--think", help="let the model think before it answers")] = False,
    mmproj: Mmproj = None, mmproj_q8: MmprojQ8 = False, image: Images = None, audio: Sounds = None, video: Videos = None,
    image_tokens: ImageTokens = TOKENS,
    session: SessionName = None, predict: NewTokens = -1,
    ctx: Context = None, temp: Temperature = None, top_k: TopK = None, top_p: TopP = None, min_p: MinP = None, seed: Seed = 0,
    draft: Draft = None, draft_max: DraftMax = "auto", draft_min_p: DraftMinP = 0.0, draft_head: DraftHead = None,
    threads: Threads = None, backend: BackendName = "kernels", arithmetic: Arithmetic = None,
    cache_disk: CacheDisk = "50G", cache_ram: CacheRam = None, cache_dir: CacheDir = None, cache_read: CacheRead = "10G",
    lock: Lock = False, verbose: Verbose = False,
):
    """Talk to an instruction-tuned model.

    /help lists what else there is; Ctrl-C stops an answer, Ctrl-D ends. What is piped in is one message. Without -m it is the built-in
    model, which continues code.
    """
    from refimpl.cli.chosen import chosen, context
    from refimpl.cli.conversation import transcript
    from refimpl.cli.conversation.commands import resumed
    from refimpl.cli.conversation.turns import Conversation
    from refimpl.cli.show.table import size
    from refimpl.decode.session import Session
    from refimpl.text.templates import CONTINUATION_TEMPLATE, CONTINUED

    budget, limit = None if cache_ram is None else n_bytes(cache_ram), n_bytes(cache_read)
    folder, seen = folder_of(cache_dir, limit), opened(image, audio, video, image_tokens)
    path = None if session is None else transcript.session_path(session)
    with transcript.alone(path):
        earlier = earlier_of(path)
        asked, needed = named(model, positional), bool(seen) or has_parts(earlier)
        refuse_useless_q8(mmproj_q8, mmproj, asked, needed)
        model = fetched(model, positional)
        m = load(model, backend, arithmetic, threads, 4096 + n_tokens_of(seen) if ctx is None else ctx, verbose, cache_disk, lock)
        refuse_without_template(m)
        only_continues = m.file.metadata["tokenizer.chat_template"] == CONTINUATION_TEMPLATE
        if only_continues and predict < 0:          # it does not know when to stop
            predict = CONTINUED
        drafting = drafting_of(m, model, draft, draft_max, draft_min_p, draft_head)
        projector = projector_of(m, model, asked, mmproj, needed, mmproj_q8)
        sampling = {"max_new_tokens": predict, "temperature": temp, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        said = Session(m, drafter=drafting.pop("drafter", None), n_ctx=ctx, projector=projector, thinking=think, cache_ram=budget,
                       cache_dir=folder, cache_disk=limit)
        talk = Conversation(said, drafting | sampling, path, verbose, image_tokens)
        talk.files = [(part.name, part) for part in seen]
        if verbose or sys.stdin.isatty():
            own = m.config.n_ctx
            share = "a quarter of what is free: --cache-ram" if budget is None else "as given"
            errors.print(chosen(m, threads, context(min(ctx or own, own), own, ctx, ""),
                                f"{size(talk.session.prefixes.budget)} for what is read ({share})"))
        if earlier is not None:
            talk.session.messages = earlier.messages
            errors.print(f"{session}: {resumed(talk, earlier)}")
        if system is not None:
            talk.instruct(system)
        if sys.stdin.isatty():
            errors.print(f"{m.name}; /help lists the commands, Ctrl-D ends")
            if only_continues:
                errors.print(f"it was not taught to answer: it continues code, up to {predict} tokens (-n); try: def add(a, b):")
            on_terminal(talk)
        else:
            piped(talk)


def folder_of(cache_dir: str | None, limit: int) -> Path | None:
    """Where --cache-dir says that what has been read is kept on the disk; None: nowhere, as it is where --cache-read allows no bytes."""
    from refimpl.kernels.machine.cache_folder import cache_root

    if cache_dir == "none" or not limit:
        return None
    return cache_root() if cache_dir is None else Path(cache_dir)


def earlier_of(path: Path | None):
    """The transcript of a session that is gone on with, None for a new one. Raises Failure, OSError."""
    from refimpl.cli.conversation import transcript

    try:
        return None if path is None else transcript.read(path)
    except FileNotFoundError:
        return None


def has_parts(earlier) -> bool:
    """Are there pictures or sounds in an earlier conversation?"""
    return earlier is not None and any(not isinstance(message["content"], str) for message in earlier.messages)


def piped(talk):
    """Answers standard input, which is one message."""
    text = read_prompt("-", None).strip()
    if not text:
        errors.print("note: standard input is empty, there is nothing to answer")
        return
    stats = talk.ask(text)
    if stats is None or stats.stop == "interrupted":
        raise typer.Exit(130)


def on_terminal(talk):
    """Answers what is typed, until the user leaves."""
    from refimpl.cli.conversation.commands import Leave
    from refimpl.cli.conversation.line import Terminal, keys_wait
    from refimpl.cli.conversation.transcript import data_root

    with keys_wait(), contextlib.closing(Terminal(data_root() / "history")) as terminal:
        offer = True
        while True:
            try:
                offer = one_line(talk, terminal, offer)
            except KeyboardInterrupt as e:          # with what stood on the line, which is in the history now
                offer = not any(e.args)
                if e.args == ("",):
                    talk.unsent = ""
                elif not e.args:                    # while something was done
                    errors.print()
            except (EOFError, Leave):
                return


def one_line(talk, terminal, offer: bool) -> bool:
    """Reads a line and does what it asks for. `offer`: a message that was not sent is on the line. Returns whether it is to be there next.

    Raises EOFError and Leave at the end, KeyboardInterrupt, and errors that cannot be mended here.
    """
    from refimpl.cli.conversation.commands import dropped, run_command
    from refimpl.loading.memory import MemoryRefusal
    from refimpl.media.source import MediaError
    from refimpl.model.cache import ContextFull
    from refimpl.text.chat import ChatError

    with talk.reading_ahead():
        line = terminal.read(talk.unsent if offer else "")
    try:
        if line.name is not None:
            run_command(talk, line.name, line.text)
        elif talk.session.projector is not None and (file := dropped(line.text)):
            run_command(talk, *file)
        elif line.text:
            talk.ask(line.text)
        elif offer:
            talk.unsent = ""
        return True
    except ContextFull as e:
        problem = f"{e}{talk.ways_out()}"
    except (Failure, ChatError, MediaError, MemoryRefusal) as e:
        problem = str(e)
    except MemoryError:
        problem = "not enough memory"
    except OSError as e:
        if e.filename in (None, "standard output"):
            raise
        problem = f"{e.filename}: {e.strerror}"
    errors.print(problem + ("; your message comes back after the next command" if talk.unsent else ""))
    return False
