"""What the forward pass calls for everything that costs time: the reference's functions, or the kernels' of the same names."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from refimpl.formats.matrix import Matrix, stored_bytes
from refimpl.host import keep_freed_memory

ARITHMETIC = ("q8", "exact")
UNKNOWN = 1 << 30           # rows of a computation of which `running` is not told how many


class Prepared(Protocol):
    """A weight matrix in the form that a backend multiplies with: a Matrix for the reference, Tiles for the kernels."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, D), or (E, O, D) for experts."""

    @property
    def type(self) -> str:
        """The weight type, such as "Q4_0"."""

    @property
    def n_bytes(self) -> int:
        """Memory held."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The functions, the type of keys and values in the cache, and how a matrix is held.

    `prepare(matrix)` turns a matrix of the file into what `matmul`, `run_experts` and `matmul_chosen` take; `held(matrix)` is how many
    bytes that needs. All calls belong inside `running()`, or inside `running(rows)` where so many rows of activations are computed.
    """

    name: str
    arithmetic: str
    threads: int
    matmul: Callable[[np.ndarray, Prepared], np.ndarray]
    attend: Callable[..., np.ndarray]
    route: Callable[..., tuple[np.ndarray, np.ndarray]]
    run_experts: Callable[..., np.ndarray]
    matmul_chosen: Callable[[np.ndarray, np.ndarray, Prepared], np.ndarray]
    rms_norm: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    rms_normalise: Callable[[np.ndarray, float], np.ndarray]
    gated: Callable[[np.ndarray, np.ndarray], np.ndarray]
    rotate: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    softcap: Callable[[np.ndarray, float], np.ndarray]
    layer_norm: Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
    silu: Callable[[np.ndarray], np.ndarray]
    glu: Callable[[np.ndarray], np.ndarray]
    limit: Callable[[np.ndarray, float, float], np.ndarray]
    attend_all: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    attend_band: Callable[..., np.ndarray]
    kv_type: np.dtype
    prepare: Callable[[Matrix], Prepared]
    held: Callable[[Matrix], int]
    running: Callable[..., AbstractContextManager]


def reference_backend(arithmetic: str, prepare: Callable[[Matrix], Matrix]) -> Backend:
    """NumPy, in "exact" or "q8" arithmetic; keys and values in float32."""
    from refimpl.reference import attention, matmul, matmul_chosen, moe, ops, tower_attention

    return Backend(name="reference", arithmetic=arithmetic, threads=1, kv_type=np.dtype(np.float32), prepare=prepare, held=stored_bytes,
                   running=nullcontext, **_functions(arithmetic, attention, matmul, matmul_chosen, moe, ops, tower_attention))


def kernel_backend(arithmetic: str, threads: int) -> Backend:
    """Numba on `threads` threads, fewer while other programs hold cores. Keys and values are float16 for "q8", float32 for "exact"."""
    from refimpl.kernels import attention, matmul, matmul_chosen, moe, ops, tower_attention
    from refimpl.kernels.cores.busy import WATCH
    from refimpl.kernels.cores.threads import running
    from refimpl.kernels.machine import tiles

    keep_freed_memory()
    kv_type = {"exact": np.float32, "q8": np.float16}[arithmetic]
    return Backend(name="kernels", arithmetic=arithmetic, threads=threads, kv_type=np.dtype(kv_type),
                   prepare=partial(tiles.tiled, n_threads=threads), held=tiles.held_bytes,
                   running=lambda rows=UNKNOWN: running(WATCH.allowed(threads, rows)),
                   **_functions(arithmetic, attention, matmul, matmul_chosen, moe, ops, tower_attention))


def _functions(arithmetic: str, attention, matmul, matmul_chosen, moe, ops, tower_attention) -> dict[str, Callable]:
    """The functions of a Backend, from the six modules of the reference or of the kernels."""
    return {
        "matmul": {"exact": matmul.matmul, "q8": matmul.matmul_q8}[arithmetic],
        "matmul_chosen": partial(matmul_chosen.matmul_chosen, arithmetic),
        "attend": attention.attend,
        "route": moe.route,
        "run_experts": partial(moe.run_experts, arithmetic),
        "rms_norm": ops.rms_norm, "rms_normalise": ops.rms_normalise, "gated": ops.gated, "rotate": ops.rotate, "softcap": ops.softcap,
        "layer_norm": ops.layer_norm, "silu": ops.silu, "glu": ops.glu, "limit": ops.limit,
        "attend_all": tower_attention.attend_all, "attend_band": tower_attention.attend_band,
    }
