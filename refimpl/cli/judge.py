"""trace and compare: for testing other engines."""

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.app import (
    Arithmetic,
    BackendName,
    DraftHead,
    Failure,
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
    load,
    named,
    number_or_word,
    refuse_overwriting,
    replacing,
    write,
)
from refimpl.cli.run import read_prompt
from refimpl.cli.senses import Images, ImageTokens, Mmproj, Sounds, n_tokens_of, opened, projector_of
from refimpl.extras import require
from refimpl.media.patches import TOKENS


@app.command()
def trace(
    positional: Positional = None, model: ModelPath = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="text to run; - reads standard input")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="read the prompt from a file")] = None,
    token_ids: Annotated[str | None, typer.Option("--ids", help="token ids instead of a text: 2,105,9731")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the .safetensors to write")] = None,
    tensors: Annotated[str, typer.Option("--tensors", help="names to keep, with * and ?: l_out-*,ffn_moe_*-3")] = "*",
    positions: Annotated[str | None, typer.Option("--positions", show_default=False, help="positions: 0:8,100 (default: all)")] = None,
    logits: Annotated[str | None, typer.Option("--logits", show_default=False, help="all, or a number of the largest (default: all for a "
                                               "vocabulary up to 65,536, else 256)")] = None,
    draft: Annotated[str | None, typer.Option("--draft", show_default=False, help="also trace this drafter's steps after the prompt; "
                                              "built-in: the built-in model's")] = None,
    draft_max: Annotated[int, typer.Option("--draft-max", min=1, max=8, help="with --draft: number of steps")] = 4,
    rounds: Annotated[int, typer.Option("--rounds", min=0, help="with --draft: speculative rounds to trace")] = 0,
    draft_head: DraftHead = None,
    mmproj: Mmproj = None, image: Images = None, audio: Sounds = None, image_tokens: ImageTokens = TOKENS,
    names: Annotated[bool, typer.Option("--names", help="print all names, and exit")] = False,
    backend: BackendName = "kernels", arithmetic: Arithmetic = None, threads: Threads = None, force: Force = False, as_json: Json = False,
):
    """Write every value of a run to a file. For `compare`, and for other engines' tests."""
    import refimpl
    from refimpl.lab.compare.record import write_trace
    from refimpl.lab.compare.towers.inputs import traced_prompt

    if names:
        write(names_table(as_json))
        return
    if output is None or output.suffix != ".safetensors":
        raise typer.BadParameter("-o FILE.safetensors says where to write the trace" + ("" if output is None else
                                 f"; {output}: a trace is a safetensors file, use a name ending in .safetensors"))
    if sum(x is not None for x in (prompt, file, token_ids)) != 1:
        raise typer.BadParameter("give the text with -p TEXT, -p - or -f FILE, or token ids with --ids")
    if rounds and draft is None:
        raise typer.BadParameter("--rounds needs --draft")
    if (image or audio) and token_ids is not None:
        raise typer.BadParameter("--image and --audio stand before a text: give it with -p TEXT, -p - or -f FILE")
    refuse_overwriting(output, force)
    text, seen = None if token_ids is not None else read_prompt(prompt, file), opened(image, audio, None, image_tokens)
    path = fetched(model, positional)
    m = load(path, backend, arithmetic, threads, 1 if text is None else len(text.encode()) + n_tokens_of(seen), False)
    drafting, media = {}, []
    if seen:
        ids, media = traced_prompt(m, projector_of(m, path, named(model, positional), mmproj, True), [*seen, text])
    else:
        ids = ids_argument(token_ids) if text is None else m.tokenizer.encode(text)
    if draft is not None:
        drafter = refimpl.load_drafter(None if draft == "built-in" else draft, m, head=number_or_word(draft_head))
        drafting = {"drafter": drafter, "draft_max": draft_max, "rounds": rounds}
    header = write_trace(output, m, ids, positions=positions_argument(positions), tensors=tensors.split(","),
                         logits=number_or_word(logits), prompt=text, progress=bar, media=media, **drafting)
    size = output.stat().st_size
    if as_json:
        write(json.dumps({key: value for key, value in header.items() if key != "crc32"}
                         | {"file": str(output), "tensors": len(header["crc32"]), "bytes": size}) + "\n")
    else:
        write(f"{output}: {len(header['crc32'])} tensors, positions: {len(header['positions'])}, {size / 1e6:.1f} MB; "
              f"{header['engine']}, {header['arithmetic']}\n")


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="TRACE", help="the correct trace (refimpl trace)")],
    b: Annotated[str, typer.Argument(metavar="OTHER", help="what to judge: a trace, .npz (how to write one: python -m pydoc "
                                     "refimpl.lab.compare.engines.foreign), what llama.cpp printed (.txt) or saved (.bin), or an engine to "
                                     "run: transformers:DIRECTORY, llama.cpp:FILE.gguf")],
    model: Annotated[Path | None, typer.Option("-m", "--model", show_default=False, help="the model, to measure how rounding errors grow "
                                               "in it (default: the one of the trace)")] = None,
    mmproj: Annotated[Path | None, typer.Option("--mmproj", "-mm", show_default=False, help="the projector, likewise, of a trace with "
                                                "pictures or sounds")] = None,
    guess: Annotated[bool, typer.Option("--guess", help="guess how rounding errors grow, without running the model")] = False,
    steps: Annotated[bool, typer.Option("--steps", help="judge every step from the engine's own inputs: finds all faults")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="for transformers: float32, bfloat16 or float16")] = "float32",
    everything: Annotated[bool, typer.Option("--all", help="list every tensor")] = False,
    picture: Annotated[Path | None, typer.Option("--plot", show_default=False, help="write a heat map, layers by tensors (.png)")] = None,
    threads: Threads = None, force: Force = False, as_json: Json = False,
):
    """Name the first tensor that departs from a trace. Exit status 0: none does; 1: one does; 3: could not compare."""
    from refimpl.cli.show.compare import as_text
    from refimpl.lab.compare import verdict
    from refimpl.lab.compare.compare import compare as judge
    from refimpl.lab.compare.compare import compare_steps, compare_with
    from refimpl.lab.compare.engines.choose import open_any
    from refimpl.lab.compare.tolerance import model_of
    from refimpl.lab.compare.tolerance import projector_of as towers_of
    from refimpl.lab.compare.towers.inputs import inputs_of, with_ids_of
    from refimpl.lab.compare.trace import open_trace

    if guess and steps:
        raise typer.BadParameter("--steps runs the model, --guess does not: choose one of them")
    if picture is not None:
        refuse_overwriting(picture, force)
    with exits_3(as_json):
        if picture is not None:
            require("matplotlib", "plot")
        first = open_trace(a)
        second = with_ids_of(first, open_any(b, first.ids, dtype, threads or 1, first))
        found, media = None, []
        if not guess and first.ids == second.ids:
            announce_compiling()
            found, why = model_of(first, second, model)
            if found is not None and first.facts.get("media"):
                projector, why = towers_of(found, first, second, mmproj)
                found = found if projector is not None else None
                media = [] if projector is None else inputs_of(found, projector, *((second, first) if steps else (first, second)))
            if found is None and steps:
                raise Failure(f"--steps runs the model: {why}; -m FILE names it")
            if found is None:
                errors.print(f"note: {why}; tolerances are guessed, -m FILE measures them")
        if found is None:
            result = judge(first, second)
        else:
            result = compare_steps(found, second, media) if steps else compare_with(found, first, second, media)
        if picture is not None and result.judged:
            with replacing(picture) as temporary:
                verdict.plot(result, temporary)
    write((json.dumps(verdict.figures(result)) if as_json else as_text(result, everything)) + "\n")
    if result.first is not None:
        raise typer.Exit(1)


# ---- helpers

@contextlib.contextmanager
def exits_3(as_json: bool):
    """An error becomes one line and exit status 3, because 1 means that the engines differ."""
    from refimpl.cli import complain

    try:
        yield
    except Exception as e:
        status = complain(e, as_json)
        raise typer.Exit(3 if status == 1 else status) from None


def ids_argument(text: str) -> list[int]:
    """--ids as numbers."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--ids {text}: expected token ids with commas between them, 2,105,9731") from None


def positions_argument(text: str | None) -> list[int] | None:
    """--positions as numbers: single ones, and ranges first:end, end excluded."""
    found: list[int] = []
    for word in text.split(",") if text is not None else ():
        first, colon, end = word.partition(":")
        try:
            found += range(int(first or 0), int(end)) if colon else [int(first)]
        except ValueError:
            raise typer.BadParameter(f"--positions {text}: expected numbers and ranges, 0:8,100") from None
    return found if text is not None else None


def names_table(as_json: bool) -> str:
    """The names of the forward pass, as a table or JSON."""
    import dataclasses

    from refimpl.cli.show.compare import names_text
    from refimpl.lab.compare.names import NAMES, TOWERS

    rows = [dataclasses.asdict(name) | {"tower": tower} for tower, names in ({"": NAMES} | TOWERS).items() for name in names]
    return (json.dumps(rows) if as_json else names_text()) + "\n"
