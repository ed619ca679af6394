"""Threads: what the system lets us have (made-up systems), what Numba is set to, and whose messages are suppressed meanwhile."""

import ctypes
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numba
import psutil
import pytest
from systems import V1, V2, put
from threadpoolctl import threadpool_info

from refimpl import host
from refimpl.host import control_groups, cpu_quota, default_threads, physical_cores
from refimpl.kernels.cores import threads
from refimpl.kernels.cores.threads import prepare, running

ROOT = Path(__file__).parent.parent


def python(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


# ---- what the system lets us have

def test_threads_of_one_core_count_once(tmp_path):
    put(tmp_path, {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 4},{i % 4 + 4}" for i in range(8)})
    assert physical_cores(set(range(8)), tmp_path) == 4
    assert physical_cores({0, 4}, tmp_path) == 1 and physical_cores({0, 1, 5}, tmp_path) == 2
    put(tmp_path, {f"sys/devices/system/cpu/cpu{i}/topology/core_cpus_list": f"{i}" for i in range(8)})      # the newer name
    assert physical_cores({0, 4}, tmp_path) == 2


def test_without_a_topology_the_machines_cores_are_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 3)
    assert physical_cores({0, 1, 2, 3, 4, 5}, tmp_path) == 3 and physical_cores({1, 2}, tmp_path) == 2
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    assert physical_cores({1, 2}, tmp_path) == 2


def test_a_mac_has_as_many_threads_as_performance_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(host, "usable_cpus", lambda: set(range(8)))
    asked = []
    for performance, wanted in ((4, 4), (0, 8), (None, 8), (16, 8)):
        monkeypatch.setattr(host, "sysctl", lambda name, n=performance: asked.append(name) or n)
        assert default_threads(tmp_path) == wanted
    assert set(asked) == {"hw.perflevel0.physicalcpu"}


class FakeLibrary:
    """The C library of a Mac that knows two names."""

    numbers = {b"hw.perflevel0.physicalcpu": ctypes.c_int32(4), b"hw.memsize": ctypes.c_int64(2**34)}

    def __init__(self, name):
        assert name is None

    @classmethod
    def sysctlbyname(cls, name, value, size, new, new_size):
        if name not in cls.numbers:
            return -1
        ctypes.memmove(value, ctypes.byref(cls.numbers[name]), ctypes.sizeof(cls.numbers[name]))
        return 0


def test_numbers_of_macos_have_4_bytes_or_8(monkeypatch):
    assert host.sysctl("hw.memsize") is None or sys.platform == "darwin"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", FakeLibrary)
    assert [host.sysctl(name) for name in ("hw.perflevel0.physicalcpu", "hw.memsize", "hw.nonsense")] == [4, 2**34, None]


def test_the_tightest_quota_of_nested_groups_counts(tmp_path):
    put(tmp_path, V2)
    assert cpu_quota(tmp_path) == math.inf
    put(tmp_path, {"sys/fs/cgroup/user/job/cpu.max": "max 100000", "sys/fs/cgroup/user/cpu.max": "250000 100000"})
    assert cpu_quota(tmp_path) == 2.5
    put(tmp_path, {"sys/fs/cgroup/user/job/cpu.max": "50000 100000"})
    assert cpu_quota(tmp_path) == 0.5


def test_quota_of_version_1_in_a_container_that_sees_the_hosts_path(tmp_path):
    put(tmp_path, V1 | {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"})
    assert cpu_quota(tmp_path) == 3
    put(tmp_path, {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1"})
    assert cpu_quota(tmp_path) == math.inf


def test_groups_are_listed_innermost_first_and_stay_below_the_mount(tmp_path):
    top = put(tmp_path, V2) / "sys/fs/cgroup"
    assert control_groups("cpu", tmp_path) == [top / "user/job", top / "user", top]
    put(tmp_path, {"proc/self/cgroup": "0::/../other"})                     # a group outside of what this namespace sees
    assert control_groups("cpu", tmp_path) == [top]
    put(tmp_path, V1)
    assert control_groups("memory", tmp_path) == [tmp_path / "sys/fs/cgroup/memory"]
    assert control_groups("cpu", tmp_path / "nothing") == []


@pytest.mark.parametrize("quota,wanted", [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("nonsense", 4)])
def test_default_is_cores_within_the_quota_and_at_least_one(tmp_path, monkeypatch, quota, wanted):
    put(tmp_path, V2 | {"sys/fs/cgroup/user/cpu.max": quota})
    put(tmp_path, {f"sys/devices/system/cpu/cpu{i}/topology/core_cpus_list": f"{i // 2}" for i in range(8)})
    monkeypatch.setattr(host, "usable_cpus", lambda: set(range(8)))
    assert default_threads(tmp_path) == wanted


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_affinity_of_this_process_counts():
    cpu = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{cpu}}}); from refimpl.kernels.cores.threads import default_threads as d; print(d())"
    assert python(code) == "1"


# ---- Numba's threads

@pytest.mark.parametrize("wrong", [0, -1, 257, 1.5, "2", True])
def test_a_senseless_number_of_threads_is_refused(wrong):
    with pytest.raises(ValueError, match="1 to 256"):
        prepare(wrong)


def test_default_asks_for_no_more_than_numba_was_told_to_have(monkeypatch):
    assert prepare(1) == 1 and 1 <= prepare() <= default_threads()
    code = "from refimpl.kernels.cores import threads as t; t.default_threads = lambda: 4; print(t.prepare())"
    assert python(code, NUMBA_NUM_THREADS="1") == "1"
    monkeypatch.setattr(threads, "default_threads", lambda: 4)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 9)
    assert prepare() == 4


@pytest.mark.parametrize("layer", ["default", pytest.param("workqueue", marks=pytest.mark.exhaustive)])
def test_more_threads_than_cpus_can_be_had_before_the_first_start_and_not_after(layer):
    code = """
import numba, numpy as np
from refimpl.kernels.cores.threads import prepare, running
n = numba.config.NUMBA_NUM_THREADS + 3
assert prepare(n) == n

@numba.njit(parallel=True)
def who(out):
    for i in numba.prange(len(out)):
        out[i] = numba.get_thread_id()

out = np.full(1000, -1)
with running(n):
    assert numba.get_num_threads() == n
    who(out)
print(n - len(set(out)))
prepare(n), prepare(n - 1)
try:
    prepare(n + 1)
except ValueError as e:
    print(n + 1, e)
"""
    missing, refused = python(code, NUMBA_THREADING_LAYER=layer).splitlines()
    assert missing == "0"
    more = refused.split()[0]
    assert f"threads={more}" in refused and f"NUMBA_NUM_THREADS={more}" in refused


def test_inside_numba_has_so_many_threads_and_linear_algebra_one():
    before, many = blas_threads(), numba.get_num_threads()
    if max(before, default=1) < 2:
        pytest.skip("linear algebra has one thread on this machine anyway")
    with running(1):
        assert numba.get_num_threads() == 1 and set(blas_threads()) == {1}
        with running(many):
            assert numba.get_num_threads() == many and set(blas_threads()) == {1}
        assert numba.get_num_threads() == 1 and set(blas_threads()) == {1}
    assert numba.get_num_threads() == many and blas_threads() == before
    with pytest.raises(KeyError):
        with running(1):
            raise KeyError
    assert numba.get_num_threads() == many and blas_threads() == before
    with pytest.raises(ValueError):
        with running(numba.config.NUMBA_NUM_THREADS + 1):
            pass
    assert blas_threads() == before


def test_the_last_of_two_python_threads_gives_linear_algebra_its_threads_back():
    before, inside, first_left = blas_threads(), threading.Barrier(2), threading.Event()
    if max(before, default=1) < 2:
        pytest.skip("linear algebra has one thread on this machine anyway")
    if threads.layer() == "workqueue":
        pytest.skip("with this threading layer only one gets in")
    seen = []

    def second():
        with running(1):
            inside.wait(10)
            first_left.wait(10)
            seen.append(blas_threads())

    other = threading.Thread(target=second)
    other.start()
    with running(1):
        inside.wait(10)
    first_left.set()
    other.join()
    assert set(seen[0]) == {1} and blas_threads() == before


def test_entering_and_leaving_searches_for_no_libraries(monkeypatch):
    """That takes milliseconds, and every call of a model enters. The first one in this process may."""
    with running(1):
        pass
    monkeypatch.setattr(threads, "ThreadpoolController", None)
    with running(1):
        pass


def test_the_slow_threading_layer_is_named_and_computes_for_one_at_a_time():
    code = """
import threading, numpy as np
from refimpl.kernels.cores.threads import prepare, running, slow_layer_warning
from refimpl.lab.bench.bandwidth import sum_parts
prepare(2)
data, sums = np.ones(1 << 16, np.float32), []

def work():
    out = np.empty(2, np.float32)
    for _ in range(300):
        with running(2):
            sum_parts(data, out)
    sums.append(out.sum())

both = [threading.Thread(target=work) for _ in range(2)]
[t.start() for t in both], [t.join() for t in both]
assert sums == [1 << 16] * 2
print(slow_layer_warning())
"""
    warning = python(code, NUMBA_THREADING_LAYER="workqueue")
    assert "workqueue" in warning and "libgomp" in warning and len(warning.splitlines()) == 1


def test_the_threading_layer_is_known_in_a_process_that_has_computed_nothing():
    assert python("from refimpl.kernels.cores.threads import layer; print(layer())") in ("omp", "tbb", "workqueue")


def test_a_good_threading_layer_gets_no_warning(monkeypatch):
    monkeypatch.setattr(threads, "layer", lambda: "omp")
    assert threads.slow_layer_warning() is None


def test_kernels_get_as_many_threads_as_running_says():
    most, before = numba.config.NUMBA_NUM_THREADS, numba.get_num_threads()
    found = []

    def elsewhere():
        found.append((threads.current(), numba.get_num_threads()))
    with running(most):
        assert threads.current() == numba.get_num_threads() == most
        with running(1):
            assert threads.current() == numba.get_num_threads() == 1
        assert threads.current() == most
        with running(1):
            thread = threading.Thread(target=elsewhere)         # which was never configured
            thread.start()
            thread.join()
    assert found[0][0] == found[0][1]
    for n in (1, most):
        numba.set_num_threads(n)
        assert threads.current() == n
    numba.set_num_threads(before)
