"""fit."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.app import (
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
    named,
    write,
)
from refimpl.host import physical_cores, usable_cpus

CHANCES = ".84,.60,.39,.27"         # as a user of the 26B-A4B published
BUSY = 0.7                          # of the cores: more, and a note says so


@app.command()
def fit(
    positional: Positional = None, model: ModelPath = None,
    ctx: Annotated[int, typer.Option("-c", "--ctx-size", min=1, help="context in tokens, of each user")] = 8192,
    users: Annotated[int, typer.Option("--users", "--parallel", "-np", min=1, max=256, help="so many get answers at the same time")] = 1,
    n_prompt: Annotated[int, typer.Option("-p", "--n-prompt", min=1, help="tokens of a prompt")] = 512,
    draft: Annotated[bool, typer.Option("--draft", help="with the model's drafter")] = False,
    accept: Annotated[str, typer.Option("--accept", help="with --draft: the chances that the first draft token, the first two, ... are "
                                        "accepted")] = CHANCES,
    mmproj: Annotated[bool, typer.Option("--mmproj", "-mm", help="with the model's projector")] = False,
    check: Annotated[list[Path] | None, typer.Option("--check", metavar="FILE", show_default=False, help="run this file, and compare with "
                                                     "what was predicted (may be repeated); some minutes each")] = None,
    threads: Threads = None, as_json: Json = False,
):
    """Show which Gemma 4 runs here, and how fast.

    Measures this machine for some seconds, and predicts. With -m only that file. Nothing is downloaded: hf:... is looked up in the list.
    """
    from refimpl.cli.show.fit import as_text, check_text
    from refimpl.decode.draft_length import MAX_DRAFT
    from refimpl.lab.bench.fit import Asked, common_files, of_file
    from refimpl.lab.bench.fit import fit as predict

    announce_compiling()
    if check:
        from refimpl.lab.bench.fit_check import check as compare

        if model is not None or positional is not None:
            raise typer.BadParameter("--check FILE names the model; no -m")
        result = compare(check, threads=threads, progress=bar)
        write((json.dumps(result) if as_json else check_text(result)) + "\n")
        return
    name = named(model, positional)
    asked = Asked(ctx, users, n_prompt, tuple(chances_argument(accept))[:MAX_DRAFT] if draft else (), mmproj)
    candidates = common_files(name)
    if not candidates:
        from refimpl.loading.hub import is_remote
        from refimpl.loading.open import open_model

        if is_remote(name):
            known = ", ".join(candidate.name for candidate in common_files() if is_remote(candidate.name))
            raise Failure(f"{name}: is not in the list ({known}); download it first, and give the file")
        candidates = [of_file(open_model(fetched(name)), name)]
    result = predict(asked, candidates, threads=threads, progress=bar)
    _warn_of_others()
    write((json.dumps(result) if as_json else as_text(result)) + "\n")


def _warn_of_others():
    """A note where other programs keep the cores busy, on systems that say so."""
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > BUSY * (cores := physical_cores(usable_cpus())):
        errors.print(f"note: other programs are running (a load of {load:.1f} on {cores} cores); this is of a machine so busy")
