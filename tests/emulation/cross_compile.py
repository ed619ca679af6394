"""Compiles the kernels for another processor into a folder that a process under an emulator loads them from: run.py starts it.

LLVM's targets are all in llvmlite's wheels. Nothing compiled here is called. What the cache is looked up by must be equal on both sides:
Python's minor version, Numba, llvmlite, the package's source, and LLVM's names of processor and features (TARGETS).
"""

import base64
import os
import pickle
import sys
import time
from dataclasses import dataclass

import llvmlite.binding as llvm


@dataclass(frozen=True)
class Target:
    """`emulated`: the emulator's name of a processor. `cpu`, `features`: LLVM's. `optional`: what the system says of an Arm processor."""

    architecture: str
    emulated: str
    cpu: str
    features: str
    isa: str
    optional: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """For both sides."""
        return {"NUMBA_CPU_NAME": self.cpu, "NUMBA_CPU_FEATURES": self.features, "REFIMPL_ISA": self.isa}


TARGETS = {
    "neon": Target("aarch64", "cortex-a72", "generic", "+neon", "neon"),
    "dotprod": Target("aarch64", "cortex-a76", "generic", "+neon", "dotprod", ("dotprod",)),
    "i8mm": Target("aarch64", "max", "generic", "+neon", "i8mm", ("dotprod", "i8mm")),
    "portable": Target("aarch64", "cortex-a72", "generic", "+neon", "portable"),
    "nehalem": Target("x86_64", "Nehalem", "nehalem", "", "portable"),
    "sandybridge": Target("x86_64", "SandyBridge", "sandybridge", "+avx", "portable"),
}


def pretend(target: Target):
    """From now on LLVM and the system speak of the target. Before the first import of the package's kernels."""
    triple = f"{target.architecture}-unknown-linux-gnu"
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = llvm.get_default_triple = lambda: triple
    llvm.Target.from_default_triple = classmethod(lambda cls: cls.from_triple(triple))
    llvm.get_host_cpu_name = lambda: target.cpu
    llvm.get_host_cpu_features = lambda: llvm.targets.FeatureMap()
    from refimpl.kernels.cores import cpu_features

    cpu_features.arm_features = lambda: {name: name in target.optional for name in cpu_features.BITS}


def main(name: str, signatures: str):
    """`signatures`: the kernels' argument types, as run.py writes them."""
    target = TARGETS[name]
    pretend(target)
    import refimpl.model.backend
    from refimpl.kernels.machine import isa, jit

    refimpl.model.backend.kernel_backend("q8", 1)
    assert isa.ISA == target.isa and isa.BEST == target.isa or name == "portable", (isa.ISA, isa.BEST)
    wanted = pickle.loads(base64.b64decode(signatures))
    for kernel, of_kernel in wanted.items():
        for signature in of_kernel:
            jit.KERNELS[kernel].compile(signature)
    print(f"{sum(map(len, wanted.values()))} kernels compiled in {time.process_time():.0f} CPU seconds")


if __name__ == "__main__":
    os.environ |= TARGETS[sys.argv[1]].environment()
    main(sys.argv[1], sys.stdin.read())
