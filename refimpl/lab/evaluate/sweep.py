"""Files x engines x texts -> one table: how good, how far from a control, how large, how fast; a Parquet file with where it came from.

Columns: those of COLUMNS, in this order, one row for each (file, engine, text). What holds for the whole table (versions, options) is JSON
in the schema's metadata, under `refimpl`; `pandas.read_parquet` reads the rest. All figures but tokens_per_second and machines are the same
whoever computes them, and however often the work was interrupted.
"""

import hashlib
import json
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import refimpl
from refimpl.extras import require
from refimpl.files.convert import convert, output_types
from refimpl.formats.gguf import open_gguf
from refimpl.formats.hashing import code_hash, file_hash, files_hash
from refimpl.lab.engines import ARITHMETIC, EVALUATED, KERNELS, parse
from refimpl.lab.evaluate.evaluate import check_memory
from refimpl.lab.evaluate.evaluation import Cutting, Evaluation
from refimpl.lab.evaluate.logit_sources import Side, sha256_of, side_of
from refimpl.lab.evaluate.run_files import write_parquet
from refimpl.lab.evaluate.saved_runs import parts_folder
from refimpl.lab.evaluate.work import IN_THIS_PROCESS, Workers, measured
from refimpl.lab.failures import line_of
from refimpl.loading.hub import local
from refimpl.loading.model import float32_bytes
from refimpl.progress import Progress, silent

COLUMNS = {
    "file": "string", "sha256": "string", "bytes": "int64", "parameters": "int64", "bits_per_weight": "float64", "types": "string",
    "engine": "string", "arithmetic": "string", "text": "string", "text_sha256": "string", "form": "string", "n_ctx": "int32",
    "stride": "int32", "count": "string", "windows": "int32", "tokens": "int64", "text_bytes": "int64", "nll": "float64",
    "nll_error": "float64", "perplexity": "float64", "perplexity_error": "float64", "bits_per_byte": "float64", "against": "string",
    "against_sha256": "string", "against_perplexity": "float64", "kl": "float64", "kl_error": "float64", "kl_50": "float64",
    "kl_90": "float64", "kl_99": "float64", "kl_99.9": "float64", "kl_100": "float64", "same_top": "float64", "same_top_error": "float64",
    "shared_top": "float64", "tokens_per_second": "float64", "machines": "string", "error": "string"}
"""Names and Arrow types. kl_90 is the 90th percentile; tokens_per_second the median over windows, logits included; machines JSON, a list;
where a row could not be computed, error says why and its figures are null."""


@dataclass(frozen=True)
class Sweep:
    """What is to be swept. `models` as `load` takes them (None: the built-in one); `types` of `convert`, into which each is converted first
    (and then it is not in the table itself); `engines` as lab.engines spells them; `against` a file or engine, None for no comparison, but
    with `types` for the model that they were made from.
    """

    models: Sequence[str | None]
    texts: Sequence[Path]
    types: Sequence[str] = ()
    engines: Sequence[str] = ("kernels",)
    against: str | None = None
    cutting: Cutting = field(default_factory=Cutting)

    def __post_init__(self):
        if not self.models or not self.texts or not self.engines:
            raise ValueError("a sweep needs at least one model, one text and one engine")
        for kind in self.types:
            if kind not in output_types():
                raise ValueError(f"unknown type {kind!r}; choose from {', '.join(output_types())}")


def sweep(plan: Sweep, output: Path | None = None, workers: Workers = IN_THIS_PROCESS, progress: Progress = silent) -> dict[str, object]:
    """The table as plain data: rows (by column, COLUMNS), provenance, notes.

    Finished windows and converted files are kept beside `output` (a Parquet file) until all is done, and the same call goes on from there.
    What fails for one file and engine leaves the rest alone: its rows say why (`error`). Raises ValueError (MissingExtra and ClusterError
    among them), GGUFError, OSError, with one line, for what cannot start.
    """
    if output is not None:
        require("pyarrow", "scale")
    with ExitStack() as stack:
        folder = parts_folder(output) if output is not None else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="refimpl-")))
        evaluations = [_evaluation(plan, side, against, text, workers) for side, against in _sides(plan, folder / "models", progress)
                       for text in plan.texts]
        if output is not None:
            for one in evaluations:
                one.resume(folder / hashlib.sha256(json.dumps(one.identity(), sort_keys=True).encode()).hexdigest()[:16])
        failed = _measure(evaluations, workers, progress)
        rows = [_row(one, failed.get(one.side)) for one in evaluations]
        provenance = _provenance(plan)
        if output is not None:
            pa = require("pyarrow", "scale")
            schema = pa.schema([(key, getattr(pa, kind)()) for key, kind in COLUMNS.items()])
            write_parquet(output, pa.Table.from_pylist(rows, schema=schema), provenance)
            if not failed:
                shutil.rmtree(folder, ignore_errors=True)
    return {"rows": rows, "provenance": provenance, "output": None if output is None else str(output),
            "notes": list(dict.fromkeys(note for one in evaluations for note in one.notes)), "errors": list(dict.fromkeys(failed.values()))}


def _sides(plan: Sweep, folder: Path, progress: Progress) -> Iterator[tuple[Side, Side | None]]:
    """Every file on every engine, with what it is compared with. Converts files, and directories.

    A file that others are compared with is computed in float32, by the first engine of ours that is asked for.
    """
    engine = None if plan.against is None else parse(plan.against, EVALUATED)[0]
    exact = f"{next((name for name in map(_name, plan.engines) if name in ARITHMETIC), KERNELS)}:exact"
    common = None if plan.against is None or engine else _on(exact, plan.against)
    for model in plan.models:
        source = None if model is None else local(model)
        if source is not None and source.is_dir():
            model = _converted(source, "auto", folder, progress)
        control = _on(exact, model)
        for file in [_converted(control.path, kind, folder, progress) for kind in plan.types] or [model]:
            against = _on(plan.against, file) if engine else common if plan.against else control if plan.types else None
            for name in plan.engines:
                yield _on(name, file), against


def _on(engine: str, model: str | Path | None) -> Side:
    """A file on `kernels`, `kernels:exact`, ..."""
    return side_of(_name(engine), engine.partition(":")[2] or None, model)


def _name(engine: str) -> str:
    return engine.partition(":")[0]


def _converted(source: Path, kind: str, folder: Path, progress: Progress) -> Path:
    """A model as a file of another type, made unless a run before has."""
    if source.is_dir():
        digest = files_hash(sorted(path for path in source.iterdir() if path.is_file()))
    else:
        with open_gguf(source) as file:
            digest = sha256_of(file.files())
    made = folder / digest[:16] / f"{source.stem}-{kind}.gguf"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        convert(source, made, kind, progress)
    return made


def _evaluation(plan: Sweep, side: Side, against: Side | None, text: Path, workers: Workers) -> Evaluation:
    return Evaluation(side, [text], plan.cutting, against, hashed=True, near=workers.near)


def _measure(evaluations: Sequence[Evaluation], workers: Workers, progress: Progress) -> dict[Side, str]:
    """Fills in all figures, one file after the other as far as there are workers for it. Returns why some have none."""
    missing = [(i, one.missing()) for i, one in enumerate(evaluations)]
    n_ctx = max(one.n_ctx for one in evaluations)
    failed: dict[Side, str] = {}

    def tasks():
        for i, numbers in missing:
            for number, task in evaluations[i].tasks(numbers, n_ctx, workers.threads):
                if evaluations[i].side not in failed:
                    yield (i, number), task
    n = sum(len(numbers) for _, numbers in missing)
    if workers.near and workers.jobs > 1 and n:
        for one in evaluations:
            check_memory(one, min(workers.jobs, n))
    with progress("tokens", sum(one.n_tokens for one in evaluations)) as step:
        step(sum(one.windows[number].n_counted for one in evaluations for number in one.parts))
        for (i, number), part in measured(tasks(), n, workers, progress):
            one = evaluations[i]
            if isinstance(part, Exception):
                failed.setdefault(one.side, line_of(part))
            else:
                one.add(number, part)
            step(one.windows[number].n_counted)
    return failed


def _row(one: Evaluation, error: str | None) -> dict[str, object]:
    """A row of the table, null where something is not known."""
    file, parameters = one.file, float32_bytes(one.file) // 4
    text = one.about["documents"][0].partition(".jsonl:")
    known = {"file": one.side.path.name, "sha256": one.side.sha256, "bytes": file.n_bytes, "parameters": parameters,
             "bits_per_weight": 8 * file.n_bytes / parameters, "engine": one.side.engine, "arithmetic": one.side.arithmetic,
             "types": ", ".join(f"{n} {kind}" for kind, n in Counter(info.type for info in file.tensors.values()).most_common()),
             "text": text[0] + text[1].rstrip(":"), "form": one.about["form"], "windows": len(one.windows), "error": error}
    known |= {"text_sha256": file_hash(known["text"])} | {key: one.about[key] for key in ("n_ctx", "stride", "count")}
    if one.against is not None:
        known |= {"against": str(one.against), "against_sha256": one.against.sha256}
    if error is None:
        result, parts = one.result(), one.in_order()
        speeds = [(len(window.ids) - 1) / part.seconds for window, part in zip(one.windows, parts)]
        known |= {key: result[key] for key in ("tokens", "nll", "nll_error", "perplexity", "perplexity_error", "bits_per_byte")}
        known |= {"text_bytes": result["bytes"], "tokens_per_second": statistics.median(speeds),
                  "machines": json.dumps([json.loads(text) for text in sorted({part.machine for part in parts})])}
        if compared := result.get("comparison"):
            known |= {"against_perplexity": compared["base_perplexity"], "kl": compared["kl_low"], "kl_error": compared["kl_low_error"],
                      **{f"kl_{share}": value for share, value in compared["kl_low_percentiles"].items()},
                      **{key: compared[key] for key in ("same_top", "same_top_error", "shared_top")}}
    return {key: known.get(key) for key in COLUMNS}


def _provenance(plan: Sweep) -> dict[str, object]:
    """What holds for the whole table."""
    cutting = plan.cutting
    return {"refimpl": refimpl.__version__, "code": code_hash(),
            "models": [str(model or "built-in") for model in plan.models], "types": list(plan.types),
            "engines": list(plan.engines), "against": plan.against,
            "texts": list(map(str, plan.texts)), "n_ctx": cutting.n_ctx,
            "stride": cutting.stride, "count": cutting.count, "raw": cutting.raw, "n_windows": cutting.n_windows}
