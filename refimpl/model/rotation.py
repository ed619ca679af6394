"""Angles of RoPE for the forward pass: those of a few positions come from a table of 64, which takes little longer to compute than one."""

from functools import lru_cache

import numpy as np

from refimpl.reference.ops import rope_angles

TOGETHER = 64           # positions of a table
FEW = 8                 # rows up to which tables are worth it: a new token, drafts
TABLES = 8              # kept: two kinds of layers, at the ends of a few conversations


def angles_at(pos_T: np.ndarray, frequency_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`rope_angles` of these positions, with the same bits: (cos, sin), float32 (T, R) each."""
    if len(pos_T) > FEW:
        return rope_angles(pos_T, frequency_R)
    tables = [_table(int(pos) // TOGETHER, frequency_R.tobytes()) for pos in pos_T]
    rows = [int(pos) % TOGETHER for pos in pos_T]
    return tuple(np.stack([table[i][row] for table, row in zip(tables, rows)]) for i in (0, 1))


@lru_cache(TABLES)
def _table(number: int, frequencies: bytes) -> tuple[np.ndarray, np.ndarray]:
    return rope_angles(np.arange(number * TOGETHER, (number + 1) * TOGETHER), np.frombuffer(frequencies, np.float32))
