"""Helpers of the tests of equality: the digest of a test module with other threads, and in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba

from refimpl.kernels.machine.isa import BEST, ISA, ORDER

HERE = Path(__file__).parent
OTHERS = [isa for isa in ORDER if isa != ISA and ORDER.index(isa) <= ORDER.index(BEST)]


def elsewhere(module: str, **environment: str) -> str:
    """What `digest` of a test module gives in a process of its own."""
    done = subprocess.run([sys.executable, "-c", f"import {module}; print({module}.digest())"], capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def assert_any_number_of_threads(module: str, digest: Callable[[], str]):
    """As many threads as this process has, one by one, and 3 in another."""
    before = numba.get_num_threads()
    try:
        results = []
        for n in range(1, min(3, numba.config.NUMBA_NUM_THREADS) + 1):
            numba.set_num_threads(n)
            results.append(digest())
    finally:
        numba.set_num_threads(before)
    assert len(set(results)) == 1
    assert elsewhere(module, NUMBA_NUM_THREADS="3") == results[0]
