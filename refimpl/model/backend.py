"""What the forward pass calls for everything that costs time: the reference's functions, or the kernels' of the same names."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np

from refimpl.formats.matrix import Matrix, stored_bytes
from refimpl.host import keep_freed_memory

ARITHMETIC = ("q8", "exact")


@dataclass(frozen=True)
class Backend:
    """The functions, what keys and values are kept in, and how a matrix is held.

    `prepare(matrix)` gives a matrix of the file the form that `matmul`, `run_experts` and `matmul_chosen` take; `held(matrix)` is how many
    bytes that takes. All calls belong inside `running()`.
    """

    name: str
    arithmetic: str
    threads: int
    matmul: Callable
    attend: Callable
    choose: Callable
    run_experts: Callable
    matmul_chosen: Callable
    rms_norm: Callable
    rms_normalise: Callable
    gated: Callable
    rotate: Callable
    softcap: Callable
    kv_type: np.dtype
    prepare: Callable[[Matrix], object]
    held: Callable[[Matrix], int]
    running: Callable[[], AbstractContextManager]


def reference_backend(arithmetic: str, prepare: Callable[[Matrix], Matrix]) -> Backend:
    """NumPy, in "exact" or "q8" arithmetic; keys and values in float32."""
    from refimpl.reference import attention, matmul, moe, ops

    product = {"exact": matmul.matmul, "q8": matmul.matmul_q8}[arithmetic]
    return Backend("reference", arithmetic, 1, product, attention.attend, moe.choose, partial(moe.run_experts, product),
                   partial(moe.matmul_chosen, product), ops.rms_norm, ops.rms_normalise, ops.gated, ops.rotate, ops.softcap,
                   np.dtype(np.float32), prepare, stored_bytes, nullcontext)


def kernel_backend(arithmetic: str, threads: int) -> Backend:
    """Numba on `threads` threads. Keys and values are kept in float16 for "q8", in float32 for "exact"."""
    from refimpl.kernels import attention, matmul, moe, ops
    from refimpl.kernels.machine import tiles
    from refimpl.kernels.machine.threads import running

    keep_freed_memory()
    product, kv_type = {"exact": (matmul.matmul, np.float32), "q8": (matmul.matmul_q8, np.float16)}[arithmetic]
    return Backend("kernels", arithmetic, threads, product, attention.attend, moe.choose, partial(moe.run_experts, product),
                   partial(moe.matmul_chosen, product), ops.rms_norm, ops.rms_normalise, ops.gated, ops.rotate, ops.softcap,
                   np.dtype(kv_type),
                   partial(tiles.tiled, n_threads=threads), tiles.held_bytes, partial(running, threads))
