"""Shared by all commands: common options, output, progress, loading."""

import contextlib
import difflib
import errno
import functools
import os
import re
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperCommand, TyperGroup

from refimpl.cli.llamacpp_options import Refused, ours

errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
ORDER = ("generate", "chat", "serve", "fit", "inspect", "convert", "verify", "bench", "synth", "trace", "compare", "judge", "eval", "sweep",
         "glass", "notebooks", "cache")
EXAMPLES = """\b
Examples:
  refimpl generate -p "def main():"
  refimpl chat hf:google/gemma-4-E4B-it-qat-q4_0-gguf
"""


class Commands(TyperGroup):
    """The commands in the order of use."""

    def list_commands(self, ctx):
        """Their names, in the order of --help."""
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def resolve_command(self, ctx, args):
        """The command that the first argument names; `help COMMAND` is `COMMAND --help`."""
        if args[0] == "help":
            if len(args) == 1:
                print(ctx.get_help())
                raise typer.Exit
            args = [args[1], "--help"]
        if not args[0].startswith("-") and args[0] not in self.commands:
            known = self.list_commands(ctx)
            near = difflib.get_close_matches(args[0], known, 1)
            remedy = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            raise typer.BadParameter.__base__(f"no command {args[0]!r}; {remedy}")
        return super().resolve_command(ctx, args)


class Command(TyperCommand):
    """A command that also takes llama.cpp's options."""

    def parse_args(self, ctx, args):
        """Parses the arguments, after llama.cpp's own are removed."""
        takes_value = {name: not (option.is_flag or option.count) for option in self.params if option.param_type_name == "option"
                       for name in (*option.opts, *option.secondary_opts)} | dict.fromkeys(ctx.help_option_names, False)
        try:
            args = ours(args, takes_value.get, lambda line: errors.print(f"note: {line}"))
        except Refused as e:
            raise typer.BadParameter.__base__(str(e)) from None
        return super().parse_args(ctx, args)


class _App(typer.Typer):
    def command(self, name=None, **options):
        return super().command(name, cls=Command, **options)


app = _App(cls=Commands, pretty_exceptions_enable=False, rich_markup_mode=None, epilog=EXAMPLES,
           context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
           help="Gemma 4 inference from scratch, readable and checked. Without -m: the small built-in model.")

MODEL = "GGUF file (of a split one the first part), Hugging Face directory, or hf:owner/name[@revision][:type or file] to download one"
Positional = Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False, help="the model, another way to give -m")]
ModelPath = Annotated[str | None, typer.Option("-m", "--model", show_default=False, help=MODEL)]
Context = Annotated[int | None, typer.Option("-c", "--ctx-size", min=1, help="context in tokens (default: the model's)",
                                            show_default=False)]
Temperature = Annotated[float | None, typer.Option("--temp", "--temperature", min=0.0, help="0 is greedy (default: the model's setting, "
                                                   "else 1.0)",
                                                   show_default=False)]
TopK = Annotated[int | None, typer.Option("--top-k", min=0, help="0 is off (default: the model's setting, else 64)", show_default=False)]
TopP = Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0, help="1 is off (default: the model's setting, else 0.95)",
                                            show_default=False)]
MinP = Annotated[float | None, typer.Option("--min-p", min=0.0, max=1.0, help="0 is off (default: the model's setting, else 0)",
                                            show_default=False)]
Arithmetic = Annotated[str | None, typer.Option("--arithmetic", show_default=False, help="q8: activations quantized to 8 bits, as ggml "
                                                "does (default of the kernels); exact: float32 (default of the reference)")]
Threads = Annotated[int | None, typer.Option("-t", "--threads", min=1, help="default: one for each physical core", show_default=False)]
BackendName = Annotated[str, typer.Option("--backend", help="kernels: compiled, all cores; reference: NumPy, one thread")]
Seed = Annotated[int, typer.Option("-s", "--seed", min=0, help="same seed, same text")]
Draft = Annotated[str | None, typer.Option("--draft", "-md", "--model-draft", show_default=False, help="the model's drafter (file, "
                                           "directory or hf:...): faster, same text; none: without one (default: the built-in model's)")]
DraftMax = Annotated[str, typer.Option("--draft-max", "--draft-n", help="draft tokens per step (1 to 8); auto: from measured costs")]
DraftMinP = Annotated[float, typer.Option("--draft-min-p", "--draft-p-min", min=0.0, max=1.0, help="drafting "
                                             "stops before a token less probable than this")]
DraftHead = Annotated[str | None, typer.Option("--draft-head", show_default=False, help="dense; centroid, if the drafter has it (then the "
                                               "default); or a number: only the first N tokens of the vocabulary")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output instead of text")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="timings on standard error")]
NewTokens = Annotated[int, typer.Option("-n", "--predict", "--n-predict", min=-1, help="new tokens at most; -1: until the text ends")]
CacheDisk = Annotated[str, typer.Option("--cache-disk", metavar="SIZE", help="what rearranged weights of all models may take on the disk, "
                                        "so that the next start is quick: 50G, 500M; 0: keep none (refimpl cache lists them)")]
Lock = Annotated[bool, typer.Option("--lock", "--mlock", help="keep the weights in memory whatever other programs need")]
Force = Annotated[bool, typer.Option("--force", help="overwrite a file that exists")]


class Failure(Exception):
    """An error that the user can fix: one line, no traceback."""


def write(text: str):
    """Writes to standard output and flushes. An OSError names standard output, except for a closed pipe."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        abandon_output()
        raise OSError(e.errno, e.strerror, "standard output") from e


def abandon_output():
    """After a failed write: keeps the interpreter from trying, and failing, again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def replacing(path: Path):
    """Yields a temporary path beside `path`; it is renamed to `path` if the block succeeds, else removed. What the system refuses to write
    there (a full disk) names `path`.
    """
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")          # same suffix, which may select the format
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        if e.strerror and e.filename in (None, str(temporary)):
            raise OSError(e.errno, e.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def bar(what: str, total: int, unit: int = 1):
    """A progress bar on standard error in multiples of `unit`, removed at the end; silent if that is no terminal. Yields advance(n)."""
    if not errors.is_terminal:
        yield lambda n: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(what, total=total // unit)
        yield lambda n: progress.advance(task, n / unit)


_compiled = [0]         # number of kernels compiled since `announce_compiling`


def announce_compiling():
    """From now on reports on standard error when kernels are compiled: at their first use on a machine."""
    _compiled[0] = 0
    _listen()


@functools.cache
def _listen():
    from refimpl.kernels.machine.isa import ISA
    from refimpl.kernels.machine.jit import announce

    def compiling(name: str, weight_types: tuple[str, ...]):
        _compiled[0] += 1
        if _compiled[0] == 1:
            errors.print(f"compiling kernels for {ISA} (first use on this machine of {' '.join(weight_types) or name}; a minute or two)")
        if errors.is_terminal:
            errors.print(f"  {_compiled[0]}: {' '.join((name, *weight_types))}")
    announce(compiling)


def fetched(model: str | None, positional: str | None = None) -> Path | None:
    """The file that -m or the positional argument names, downloaded first if it is `hf:...`; None for the built-in model."""
    from refimpl.loading.hub import local

    model = named(model, positional)
    return None if model is None else local(model)


def named(model: str | None, positional: str | None) -> str | None:
    """What -m or the positional argument says."""
    if model is not None and positional is not None:
        raise typer.BadParameter(f"{positional} and -m {model}: give the model once")
    return positional if model is None else model


def refuse_overwriting(path: Path, force: bool):
    """Raises if `path` is a folder or an existing file (devices and pipes are fine), or its folder is missing. Called before any work."""
    if path.is_dir():
        raise Failure(f"{path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if not force and path.is_file():
        raise Failure(f"{path} exists; --force overwrites it")


def load(path: Path | None, backend: str, arithmetic: str | None, threads: int | None, n_ctx: int, verbose: bool, cache_disk: str = "50G",
         lock: bool = False):
    """Loads the model; notes about its file or this machine go to standard error."""
    import refimpl

    announce_compiling()
    m = refimpl.load(path, backend=backend, arithmetic=arithmetic, threads=threads, n_ctx=n_ctx, cache_disk=n_bytes(cache_disk), lock=lock,
                     progress=bar)
    for note in (*m.notes, *m.tokenizer.warnings):
        errors.print(f"note: {note}")
    if m.held_as_float32:
        from refimpl.loading.memory import about_float32

        errors.print(f"note: {about_float32(m.held_as_float32, m.file.path)}")
    if m.backend.name == "kernels":
        from refimpl.kernels.cores.threads import layer, slow_layer_warning
        from refimpl.kernels.machine.isa import ISA

        if warning := slow_layer_warning():
            errors.print(f"note: {warning}")
        if verbose:
            errors.print(f"kernels: {ISA}, threads: {m.backend.threads} by {layer()}, arithmetic: {m.backend.arithmetic}")
    elif verbose:
        errors.print(f"reference: NumPy, one thread, arithmetic: {m.backend.arithmetic}")
    return m


def drafting_of(m, path: Path | None, draft: str | None, draft_max: str, draft_min_p: float, head: str | None) -> dict[str, object]:
    """The drafting arguments of `stream`. Mentions a drafter that lies beside the model, but loads it only on request."""
    import refimpl
    from refimpl.loading.drafter import drafters_beside
    from refimpl.loading.hub import is_built_in

    if draft is not None and draft.isdecimal():
        raise typer.BadParameter(f"--draft {draft}: expected the drafter; the number of draft tokens is --draft-max {draft}")
    options = {"draft_max": number_or_word(draft_max), "draft_min_p": draft_min_p}
    if draft == "none" or draft is None and not is_built_in(m.file.path):
        found = drafters_beside(path) if draft is None else []
        if found:
            errors.print(f"note: {found[0]} looks like this model's drafter; --draft {found[0]} makes the same text faster")
        return options
    return options | {"drafter": refimpl.load_drafter(draft, m, head=number_or_word(head), progress=bar)}


def number_or_word(word: str | None) -> int | str | None:
    """The value of an option that is a number or a word, not validated."""
    try:
        return int(word)
    except (TypeError, ValueError):
        return word


def n_bytes(size: str) -> int:
    """50G, 500M, 1.5G or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", size, re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{size!r} is no size: expected 50G, 500M or a number of bytes")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def chances_argument(text: str | None) -> list[float] | None:
    """--accept as numbers."""
    try:
        return None if text is None else [float(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--accept {text}: expected numbers with commas between them, .84,.60") from None
