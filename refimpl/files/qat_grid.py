"""Do the float weights of a file lie on the Q4_0 grid already, and what would converting them by the usual rule lose?

A release of a quantization-aware training as bfloat16 numbers does lie on it; ordinary weights do not. Big tensors are judged by some of
their rows, evenly spread.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from refimpl.files.recover_scales import find_lattice
from refimpl.formats.quants.codecs import dequantize, quantize
from refimpl.loading.open import open_model

FLOATS = ("F32", "F16", "BF16")
LOOKED_AT = 1 << 19             # weights of a tensor, about
NOTES = ("on a lattice: blocks of 32 that are products of one scale and levels -8 .. 7, as far as their format tells",
         "off the best one, by the rule: what Q4_0 loses with the best scale and with llama.cpp's (largest / -8), RMS over the weights'",
         "moved by it: weights that the rule puts elsewhere than the best scale does, by more than 1/16 of a step")
ROLE_OF = re.compile(r"^blk\.\d+\.|\.weight$")


@dataclass(frozen=True)
class Distance:
    """Sums over weights; they add up from block to tensor to file."""

    n_rows: int = 0
    n_blocks: int = 0
    n_exact: int = 0            # blocks on a lattice, as far as their format tells
    n_moved: int = 0            # weights that the rule moves by more than a sixteenth of the best lattice's step
    square: float = 0.0         # sum of x**2
    lattice: float = 0.0        # sum of (x - best lattice)**2
    rule: float = 0.0           # sum of (x - llama.cpp's Q4_0)**2

    def __add__(self, other: "Distance") -> "Distance":
        return Distance(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def described(self) -> dict[str, object]:
        """As shares, and as root mean squares relative to the weights'."""
        size = self.square or 1.0
        return {"rows_looked_at": self.n_rows, "on_a_lattice": self.n_exact / max(1, self.n_blocks),
                "lattice_rms": (self.lattice / size) ** 0.5, "rule_rms": (self.rule / size) ** 0.5,
                "moved_by_rule": self.n_moved / max(1, 32 * self.n_blocks)}


def distance_of(x: np.ndarray) -> Distance:
    """Of rows, float32 (n_rows, D) with D a multiple of 32. Raises ValueError for NaN and infinities."""
    blocks = x.reshape(-1, 32)
    found = find_lattice(blocks)
    lattice, rule = found.restored(), dequantize(quantize(blocks, "Q4_0"), "Q4_0")
    moved = np.abs(rule - lattice) > np.abs(found.d.astype(np.float32))[:, None] / np.float32(16)
    return Distance(len(x), len(blocks), int(found.exact.sum()), int(moved.sum()), _sum_of_squares(blocks),
                    _sum_of_squares(blocks - lattice), _sum_of_squares(blocks - rule))


def _sum_of_squares(x: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", x, x, dtype=np.float64))


Begin = Callable[[int], Callable[[int], None]]


def silent(total: int) -> Callable[[int], None]:
    """Shows no progress."""
    return lambda n: None


def describe_grid(path: str | os.PathLike, begin: Begin = silent) -> dict[str, object]:
    """`grid_of` a GGUF file or the directory of a model."""
    file = open_model(path)
    return {"path": str(file.path)} | grid_of(file, begin)


def grid_of(file, begin: Begin = silent) -> dict[str, object]:
    """Distances of the float matrices of anything with `path`, `tensors` and `raw(name)`: for each tensor, each role and all together.

    `begin` is told the number of tensors and returns what is told of each one done. Raises ValueError where there is no float matrix.
    """
    matrices = [t for t in file.tensors.values() if t.type in FLOATS and len(t.shape) > 1 and t.shape[-1] % 32 == 0]
    if not matrices:
        types = sorted({t.type for t in file.tensors.values() if len(t.shape) > 1})
        raise ValueError(f"{file.path}: no float matrix with rows of whole blocks of 32 to look at, only {', '.join(types) or 'vectors'}; "
                         "give a file in F32, F16 or BF16")
    step, tensors, roles, total = begin(len(matrices)), [], defaultdict(Distance), Distance()
    for info in matrices:
        raw = file.raw(info.name)
        rows = raw.reshape(-1, raw.shape[-1])
        n_looked_at = min(len(rows), max(1, LOOKED_AT // info.shape[-1]))
        chosen = np.linspace(0, len(rows) - 1, n_looked_at).astype(np.int64)
        try:
            found = distance_of(dequantize(np.ascontiguousarray(rows[chosen]), info.type))
        except ValueError as error:
            raise ValueError(f"{file.path}: tensor {info.name}: {error}") from None
        role = ROLE_OF.sub("", info.name)
        tensors.append({"name": info.name, "type": info.type, "rows": len(rows)} | found.described())
        roles[role] += found
        total += found
        step(1)
    return {"tensors": tensors, "roles": {role: found.described() for role, found in roles.items()}, "all": total.described()}


def as_text(described: dict[str, object]) -> str:
    """The same for people."""
    entries = [(name, "", found) for name, found in described["roles"].items()]
    entries += [("all together", "", described["all"]), *((t["name"], f" of {t['rows']}", t) for t in described["tensors"])]
    width = max(len(name) for name, _, _ in entries)
    head = f"{'':<{width}}  {'rows looked at':>18}  on a lattice  off the best one  by the rule  moved by it"
    lines = [f"{name:<{width}}  {found['rows_looked_at']:>{18 - len(of)}}{of}  {found['on_a_lattice']:>12.2%}  "
             f"{found['lattice_rms']:>16.3%}  {found['rule_rms']:>11.3%}  {found['moved_by_rule']:>11.2%}" for name, of, found in entries]
    n_roles = len(described["roles"]) + 1
    return "\n".join([described["path"], "", head, *lines[:n_roles], "", head, *lines[n_roles:], "", *NOTES])
