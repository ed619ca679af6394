"""What a measurement ran on."""

import math
import platform

import numpy as np
import psutil

from refimpl.host import ROOT, cpu_quota, physical_cores, read, usable_cpus
from refimpl.kernels.cores.threads import layer


def machine(n_threads: int) -> dict[str, object]:
    """The processor, what is used of it, and the versions of what computes."""
    import llvmlite
    import numba

    import refimpl
    from refimpl.kernels.machine.isa import BEST, ISA

    cpuinfo = [line.partition(":") for line in (read(ROOT / "proc/cpuinfo") or "").splitlines()]
    names = [value.strip() for key, _, value in cpuinfo if key.strip() == "model name"]
    return {"cpu": names[0] if names else platform.processor() or platform.machine(), "isa": ISA, "best_isa": BEST,
            "physical_cores": physical_cores(usable_cpus()), "cpus": len(usable_cpus()), "cpu_quota": _finite(cpu_quota()),
            "memory_bytes": psutil.virtual_memory().total, "threads": n_threads, "threading_layer": layer(), "system": platform.system(),
            "versions": {"python": platform.python_version(), "refimpl": refimpl.__version__, "numpy": np.__version__,
                         "numba": numba.__version__, "llvmlite": llvmlite.__version__}}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
