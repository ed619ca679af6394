"""Every weight type beside the others: bits a weight, speed of its kernels, error of quantizing."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from refimpl.formats.matrix import Matrix
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import QUANTIZABLE, dequantize, quantize
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.threads import running
from refimpl.kernels.machine.tiles import Tiles, tiled
from refimpl.kernels.machine.unpack import LAYOUTS
from refimpl.kernels.matmul import matmul_q8
from refimpl.progress import silent

BASE = "Q4_0"               # what every type is measured in turn with
WIDTH = 4096                # weights in a row
N_TOK = 512                 # rows of a prompt


def measure_types(types: Sequence[str] = tuple(LAYOUTS), *, threads: Sequence[int] = (1, 2), repetitions: int = 9,
                  decode_bytes: int = 256 << 20, prompt_rows: int = 1024, seed: int = 0,
                  progress: Callable[..., AbstractContextManager] = silent) -> list[dict[str, object]]:
    """A row for each type, in `q8` arithmetic: {type, bits (a weight), and for each number n of threads

    decode_n        GB/s of weight bytes that one row of activations gets through a matrix of `decode_bytes` (larger than any cache)
    prompt_n        10^9 operations a second, two for each weight and row, of N_TOK rows with a matrix of `prompt_rows` rows
    decode_n_ratio, prompt_n_ratio        the same products in weights a second, as a multiple of Q4_0's
    error_normal, error_laplace           RMS error of encoding such weights, relative to their own RMS (where there is an encoder)}.

    Speeds are medians of `repetitions` runs, Q4_0 and the type in turn; a ratio is the median of those of neighbouring runs. A product is
    run once before it counts. Raises ValueError for a type without kernels.
    """
    missing = [name for name in types if name not in LAYOUTS]
    if missing:
        raise ValueError(f"there are no kernels for {', '.join(missing)}; there are for {', '.join(LAYOUTS)}")
    rng, table = np.random.default_rng(seed), []
    one, many = (rng.standard_normal((n, WIDTH), dtype=np.float32) for n in (1, N_TOK))
    base = _matrix(BASE, decode_bytes, rng), _matrix(BASE, _bytes(BASE, prompt_rows), rng)
    with progress("types", len(types)) as step:
        for name in types:
            decode, prompt = _matrix(name, decode_bytes, rng), _matrix(name, _bytes(name, prompt_rows), rng)
            row = {"type": name, "bits": 8 * BLOCKS[name].n_bytes / BLOCKS[name].elements}
            for n in threads:
                seconds, ratio = in_turn((decode, base[0]), one, n, repetitions)
                row |= {f"decode_{n}": decode.n_bytes / seconds / 1e9, f"decode_{n}_ratio": ratio}
                seconds, ratio = in_turn((prompt, base[1]), many, n, repetitions)
                row |= {f"prompt_{n}": 2 * N_TOK * WIDTH * prompt.shape[0] / seconds / 1e9, f"prompt_{n}_ratio": ratio}
            table.append(row | errors(name, seed))
            step(1)
    return table


def in_turn(pair: tuple[Tiles, Tiles], x_TD: np.ndarray, n_threads: int, repetitions: int) -> tuple[float, float]:
    """(median seconds of x times the first matrix, median over neighbouring runs of its weights a second over those of the second)."""
    seconds: tuple[list[float], list[float]] = [], []
    with running(n_threads):
        for turn in range(repetitions + 1):
            for tiles, runs in zip(pair, seconds):
                began = time.perf_counter()
                matmul_q8(x_TD, tiles)
                if turn:
                    runs.append(time.perf_counter() - began)
    rows = pair[0].shape[0] / pair[1].shape[0]
    return statistics.median(seconds[0]), statistics.median(rows * b / a for a, b in zip(*seconds))


def errors(name: str, seed: int = 0) -> dict[str, float]:
    """Relative RMS errors of encoding 2^18 weights of two distributions; nothing for a type that this project does not encode."""
    rng, found = np.random.default_rng(seed), {}
    for kind, draw in (("normal", rng.standard_normal), ("laplace", rng.laplace)):
        x = draw(size=(64, WIDTH)).astype(np.float32)
        if name in QUANTIZABLE:
            lost = dequantize(quantize(x, name).view(np.uint8), name).astype(np.float64) - x
            found[f"error_{kind}"] = float(np.sqrt(np.mean(lost**2) / np.mean(x.astype(np.float64)**2)))
    return found


def _bytes(name: str, n_rows: int) -> int:
    return n_rows * BLOCKS[name].row_bytes(WIDTH)


def _matrix(name: str, n_bytes: int, rng: np.random.Generator) -> Tiles:
    """About `n_bytes` of weights: the same two tiles over and over, each time in memory of their own."""
    n_rows = 2 * LANES
    if name in QUANTIZABLE:
        raw = quantize(rng.standard_normal((n_rows, WIDTH), dtype=np.float32), name)
    else:
        raw = rng.integers(0, 256, (n_rows, _bytes(name, 1)), dtype=np.uint8)
        for field, kind, _ in BLOCKS[name].fields:
            if kind == "<f2":
                raw.view(BLOCKS[name].dtype)[field] = 0.01          # neither infinite nor denormal
    two = tiled(Matrix(raw, name), 1)
    n_tiles = max(n_bytes // (LANES * _bytes(name, 1)), 1)
    return Tiles(np.resize(two.raw, (1, n_tiles, two.raw.shape[2])), name, (LANES * n_tiles, WIDTH))
