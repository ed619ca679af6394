"""How fast this machine reads memory, and how much of it a token has to read: together, how fast decoding can be at most."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import prange

from refimpl.formats.gguf import GGUFFile
from refimpl.formats.matrix import Matrix, stored_bytes
from refimpl.kernels.cores.threads import running
from refimpl.kernels.machine.intrinsics import add_f32, address, at, load_f32, splat_f32, store_f32, sum_f32
from refimpl.kernels.machine.jit import inline, kernel
from refimpl.loading.memory import parts_of, tables_of
from refimpl.model.config import Config
from refimpl.model.weights import MoeWeights, weights_from_gguf

BUFFER_BYTES = 512 << 20            # far more than a cache holds
STEP = 512                          # bytes in one turn of the loop: 8 vectors, so that no addition waits for the one before


@inline
def _fill(pointer, n_bytes):
    ones = splat_f32(np.float32(1))
    for place in range(0, n_bytes, 64):
        store_f32(at(pointer, place), ones)


@inline
def _sum(pointer, n_bytes):
    a = b = c = d = e = f = g = h = splat_f32(np.float32(0))
    for place in range(0, n_bytes, STEP):
        here = at(pointer, place)
        a, b = add_f32(a, load_f32(here)), add_f32(b, load_f32(at(here, 64)))
        c, d = add_f32(c, load_f32(at(here, 128))), add_f32(d, load_f32(at(here, 192)))
        e, f = add_f32(e, load_f32(at(here, 256))), add_f32(f, load_f32(at(here, 320)))
        g, h = add_f32(g, load_f32(at(here, 384))), add_f32(h, load_f32(at(here, 448)))
    return sum_f32(add_f32(add_f32(add_f32(a, b), add_f32(c, d)), add_f32(add_f32(e, f), add_f32(g, h))))


@kernel(parallel=True)
def fill_parts(data, n_parts):
    """Writes 1 everywhere. Each thread its own part, so that it lies in memory near to the thread."""
    base, part_bytes = address(data), data.nbytes // n_parts
    for i in prange(n_parts):
        _fill(at(base, i * part_bytes), part_bytes)


@kernel(parallel=True)
def sum_parts(data, out):
    """out[i] = sum of the i-th of len(out) equal parts of `data`, float32, of a whole number of STEP bytes each."""
    base, part_bytes = address(data), data.nbytes // len(out)
    for i in prange(len(out)):
        out[i] = _sum(at(base, i * part_bytes), part_bytes)


def read_bandwidth(n_threads: int, n_bytes: int = BUFFER_BYTES, passes: int = 10) -> list[float]:
    """Bytes per second of `passes` readings of a buffer of about `n_bytes`, each thread a part of it from end to end."""
    part = max(n_bytes // (n_threads * STEP), 1) * STEP // 4
    data, out = np.empty(n_threads * part, np.float32), np.empty(n_threads, np.float32)
    speeds = []
    with running(n_threads):
        fill_parts(data, n_threads)
        sum_parts(data, out)                    # the first time compiles
        for _ in range(passes):
            began = time.perf_counter()
            sum_parts(data, out)
            speeds.append(data.nbytes / (time.perf_counter() - began))
    return speeds


# ---- what a token reads

@dataclass(frozen=True)
class Traffic:
    """Bytes that one decoded token reads."""

    weights: int
    kv: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.kv


def bytes_per_token(file: GGUFFile, config: Config, depth: int, n_new: int, kv_bytes: float,
                    held: Callable[[Matrix], int] = stored_bytes) -> Traffic:
    """What each of `n_new` tokens after `depth` others reads, in the mean; `kv_bytes` is the size of one number of a key or a value."""
    kv = sum(kv_read(config, depth + i, kv_bytes) for i in range(n_new)) / n_new
    return Traffic(weight_bytes(file, config, held), kv)


def weight_bytes(file: GGUFFile, config: Config, held: Callable[[Matrix], int] = stored_bytes) -> int:
    """Bytes of weights that one token reads, as they lie in the file, or as an engine holds them (`Backend.held`).

    Every matrix and vector once, also where it has two roles; of the experts the share that is picked; of the embedding one row, and
    all of it as the head of a tied model; of the table of per-layer inputs one row.
    """
    weights = weights_from_gguf(file, config)
    total = weights.embedding_VD.rows(0, 1, "one row").n_bytes if weights.head_VD is weights.embedding_VD else 0
    share = {id(table): (1, table.shape[0]) for table in tables_of(weights)}
    for block in weights.layers:
        if isinstance(block.ffn, MoeWeights):
            picked = (block.spec.ffn.n_used, block.spec.ffn.n_expert)
            share |= {id(experts): picked for experts in (block.ffn.gate_EMD, block.ffn.up_EMD, block.ffn.down_EDM)}
    for part in parts_of(weights):
        n, of = share.get(id(part), (1, 1))
        total += (part.nbytes if isinstance(part, np.ndarray) else held(part)) * n // of
    return total


def kv_read(config: Config, depth: int, kv_bytes: float) -> float:
    """Bytes of keys and values that a token after `depth` others reads, its own among them. Layers that share them read them each."""
    return sum(2 * spec.n_kv * spec.head_dim * kv_bytes * min(depth + 1, spec.window or depth + 1) for spec in config.layers)
