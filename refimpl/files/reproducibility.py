"""A short run, hashed: the same for any number of threads, any number of rows in a call, and every instruction set.

Each instruction set needs a process of its own, because it is chosen at import; that process runs this file as a module. It reports in
lines of JSON: `{"compiling": isa}` before kernels are compiled, `{"run": {...}}` for every run, `{"error": "one line"}`, `{"end": true}`.

What is hashed: SHA-256 of the logits at all N_TOKENS positions, float32, little-endian. What equal hashes show: for the weight types and
layers of this file, over these tokens, this machine's kernels (its processor, compiler and thread library) compute the same numbers however
the work is split; and, where the hash is the one in KNOWN, the numbers of the machine that recorded it (x86-64 with AVX-512, under all four
instruction sets; those of Arm have it under an emulator). What they do not show: that the numbers are right (the tests compare with
transformers); other weight types, lengths, or drafters; and nothing about the reference: its last bits depend on the order of sums in NumPy
and in its linear algebra library, and on NumPy's exp and log, so they differ between machines.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from refimpl.kernels.cores.threads import prepare
from refimpl.loading.model import Model, load

N_TOKENS = 80                       # past the window of the built-in model; divisible by all WIDTHS
WIDTHS = (1, 2, 5, 16, N_TOKENS)    # rows a call
KNOWN = {"q8": "75c6c9e935d09cdea8e1a4227df32bae84b49acc36873ed5be5c09d768f59535",
         "exact": "6c2f88657bb367d1a49a057ea04341e7c9c506523c5f732dee340564915a7122"}
"""Hashes of the built-in model by arithmetic."""


def token_ids(n_vocab: int, bos: int) -> list[int]:
    """N_TOKENS ids, made without a tokenizer or random numbers."""
    return [bos, *((31 * i * i + 17 * i + 5) % n_vocab for i in range(1, N_TOKENS))]


def hashed_run(model: Model, width: int) -> str:
    """The hash of one run, `width` rows in a call."""
    ids, cache, digest = token_ids(model.config.n_vocab, model.tokenizer.bos), model.new_cache(N_TOKENS), hashlib.sha256()
    for first in range(0, N_TOKENS, width):
        digest.update(model.head(model.prefill(ids[first:first + width], cache)).astype("<f4").tobytes())
    return digest.hexdigest()


def runs(path: Path | None, combinations: Sequence[tuple[str, int, int]]) -> Iterator[dict[str, object]]:
    """Runs the model in each (arithmetic, threads, width). The weights are loaded once."""
    from refimpl.kernels.machine.isa import ISA
    from refimpl.model.backend import kernel_backend

    model = load(path, threads=max(threads for _, threads, _ in combinations), n_ctx=N_TOKENS)
    for arithmetic, threads, width in combinations:
        model.backend = kernel_backend(arithmetic, threads)
        yield {"isa": ISA, "arithmetic": arithmetic, "threads": threads, "rows": width, "sha256": hashed_run(model, width)}


def plan(isas: Sequence[str], threads: int) -> dict[str, list[tuple[str, int, int]]]:
    """By instruction set, the (arithmetic, threads, width) to run: every width and number of threads on the first, one on the others."""
    numbers = sorted({1, 2, threads})
    star = [(threads, width) for width in WIDTHS] + [(n, 5) for n in numbers if n != threads]
    return {isa: [(arithmetic, *each) for arithmetic in ("q8", "exact") for each in (star if i == 0 else [(threads, 16)])]
            for i, isa in enumerate(isas)}


def run_in_process(path: Path | None, isa: str, combinations: Sequence[tuple[str, int, int]], receive: Callable[[dict], None]):
    """Does `runs` in a new process under `isa`; `receive` gets every message. "portable" turns NumPy's own vector code off, too."""
    most = max(threads for _, threads, _ in combinations)
    environment = os.environ | {"REFIMPL_ISA": isa, "NUMBA_NUM_THREADS": str(max(most, os.cpu_count() or 1))}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent.parent), os.environ.get("PYTHONPATH")]))
    if isa == "portable":
        environment["NPY_DISABLE_CPU_FEATURES"] = ",".join(np.show_config(mode="dicts")["SIMD Extensions"].get("found", []))
    command = [sys.executable, "-m", __name__, json.dumps([None if path is None else str(path), combinations])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment) as process:
        try:
            finished = False
            for line in process.stdout:
                receive(message := json.loads(line))
                finished = "end" in message or "error" in message
            last_words = process.stderr.read().strip().splitlines()
        except BaseException:
            process.kill()
            raise
    if not finished:
        receive({"error": f"the process ended (status {process.returncode}): {last_words[-1] if last_words else 'no message'}"})


def main(request: str):
    """Runs in the new process."""
    from refimpl.kernels.machine.isa import ISA
    from refimpl.kernels.machine.jit import announce

    def send(**message: object):
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()

    path, combinations = json.loads(request)
    prepare(max(threads for _, threads, _ in combinations))
    announce(lambda kernel, weight_types: send(compiling=ISA))
    try:
        for run in runs(None if path is None else Path(path), combinations):
            send(run=run)
    except Exception as e:
        send(error=" ".join(f"{e}".split()))
    else:
        send(end=True)


if __name__ == "__main__":
    main(sys.argv[1])
