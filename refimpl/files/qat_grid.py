"""Are the float weights of a file on the Q4_0 quantization grid already, and what would llama.cpp's rule for Q4_0 lose?

Weights that quantization-aware training released as bfloat16 are on it; ordinary weights are not. Large tensors are judged by a sample of
rows, evenly spaced.
"""

import math
import os
import re
from collections import defaultdict
from dataclasses import dataclass, fields

import numpy as np

from refimpl.files.recover_scales import recover_grid
from refimpl.formats.gguf import TensorInfo
from refimpl.formats.quants.codecs import dequantize, quantize
from refimpl.loading.open import open_model
from refimpl.progress import Progress, silent

FLOATS = ("F32", "F16", "BF16")
SAMPLE = 1 << 19                # about as many weights of each tensor
ROLE_OF = re.compile(r"^blk\.\d+\.|\.weight$")


@dataclass(frozen=True)
class Distance:
    """Sums over weights, which add up from block to tensor to file."""

    n_rows: int = 0
    n_blocks: int = 0
    n_exact: int = 0            # blocks on a grid, to the precision of their format
    n_moved: int = 0            # weights that the rule moves by more than a sixteenth of the best grid's step
    square: float = 0.0         # sum of x**2
    grid: float = 0.0           # sum of (x - best grid)**2
    rule: float = 0.0           # sum of (x - llama.cpp's Q4_0)**2

    def __add__(self, other: "Distance") -> "Distance":
        return Distance(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def described(self) -> dict[str, object]:
        """As shares, and as root mean squares relative to the weights'."""
        size = self.square or 1.0
        return {"rows_sampled": self.n_rows, "on_grid": self.n_exact / max(1, self.n_blocks),
                "grid_rms": (self.grid / size) ** 0.5, "rule_rms": (self.rule / size) ** 0.5,
                "moved_by_rule": self.n_moved / max(1, 32 * self.n_blocks)}


def distance_of(x: np.ndarray) -> Distance:
    """Of rows, float32 (n_rows, D) with D a multiple of 32. Raises ValueError for NaN and infinities."""
    blocks = x.reshape(-1, 32)
    found = recover_grid(blocks)
    grid, rule = found.restored(), dequantize(quantize(blocks, "Q4_0"), "Q4_0")
    moved = np.abs(rule - grid) > np.abs(found.d.astype(np.float32))[:, None] / np.float32(16)
    return Distance(len(x), len(blocks), int(found.exact.sum()), int(moved.sum()), _sum_of_squares(blocks),
                    _sum_of_squares(blocks - grid), _sum_of_squares(blocks - rule))


def _sum_of_squares(x: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", x, x, dtype=np.float64))


def describe_grid(path: str | os.PathLike, progress: Progress = silent) -> dict[str, object]:
    """`grid_of` a GGUF file or the directory of a model."""
    file = open_model(path)
    return {"path": str(file.path)} | grid_of(file, progress)


def grid_of(file, progress: Progress = silent) -> dict[str, object]:
    """Distances of the float matrices of anything with `path`, `tensors` and `raw(name)`: for each tensor, each role and all together.

    Raises ValueError where there is no float matrix.
    """
    matrices = [t for t in file.tensors.values() if t.type in FLOATS and len(t.shape) > 1 and t.shape[-1] % 32 == 0]
    if not matrices:
        types = sorted({t.type for t in file.tensors.values() if len(t.shape) > 1})
        raise ValueError(f"{file.path}: no float matrix with rows of whole blocks of 32 to examine, only {', '.join(types) or 'vectors'}; "
                         "give a file in F32, F16 or BF16")
    tensors, roles, total = [], defaultdict(Distance), Distance()
    with progress("tensors", len(matrices)) as advance:
        for info in matrices:
            found = _sampled(file, info)
            tensors.append({"name": info.name, "type": info.type, "rows": math.prod(info.shape[:-1])} | found.described())
            roles[ROLE_OF.sub("", info.name)] += found
            total += found
            advance(1)
    return {"tensors": tensors, "roles": {role: found.described() for role, found in roles.items()}, "all": total.described()}


def _sampled(file, info: TensorInfo) -> Distance:
    """Distance of about SAMPLE weights of one tensor."""
    raw = file.raw(info.name)
    rows = raw.reshape(-1, raw.shape[-1])
    n_sampled = min(len(rows), max(1, SAMPLE // info.shape[-1]))
    chosen = np.linspace(0, len(rows) - 1, n_sampled).astype(np.int64)
    try:
        return distance_of(dequantize(np.ascontiguousarray(rows[chosen]), info.type))
    except ValueError as error:
        raise ValueError(f"{file.path}: tensor {info.name}: {error}") from None
