"""Compiles kernels with Numba and keeps the machine code on disk.

`kernel` is for functions that Python calls: compiled at the first call with new argument types, so once for each weight type too, and
kept in a folder (cache_folder.py) for the next process. `inline` is for their parts, which become part of the caller.
"""

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path

import numba
from numba.core import event, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.extending import lower_builtin, type_callable

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
    part = numba.njit(function, **INLINE)
    return _called_in_kernels(function, lambda args: part)


def out_of_line(function) -> Callable:
    """As `inline`, for a part that is large: it stays a function that is called."""
    part = numba.njit(function, **CALLED)
    return _called_in_kernels(function, lambda args: part)


def by_format(bodies: dict[str, Callable] | Callable) -> Callable:
    """Gives a declared function a body for each weight format, its first argument: inlined in a kernel, called in plain Python.

    `bodies` is a table by weight type, or a function of the WeightFormat; the declaration has the signature, a docstring and no body.
    """
    body_of = bodies if callable(bodies) else lambda fmt: bodies[fmt.type]

    def define(declared):
        @functools.wraps(declared)
        def chosen(fmt, *args):
            return body_of(fmt)(fmt, *args)

        @functools.cache
        def part_of(fmt):
            return numba.njit(body_of(fmt), **INLINE)
        return _called_in_kernels(chosen, lambda args: part_of(args[0].format))
    return define


def per_row(function: Callable | None = None, *, shared: tuple[str, ...] = ()) -> Callable:
    """Makes a function of one row a function of several: a tuple among the arguments has a value for each row, and so has the result.

    `shared` names the parameters that all rows share even where they are tuples.
    """
    if function is None:
        return functools.partial(per_row, shared=shared)
    part, may_differ = numba.njit(function, **INLINE), [name not in shared for name in inspect.signature(function).parameters]

    @functools.wraps(function)
    def several(*args):
        differ = [may and type(a) is tuple for may, a in zip(may_differ, args)]
        n = len(args[differ.index(True)])
        return tuple(function(*(a[i] if own else a for own, a in zip(differ, args))) for i in range(n))
    return _called_in_kernels(several, lambda args: part, may_differ)


def _called_in_kernels(function: Callable, part_for: Callable, may_differ: Sequence[bool] = ()) -> Callable:
    """Makes a kernel that calls `function` call `part_for(types of the arguments)`, compiled for these. Where arguments that
    `may_differ` are tuples, it is called for each row.

    Numba's own way to do so (`overload`) compiles a part once more for every kind of caller, and per_row would be one more function around
    it. This way a start that compiles takes a fifth less.
    """
    def resolve(context, args):
        differ = [may and isinstance(a, types.UniTuple) for may, a in zip(may_differ or repeat(False), args)]
        part = types.Dispatcher(part_for(args))
        return differ, part, part.get_call_type(context, [a.dtype if own else a for own, a in zip(differ, args)], {})

    @type_callable(function)
    def _type(context):
        def returned(*args):
            differ, _, one = resolve(context, args)
            return types.UniTuple(one.return_type, args[differ.index(True)].count) if True in differ else one.return_type
        returned.__signature__ = inspect.signature(function)
        return returned

    @lower_builtin(function, types.VarArg(types.Any))
    def _calls(context, builder, sig, args):
        differ, part, one = resolve(context.typing_context, sig.args)
        call = context.get_function(part, one)
        if True not in differ:
            return call(builder, args)
        rows = ([builder.extract_value(a, i) if own else a for own, a in zip(differ, args)] for i in range(sig.return_type.count))
        return context.make_tuple(builder, sig.return_type, [call(builder, row) for row in rows])

    PARTS.add(function)
    return function


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
