"""compare: which tensor of another engine departs first, and why."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.app import Failure, Force, Json, Threads, announce_compiling, app, errors, refuse_overwriting, replacing, write
from refimpl.extras import require
from refimpl.lab.compare.engines.convention import TEXT

CONVENTION = "\n\n".join("\b\n" + paragraph for paragraph in TEXT.split("\n\n"))      # \b: click keeps the lines of a paragraph
EXPORTERS = {"pytorch": "pytorch.py", "cpp": "refimpl_npz.hpp", "mlx": "mlx.py"}


@app.command(epilog=CONVENTION)
def compare(
    a: Annotated[str | None, typer.Argument(metavar="TRACE", show_default=False, help="the correct trace (refimpl trace)")] = None,
    b: Annotated[str | None, typer.Argument(metavar="OTHER", show_default=False, help="what to judge: a trace, .npz (below), what "
                                            "llama.cpp printed (.txt) or saved (.bin), or an engine to run: transformers:DIRECTORY, "
                                            "llama.cpp:FILE.gguf")] = None,
    model: Annotated[Path | None, typer.Option("-m", "--model", show_default=False, help="the model, to measure how rounding errors grow "
                                               "in it (default: the one of the trace)")] = None,
    mmproj: Annotated[Path | None, typer.Option("--mmproj", "-mm", show_default=False, help="the projector, likewise, of a trace with "
                                                "pictures or sounds")] = None,
    guess: Annotated[bool, typer.Option("--guess", help="guess how rounding errors grow, without running the model")] = False,
    steps: Annotated[bool, typer.Option("--steps", help="judge every step from the engine's own inputs: finds all faults")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="for transformers: float32, bfloat16 or float16")] = "float32",
    everything: Annotated[bool, typer.Option("--all", help="list every tensor")] = False,
    picture: Annotated[Path | None, typer.Option("--plot", show_default=False, help="write a heat map, layers by tensors (.png)")] = None,
    html: Annotated[Path | None, typer.Option("--html", show_default=False, help="write a report: one page, with the picture of the tensor "
                                              "that departs and code that would make such a mistake")] = None,
    junit: Annotated[Path | None, typer.Option("--junit", show_default=False, help="write JUnit's XML: each tensor is a test case")] = None,
    sarif: Annotated[Path | None, typer.Option("--sarif", show_default=False, help="write SARIF 2.1.0: what departs is a result")] = None,
    check: Annotated[str | None, typer.Option("--check", metavar="FILE", show_default=False, help="say what is wrong with a file of "
                                              "another engine, by itself or for TRACE; exit status 0: nothing; 3: something")] = None,
    exporter: Annotated[str | None, typer.Option("--exporter", show_default=False, help="print code that writes such a file: "
                                                 f"{', '.join(EXPORTERS)}")] = None,
    threads: Threads = None, force: Force = False, as_json: Json = False,
):
    """Name the first tensor that departs from a trace. Exit status 0: none does; 1: one does; 2: wrong usage; 3: could not compare."""
    if exporter is not None:
        write(exporter_code(exporter))
        return
    if check is not None:
        if b is not None:
            raise typer.BadParameter(f"--check takes TRACE, or nothing else: what is {b}?")
        with exits_3(as_json):
            ok = checked(check, a, as_json)
        raise typer.Exit(0 if ok else 3)
    if a is None or b is None:
        raise typer.BadParameter("give two: the trace to judge by (refimpl trace), then what to judge")
    if guess and steps:
        raise typer.BadParameter("--steps runs the model, --guess does not: choose one of them")
    with exits_3(as_json):
        writers = reports(picture, html, junit, sarif, force)
        result = judged(a, b, model, mmproj, guess, steps, dtype, threads or 1)
        for path, write_report in writers.items():
            with replacing(path) as temporary:
                write_report(result, temporary)
    from refimpl.cli.show.compare import as_text
    from refimpl.lab.compare.reports.data import figures

    write((json.dumps(figures(result)) if as_json else as_text(result, everything)) + "\n")
    raise typer.Exit({"same": 0, "departs": 1, "undecided": 3}[result.verdict])


# ---- helpers

def judged(a: str, b: str, model: Path | None, mmproj: Path | None, guess: bool, steps: bool, dtype: str, threads: int):
    """The comparison of `b` with the trace `a`."""
    from refimpl.lab.compare.compare import compare as judge
    from refimpl.lab.compare.compare import compare_steps, compare_with
    from refimpl.lab.compare.engines.choose import open_any, open_first
    from refimpl.lab.compare.stages import before_tensors
    from refimpl.lab.compare.tolerance import model_of, projector_of
    from refimpl.lab.compare.towers.inputs import inputs_of, with_ids_of

    first = open_first(a, b)
    second = with_ids_of(first, open_any(b, first.ids, dtype, threads, first))
    if guess or before_tensors(first, second)[1] is not None:
        return judge(first, second)
    announce_compiling()
    found, why = model_of(first, second, model)
    media = []
    if found is not None and first.facts.get("media"):
        projector, why = projector_of(found, first, second, mmproj)
        found = found if projector is not None else None
        media = [] if projector is None else inputs_of(found, projector, *((second, first) if steps else (first, second)))
    if found is not None:
        return compare_steps(found, second, media) if steps else compare_with(found, first, second, media)
    if steps:
        raise Failure(f"--steps runs the model: {why}; -m FILE names it")
    errors.print(f"note: {why}; tolerances are guessed, -m FILE measures them")
    return judge(first, second)


def reports(picture: Path | None, html: Path | None, junit: Path | None, sarif: Path | None, force: bool) -> dict[Path, Callable]:
    """path -> what writes a comparison there. Raises before any work what would fail after it."""
    from refimpl.lab.compare.reports import data, heat_map, junit_xml, page
    from refimpl.lab.compare.reports import sarif as sarif_json

    makers = (picture, heat_map.plot), (html, data.text_of(page.as_html)), (junit, data.text_of(junit_xml.as_junit)), (
        sarif, data.text_of(sarif_json.as_sarif))
    wanted = {path: maker for path, maker in makers if path is not None}
    if len(wanted) < sum(path is not None for path, _ in makers):
        raise Failure("two reports have the same name")
    for path in wanted:
        refuse_overwriting(path, force)
    if picture is not None:
        require("matplotlib", "plot")
    return wanted


def checked(path: str, trace: str | None, as_json: bool) -> bool:
    """--check: writes what is wrong with a file. Is nothing?"""
    import dataclasses

    from refimpl.lab.compare.engines.check import check
    from refimpl.lab.compare.engines.choose import open_first

    found = check(path, None if trace is None else open_first(trace, path))
    if as_json:
        write(json.dumps(dataclasses.asdict(found) | {"ok": found.ok}) + "\n")
        return found.ok
    lines = [f"{found.where}: {found.found}", *(f"wrong: {line}" for line in found.wrong), *(f"note: {line}" for line in found.notes)]
    write("\n".join([*lines, "it can be compared" if found.ok else f"{len(found.wrong)} to change; refimpl compare --help has the "
                     "convention"]) + "\n")
    return found.ok


def exporter_code(name: str) -> str:
    """The code of --exporter."""
    from importlib.resources import files

    if name not in EXPORTERS:
        raise typer.BadParameter(f"--exporter {name}: expected {', '.join(EXPORTERS)}")
    return (files("refimpl.lab.compare.exporters") / EXPORTERS[name]).read_text(encoding="utf-8")


@contextlib.contextmanager
def exits_3(as_json: bool):
    """An error becomes one line and exit status 3, because 1 means that the engines differ."""
    from refimpl.cli import complain

    try:
        yield
    except Exception as e:
        status = complain(e, as_json)
        raise typer.Exit(3 if status == 1 else status) from None
