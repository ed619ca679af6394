"""Every block type in one table: bits, quantization error, speed."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import DEQUANTIZABLE, QUANTIZABLE, dequantize, quantize

SEED, SHAPE = 0, (256, 1024)        # of the random weights

# measured_types.json says on which machine, when and how: type -> errors of ggml's quantizers (normal, Laplace) and 10**9 weights a second
MEASURED = json.loads(Path(__file__).with_name("measured_types.json").read_text(encoding="utf-8"))
GGML: dict[str, tuple[float, float, float]] = MEASURED["ggml"]["types"]
KERNELS: dict[str, tuple[float, float]] = MEASURED["kernels"]["types"]       # decoding and prompt, as multiples of Q4_0


@dataclass(frozen=True)
class Row:
    """A type: bits a weight in the file, and as the kernels hold it; relative RMS error of this project's quantizer and ggml's; speeds.

    `ggml_speed` is that of one thread out of the cache, in 10**9 weights a second; `decode` and `prompt` are those of this package's
    kernels as multiples of Q4_0's. A number that was not measured is NaN.
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
    """Measures GGML again (needs llama-cpp-python; a minute): type -> errors on normal and Laplace weights, 10**9 weights a second."""
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
