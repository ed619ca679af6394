"""Arrays in JSON: their bytes in base64, which a browser turns into a typed array at once."""

import base64

import numpy as np

FRACTION = 65535        # what stands for 1 where a share from 0 to 1 is kept in 16 bits


def packed(values: np.ndarray) -> dict[str, object]:
    """{"type", "shape", "data"}: "u1", "u2", "u4", "i4" or "f4" with the bytes in little-endian order, rows first.

    Raises ValueError for another type, which JavaScript has no array for.
    """
    kind = values.dtype.str[1:]
    if kind not in ("u1", "u2", "u4", "i4", "f4"):
        raise ValueError(f"an array of {values.dtype} cannot be packed")
    raw = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
    return {"type": kind, "shape": list(values.shape), "data": base64.b64encode(raw).decode()}


def shares(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 as uint16, `FRACTION` for 1."""
    return np.rint(np.clip(values, 0, 1) * FRACTION).astype(np.uint16)


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the `k` largest numbers along the last axis (fewer where there are fewer), largest first, the lower index first of equal
    ones.
    """
    k, n = min(k, values.shape[-1]), values.shape[-1]
    if k == n:
        return np.argsort(-values, axis=-1, kind="stable")
    # all candidates for the places: those above the k-th largest, and of its equals the ones with the lowest index
    kth = np.partition(values, n - k, axis=-1)[..., n - k, None]
    rank = np.where(values > kth, 2, np.where(values == kth, 1, 0))
    order = np.argsort(-rank, axis=-1, kind="stable")[..., :k]
    found = np.take_along_axis(values, order, -1)
    return np.take_along_axis(order, np.argsort(-found, axis=-1, kind="stable"), -1)
