"""Which optional instructions an Arm processor has, asked of the operating system.

LLVM knows them by the processor's name, so not for a processor that is newer than it; on macOS and in emulators it reports none.
"""

import ctypes
import sys
from collections.abc import Callable

from refimpl import host

AT_HWCAP, AT_HWCAP2 = 16, 26                                            # Linux: include/uapi/linux/auxvec.h
BITS = {"dotprod": (AT_HWCAP, 20), "i8mm": (AT_HWCAP2, 13)}             # arch/arm64/include/uapi/asm/hwcap.h: ASIMDDP, I8MM
KEYS = {"dotprod": "hw.optional.arm.FEAT_DotProd", "i8mm": "hw.optional.arm.FEAT_I8MM"}        # macOS


def auxiliary_value(which: int) -> int:
    """An entry of Linux's auxiliary vector, 0 where there is none."""
    function = ctypes.CDLL(None).getauxval
    function.restype, function.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return function(which)


def arm_features(system: str = sys.platform, auxval: Callable[[int], int] = auxiliary_value,
                 sysctl: Callable[[str], int | None] = host.sysctl) -> dict[str, bool]:
    """LLVM's names of the features that the kernels use -> does the processor have it? Nothing on systems that are not asked (Windows)."""
    if system == "linux":
        return {name: bool(auxval(which) >> bit & 1) for name, (which, bit) in BITS.items()}
    if system == "darwin":
        return {name: sysctl(key) == 1 for name, key in KEYS.items()}
    return dict.fromkeys(BITS, False)
