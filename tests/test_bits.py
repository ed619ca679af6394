"""The kernels' results have the same bits on every instruction set, with any number of threads, in any chunking: equal, not close."""

import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shapes import SHAPES, random_model, write_model

from refimpl.kernels.machine.isa import BEST, ORDER

SCRIPT = '''
import hashlib, json, sys
from pathlib import Path
sys.path.insert(0, "tests")
import numba, numpy as np
import refimpl
from refimpl.kernels import matmul
from refimpl.kernels.machine.tiles import tiled
from refimpl.kernels.machine.isa import ISA
from test_kernels import TYPES, matrix, rows

def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()

threads, cut, out = int(sys.argv[1]), sys.argv[2] == "cut", {}
numba.set_num_threads(threads)
for block in TYPES:
    w = tiled(matrix(block, 75, 512), threads)
    for name in ("matmul", "matmul_q8"):
        out[f"{name} {block}"] = digest(getattr(matmul, name)(rows(11, 512), w))
for path in sys.argv[3:]:
    for arithmetic in ("q8", "exact") if path == "built-in" else ("q8",):
        model = refimpl.load(None if path == "built-in" else path, arithmetic=arithmetic, threads=threads)
        n = 530 if path == "built-in" else 70
        ids = np.random.default_rng(0).integers(5, model.config.n_vocab, n)
        whole = model.logits(ids)
        cuts = [1] * 40 + [n - 40], [5] * 14 + [n - 70] * (n > 70), [64] * (n // 64) + [n % 64], [n - 1, 1]
        for sizes in cuts if cut else ():
            cache, first, states = model.new_cache(), 0, []
            for size in sizes:
                states.append(model.states(ids[first:first + size], cache))
                first += size
            assert first == n and np.array_equal(model.head(np.concatenate(states)), whole), (path, arithmetic, sizes)
        again = whole if not cut else refimpl.load(None if path == "built-in" else path, arithmetic=arithmetic, threads=threads).logits(ids)
        assert np.array_equal(whole, again)
        out[f"{Path(path).stem} {arithmetic}"] = digest(whole)
assert numba.get_num_threads() >= threads
print(json.dumps([ISA, out]))
'''


def run(isa: str, threads: int, cut: bool, paths: list[str]) -> dict[str, str]:
    """The digests, from a process of its own; with `cut`, each model also in many chunkings and a second time, and compared there."""
    env = {**os.environ, "REFIMPL_ISA": isa, "NUMBA_NUM_THREADS": str(max(threads, 2)), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", SCRIPT, str(threads), "cut" if cut else "whole", *paths]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    used, digests = json.loads(done.stdout)
    assert used == isa
    return digests


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return ["built-in", *(str(write_model(folder / f"{shape}.gguf", random_model(shape, seed=8), "Q4_0")) for shape in SHAPES)]


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(paths):
    """All types one by one, the five shapes, the model that ships."""
    isas = ORDER[:ORDER.index(BEST) + 1][::-1]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = [pool.submit(run, isa, 2, isa == BEST, paths) for isa in isas]
        first = [future.result() for future in first]
        more = [pool.submit(run, BEST, threads, False, paths) for threads in (1, 3)]
        more = [future.result() for future in more]
    print(f"\n{len(first[0])} digests on {', '.join(isas)}; with 1, 2 and 3 threads on {BEST}")
    for other in (*first[1:], *more):
        differ = [name for name in first[0] if first[0][name] != other[name]]
        assert not differ and other.keys() == first[0].keys(), f"other bits: {differ}"
