"""Kept kernels: taken from the cache folder when they are there and whole, compiled otherwise."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import matrix, rows
from numba import njit

from refimpl.kernels import matmul, ops
from refimpl.kernels.machine import cache_folder
from refimpl.kernels.machine.jit import announce, per_row
from refimpl.kernels.machine.tiles import tiled

ROOT = Path(__file__).parent.parent

SCRIPT = '''
import numpy as np
from refimpl.kernels.machine.jit import announce
from refimpl.kernels import ops
compiled = []
announce(lambda kernel, weight_types: compiled.append(kernel))
print(ops.limit(np.linspace(-50, 50, 20, dtype=np.float32), -7.3, 11.1).tobytes().hex(), *compiled)
'''


def run(folder: Path, installed_in: Path = ROOT) -> tuple[str, list[str]]:
    """(result, kernels that had to be compiled) of a process that keeps its kernels in `folder`."""
    env = {**os.environ, "REFIMPL_CACHE_DIR": str(folder), "PYTHONPATH": str(installed_in)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, cwd=installed_in)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    result, *compiled = done.stdout.split()
    return result, compiled


def test_damaged_files_are_compiled_again(tmp_path):
    want, compiled = run(tmp_path)
    assert compiled
    for ending, damage in (("nbi", lambda raw: b""), ("nbc", lambda raw: raw[:len(raw) // 2])):
        files = list(tmp_path.rglob(f"*.{ending}"))
        assert files
        for file in files:
            file.write_bytes(damage(file.read_bytes()))
        assert run(tmp_path) == (want, compiled)
    elsewhere = tmp_path / "another environment"
    shutil.copytree(ROOT / "refimpl", elsewhere / "refimpl", ignore=shutil.ignore_patterns("__pycache__", "*.gguf"))
    assert run(tmp_path, elsewhere) == (want, [])            # and what was written instead is whole


@pytest.mark.parametrize("name, times", [("a file", 1), *(pytest.param(name, 2, marks=pytest.mark.exhaustive)
                                                         for name in ("a file", "a file/below"))])
def test_no_folder_to_keep_them_in(tmp_path, name, times):
    (tmp_path / "a file").write_text("in the way")
    compiled = [run(tmp_path / name)[1] for _ in range(times)]
    assert compiled[0] == compiled[-1] != []
    assert list(tmp_path.iterdir()) == [tmp_path / "a file"] and (tmp_path / "a file").read_text() == "in the way"


def test_a_function_of_one_row_becomes_one_of_several():
    """Tuples hold a value for each row; everything else is shared. Compiled as in plain Python."""
    @per_row
    def moved(place, step, factor):
        return place + step * factor

    def three(a, b, c):
        return moved((a, b, c), 10, (1, 2, 3)), moved((a,), 1, 1)
    assert three(1, 2, 3) == njit(three)(1, 2, 3) == ((11, 22, 33), (2,))


def test_compiling_is_announced_with_the_weight_types():
    def first(fmt, x, other):
        return x[0]
    first.__module__ = "refimpl.kernels.made_up"        # as quickly compiled as can be
    found, formats = [], matmul.FORMATS["q8"]
    announce(lambda kernel, weight_types: found.append((kernel, weight_types)))
    njit(first)(formats["F32"], np.ones(1), formats["Q4_0"])
    njit(first)(formats["F32"], np.ones(1), formats["F32"])
    njit(ops.capped_numbers.py_func)(np.ones(16, np.float32), 1.0, np.ones(16, np.float32), 1)      # however full the cache is
    assert found == [("first", ("F32", "Q4_0")), ("first", ("F32",)), ("capped_numbers", ())]


@pytest.mark.exhaustive
def test_compiling_a_product_is_announced_once():
    w, found = tiled(matrix("F32", 1, 32), 1), []
    announce(lambda kernel, weight_types: found.append((kernel, weight_types)))
    njit(matmul.multiply.py_func, parallel=True)(matmul.FORMATS["q8"]["F32"], w.raw[0], rows(1, 32), np.empty((1, 1), np.float32), 1)
    assert found == [("multiply", ("F32",))]


# ---- the folders

def folder(root: Path, name: str, days: float = 0) -> Path:
    made = root / name
    made.mkdir(parents=True)
    (made / "kernel.nbc").write_bytes(bytes(1000))
    os.utime(made, (time.time() - 86400 * days,) * 2)
    return made


def test_folders_nobody_uses_are_removed_when_a_new_one_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_CACHE_DIR", str(tmp_path))
    old = folder(tmp_path, "kernels-avx2-0123456789abcdef", 15)
    kept = [folder(tmp_path, name, days) for name, days in (
        ("kernels-avx2-1123456789abcdef", 13), ("kernels-avx512-0123456789abcdef", 15), ("kernels-avx2-mine", 99), ("models", 99))]
    ours = cache_folder.open_folder("avx2")
    assert ours.parent == tmp_path and ours.is_dir() and not old.exists() and all(path.exists() for path in kept)
    old = folder(tmp_path, old.name, 15)
    os.utime(ours, (0, 0))
    assert cache_folder.open_folder("avx2") == ours and old.exists()          # only when one is made
    assert time.time() - ours.stat().st_mtime < 60                            # and using it keeps it from being removed


def test_a_folder_that_cannot_be_removed_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_CACHE_DIR", str(tmp_path))
    old = folder(tmp_path, "kernels-avx2-0123456789abcdef", 15)

    def refused(path):
        raise PermissionError(path)
    monkeypatch.setattr(shutil, "rmtree", refused)
    assert cache_folder.open_folder("avx2").is_dir() and old.exists()


def test_folders_are_listed_and_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_CACHE_DIR", str(tmp_path / "none yet"))
    assert cache_folder.cache_root() == tmp_path / "none yet" and cache_folder.kernel_folders() == []
    monkeypatch.setenv("REFIMPL_CACHE_DIR", str(tmp_path))
    old, other = folder(tmp_path, "kernels-avx2-0123456789abcdef"), folder(tmp_path, "models")
    ours = cache_folder.open_folder("avx2")
    assert sorted(cache_folder.kernel_folders()) == sorted([(old, 1000, False), (ours, 0, True)])
    with pytest.raises(ValueError, match="models is not a folder of compiled kernels"):
        cache_folder.remove([old, other])
    assert old.exists() and other.exists()
    cache_folder.remove([old])
    assert not old.exists() and cache_folder.kernel_folders() == [(ours, 0, True)]


@pytest.mark.parametrize("name", ["NUMBA_BOUNDSCHECK", "NUMBA_OPT"])
def test_what_is_compiled_otherwise_is_kept_apart(name, monkeypatch):
    usual = cache_folder.source_hash.__wrapped__()
    monkeypatch.setenv(name, "1")
    assert cache_folder.source_hash.__wrapped__() != usual


def test_folders_are_listed_without_numba():
    code = "import sys; from refimpl.kernels.machine import cache_folder; cache_folder.kernel_folders(); print('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout == "False\n"
