"""The command line: arguments in, text out. The only file that prints.

Text goes to standard output; progress, timings and complaints to standard error. Exit status: 0, 1 for a failure (one line says what),
2 for wrong usage, 130 after Ctrl-C.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Gemma 4 inference from scratch, readable and checked. Without -m: the small model that ships.")
errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

ModelPath = Annotated[Path | None, typer.Option("-m", "--model", help="GGUF file (the first part of a split one)", show_default=False)]
Context = Annotated[int | None, typer.Option("-c", "--ctx-size", min=1, help="context in tokens (default: the model's)",
                                            show_default=False)]
Temperature = Annotated[float | None, typer.Option("--temp", min=0.0, help="0 takes the likeliest (default: the file's, else 1.0)",
                                                   show_default=False)]
TopK = Annotated[int | None, typer.Option("--top-k", min=0, help="0 is off (default: the file's, else 64)", show_default=False)]
TopP = Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0, help="1 is off (default: the file's, else 0.95)",
                                            show_default=False)]
MinP = Annotated[float | None, typer.Option("--min-p", min=0.0, max=1.0, help="0 is off (default: the file's, else 0)",
                                            show_default=False)]
Arithmetic = Annotated[str | None, typer.Option("--arithmetic", show_default=False, help="q8: activations in 8 bits, as ggml does (default "
                                                "of the kernels); exact: float32 throughout (default of the reference)")]
Threads = Annotated[int | None, typer.Option("-t", "--threads", min=1, help="default: one for each physical core", show_default=False)]
BackendName = Annotated[str, typer.Option("--backend", help="kernels: compiled, all cores; reference: NumPy, one thread")]
Seed = Annotated[int, typer.Option("-s", "--seed", min=0, help="of the random choices: same seed, same text")]
Draft = Annotated[str | None, typer.Option("--draft", show_default=False, help="the model's drafter (GGUF): faster, and the same text; "
                                           "none: without one (default: the built-in model has its own, others none)")]
DraftMax = Annotated[str, typer.Option("--draft-max", help="tokens to draft at a time, 1 to 8; auto: as many as pay")]
DraftMinP = Annotated[float, typer.Option("--draft-min-p", min=0.0, max=1.0, help="a draft ends ahead of a token less likely than this")]
DraftHead = Annotated[str | None, typer.Option("--draft-head", show_default=False, help="dense; centroid, where the drafter has one (then "
                                               "the default); or how many tokens of the vocabulary to look at")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output instead of text")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="timings on standard error")]
NewTokens = Annotated[int, typer.Option("-n", "--predict", min=0, help="new tokens at most")]


class Failure(Exception):
    """A reason to stop that the user can do something about."""


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False):
    if version:
        import refimpl

        print(refimpl.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        errors.print(context.get_help())
        raise typer.Exit(2)


@app.command()
def generate(
    model: ModelPath = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="text to continue; - reads standard input")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="read the prompt from a file")] = None,
    predict: NewTokens = 128,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is a question: use the file's chat template")] = False,
    think: Annotated[bool, typer.Option("--think", help="with --chat: let the model think first")] = False,
    special: Annotated[bool, typer.Option("--special", help="special tokens in the prompt count, and are shown in the text")] = False,
    ctx: Context = None, temp: Temperature = None, top_k: TopK = None, top_p: TopP = None, min_p: MinP = None, seed: Seed = 0,
    draft: Draft = None, draft_max: DraftMax = "auto", draft_min_p: DraftMinP = 0.0, draft_head: DraftHead = None,
    threads: Threads = None, backend: BackendName = "kernels", arithmetic: Arithmetic = None, as_json: Json = False,
    verbose: Verbose = False,
):
    """Continue a prompt."""
    import refimpl

    if (prompt is None) == (file is None):
        raise typer.BadParameter("give the text with -p TEXT, -p - or -f FILE")
    if think and not chat:
        raise typer.BadParameter("--think needs --chat")
    text = read_prompt(prompt, file)
    room = ctx if ctx is not None else len(text.encode()) + predict + 256        # a token is at least a byte; 256 for a template
    m = load(model, backend, arithmetic, threads, room, verbose)
    drafting = drafting_of(m, model, draft, draft_max, draft_min_p, draft_head)
    if chat:
        ids = chat_ids(m, [{"role": "user", "content": text}], think)
    else:
        ids = m.tokenizer.encode(text, special=special)
    out = refimpl.Output()
    pieces = begin(m, ids, out, max_new_tokens=predict, n_ctx=ctx, special=special, **drafting,
                   **sampling_of(m, temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed))
    if not as_json and not chat:
        write(text)
    interrupted = speak(pieces, out, silent=as_json)
    if as_json:
        write(json.dumps({"model": m.name, "prompt_ids": ids, "ids": out.ids, "text": out.text} | report(out.stats)) + "\n")
    else:
        write("\n")
    if verbose:
        tell(out.stats)
    if interrupted:
        raise typer.Exit(130)


@app.command()
def chat(
    model: ModelPath = None,
    system: Annotated[str | None, typer.Option("--system", help="instruction ahead of the conversation")] = None,
    think: Annotated[bool, typer.Option("--think", help="let the model think before it answers")] = False,
    predict: NewTokens = 1024,
    ctx: Context = None, temp: Temperature = None, top_k: TopK = None, top_p: TopP = None, min_p: MinP = None, seed: Seed = 0,
    draft: Draft = None, draft_max: DraftMax = "auto", draft_min_p: DraftMinP = 0.0, draft_head: DraftHead = None,
    threads: Threads = None, backend: BackendName = "kernels", arithmetic: Arithmetic = None, verbose: Verbose = False,
):
    """Talk to an instruction-tuned model. An empty line or Ctrl-D ends; Ctrl-C stops an answer."""
    import refimpl
    from refimpl.decode.chat import split_thought

    m = load(model, backend, arithmetic, threads, ctx if ctx is not None else 4 * predict, verbose)
    drafting = drafting_of(m, model, draft, draft_max, draft_min_p, draft_head)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        errors.print("> ", end="")
        line = sys.stdin.readline()
        if not line.strip():
            break
        messages.append({"role": "user", "content": line.strip()})
        out = refimpl.Output()
        pieces = begin(m, chat_ids(m, messages, think), out, max_new_tokens=predict, n_ctx=ctx, **drafting,
                       **sampling_of(m, temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed))
        speak(pieces, out)
        write("\n")
        messages.append({"role": "assistant", "content": split_thought(out.text)[1]})
        if verbose:
            tell(out.stats)


@app.command()
def inspect(
    model: ModelPath = None,
    ctx: Context = None,
    as_json: Json = False,
):
    """Show what is in a file: metadata, layers, tensor types and sizes, and the memory it will need."""
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


@app.command()
def bench(
    model: ModelPath = None,
    n_prompt: Annotated[int, typer.Option("-p", "--n-prompt", min=0, help="tokens of the prompt; 0 leaves it out")] = 512,
    n_new: Annotated[int, typer.Option("-n", "--n-gen", min=0, help="new tokens; 0 leaves them out")] = 64,
    depth: Annotated[int, typer.Option("-d", "--n-depth", min=0, help="tokens of context before the new ones")] = 0,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="runs of each test")] = 5,
    threads: Threads = None,
    versus: Annotated[str | None, typer.Option("--vs", help="llama.cpp: run it in turn, on the same file and ids")] = None,
    draft: Annotated[str | None, typer.Option("--draft", show_default=False, help="measure new tokens with this drafter and without; "
                                              "built-in: the built-in model's")] = None,
    draft_max: Annotated[str, typer.Option("--draft-max", help="with --draft: drafts at a time, some to compare: auto,1,2")] = "auto",
    draft_min_p: DraftMinP = 0.0, draft_head: DraftHead = None,
    accept: Annotated[str | None, typer.Option("--accept", show_default=False, help="with --draft: a SIMULATION with the chances that the "
                                               "first draft, the first two, ... are accepted: .84,.60,.39")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", show_default=False, help="with --draft: the text to continue")] = None,
    temp: Annotated[float, typer.Option("--temp", min=0.0, help="with --draft: temperature")] = 0.0,
    backend: BackendName = "kernels", arithmetic: Arithmetic = None, as_json: Json = False,
):
    """Measure speed: a prompt, new tokens, how near they come to what reading the weights allows; with --draft, what drafting wins."""
    from refimpl.lab.bench import OPPONENTS, Plan, as_text
    from refimpl.lab.bench import bench as measure

    if versus is not None and versus not in OPPONENTS:
        raise typer.BadParameter(f"--vs {versus}: expected {' or '.join(OPPONENTS)}")
    if not n_prompt and not n_new:
        raise typer.BadParameter("-p and -n are both 0: nothing to measure")
    tell_of_compiling()
    if draft is not None:
        from refimpl.lab import draft_bench

        if versus is not None or not n_new:
            raise typer.BadParameter("--draft measures new tokens of refimpl alone: no --vs, and -n of at least 1")
        depths = [number_or_word(word) for word in draft_max.split(",")]
        result = draft_bench.draft_bench(
            model, None if draft == "built-in" else draft, Plan(0, n_new, depth, repetitions), depths, chances=chances_argument(accept),
            min_p=draft_min_p, head=number_or_word(draft_head), temperature=temp, prompt=prompt, threads=threads, backend=backend,
            arithmetic=arithmetic, progress=bar)
        write((json.dumps(result) if as_json else draft_bench.as_text(result)) + "\n")
        return
    if accept is not None or prompt is not None:
        raise typer.BadParameter("--accept and --prompt need --draft")
    result = measure(model, Plan(n_prompt, n_new, depth, repetitions), threads=threads, backend=backend, arithmetic=arithmetic,
                     opponent=versus, progress=bar)
    for note in result["notes"]:
        errors.print(f"note: {note}")
    write((json.dumps(result) if as_json else as_text(result)) + "\n")


# ---- helpers

def load(path: Path | None, backend: str, arithmetic: str | None, threads: int | None, n_ctx: int, verbose: bool):
    """The model, and what is odd about its file or this machine on standard error."""
    import refimpl

    tell_of_compiling()
    with contextlib.ExitStack() as stack:
        m = refimpl.load(path, backend=backend, arithmetic=arithmetic, threads=threads, n_ctx=n_ctx,
                         begin=lambda total: stack.enter_context(bar("MB loaded", total, 10**6)))
    for warning in m.tokenizer.warnings:
        errors.print(f"note: {warning}")
    if m.backend.name == "kernels":
        from refimpl.kernels.threads import layer, slow_layer_warning
        from refimpl.kernels.words import ISA

        if warning := slow_layer_warning():
            errors.print(f"note: {warning}")
        if verbose:
            errors.print(f"kernels: {ISA}, threads: {m.backend.threads} by {layer()}, arithmetic: {m.backend.arithmetic}")
    elif verbose:
        errors.print(f"reference: NumPy, one thread, arithmetic: {m.backend.arithmetic}")
    return m


def drafting_of(m, path: Path | None, draft: str | None, draft_max: str, draft_min_p: float, head: str | None) -> dict[str, object]:
    """The arguments of `stream` that have to do with drafting. Offers a drafter that lies beside the model, and loads none unasked."""
    import refimpl
    from refimpl.decode.drafter import beside

    options = {"draft_max": number_or_word(draft_max), "draft_min_p": draft_min_p}
    if draft == "none" or draft is None and path is not None:
        found = beside(path) if draft is None else []
        if found:
            errors.print(f"note: {found[0]} looks like this model's drafter; --draft {found[0]} makes the same text faster")
        return options
    with contextlib.ExitStack() as stack:
        drafter = refimpl.load_drafter(draft, m, head=number_or_word(head),
                                       begin=lambda total: stack.enter_context(bar("MB of the drafter", total, 10**6)))
    return options | {"drafter": drafter}


def number_or_word(word: str | None) -> int | str | None:
    """An option that is a number or a word; whoever takes it refuses what is senseless."""
    try:
        return int(word)
    except (TypeError, ValueError):
        return word


def chances_argument(text: str | None) -> list[float] | None:
    """--accept as numbers."""
    try:
        return None if text is None else [float(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--accept {text}: expected numbers with commas between them, .84,.60") from None


def tell_of_compiling():
    """Says on standard error that kernels are being compiled, when they are: at the first use on a machine."""
    from refimpl.kernels.jit import announce
    from refimpl.kernels.words import ISA

    count = itertools.count(1)

    def tell(name: str):
        n = next(count)
        if n == 1:
            errors.print(f"compiling kernels for {ISA}, once on this machine (up to a minute)")
        if errors.is_terminal:
            errors.print(f"  {n}: {name}")
    announce(tell)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from -p, standard input or a file."""
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise Failure(f"{file}: at byte {e.start}: not UTF-8 text") from None
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise Failure(f"standard input: at byte {e.start}: not UTF-8 text") from None


def chat_ids(m, messages: list[dict], think: bool) -> list[int]:
    """Token ids of a conversation. Text of the user is cut up apart, so that markers in it stay text."""
    from refimpl.decode.chat import encode_chat

    return encode_chat(m.tokenizer, m.file.metadata.get("tokenizer.chat_template"), messages, thinking=think)


def sampling_of(m, **given) -> dict[str, float]:
    """The file's own sampling settings, else Gemma's, under what the command line says (None where it says nothing)."""
    from refimpl.decode.sampling import Sampling

    return dataclasses.asdict(Sampling.from_metadata(m.file.metadata, **given))


def begin(m, ids: list[int], out, **options):
    """Runs the prompt under a progress bar. Returns an iterator over the pieces of text, the first of which is already made."""
    import refimpl

    with bar("prompt", len(ids)) as step:
        pieces = refimpl.stream(m, ids, output=out, progress=step, **options)
        first = next(pieces, "")
    return itertools.chain([first], pieces)


def speak(pieces, out, silent: bool = False) -> bool:
    """Prints the pieces as they come. Returns whether Ctrl-C cut them short; what was said stays."""
    try:
        for piece in pieces:
            if not silent:
                write(piece)
    except KeyboardInterrupt:
        out.stats.stop = "interrupted"
        return True
    return False


def write(text: str):
    """To standard output, at once. An OSError names it, but for the one of a closed pipe."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        abandon_output()
        raise OSError(e.errno, e.strerror, "standard output") from e


def abandon_output():
    """Nobody can take our output: keeps the interpreter from trying again, and complaining, when it closes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(stats) -> dict[str, object]:
    """The figures of a run, for programs."""
    from refimpl.decode.speculative import figures

    return {"n_prompt": stats.n_prompt, "n_generated": stats.n_generated, "prompt_seconds": round(stats.prompt_seconds, 4),
            "decode_seconds": round(stats.decode_seconds, 4), "prompt_per_second": round(stats.prompt_per_second, 2),
            "decode_per_second": round(stats.decode_per_second, 2), "stop": stats.stop} | (
            {"draft": figures(stats.draft)} if stats.draft else {})


def tell(stats):
    """The figures of a run, for people."""
    errors.print(f"prompt {stats.n_prompt} tokens, {stats.prompt_per_second:.1f}/s; new {stats.n_generated} tokens, "
                 f"{stats.decode_per_second:.1f}/s; stopped by {stats.stop}")
    if stats.draft and stats.draft.rounds:
        d = stats.draft
        shares = ", ".join(f"{100 * share:.0f} %" for share in d.acceptance) or "none made"
        experts = f"; {d.experts_per_layer:.1f} distinct experts a layer" if d.expert_layers else ""
        errors.print(f"{d.rounds} rounds of {d.tokens_per_round:.2f} tokens, {d.n_accepted} of {d.n_proposed} drafts accepted, by position "
                     f"{shares}{experts}; draft {d.draft_seconds:.2f} s, verify {d.verify_seconds:.2f} s, "
                     f"other {max(0.0, stats.decode_seconds - d.draft_seconds - d.verify_seconds):.2f} s")


@contextlib.contextmanager
def bar(what: str, total: int, unit: int = 1):
    """A progress bar on standard error, counting in `unit`s, gone when done, silent when that is no terminal. Yields step(n)."""
    if not errors.is_terminal:
        yield lambda n: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(what, total=total // unit)
        yield lambda n: progress.advance(task, n / unit)


def main():
    """Runs the command line. Whatever goes wrong becomes one line on standard error."""
    warnings.showwarning = lambda message, *place: errors.print(f"note: {message}")
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status or 0)
    except BrokenPipeError:
        abandon_output()
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except typer.Exit as e:
        sys.exit(e.exit_code)
    except Exception as e:
        sys.exit(complain(e))


def complain(e: Exception) -> int:
    """One line for an error; returns the exit status. An error of ours that nobody foresaw keeps its traceback."""
    from refimpl.formats.container import GGUFError
    from refimpl.model.cache import ContextFull

    usage_error = typer.BadParameter.__base__       # typer carries a copy of click or uses the installed one, by its version
    if isinstance(e, usage_error):
        errors.print(f"refimpl: {e.format_message()}")
        return 2
    if isinstance(e, OSError) and e.filename is not None:
        errors.print(f"refimpl: {e.filename}: {e.strerror}")
        return 1
    if isinstance(e, (GGUFError, ContextFull, Failure, ValueError, OSError)):
        errors.print(f"refimpl: {' '.join(str(e).split())}")
        return 1
    if isinstance(e, MemoryError):
        errors.print("refimpl: not enough memory")
        return 1
    raise e


if __name__ == "__main__":
    main()
