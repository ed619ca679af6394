"""trace: every value of a run in a file, for testing other engines."""

import contextlib
import json
import secrets
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.app import (
    BackendName,
    DraftHead,
    Force,
    Json,
    ModelPath,
    Positional,
    Threads,
    app,
    bar,
    fetched,
    load,
    named,
    number_or_word,
    refuse_overwriting,
    replacing,
    write,
)
from refimpl.cli.run import read_prompt, refuse_without_template
from refimpl.cli.senses import Images, ImageTokens, Mmproj, Sounds, n_tokens_of, opened, projector_of
from refimpl.media.patches import TOKENS


@app.command()
def trace(
    positional: Positional = None, model: ModelPath = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="text to run; - reads standard input")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="read the prompt from a file")] = None,
    token_ids: Annotated[str | None, typer.Option("--ids", help="token ids instead of a text: 2,105,9731")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the .safetensors to write")] = None,
    npz: Annotated[Path | None, typer.Option("--npz", metavar="FILE.npz", show_default=False, help="write it, too or instead, as another "
                                             "engine would: an example of the convention (compare --help)")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is a message: apply the file's chat template")] = False,
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
    backend: BackendName = "kernels",
    arithmetic: Annotated[str, typer.Option("--arithmetic", help="exact: float32, judges any engine; q8: activations quantized to 8 bits, "
                                            "as ggml does, whose rounding hides errors of an engine in floating point")] = "exact",
    threads: Threads = None, force: Force = False, as_json: Json = False,
):
    """Write every value of a run to a file. For `compare`, and for other engines' tests."""
    import refimpl
    from refimpl.lab.compare.engines.foreign import write_npz
    from refimpl.lab.compare.record import write_trace
    from refimpl.lab.compare.towers.inputs import traced_prompt
    from refimpl.lab.compare.trace import open_trace
    from refimpl.text.chat import encode_chat, render_chat

    if names:
        write(names_table(as_json))
        return
    if output is None and npz is None or output is not None and output.suffix != ".safetensors":
        raise typer.BadParameter("-o FILE.safetensors says where to write the trace" + ("" if output is None else
                                 f"; {output}: a trace is a safetensors file, use a name ending in .safetensors"
                                 + (f", or --npz {output}" if output.suffix == ".npz" else "")))
    if npz is not None and npz.suffix != ".npz":
        raise typer.BadParameter(f"--npz {npz}: use a name ending in .npz")
    if sum(x is not None for x in (prompt, file, token_ids)) != 1:
        raise typer.BadParameter("give the text with -p TEXT, -p - or -f FILE, or token ids with --ids")
    if rounds and draft is None:
        raise typer.BadParameter("--rounds needs --draft")
    if (image or audio) and token_ids is not None:
        raise typer.BadParameter("--image and --audio stand before a text: give it with -p TEXT, -p - or -f FILE")
    if chat and (token_ids is not None or image or audio):
        raise typer.BadParameter("--chat takes a text, and no --ids, --image or --audio")
    for path in filter(None, (output, npz)):
        refuse_overwriting(path, force)
    text, seen = None if token_ids is not None else read_prompt(prompt, file), opened(image, audio, None, image_tokens)
    path = fetched(model, positional)
    m = load(path, backend, arithmetic, threads, 1 if text is None else len(text.encode()) + n_tokens_of(seen), False)
    drafting, media, rendered = {}, [], None
    if chat:
        refuse_without_template(m)
        template, messages = m.file.metadata["tokenizer.chat_template"], [{"role": "user", "content": text}]
        ids, tokenizer = encode_chat(m.tokenizer, template, messages), m.tokenizer
        rendered = render_chat(template, messages, bos_token=tokenizer.token(tokenizer.bos), eos_token=tokenizer.token(tokenizer.eos))
    elif seen:
        ids, media = traced_prompt(m, projector_of(m, path, named(model, positional), mmproj, True), [*seen, text])
    else:
        ids = ids_argument(token_ids) if text is None else m.tokenizer.encode(text)
    if draft is not None:
        drafter = refimpl.load_drafter(draft, m, head=number_or_word(draft_head))
        drafting = {"drafter": drafter, "draft_max": draft_max, "rounds": rounds}
    with contextlib.ExitStack() as held:
        target = output or held.enter_context(scratch(npz.with_suffix(".safetensors")))
        header = write_trace(target, m, ids, positions=positions_argument(positions), tensors=tensors.split(","),
                             logits=number_or_word(logits), prompt=text, template=rendered, progress=bar, media=media, **drafting)
        if npz is not None:
            with replacing(npz) as temporary:
                write_npz(temporary, open_trace(target))
    written = [path for path in (output, npz) if path is not None]
    sizes = [path.stat().st_size for path in written]
    if as_json:
        write(json.dumps({key: value for key, value in header.items() if key != "crc32"}
                         | {"file": str(written[0]), "tensors": len(header["crc32"]), "bytes": sizes[0]}
                         | ({"npz": str(npz)} if npz is not None else {})) + "\n")
        return
    for path, size in zip(written, sizes):
        write(f"{path}: {len(header['crc32'])} tensors, positions: {len(header['positions'])}, {size / 1e6:.1f} MB; "
              f"{header['engine']}, {header['arithmetic']}\n")


# ---- helpers

@contextlib.contextmanager
def scratch(path: Path):
    """Yields the path of a file beside `path` that is gone afterwards."""
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


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
