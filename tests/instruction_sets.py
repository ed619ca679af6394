"""What is computed under every instruction set: hashes of products, attention, small kernels and models, in one process for each set.

An instruction set is chosen at import, so a set needs a process. `computed(isa, folder)` starts it once for all tests and all workers of
pytest-xdist: what it found lies in `folder`. The best set of the machine computes everything with 1, 2 and 3 threads, the others with 2.
"""

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numba
import numpy as np
from filelock import FileLock
from kernel_cases import ATTENTION, TYPES, attention_case, matrix, ops_cases, rows, tower_cases

import refimpl
from refimpl.kernels import matmul
from refimpl.kernels.attention import attend
from refimpl.kernels.machine.isa import BEST, ISA, ORDER
from refimpl.kernels.machine.tiles import tiled

HERE = Path(__file__).parent
OTHERS = ORDER[:ORDER.index(BEST)]          # the sets of this machine but for the best, the plainest first
ALL_SETS_ALL_TYPES = "REFIMPL_TESTS_ALL_TYPES"          # an environment variable
# one type for each way through the kernels: what differs between sets are intrinsics, and test_simd.py compares all of those. The slowest
# to compile has those of its models only; avxvnni has the intrinsics of avx2 but for dot products of 8-bit integers
ALL_TYPES = dict.fromkeys(("matmul_q8", "matmul"), TYPES)
SOME_TYPES = {"matmul_q8": ("Q4_0", "Q8_0", "Q4_K", "Q6_K"), "matmul": ("Q4_0", "F32")}
FEW_TYPES = {"portable": {"matmul_q8": ("Q4_0",), "matmul": ("F32",)}, "avxvnni": {"matmul_q8": ("Q4_0", "Q8_0"), "matmul": ()}}


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's numbers."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# ---- in the process of an instruction set

def in_parts(model, ids) -> bool:
    """Do prompts cut into parts of many sizes, and a second model, give the bits of one call?"""
    whole, n = model.logits(ids), len(ids)
    cuts = [1] * 40 + [n - 40], [5] * 14 + [n - 70] * (n > 70), [64] * (n // 64) + [n % 64], [n - 1, 1]
    for sizes in cuts:
        cache, first, states = model.new_cache(), 0, []
        for size in sizes:
            states.append(model.prefill(ids[first:first + size], cache))
            first += size
        if first != n or not np.array_equal(model.head(np.concatenate(states)), whole):
            return False
    return True


def digests(threads: int, types: dict[str, tuple[str, ...]], paths: list[str], cut: bool) -> dict[str, str]:
    """The hash of everything by name. With `cut`, models also run in parts, and the hash says so where that changes a bit."""
    numba.set_num_threads(threads)
    found = {}
    for name, blocks in types.items():
        for block in reversed(blocks):           # another process, of test_kernels.py, begins with the first: each compiles for both
            found[f"{name} {block}"] = digest(getattr(matmul, name)(rows(11, 512), tiled(matrix(block, 75, 512), threads)))
    if types == FEW_TYPES["avxvnni"]:
        return found
    for name in ATTENTION:
        found[f"attend, {name}"] = digest(attend(*attention_case(name)))
    for name, function, arguments in (*ops_cases(), *tower_cases()):
        found[name] = digest(function(*arguments))
    for path in [None, *paths]:
        for arithmetic in ("q8", "exact") if path is None and types == ALL_TYPES else ("q8",):
            name, model = f"{Path(path or 'built-in').stem} {arithmetic}", refimpl.load(path, arithmetic=arithmetic, threads=threads)
            ids = np.random.default_rng(0).integers(5, model.config.n_vocab, 530 if path is None else 70)
            found[name] = digest(model.logits(ids))
            if cut and not (in_parts(model, ids)
                            and found[name] == digest(refimpl.load(path, arithmetic=arithmetic, threads=threads).logits(ids))):
                found[name] = "other bits when the prompt comes in parts, or in a second model"
    assert numba.get_num_threads() >= threads
    return found


def main(out: str, *paths: str):
    """The process: writes {"isa", "intrinsics": what pytest said, "digests": {threads: hashes}} into the file `out`."""
    import pytest

    types = ALL_TYPES if os.environ.get(ALL_SETS_ALL_TYPES) else SOME_TYPES if ISA == BEST else FEW_TYPES.get(ISA, SOME_TYPES)
    found = {str(threads): digests(threads, types, list(paths), cut=threads == 2 and ISA == BEST)
             for threads in ((2, 1, 3) if ISA == BEST else (2,))}
    # minutes of compiling, and the hashes say the same of all intrinsics together: only where everything is asked for
    thorough = ISA != BEST and os.environ.get(ALL_SETS_ALL_TYPES)
    status = 0 if not thorough else pytest.main([str(HERE / "test_simd.py"), "-q", "-n", "0", "-p", "no:cacheprovider"])
    Path(out).write_text(json.dumps({"isa": ISA, "intrinsics": int(status), "digests": found}))


# ---- in the tests

@cache
def computed(isa: str, folder: Path, every_type: bool = False) -> dict[str, object]:
    """What the process of `isa` found. `folder` is shared by all workers."""
    paths = [str(path) for path in _models(folder)]
    out, said = (folder / f"{isa}{'-every-type' * every_type}.{ending}" for ending in ("json", "log"))
    with FileLock(out.with_suffix(".lock")):
        if not said.exists():
            env = os.environ | {"REFIMPL_ISA": isa, "NUMBA_NUM_THREADS": "3" if isa == BEST else "2",
                                ALL_SETS_ALL_TYPES: "1" * every_type,
                                # half of the time; that optimizing changes no bit is seen where everything is asked for
                                **({"NUMBA_OPT": "0"} if isa == "portable" and not every_type else {}),
                                "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")]))}
            env = {name: value for name, value in env.items() if not name.startswith("PYTEST")}
            done = subprocess.run([sys.executable, __file__, str(out), *paths], env=env, capture_output=True, text=True, cwd=HERE.parent)
            said.write_text(done.stdout[-10_000:] + done.stderr[-10_000:])
    assert out.exists(), f"the process of {isa} failed: {said.read_text()}"
    found = json.loads(out.read_text())
    assert found["isa"] == isa
    return found | {"said": said.read_text()}


def _models(folder: Path) -> list[Path]:
    """Files of the five shapes, for all processes. (Those need no torch, so it is imported here.)"""
    from shapes import SHAPES, random_model, write_model

    paths = [folder / f"{shape}.gguf" for shape in SHAPES]
    with FileLock(folder / "models.lock"):
        for shape, path in zip(SHAPES, paths):
            if not path.exists():
                write_model(path, random_model(shape, seed=8), "Q4_0")
    return paths


if __name__ == "__main__":
    main(*sys.argv[1:])
