"""Calls handed out to processes of this machine, or of many, through Dask.

    with connected("local", jobs=3, threads=2) as cluster:          # or the address of a scheduler: "tcp://10.0.0.5:8786"
        for key, result in cluster.each(function, tasks): ...       # in any order

A process computes one call at a time, in a thread of its own. One that dies costs the calls that it had: Dask gives them to another. Only
processes with the very same source of this package get calls. Imports formats, host and failures.py only; needs the extra `scale`.
"""

import concurrent.futures
import contextlib
import itertools
import logging
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator

import refimpl
from refimpl.extras import require
from refimpl.formats.hashing import code_hash
from refimpl.host import default_threads
from refimpl.lab.failures import FAILURES, line_of

distributed = require("distributed", "scale")
dask = require("dask", "scale")

LOCAL = "local"
PER_PROCESS = 2         # calls handed out for each process: one that runs, one that waits
CONNECT = "10s"         # how long a scheduler may take to answer
PATIENCE = 60           # seconds without any process until the rest is given up
SLOT = "refimpl"        # Dask's name for the right to run a call: a process has one
SETTINGS = {"distributed.nanny.pre-spawn-environ": {},                      # threads are set by the calls, the allocator by host.py
            "distributed.comm.timeouts.connect": CONNECT,
            "distributed.admin.large-graph-warning-threshold": "1GB"}


class ClusterError(ValueError):
    """What keeps calls from being computed. One line."""


class Failed(ValueError):
    """A call raised one of FAILURES: its line, and where."""


class Cluster:
    """Processes that are connected. Made by `connected`."""

    def __init__(self, client, name: str):
        self._client, self._name = client, name

    def each(self, function: Callable[[object, int], object], tasks: Iterable[tuple[object, object]]) -> Iterator[tuple[object, object]]:
        """(key, function(argument, threads)) for every (key, argument) of `tasks`, as they are done; Failed in the place of a result that
        there is none of.

        `function` is one of a module, `threads` what the process may use. `tasks` is read as far as there are processes to compute. Raises
        ClusterError where all of them are gone, or the scheduler is, or a call ended the process that computed it several times.
        """
        tasks, waiting, numbers, alone_since = iter(tasks), {}, itertools.count(), None
        try:
            while True:
                room = PER_PROCESS * max(1, len(self._processes()))
                for key, argument in itertools.islice(tasks, max(0, room - len(waiting))):
                    future = self._client.submit(_call, function, argument, pure=False, resources={SLOT: 1}, priority=-next(numbers))
                    waiting[future] = key
                if not waiting:
                    return
                done = self._wait(list(waiting))
                alone_since = None if done or self._processes() else alone_since or time.monotonic()
                if alone_since and time.monotonic() - alone_since > PATIENCE:
                    raise ClusterError(f"{self._name}: no process has been there for {PATIENCE} s")
                for future in done:
                    yield waiting.pop(future), self._result(future)
        finally:
            with contextlib.suppress(Exception):            # of a scheduler that is gone
                self._client.cancel(list(waiting))

    def on_all(self, function: Callable[[], object]):
        """Calls `function` once in every process."""
        with contextlib.suppress(OSError, TimeoutError):
            self._client.run(_in_own_thread, function)

    def _processes(self) -> dict[str, int]:
        try:
            return self._client.nthreads()
        except (OSError, TimeoutError) as e:
            raise ClusterError(f"{self._name}: the scheduler is gone") from e

    def _wait(self, futures: list) -> list:
        """Those of the futures that are done; none after a second."""
        try:
            return list(distributed.wait(futures, timeout=1, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            return []
        except (distributed.CancelledError, OSError) as e:
            raise ClusterError(f"{self._name}: the scheduler is gone") from e

    def _result(self, future) -> object:
        try:
            good, result = future.result()
        except distributed.KilledWorker as e:
            raise ClusterError(f"{self._name}: {e.allowed_failures + 1} processes ended during the same call; if memory ran out, fewer of "
                               "them (--jobs) help") from None
        except distributed.CancelledError as e:
            raise ClusterError(f"{self._name}: the scheduler is gone") from e
        return result if good else Failed(result)


@contextlib.contextmanager
def connected(cluster: str, jobs: int, threads: int) -> Iterator[Cluster]:
    """`jobs` new processes of this machine, with `threads` threads each, for "local"; otherwise those of the scheduler at an address.

    Raises ClusterError for a scheduler that does not answer or has no processes, and for processes with another refimpl.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(SETTINGS))
        stack.enter_context(_quiet())
        address, name = cluster, cluster
        if cluster == LOCAL:
            started = distributed.LocalCluster(n_workers=jobs, threads_per_worker=threads, host="127.0.0.1", dashboard_address=None,
                                               memory_limit=0, silence_logs=logging.CRITICAL)
            address, name = stack.enter_context(started), "the processes of this machine"
        try:
            client = stack.enter_context(distributed.Client(address, timeout=CONNECT))
        except (OSError, TimeoutError, ValueError) as e:
            raise ClusterError(f"{cluster}: no Dask scheduler answers there; `dask scheduler` starts one, and says its address") from e
        _check(client, name)
        try:
            client.register_plugin(_Joined(code_hash(), ours=cluster == LOCAL), name=SLOT)
        except ClusterError:
            raise
        except Exception as e:      # whatever another source makes of it
            raise ClusterError(f"{name}: a process has refimpl {refimpl.__version__} with another source, which says: {e}") from e
        yield Cluster(client, name)


def _check(client, name: str):
    """There is a process, and all have this version. Dask asks them itself, so that nothing of the package need fit."""
    with warnings.catch_warnings(action="ignore"):
        found = client.get_versions(packages=["refimpl"])
    if not found["workers"]:
        raise ClusterError(f"{name}: the scheduler has no workers; `dask worker {name}` starts one")
    here = found["client"]["packages"]["refimpl"]           # None for a checkout that is not installed
    for address, about in found["workers"].items():
        theirs = about["packages"]["refimpl"]
        if theirs != here:
            raise ClusterError(f"{address}: has {theirs and f'refimpl {theirs}' or 'no refimpl'}, here is {here or refimpl.__version__}; "
                               "install the same one")


@contextlib.contextmanager
def _quiet():
    """Dask's own messages are not for whoever waits for a result."""
    logs = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.split(".")[0] == "distributed"]
    before = [log.level for log in logs]
    try:
        for log in logs:                            # each has a level and a handler of its own
            log.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            yield
    finally:
        for log, level in zip(logs, before):
            log.setLevel(level)


# ---- inside of a process

class _Joined(distributed.WorkerPlugin):
    """Every process that joins, now or later: one with this source gets the right to run a call."""

    def __init__(self, code: str, ours: bool):
        self.code, self.ours = code, ours

    async def setup(self, worker):
        """Of a process."""
        if code_hash() != self.code:
            raise ClusterError(f"{worker.address}: has refimpl {refimpl.__version__} with source {code_hash()}, here it is {self.code}; "
                               "install the same one")
        if self.ours and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is for the one that started us
        await worker.set_resources(**{SLOT: 1})


_own_thread = concurrent.futures.ThreadPoolExecutor(1, SLOT)        # threads of kernels, and what they hold, belong to the thread that asks


def _in_own_thread(function: Callable, *arguments: object) -> object:
    return _own_thread.submit(function, *arguments).result()


def _call(function: Callable[[object, int], object], argument: object) -> tuple[bool, object]:
    """(True, result) or (False, line)."""
    threads = min(distributed.get_worker().state.nthreads, default_threads())
    try:
        return True, _in_own_thread(function, argument, threads)
    except FAILURES as e:
        return False, f"{line_of(e)} (on {platform.node()})"
