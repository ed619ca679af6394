"""How kernels are compiled, and where the result is kept.

`kernel` is for what Python calls: compiled at the first call with new types, and kept in the user's cache folder for the next start.
`inline` is for the pieces that kernels are made of: they become part of their caller.

The cache folder (`REFIMPL_CACHE_DIR`, else the one of the operating system) has a part for each instruction set and each state of the
kernels' own source; inside of it Numba tells processors apart, so that a cache from another machine is not used but passed over.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import llvmlite
import numba
from numba.core import event, types
from numba.core.caching import FunctionCache
from numba.extending import overload, register_jitable
from platformdirs import user_cache_path

from refimpl.kernels.machine.isa import ISA


def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None where no such folder can be written."""
    mark = hashlib.sha256()
    for source in sorted(Path(__file__).parent.parent.rglob("*.py")):
        mark.update(source.read_bytes())
    mark.update(f"{numba.__version__} {llvmlite.__version__} {numba.config.BOUNDSCHECK}".encode())
    base = os.environ.get("REFIMPL_CACHE_DIR")
    folder = (Path(base) if base else user_cache_path("refimpl")) / f"kernels-{ISA}-{mark.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


FOLDER = cache_folder()
KERNELS: dict[str, object] = {}         # everything that `kernel` made, by module and name
INLINE = {"forceinline": True, "error_model": "numpy"}          # how a piece is compiled


def kernel(**options) -> Callable:
    """Compiles a function that Python calls. `options` are Numba's, `parallel=True` above all."""

    def compile_later(function):
        made = numba.njit(function, error_model="numpy", nogil=True, **options)
        before = numba.config.CACHE_DIR
        if FOLDER is not None:
            numba.config.CACHE_DIR = str(FOLDER)         # read when a cache is made
            try:
                made._cache = _Cache(function)           # what Numba's own `cache=True` does, with another class
            finally:
                numba.config.CACHE_DIR = before
        KERNELS[f"{function.__module__.split('.')[-1]}.{function.__name__}"] = made
        return made
    return compile_later


class _Cache(FunctionCache):
    """Kept kernels are a convenience: what cannot be read (a file cut short when the machine went down) is compiled again and written anew;
    what cannot be written (the disk is full) is not kept.
    """

    def load_overload(self, sig, target_context):
        """The kernel from the cache, None where there is none or it is damaged."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:                                # unpickling fails with any of them
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig, data):
        """Keeps a compiled kernel if it can be kept."""
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def inline(function) -> Callable:
    """Compiles a piece of a kernel into whoever uses it. Called from Python it stays plain Python."""
    return register_jitable(**INLINE)(function)


def per_row(function) -> Callable:
    """Makes a piece that is written for one row a piece for several: what is a tuple holds a value for each row, and so does the result."""
    piece = inline(function)

    def several(*args):
        n = next(len(a) for a in args if type(a) is tuple)
        return tuple(function(*(a[i] if type(a) is tuple else a for a in args)) for i in range(n))

    @overload(several, jit_options=INLINE)
    def _several(*args):
        held = [isinstance(a, types.UniTuple) for a in args]
        n = next(a.count for a in args if isinstance(a, types.UniTuple))
        calls = ("piece(" + ", ".join(f"args[{k}][{i}]" if held[k] else f"args[{k}]" for k in range(len(args))) + ")," for i in range(n))
        return eval(f"lambda *args: ({' '.join(calls)})", {"piece": piece})

    several.__name__ = function.__name__
    several.__doc__ = function.__doc__
    return several


class _Listener(event.Listener):
    def __init__(self, tell: Callable[[str], None]):
        self.tell, self.depth = tell, 0

    def on_start(self, what):
        self.depth += 1
        function = what.data["dispatcher"].py_func
        if self.depth == 1 and (function.__module__ or "").startswith("refimpl."):
            self.tell(function.__name__)

    def on_end(self, what):
        self.depth -= 1


def announce(tell: Callable[[str], None]):
    """From now on `tell(name)` is called whenever a kernel is about to be compiled (and not when it comes out of the cache)."""
    event.register("numba:compile", _Listener(tell))
