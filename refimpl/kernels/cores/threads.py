"""How many threads compute.

Numba starts its threads once a process, at the first parallel step; each computation then uses as many of them as it asks for. Two threads
on one core share its arithmetic units and caches, so the default is one for each physical core that the process may use. Threads of a
linear algebra library would compete for the same cores: inside `running` it has one.
"""

import contextlib
import functools
import os
import threading

from threadpoolctl import LibController, ThreadpoolController

from refimpl.host import default_threads

SPIN = "5000"               # turns (about 0.1 ms) that an idle thread spins before it sleeps; see `prepare`
MOST = 256                  # an OpenMP runtime ends the process when it cannot start a thread; this limit stays far below
MANY = 1 << 15              # numbers from which on a small kernel uses threads; one thread takes 5 to 20 us for as many


# ---- Numba's threads

def prepare(threads: int | None = None) -> int:
    """How many threads to compute with: `threads`, or `default_threads` for None (but at most Numba's own number).

    Numba starts one thread for each CPU it sees. Where more are wanted and none has been started yet, it is made to start more. Raises
    ValueError for a number outside of 1 to 256, or for more than have been started.

    Also shortens how long idle threads of GNU's OpenMP spin (unless GOMP_SPINCOUNT is set): by default milliseconds, during which they keep
    their core. Measured on 2 cores with tokens of 36 ms: no difference alone, but 75 instead of 140 to 570 ms beside one busy program.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN)
    import numba
    from numba.np.ufunc import parallel

    if threads is None:
        return min(default_threads(), numba.config.NUMBA_NUM_THREADS)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MOST:
        raise ValueError(f"threads={threads!r}: expected a number from 1 to {MOST}")
    if threads > numba.config.NUMBA_NUM_THREADS:
        inner = ("NUM_THREADS", "snt_check", "gen_snt_check")
        if getattr(parallel, "_is_initialized", True) or not all(hasattr(parallel, name) for name in inner):
            raise ValueError(f"threads={threads}: this process has {numba.config.NUMBA_NUM_THREADS} already and cannot get more; "
                             f"set NUMBA_NUM_THREADS={threads} before it starts")
        # a copy of the setting from when Numba was imported, used when the threads are started
        numba.config.NUMBA_NUM_THREADS = parallel.NUM_THREADS = threads
        parallel.snt_check = parallel.gen_snt_check()
    return threads


@contextlib.contextmanager
def running(n: int):
    """Inside, parallel kernels run on `n` threads and linear algebra on one. Can be nested, and entered by several Python threads.

    Takes about 10 microseconds. With the threading layer "workqueue", where two concurrent parallel regions end the process, a second
    Python thread waits until the first has left.
    """
    import numba

    before, outer = numba.get_num_threads(), getattr(_here, "n", None)
    numba.set_num_threads(n)
    _here.n = n
    try:
        with _alone if numba.threading_layer() == "workqueue" else contextlib.nullcontext(), _one_blas_thread:
            yield
    finally:
        _here.n = outer
        numba.set_num_threads(before)


def current() -> int:
    """How many threads a parallel kernel gets now: those of `running`, else Numba's number (a lookup of 0.7 us, 60 times a token)."""
    n = getattr(_here, "n", None)
    if n is None:
        import numba

        n = numba.get_num_threads()
    return n


def threads_for(size: int) -> int:
    """How many threads a small kernel uses for this many numbers."""
    return 1 if size < MANY else current()


def layer() -> str:
    """Numba's threading layer: "tbb", "omp" or "workqueue". Starts the threads. Raises ValueError where there is none."""
    import numba

    numba.get_num_threads()
    return numba.threading_layer()


def slow_layer_warning() -> str | None:
    """One line about a slow threading layer, None for a fast one. Starts the threads."""
    if layer() != "workqueue":
        return None
    return ("Numba uses the threading layer 'workqueue', which takes about 80 us to start a parallel step (others: 1 us) and lets "
            "only one Python thread compute at a time; install an OpenMP runtime (libgomp1, on macOS libomp) or the Python package tbb")


class _OneBlasThread:
    """The limit holds for the whole process: the first to enter sets it, the last to leave restores it."""

    def __init__(self):
        self.lock, self.inside, self.before = threading.Lock(), 0, []

    def __enter__(self):
        with self.lock:
            if not self.inside:         # a third of the time that ThreadpoolController.limit takes
                self.before = [(library, library.get_num_threads()) for library in _libraries()]
                self.set((library, 1) for library, _ in self.before)
            self.inside += 1

    def __exit__(self, *error):
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.set(self.before)

    def set(self, numbers):
        for library, threads in numbers:
            library.set_num_threads(threads)
            if hasattr(library, "clear_controlling_thread"):        # else threadpoolctl 3.8 ignores all threads but the first to set one
                library.clear_controlling_thread()


@functools.cache
def _libraries() -> list[LibController]:
    """The linear algebra libraries that are loaded. Finding out takes milliseconds."""
    return ThreadpoolController().select(user_api="blas").lib_controllers


_alone, _one_blas_thread, _here = threading.RLock(), _OneBlasThread(), threading.local()
