"""How many threads compute, and what keeps out of their way.

The threads are Numba's. It starts them once in the life of a process, at the first parallel step, and every computation then takes as many
of them as it is told. Two of them on one core share its arithmetic and its cache, so that the default is one for each physical core which
the process may use. Threads of a linear algebra library would compete for the same cores: inside of `running` it has one.
"""

import contextlib
import functools
import os
import threading

from threadpoolctl import LibController, ThreadpoolController

from refimpl.host import default_threads

SPIN = "5000"               # turns (about 0.1 ms) that a thread which has nothing to do waits awake; see `prepare`
MOST = 256                  # an OpenMP runtime ends the process when it cannot start a thread: nobody gets near that by mistake


# ---- Numba's threads

def prepare(threads: int | None = None) -> int:
    """How many threads to compute with: `threads`, or for None `default_threads` (and no more than Numba has or was told to have).

    Numba starts as many as there are CPUs in sight; where more are wanted, and none has been started, it is told to start more. Raises
    ValueError for a number that is not 1 to 256, or for more than have been started.

    Before that it makes GNU's OpenMP wait awake for a shorter time (unless GOMP_SPINCOUNT is set already): by default a waiting thread
    keeps its core for milliseconds. Measured on 2 cores, a token of 36 ms: no difference; but with one other program busy 75 ms instead of
    140 to 570.
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
        # copied from the setting when Numba was imported, but used only when the threads are started
        numba.config.NUMBA_NUM_THREADS = parallel.NUM_THREADS = threads
        parallel.snt_check = parallel.gen_snt_check()
    return threads


@contextlib.contextmanager
def running(n: int):
    """Inside of it parallel kernels run on `n` threads and linear algebra on one. Can be nested, and entered by several Python threads.

    Takes about 10 microseconds. With the threading layer "workqueue", in which two parallel regions at once end the process, a second
    Python thread waits here until the first has left.
    """
    import numba

    before, told = numba.get_num_threads(), getattr(_here, "n", None)
    numba.set_num_threads(n)
    _here.n = n
    try:
        with _alone if numba.threading_layer() == "workqueue" else contextlib.nullcontext(), _one_blas_thread:
            yield
    finally:
        _here.n = told
        numba.set_num_threads(before)


def current() -> int:
    """How many threads a parallel kernel gets now: as `running` says, else as Numba says (who takes 0.7 us to say it, 60 times a token)."""
    n = getattr(_here, "n", None)
    if n is None:
        import numba

        n = numba.get_num_threads()
    return n


def layer() -> str:
    """What Numba runs its threads with: "tbb", "omp" or "workqueue". Starts them. Raises ValueError where there is none at all."""
    import numba

    numba.get_num_threads()
    return numba.threading_layer()


def slow_layer_warning() -> str | None:
    """One line about a slow threading layer, None where it is a good one. Starts the threads."""
    if layer() != "workqueue":
        return None
    return ("Numba runs its threads with 'workqueue', which takes about 80 us to begin a parallel step where others take 1 us, and lets "
            "only one Python thread compute at a time; install an OpenMP runtime (libgomp1, on macOS libomp) or the Python package tbb")


class _OneBlasThread:
    """The limit belongs to the whole process: the first one in sets it, the last one out takes it back."""

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
            if hasattr(library, "clear_controlling_thread"):        # else threadpoolctl 3.8 heeds none but the first thread to set one
                library.clear_controlling_thread()


@functools.cache
def _libraries() -> list[LibController]:
    """The linear algebra that has been loaded. Finding out takes milliseconds."""
    return ThreadpoolController().select(user_api="blas").lib_controllers


_alone, _one_blas_thread, _here = threading.RLock(), _OneBlasThread(), threading.local()
