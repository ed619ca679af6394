"""Kept kernels: taken from the cache folder when they are there and whole, compiled otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba import njit

from refimpl.kernels.machine.jit import per_row

SCRIPT = '''
import numpy as np
from refimpl.kernels.machine.jit import announce
from refimpl.kernels import ops
compiled = []
announce(compiled.append)
print(ops.softcap(np.linspace(-50, 50, 20, dtype=np.float32), 30.0).tobytes().hex(), *compiled)
'''


def run(folder: Path) -> tuple[str, list[str]]:
    """(result, kernels that had to be compiled) of a process that keeps its kernels in `folder`."""
    env = {**os.environ, "REFIMPL_CACHE_DIR": str(folder), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    result, *compiled = done.stdout.split()
    return result, compiled


def test_damaged_files_are_compiled_again(tmp_path):
    want, compiled = run(tmp_path)
    assert compiled and run(tmp_path) == (want, [])
    for ending in ("nbi", "nbc"):
        for damage in (lambda raw: b"", lambda raw: raw[:len(raw) // 2]):
            files = list(tmp_path.rglob(f"*.{ending}"))
            assert files
            for file in files:
                file.write_bytes(damage(file.read_bytes()))
            assert run(tmp_path) == (want, compiled)
            assert run(tmp_path) == (want, [])


@pytest.mark.parametrize("name", ["a file", "a file/below"])
def test_no_folder_to_keep_them_in(tmp_path, name):
    (tmp_path / "a file").write_text("in the way")
    assert run(tmp_path / name)[1] == run(tmp_path / name)[1] != []


def test_a_piece_for_one_row_is_one_for_several():
    """Tuples hold a value for each row; everything else is shared. Compiled as in plain Python."""
    @per_row
    def moved(place, step, factor):
        return place + step * factor

    def three(a, b, c):
        return moved((a, b, c), 10, (1, 2, 3)), moved((a,), 1, 1)
    assert three(1, 2, 3) == njit(three)(1, 2, 3) == ((11, 22, 33), (2,))
