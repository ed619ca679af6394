"""Compiles kernels with Numba and keeps the machine code on disk.

`kernel` is for functions that Python calls: compiled at the first call with new argument types, so once for each weight type too, and
kept in a folder (cache_folder.py) for the next process. `inline` is for their parts, which become part of the caller.
"""

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path

import numba
from numba.core import event, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.extending import overload, register_jitable

from refimpl.kernels.machine.cache_folder import open_folder
from refimpl.kernels.machine.isa import ISA

FOLDER = open_folder(ISA)               # None: nothing is kept
KERNELS: dict[str, object] = {}         # everything that `kernel` made, by module and name
PARTS: set[Callable] = set()            # the functions that kernels are composed of
CALLED = {"error_model": "numpy", "no_cfunc_wrapper": True, "no_cpython_wrapper": True}        # by kernels alone: Python needs no way in
INLINE = {"forceinline": True, **CALLED}


def kernel(**options) -> Callable:
    """Compiles a function that Python calls. `options` are Numba's, above all `parallel=True`."""

    def compile_later(function):
        made = numba.njit(function, error_model="numpy", nogil=True, **options)
        if FOLDER is not None:
            made._cache = _Cache(function)               # what Numba's own `cache=True` does, with another class
        KERNELS[f"{function.__module__.split('.')[-1]}.{function.__name__}"] = made
        return made
    return compile_later


class _Locator(_CacheLocator):
    """Files are found by module name and source text. (Numba's locators use the source's absolute path, so that every new virtual
    environment would compile again.)
    """

    def __init__(self, function, source):
        self.function, self.source = function, source

    def get_cache_path(self):
        return str(FOLDER / self.function.__module__.rpartition(".")[0])

    def get_source_stamp(self):
        return hashlib.sha256(Path(self.source).read_bytes()).hexdigest()

    def get_disambiguator(self):
        return str(self.function.__code__.co_firstlineno)

    @classmethod
    def from_function(cls, function, source):
        return cls(function, source)


class _Results(CompileResultCacheImpl):
    _locator_classes = [_Locator]


class _Cache(FunctionCache):
    """Numba's cache, but never a reason to fail: a damaged file (cut short when the machine went down) is compiled and written again; what
    cannot be written (a full disk) is not kept.
    """

    _impl_class = _Results

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
    """Makes a function part of every kernel that uses it. Called from Python it stays plain Python."""
    PARTS.add(function)
    return register_jitable(**INLINE)(function)


def by_format(bodies: dict[str, Callable] | Callable) -> Callable:
    """Gives a declared function a body for each weight format, its first argument: inlined in a kernel, called in plain Python.

    `bodies` is a table by weight type, or a function of the WeightFormat; the declaration has the signature, a docstring and no body.
    """
    body_of = bodies if callable(bodies) else lambda fmt: bodies[fmt.type]

    def define(declared):
        @functools.wraps(declared)
        def chosen(fmt, *args):
            return body_of(fmt)(fmt, *args)

        @overload(chosen, jit_options=INLINE, strict=False)
        def _chosen(fmt, *args):
            return body_of(fmt.format)
        PARTS.add(chosen)
        return chosen
    return define


def out_of_line(function) -> Callable:
    """As `inline`, for a part that is large: it stays a function that is called."""
    PARTS.add(function)
    return register_jitable(**CALLED)(function)


def per_row(function: Callable | None = None, *, shared: tuple[str, ...] = ()) -> Callable:
    """Makes a function of one row a function of several: a tuple among the arguments has a value for each row, and so has the result.

    `shared` names the parameters that all rows share even where they are tuples.
    """
    if function is None:
        return functools.partial(per_row, shared=shared)
    part, split = inline(function), [name not in shared for name in inspect.signature(function).parameters]

    def several(*args):
        rows = [own and type(a) is tuple for own, a in zip(split, args)]
        n = len(args[rows.index(True)])
        return tuple(function(*(a[i] if own else a for own, a in zip(rows, args))) for i in range(n))

    @overload(several, jit_options=INLINE)
    def _several(*args):
        rows = [own and isinstance(a, types.UniTuple) for own, a in zip(split, args)]
        n = args[rows.index(True)].count
        calls = ("part(" + ", ".join(f"args[{k}][{i}]" if own else f"args[{k}]" for k, own in enumerate(rows)) + ")," for i in range(n))
        return eval(f"lambda *args: ({' '.join(calls)})", {"part": part})

    several.__name__ = function.__name__
    several.__doc__ = function.__doc__
    PARTS.add(several)
    return several


class _Listener(event.Listener):
    def __init__(self, callback: Callable[[str, tuple[str, ...]], None]):
        self.callback, self.depth = callback, 0

    def on_start(self, what):
        self.depth += 1
        function = what.data["dispatcher"].py_func
        if self.depth == 1 and (function.__module__ or "").startswith("refimpl."):
            self.callback(function.__name__, tuple(dict.fromkeys(t.weight_type for t in what.data["args"] if hasattr(t, "weight_type"))))

    def on_end(self, what):
        self.depth -= 1


def announce(callback: Callable[[str, tuple[str, ...]], None]):
    """From now on calls `callback(kernel, weight types)` whenever a kernel is about to be compiled, not when it comes from disk.

    The weight types are those it is compiled for, such as ("Q4_0",), and () for a kernel without weights.
    """
    event.register("numba:compile", _Listener(callback))
