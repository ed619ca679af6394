"""What this process may use of the machine: cores, CPU quota, memory. Imports nothing of the package."""

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
OWN_MAPPING, KEPT = 128 << 20, 256 << 20        # arrays from this size have a mapping of their own; freed bytes kept at the end of the heap
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # malloc.h


# ---- cores

def default_threads(root: Path = ROOT) -> int:
    """Physical cores that this process may run on, or the quota of its control group if that is less; at least 1. On a Mac its
    performance cores alone: rows are shared out evenly, so that all would wait for the slowest core.

    A quota of 2.5 cores counts as 2: a third thread would be stopped halfway through its period, and all others would wait for it.
    """
    return max(1, math.floor(min(physical_cores(usable_cpus(), root), cpu_quota(root))))


def usable_cpus() -> set[int]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    import psutil

    process = psutil.Process()
    return set(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else set(range(os.cpu_count() or 1))


def physical_cores(cpus: set[int], root: Path = ROOT) -> int:
    """Physical cores of these logical CPUs. Where the system does not say which CPUs share a core: at most the (performance) cores of the
    machine.
    """
    cores = set()
    for cpu in cpus:
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = read(folder / "core_cpus_list") or read(folder / "thread_siblings_list")
        if siblings is None:
            import psutil

            # on macOS "perflevel0" are the performance cores; Intel's Macs, and systems before macOS 12, do not know the name
            return min(len(cpus), sysctl("hw.perflevel0.physicalcpu") or psutil.cpu_count(logical=False) or len(cpus))
        cores.add(siblings)
    return len(cores)


def cpu_quota(root: Path = ROOT) -> float:
    """The CPU quota of the control groups in cores, infinite without a limit: the smallest one of the group and its ancestors."""
    quotas = [math.inf]
    for folder in control_groups("cpu", root):
        both = (read(folder / "cpu.max") or "").split() or [read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")]
        with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):        # no such file, or "max": no limit
            quota, period = map(int, both)
            quotas.append(quota / period if quota > 0 else math.inf)
    return min(quotas)


def control_groups(controller: str, root: Path = ROOT) -> list[Path]:
    """Folders of the control groups of this process for `controller`, innermost first; none outside of Linux.

    Version 2 has one tree for all controllers, version 1 a tree for each. In a container the group's path may be the host's, of which
    only the part below the root of the mount exists.
    """
    folders = []
    for line in (read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        for kind, inside, place, options in _mounts(root):
            if (kind == "cgroup2") if not controllers else (controller in controllers.split(",") and controller in options):
                path = PurePosixPath(group)
                known = path.is_relative_to(inside) and ".." not in path.parts
                own = root / place.lstrip("/") / (path.relative_to(inside) if known else "")
                top = root / place.lstrip("/")
                folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return folders


def _mounts(root: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """(type, folder that is mounted, where, options) of the control group file systems."""
    for line in (read(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup"):
            yield after.split()[0], before.split()[3], before.split()[4], after.split()[-1].split(",")


def read(path: Path) -> str | None:
    """The text of a small file of the system, None where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


# ---- memory

def available(root: Path = ROOT) -> int:
    """Bytes that this process can still allocate: what is free on the machine, or left of its control groups' limits if that is less.

    Cached file pages count as free, in the groups too: the system drops them when it needs memory. Swap does not count.
    """
    meminfo = _numbers(root / "proc/meminfo")
    if "MemAvailable:" in meminfo:
        left = meminfo["MemAvailable:"] * 1024
    else:
        import psutil  # takes 30 ms: imported only where the system has no files to ask

        left = psutil.virtual_memory().available
    for folder in control_groups("memory", root):
        stat = _numbers(folder / "memory.stat")
        for limit, usage, prefix in (("memory.max", "memory.current", ""), ("memory.high", "memory.current", ""),
                                     ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")):
            allowed, used = read(folder / limit), read(folder / usage)
            if allowed is not None and used is not None and allowed.isdigit():         # "max": no limit
                files = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
                left = min(left, int(allowed) - int(used) + files)
    return max(left, 0)


def keep_freed_memory():
    """Has glibc keep up to KEPT freed bytes, so that a layer's arrays reuse the memory of the layer before.

    By default it returns them to the system and gets them back page by page, filled with zeros: 3 to 5 % of the time of a prompt. Does
    nothing with other C libraries, or if MALLOC_... or GLIBC_TUNABLES are in the environment.
    """
    configured = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not configured else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, OWN_MAPPING)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def sysctl(name: str) -> int | None:
    """A number that macOS knows under this name; None if it knows none, and on other systems."""
    function = getattr(ctypes.CDLL(None), "sysctlbyname", None) if sys.platform == "darwin" else None
    value, size = ctypes.c_int64(), ctypes.c_size_t(8)          # 4 bytes of it are written or 8, and both are little-endian
    if function is None or function(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)):
        return None
    return value.value


def _numbers(path: Path) -> dict[str, int]:
    lines = [line.split() for line in (read(path) or "").splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
