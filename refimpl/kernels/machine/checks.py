"""What a kernel requires of its arguments, checked before compiled code sees them."""

import numpy as np


def float_rows(x_TD: np.ndarray, width: int) -> np.ndarray:
    """Contiguous float32 rows of `width`. Raises ValueError for anything else but another order in memory."""
    if x_TD.dtype != np.float32 or x_TD.ndim != 2 or x_TD.shape[1] != width:
        raise ValueError(f"expected float32 rows of {width}, got {x_TD.dtype} of shape {x_TD.shape}")
    return np.ascontiguousarray(x_TD)


def expert_ids(id_TX: np.ndarray, n_tok: int, n_expert: int) -> np.ndarray:
    """Contiguous int64 ids (T, X) of 0 to n_expert - 1. Raises ValueError for others."""
    if id_TX.ndim != 2 or len(id_TX) != n_tok or id_TX.dtype != np.int64:
        raise ValueError(f"expected int64 ids of {n_tok} tokens, got {id_TX.dtype} of shape {id_TX.shape}")
    if id_TX.size and not 0 <= id_TX.min() <= id_TX.max() < n_expert:
        raise ValueError(f"ids must be 0 to {n_expert - 1}, got {id_TX.min()} to {id_TX.max()}")
    return np.ascontiguousarray(id_TX)


def mismatch(*arrays: np.ndarray) -> ValueError:
    """The error for float32 arrays of wrong types or shapes."""
    return ValueError("expected float32 arrays of matching shapes, got " + ", ".join(f"{a.dtype} {a.shape}" for a in arrays))
