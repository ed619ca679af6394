"""Every block type in one table: what it takes, how far it moves weights, how fast it is multiplied."""

import math
from dataclasses import dataclass

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import DEQUANTIZABLE, QUANTIZABLE, dequantize, quantize

SEED, SHAPE = 0, (256, 1024)        # of the random weights

# Of ggml (0.25.3, in llama-cpp-python 0.3.36): relative RMS error of its quantizers on `weights()`, normal and Laplace, every weight as
# important as the others (files are made with importances: their errors are lower where it matters); and 10**9 weights a second that one
# thread multiplies out of the cache, row by row (`ggml_dot_speed`, the best of 300), on an AMD EPYC with AVX-512 VNNI.
# Measured by `measure_ggml` on 2026-11-21.
GGML = {
    "F16": (0.000207, 0.000207, 17.7), "BF16": (0.00166, 0.00165, 28.4), "Q8_0": (0.00536, 0.00675, 26.8),
    "Q6_K": (0.0178, 0.0218, 37.5), "Q5_1": (0.0379, 0.0444, 15.6), "Q5_0": (0.0428, 0.0536, 20.9),
    "Q5_K": (0.0362, 0.0429, 26.4), "Q4_1": (0.0783, 0.0917, 15.8), "Q4_0": (0.0861, 0.107, 25.6),
    "Q4_K": (0.0715, 0.0847, 40.5), "IQ4_NL": (0.0762, 0.0879, 22.5), "IQ4_XS": (0.0768, 0.0887, 26.4),
    "MXFP4": (0.115, 0.127, 20.2), "NVFP4": (0.0951, 0.0929, 18.3), "Q3_K": (0.151, 0.176, 30.0),
    "IQ3_S": (0.166, 0.197, 9.71), "IQ3_XXS": (0.214, 0.248, 11.3), "Q2_K": (0.297, 0.343, 44.4),
    "IQ2_S": (0.265, 0.325, 15.9), "IQ2_XS": (0.3, 0.329, 16.2), "IQ2_XXS": (0.344, 0.385, 15.1),
    "IQ1_M": (0.583, 0.585, 16.4), "IQ1_S": (0.486, 0.545, 15.6), "TQ1_0": (0.808, 0.833, 31.2),
    "TQ2_0": (0.808, 0.833, 58.7), "Q2_0": (0.719, 0.726, 1.97), "Q1_0": (0.6, 0.705, 33.6),
}

# Of this package's kernels in `q8`, both threads of the same machine: weights a second as a multiple of Q4_0's, measured in turn with it;
# with one row of activations and weights from memory (Q4_0: 55 * 10**9 weights, 31 GB a second), and with 512 rows (Q4_0: 640 * 10**9
# operations a second). Medians of three times 31 (types_bench.py: measure_types(repetitions=31), 2026-11-21).
KERNELS = {
    "Q4_0": (1.00, 1.00), "Q4_1": (0.90, 0.93), "Q5_0": (0.81, 0.90), "Q5_1": (0.75, 0.83), "Q8_0": (0.55, 1.00), "IQ4_NL": (0.98, 1.00),
    "MXFP4": (1.00, 0.98), "Q2_K": (1.67, 0.76), "Q3_K": (1.24, 0.73), "Q4_K": (0.96, 0.88), "Q5_K": (0.80, 0.77), "Q6_K": (0.62, 0.78),
    "IQ4_XS": (1.01, 0.94), "F32": (0.14, 0.34), "F16": (0.28, 0.35), "BF16": (0.28, 0.34),
}


@dataclass(frozen=True)
class Row:
    """A type: bits a weight in the file, and as the kernels hold it; relative RMS error of this project's quantizer and ggml's; speeds.

    `ggml_speed` is that of one thread out of the cache, in 10**9 weights a second; `decode` and `prompt` are those of this package's
    kernels as multiples of Q4_0's. A number that nobody measured is NaN.
    """

    type: str
    bits: float
    held_bits: float
    normal: float
    laplace: float
    ggml_normal: float
    ggml_laplace: float
    ggml_speed: float
    decode: float
    prompt: float

    @property
    def best_normal(self) -> float:
        """This project's error on normal weights, ggml's where this project has no quantizer."""
        return self.ggml_normal if math.isnan(self.normal) else self.normal


def weights() -> dict[str, np.ndarray]:
    """Random weights to quantize, float32 SHAPE: normal, and Laplace (more of them large), as weights of trained models are in between."""
    rng = np.random.default_rng(SEED)
    return {"normal": rng.standard_normal(SHAPE).astype(np.float32), "laplace": rng.laplace(size=SHAPE).astype(np.float32)}


def relative_error(x: np.ndarray, restored: np.ndarray) -> float:
    """RMS of the difference over RMS of the weights."""
    return float(np.sqrt(np.mean((restored - x).astype(np.float64) ** 2) / np.mean(x.astype(np.float64) ** 2)))


def rows() -> list[Row]:
    """A row for every type that can be decoded, from few bits to many."""
    from refimpl.kernels.machine.tiles import held_type

    random, out = weights(), []
    for name in DEQUANTIZABLE:
        block, held = BLOCKS[name], BLOCKS[held_type(name)]
        ours = [relative_error(x, dequantize(quantize(x, name), name)) if name in QUANTIZABLE else math.nan for x in random.values()]
        out.append(Row(name, 8 * block.n_bytes / block.elements, 8 * held.n_bytes / held.elements, *ours,
                       *GGML.get(name, (math.nan,) * 3), *KERNELS.get(name, (math.nan,) * 2)))
    return sorted(out, key=lambda row: (row.bits, row.type))


def measure_ggml() -> dict[str, tuple[float, float, float]]:
    """GGML anew (needs llama-cpp-python; a minute): type -> errors on normal and Laplace weights, 10**9 weights a second."""
    from refimpl.lab.explain.ggml import ggml_dequantize, ggml_dot_speed, ggml_quantize

    measured = {}
    for name in GGML:
        errors = [relative_error(x, ggml_dequantize(ggml_quantize(x, name), name)) for x in weights().values()]
        measured[name] = (*errors, max(ggml_dot_speed(name, passes=100) for _ in range(3)) / 1e9)
    return measured


HEAD = ("type", "bits a weight", "in the kernels' memory", "error, normal", "ggml's", "error, Laplace", "ggml's", "ggml, 10^9 weights/s",
        "here, decoding, Q4_0 = 1", "here, prompt, Q4_0 = 1")


def cells(table: list[Row]) -> list[list[str]]:
    """The table as text, under HEAD: errors in percent of the weights' RMS."""
    def percent(value: float) -> str:
        return "" if math.isnan(value) else f"{100 * value:.3g} %"
    return [[row.type, f"{row.bits:.4g}", f"{row.held_bits:.4g}", percent(row.normal), percent(row.ggml_normal), percent(row.laplace),
             percent(row.ggml_laplace),
             *("" if math.isnan(speed) else f"{speed:.3g}" for speed in (row.ggml_speed, row.decode, row.prompt))] for row in table]
