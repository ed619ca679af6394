"""Weights that stay in memory: locked there, on request."""

import ctypes
import sys
from collections.abc import Iterable

import numpy as np

from refimpl.formats.matrix import Matrix


def lock_in_memory(parts: Iterable[Matrix | np.ndarray]) -> str:
    """Locks the memory of matrices and vectors until the process ends; what is mapped is read from the disk. Returns one line: what is
    locked, or why not all of it is, and what helps.
    """
    if sys.platform == "win32":
        return "weights are not locked in memory: that is not supported on Windows"
    library, n_locked = ctypes.CDLL(None, use_errno=True), 0
    for part in parts:
        raw = part if isinstance(part, np.ndarray) else part.raw
        if not raw.nbytes:
            continue
        if library.mlock(ctypes.c_void_p(raw.ctypes.data), ctypes.c_size_t(raw.nbytes)):
            return (f"only {n_locked / 1e9:.2f} GB of the weights are locked in memory: the system allows no more; `ulimit -l unlimited` "
                    "(or memlock in /etc/security/limits.conf) helps where there is enough memory")
        n_locked += raw.nbytes
    return f"{n_locked / 1e9:.2f} GB of weights are locked in memory"
