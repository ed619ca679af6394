"""Is this file whole, and does this machine compute with it as others do? Seven checks:

    structure    container, configuration, tokenizer, and a place for every tensor
    metadata     keys of the architecture that this version does not know: named, and refused by `strict`
    sha256       of the file's bytes, compared with a given one, or with the one that the hub lists; otherwise the hash is only reported
    numbers      every scale of every block, and every unquantized weight, is finite
    copy         the rearranged weights on the disk, where there are any (loading/prepared.py), are the file's, byte for byte
    same bits    a short run gives the same bits for any number of threads, any number of rows a call, every instruction set
                 (reproducibility.py)
    known bits   those of the built-in model are the ones recorded in reproducibility.KNOWN

A file that passes may still be a different model: compare its SHA-256 with the publisher's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from refimpl.files import reproducibility
from refimpl.formats.gguf import GGUFError
from refimpl.formats.hashing import file_hash
from refimpl.formats.quants.blocks import BLOCKS, Block, fields_of
from refimpl.formats.quants.codecs import dequantize
from refimpl.formats.source import TensorSource, releasing
from refimpl.kernels.cores.threads import prepare, running
from refimpl.loading.hub import listed_sha256
from refimpl.loading.memory import products_of
from refimpl.loading.model import BUILT_IN
from refimpl.loading.open import open_model
from refimpl.model.config import DRAFTER_ARCHITECTURE, architecture_of, config_from_gguf, unknown_keys
from refimpl.model.weights import vocabulary_size, weights_from_gguf
from refimpl.progress import Advance, Progress, silent
from refimpl.text.tokenizer import Tokenizer, TokenizerError

STEP_BYTES = 16 << 20               # of a tensor checked at a time
SCATTERED = ("IQ1_M",)              # types whose scale is split over several fields: their weights are checked instead
OK, FAILED, LEFT_OUT = "ok", "FAILED", "left out"


@dataclass
class Check:
    """The result of one check: its state (OK, FAILED, LEFT_OUT), a line of summary, and a line for each thing that is wrong."""

    name: str
    state: str
    summary: str
    findings: list[str] = field(default_factory=list)


def verify(path: Path | None, *, sha256: Sequence[str] = (), strict: bool = False, run: bool = True, threads: int | None = None,
           progress: Progress = silent, notify: Callable[[str], None] = lambda line: None) -> dict[str, object]:
    """All checks of a file or directory (None: the built-in model), as plain data; "ok" is true where nothing is wrong.

    sha256    hexadecimal digests, one for each part of a split model; without, a file in the hub's cache must have the listed one, and of
              others the hash is only reported
    strict    metadata keys that this version does not know are an error
    run       False leaves out the checks that compute
    notify    is called with a line before something that takes long

    Raises OSError, and ValueError for `threads`.
    """
    name = Path(BUILT_IN if path is None else path)
    n_threads = prepare(threads)
    structure, file = check_structure(name)
    checks = [structure, check_metadata(file, strict), check_hash(file_paths(name, file), sha256)]
    if file is None:
        checks.append(Check("numbers", LEFT_OUT, "the file cannot be read"))
    else:
        with progress("MB checked", file.n_bytes, 10**6) as advance:
            checks.append(check_numbers(file, advance))
        checks.append(check_copy(file, n_threads, progress))
    why = next((reason for state, reason in (
        (not run, "as requested"), (file is not None and _is_drafter(file), "a drafter cannot run alone"),
        (any(check.state == FAILED for check in checks), "an earlier check failed")) if state), None)
    if why is None:
        checks += check_runs(path, n_threads, progress, notify)
    else:
        checks += [Check("same bits", LEFT_OUT, why), Check("known bits", LEFT_OUT, why)]
    return {"path": str(name), "ok": all(check.state != FAILED for check in checks), "checks": [asdict(check) for check in checks]}


# ---- the file

def check_structure(path: Path) -> tuple[Check, TensorSource | None]:
    """Opens the file and finds a place for every tensor. The file is None where it cannot be opened."""
    file = None
    try:
        file = open_model(path)
        found = f"{file.format}, {len(file.tensors)} tensors"
        if _is_drafter(file):
            return Check("structure", OK, f"{found}; a drafter, whose layers are checked when it is loaded with its target"), file
        config = config_from_gguf(file.metadata, file.tensors.keys(), vocabulary_size(file), file.path)
        weights_from_gguf(file, config)
        tokenizer = Tokenizer.from_metadata(file.metadata, str(file.path))
        if tokenizer.n_vocab != config.n_vocab:
            raise GGUFError(file.path, None, f"the vocabulary has {tokenizer.n_vocab} tokens, the embedding {config.n_vocab} rows")
        return Check("structure", OK, "; ".join([f"{found}, {config.n_layer} layers, {config.n_vocab} tokens", *tokenizer.warnings])), file
    except (GGUFError, TokenizerError) as e:
        return Check("structure", FAILED, "", [str(e)]), file


def _is_drafter(file: TensorSource) -> bool:
    return architecture_of(file.metadata) == DRAFTER_ARCHITECTURE


def file_paths(path: Path, file: TensorSource | None) -> list[Path]:
    """The files of a model: the parts of a split one, the safetensors files of a directory."""
    return [path] if file is None else file.files()


def check_metadata(file: TensorSource | None, strict: bool) -> Check:
    """Keys of the file's architecture that this version does not know, and that may change what the model computes."""
    if file is None:
        return Check("metadata", LEFT_OUT, "the file cannot be read")
    unknown = unknown_keys(file.metadata)
    if not unknown:
        return Check("metadata", OK, f"every {architecture_of(file.metadata)}.* key is known")
    findings = [f"{file.path}: {key} is not a key this version knows, and it may change the result; a newer refimpl may read it"
                for key in unknown]
    summary = f"not known to this version, and ignored: {', '.join(unknown)} (--strict refuses them)"
    return Check("metadata", FAILED if strict else OK, summary, findings)


def check_hash(paths: Sequence[Path], wanted: Sequence[str]) -> Check:
    """SHA-256 of every file, compared with the given ones or those that the hub lists, if there are any."""
    if not all(path.is_file() for path in paths):
        return Check("sha256", LEFT_OUT, "there is no such file")
    try:
        found = [file_hash(path) for path in paths]
    except OSError as e:
        return Check("sha256", FAILED, "", [f"{e.filename}: {e.strerror}"])
    given = "as given"
    if not wanted:
        wanted, given = [listed_sha256(path) or "" for path in paths], "as the hub lists it"
        if not all(wanted):
            return Check("sha256", OK, f"{', '.join(found)} (not compared: none was given)")
    if len(wanted) != len(paths):
        return Check("sha256", FAILED, "", [f"{len(wanted)} hashes given for a model of {len(paths)} files"])
    findings = [f"{path}: {theirs}, expected {ours.lower()}; another file, or a damaged one: download it again"
                for path, theirs, ours in zip(paths, found, wanted) if theirs != ours.lower()]
    return Check("sha256", FAILED if findings else OK, f"{', '.join(found)}, {given}", findings)


def check_numbers(file: TensorSource, advance: Advance = lambda n_bytes: None) -> Check:
    """Is every number that the file holds as a float (scales, minimums, unquantized weights) finite?"""
    findings, n_blocks, advance = [], 0, releasing(file, advance)
    for name, info in file.tensors.items():
        block = BLOCKS[info.type]
        n_blocks += info.n_bytes // block.n_bytes
        findings += [f"{file.path}: tensor {name} ({info.type}): {n:,} of {info.n_bytes // block.n_bytes:,} blocks with {what} that is "
                     f"not finite, the first in block {at % (info.row_bytes // block.n_bytes)} of row "
                     f"{at // (info.row_bytes // block.n_bytes)}, byte {info.offset + at * block.n_bytes}"
                     for what, n, at in not_finite(file.raw(name), block)]
        advance(info.n_bytes)
    return Check("numbers", FAILED if findings else OK, f"{n_blocks:,} blocks, all finite", findings)


def not_finite(raw: np.ndarray, block: Block) -> Iterator[tuple[str, int, int]]:
    """(field, number of blocks, first block counted through the tensor) for each float field with something that is not finite."""
    rows = raw.reshape(-1, raw.shape[-1])
    per_row, step = raw.shape[-1] // block.n_bytes, max(1, STEP_BYTES // raw.shape[-1])
    wrong: dict[str, list[int]] = {}
    for first in range(0, len(rows), step):
        blocks = fields_of(rows[first:first + step], block).ravel()
        for name, kind, count in block.fields:
            if block.name in SCATTERED:
                if name != "scales":
                    continue
                bad = ~np.isfinite(dequantize(rows[first:first + step], block.name)).reshape(-1, block.elements)
            elif np.dtype(kind).kind == "f":
                bad = ~np.isfinite(blocks[name])
            elif block.name == "BF16":                              # NumPy has no bfloat16; not finite: an exponent of all ones
                bad = blocks[name] & np.uint16(0x7F80) == 0x7F80
            else:
                continue
            at = np.flatnonzero(bad.any(axis=1) if count > 1 else bad)
            if len(at):
                seen = wrong.setdefault(name, [0, first * per_row + int(at[0])])
                seen[0] += len(at)
    words = {"x": "a number", "d": "a scale (d)", "m": "a minimum (m)", "dmin": "a minimum (dmin)", "scales": "a scale"}
    return ((words.get(name, name), n, at) for name, (n, at) in wrong.items())


def check_copy(file: TensorSource, threads: int, progress: Progress = silent) -> Check:
    """Are the rearranged weights that are kept on the disk those of the file?"""
    from refimpl.kernels.machine.tiles import tiled  # here: it takes a third of a second
    from refimpl.loading.tile_file import copy_of

    if _is_drafter(file):
        return Check("copy", LEFT_OUT, "that of a drafter is compared when it is loaded, in samples")
    try:
        config = config_from_gguf(file.metadata, file.tensors.keys(), vocabulary_size(file), file.path)
        matrices = products_of(weights_from_gguf(file, config))
        copy = copy_of(file, matrices)
    except (GGUFError, OSError) as e:
        return Check("copy", LEFT_OUT, f"the file cannot be read: {e}")
    wrong, there = list(copy.damaged), [matrix for matrix in matrices if matrix.name in copy.found]
    if not wrong and not there:
        return Check("copy", LEFT_OUT, "no rearranged weights on the disk")
    with running(threads), progress("MB compared", sum(matrix.n_bytes for matrix in there), 10**6) as advance:
        for matrix in there:
            if not np.array_equal(copy.find(matrix).raw, tiled(matrix.read(), threads).raw):
                wrong.append(matrix.name)
            advance(matrix.n_bytes)
    remedy = "`refimpl cache --clear weights` removes it, the next start makes it again"
    return Check("copy", FAILED if wrong else OK, f"{len(there)} of {len(matrices)} matrices in {copy.folder}",
                 [f"{copy.data}: {name} is not what the file has; {remedy}" for name in wrong])


# ---- the machine

def check_runs(path: Path | None, threads: int, progress: Progress = silent, notify: Callable[[str], None] = lambda line: None
               ) -> list[Check]:
    """Short runs on every instruction set that this machine has, compared with each other and, of the built-in model, with KNOWN."""
    from refimpl.kernels.machine.isa import BEST, ORDER

    isas = ORDER[:ORDER.index(BEST) + 1][::-1]
    plan = reproducibility.plan(isas, threads)
    found, findings, compiling = [], [], set()
    with progress("runs", sum(map(len, plan.values()))) as advance:
        def receive(message: dict[str, object]):
            if isa := message.get("compiling"):
                if isa not in compiling:
                    notify(f"compiling kernels for {isa} (a minute or two; they are kept)")
                compiling.add(isa)
            elif "run" in message:
                found.append(message["run"])
                advance(1)
            elif "error" in message:
                findings.append(message["error"])

        for isa, combinations in plan.items():
            reproducibility.run_in_process(path, isa, combinations, receive)
            if findings:
                return [Check("same bits", FAILED, "", findings), Check("known bits", LEFT_OUT, "the runs were not finished")]
    return compare_runs(found, path is None)


def compare_runs(found: Sequence[dict[str, object]], built_in: bool) -> list[Check]:
    """For each arithmetic: are the hashes of all runs equal, and are they the known ones?"""
    findings, unknown, hashes = [], [], {}
    for arithmetic in sorted({run["arithmetic"] for run in found}):
        own = [run for run in found if run["arithmetic"] == arithmetic]
        hashes[arithmetic] = own[0]["sha256"]
        findings += [f"{arithmetic}: other bits on {_where(run)} than on {_where(own[0])}" for run in own
                     if run["sha256"] != own[0]["sha256"]]
        unknown += [f"{arithmetic}: {own[0]['sha256']} on this machine, expected {reproducibility.KNOWN[arithmetic]}"
                    for _ in [0] if built_in and own[0]["sha256"] != reproducibility.KNOWN[arithmetic]]
    count = {key: ", ".join(map(str, dict.fromkeys(run[key] for run in found))) for key in ("threads", "rows", "isa")}
    summary = f"{len(found)} runs: {count['isa']}; threads: {count['threads']}; rows a call: {count['rows']}"
    shown = ", ".join(f"{arithmetic} {value[:16]}" for arithmetic, value in hashes.items())
    known = (Check("known bits", FAILED if unknown else OK, f"{shown}: as recorded", unknown) if built_in else
             Check("known bits", LEFT_OUT, f"recorded for the built-in model only (verify without -m); here {shown}"))
    return [Check("same bits", FAILED if findings else OK, summary, findings), known]


def _where(run: dict[str, object]) -> str:
    return f"{run['isa']}, threads {run['threads']}, {run['rows']} rows a call"
