"""What this machine lets the process have: cores, their quota, memory. Imports nothing of the package."""

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
OWN_MAPPING, KEPT = 128 << 20, 256 << 20        # bytes from which on an array is mapped by itself; freed bytes at the heap's end that stay
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # malloc.h


# ---- cores

def default_threads(root: Path = ROOT) -> int:
    """Physical cores that this process may run on, or what its control group's quota allows if that is less; at least 1.

    A quota of 2.5 cores counts as 2: threads that wait for one which ran out of its share would use up the share of all.
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
    """How many cores these logical CPUs make up. Where the system does not tell which share one: at most the cores of the machine."""
    cores = set()
    for cpu in cpus:
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = read(folder / "core_cpus_list") or read(folder / "thread_siblings_list")
        if siblings is None:
            import psutil

            return min(len(cpus), psutil.cpu_count(logical=False) or len(cpus))
        cores.add(siblings)
    return len(cores)


def cpu_quota(root: Path = ROOT) -> float:
    """CPUs' worth of time that the control groups grant, infinite without a limit. The tightest of the group and those around it counts."""
    quotas = [math.inf]
    for folder in control_groups("cpu", root):
        both = (read(folder / "cpu.max") or "").split() or [read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")]
        with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):        # no such file, or "max": no limit
            quota, period = map(int, both)
            quotas.append(quota / period if quota > 0 else math.inf)
    return min(quotas)


def control_groups(controller: str, root: Path = ROOT) -> list[Path]:
    """Folders of the control groups that limit this process in `controller`, innermost first; none outside of Linux.

    Both versions: a group of version 2 has all controllers, version 1 has a tree for each. Seen from inside of a container, the group's
    path may be one of the host, of which only the part below the mount's own root is there.
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
    """(type, folder of the file system that is mounted, where, options) of the control group trees."""
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
    """Bytes that this process can still take: what the machine has left, or its control groups allow if that is less.

    File pages count as free, also those of the groups: the system takes them back when it needs them. Swap does not count.
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
    """Has the C library keep what was freed, up to KEPT bytes, so that a layer's arrays come to lie where those of the layer before lay.

    By default (GNU's) they go back to the system and come back page by page, filled with zeros: 3 to 5 % of the time of a prompt. Other
    systems are left alone, and so is a process that was told otherwise (MALLOC_..., GLIBC_TUNABLES in its environment).
    """
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not told else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, OWN_MAPPING)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def _numbers(path: Path) -> dict[str, int]:
    lines = [line.split() for line in (read(path) or "").splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
