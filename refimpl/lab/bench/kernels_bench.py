"""The products of every weight type, beside what the machine allows: multiply-adds a second as a share of a loop of nothing else (peak.py),
and with one row of activations bytes of weights a second as a share of reading alone (bandwidth.py). Also the error of each type.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from refimpl.formats.matrix import Matrix
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import QUANTIZABLE, dequantize, quantize
from refimpl.kernels.cores.threads import prepare, running
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.tiles import Tiles, tiled
from refimpl.kernels.machine.unpack import LAYOUTS
from refimpl.kernels.matmul import matmul_q8
from refimpl.lab.bench.bandwidth import STEP, fill_parts, sum_parts
from refimpl.lab.bench.machine import machine
from refimpl.lab.bench.peak import peak
from refimpl.progress import silent

BASE = "Q4_0"               # what every type is measured in turn with
WIDTH = 4096                # weights in a row
ROWS = (1, 4, 5, 32, 512)   # of activations: a new token, drafts to verify, an expert's share of a prompt, a prompt
FEW = 8                     # rows up to which weights come from memory
MOST_ROWS = 4096


def measure_kernels(types: Sequence[str] = tuple(LAYOUTS), rows: Sequence[int] = ROWS, *, threads: int | None = None, repetitions: int = 5,
                    memory_bytes: int = 256 << 20, cached_rows: int = 1024, seed: int = 0,
                    progress: Callable[..., AbstractContextManager] = silent) -> dict[str, object]:
    """{plan, machine, types, products}, with one thread and with `threads`, in `q8` arithmetic.

    `types`: {type, bits (a weight), error_normal, error_laplace: the RMS error of encoding such weights, relative to their own RMS, where
    there is an encoder}. `products`, one for each type, number of threads and number of rows: {type, threads, rows,
    multiply_adds_per_second, weight_bytes_per_second, share_of_peak, share_of_bandwidth (one row only), ratio (weights a second, as a
    multiple of Q4_0's)}.

    Up to FEW rows are multiplied with a matrix of `memory_bytes`, larger than any cache, more rows with one of `cached_rows`. All are
    medians of `repetitions` rounds, in each of which the peak, the bandwidth, Q4_0 and the type take turns. A round is run before it
    counts. Raises ValueError for a type without kernels, and for numbers of rows that are not 1 to 4096.
    """
    missing = [name for name in types if name not in LAYOUTS]
    if missing or not types:
        raise ValueError(f"there are no kernels for {', '.join(missing)}; there are for {', '.join(LAYOUTS)}")
    if not rows or any(not 1 <= n <= MOST_ROWS for n in rows):
        raise ValueError(f"rows {', '.join(map(str, rows))}: expected numbers from 1 to {MOST_ROWS}")
    most = prepare(threads)
    numbers = sorted({1, most})
    rng = np.random.default_rng(seed)
    x_TD = rng.standard_normal((max(rows), WIDTH), dtype=np.float32)
    data, products = _buffer(memory_bytes, most), []
    base = _matrices(BASE, rows, memory_bytes, cached_rows, rng)
    with progress("types", len(types)) as step:
        for name in types:
            pair = base, base if name == BASE else _matrices(name, rows, memory_bytes, cached_rows, rng)
            for n in numbers:
                products += _rounds(name, pair, x_TD, rows, n, data, repetitions)
            step(1)
    return {"plan": {"rows": list(rows), "threads": numbers, "repetitions": repetitions, "width": WIDTH, "memory_bytes": memory_bytes,
                     "cached_rows": cached_rows, "seed": seed},
            "machine": machine(most), "types": [_about(name, seed) for name in types], "products": products}


def _rounds(name, pair, x_TD, rows, n_threads, data, repetitions) -> list[dict[str, object]]:
    """The entries of one type with one number of threads."""
    found = {n: [] for n in rows}
    floats, out = LAYOUTS[name]["family"] == "float", np.empty(n_threads, np.float32)
    with running(n_threads):
        for turn in range(repetitions + 1):
            most = peak(floats, n_threads)
            read = data.nbytes / seconds(sum_parts, data, out) if 1 in rows else 0
            for n in rows:
                base, own = (tiles[n <= FEW] for tiles in pair)
                base_weights = base.shape[0] / seconds(matmul_q8, x_TD[:n], base)
                took = seconds(matmul_q8, x_TD[:n], own) if own is not base else base.shape[0] / base_weights
                work, n_bytes = n * own.shape[0] * WIDTH / took, own.n_bytes / took
                entry = {"multiply_adds_per_second": work, "weight_bytes_per_second": n_bytes, "share_of_peak": work / most,
                         "ratio": own.shape[0] / took / base_weights} | ({"share_of_bandwidth": n_bytes / read} if n == 1 else {})
                if turn:
                    found[n].append(entry)
    return [{"type": name, "threads": n_threads, "rows": n}
            | {key: statistics.median(entry[key] for entry in entries) for key in entries[0]} for n, entries in found.items()]


def seconds(function: Callable, *args) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


def _buffer(n_bytes: int, n_threads: int) -> np.ndarray:
    """Memory to read, a whole number of STEPs for each thread."""
    data = np.empty(max(n_bytes // (n_threads * STEP), 1) * n_threads * STEP // 4, np.float32)
    with running(n_threads):
        fill_parts(data, n_threads)
    return data


def _about(name: str, seed: int) -> dict[str, object]:
    return {"type": name, "bits": 8 * BLOCKS[name].n_bytes / BLOCKS[name].elements} | errors(name, seed)


def errors(name: str, seed: int = 0) -> dict[str, float]:
    """Relative RMS errors of encoding 2^18 weights of two distributions; nothing for a type that this project does not encode."""
    rng, found = np.random.default_rng(seed), {}
    for kind, draw in (("normal", rng.standard_normal), ("laplace", rng.laplace)):
        x = draw(size=(64, WIDTH)).astype(np.float32)
        if name in QUANTIZABLE:
            lost = dequantize(quantize(x, name).view(np.uint8), name).astype(np.float64) - x
            found[f"error_{kind}"] = float(np.sqrt(np.mean(lost**2) / np.mean(x.astype(np.float64)**2)))
    return found


def _matrices(name: str, rows: Sequence[int], memory_bytes: int, cached_rows: int, rng) -> dict[bool, Tiles]:
    """The matrix for few rows (True) and for many, as far as they are used."""
    sizes = {True: memory_bytes, False: cached_rows * BLOCKS[name].row_bytes(WIDTH)}
    return {few: tiles_of(name, sizes[few], rng) for few in {n <= FEW for n in rows}}


def tiles_of(name: str, n_bytes: int, rng: np.random.Generator) -> Tiles:
    """About `n_bytes` of weights: the same two tiles over and over, each time in memory of their own."""
    n_rows = 2 * LANES
    if name in QUANTIZABLE:
        raw = quantize(rng.standard_normal((n_rows, WIDTH), dtype=np.float32), name)
    else:
        raw = rng.integers(0, 256, (n_rows, BLOCKS[name].row_bytes(WIDTH)), dtype=np.uint8)
        for field, kind, _ in BLOCKS[name].fields:
            if kind == "<f2":
                raw.view(BLOCKS[name].dtype)[field] = 0.01          # neither infinite nor denormal
    two = tiled(Matrix(raw, name), 1)
    n_tiles = max(n_bytes // (LANES * BLOCKS[name].row_bytes(WIDTH)), 1)
    return Tiles(np.resize(two.raw, (1, n_tiles, two.raw.shape[2])), name, (LANES * n_tiles, WIDTH))
