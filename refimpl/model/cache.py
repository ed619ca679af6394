"""The KV cache. Full layers keep the keys and values of all positions, sliding layers a ring buffer of the latest.

The forward pass writes the keys and values of its rows layer by layer; they belong to the sequence once the caller commits them with
`advance`. Rows of rejected draft tokens are never committed: the next call writes over them. `roll_back` shortens the committed sequence
(a conversation that goes on from an earlier point), as far as the rings still hold what is visible there.
"""

import numpy as np

from refimpl.model.config import Config


class ContextFull(Exception):
    """More tokens than the context holds."""


class LayerCache:
    """Keys and values of one layer, (S, K, H) each, of the type `dtype`. Position p is in slot p % S.

    `window` is the layer's sliding window, None for a layer that keeps all positions (there, slot = position). S grows up to `most` before
    any slot is used twice: a large window or context in a file takes no memory by itself.
    """

    def __init__(self, n_kv: int, head_dim: int, n_slots: int, most: int, window: int | None, dtype: np.dtype):
        self.k_SKH = np.empty((min(n_slots, most), n_kv, head_dim), dtype)
        self.v_SKH = np.empty_like(self.k_SKH)
        self.window, self.most = window, most

    @property
    def n_slots(self) -> int:
        """S, the number of slots."""
        return len(self.k_SKH)

    @property
    def n_bytes(self) -> int:
        """Memory held, in bytes."""
        return self.k_SKH.nbytes + self.v_SKH.nbytes

    def first_visible(self, pos: int | np.ndarray) -> int | np.ndarray:
        """The earliest position that a query at `pos` sees; elementwise for an array."""
        return np.zeros_like(pos) if self.window is None else np.maximum(0, pos - self.window + 1)

    def write(self, pos: int, k_TKH: np.ndarray, v_TKH: np.ndarray):
        """Stores the keys and values of positions pos, pos + 1, ..."""
        slots = (pos + np.arange(len(k_TKH))) % self.n_slots
        self.k_SKH[slots], self.v_SKH[slots] = k_TKH, v_TKH

    def grow(self, n_slots: int):
        """Makes room for `n_slots` positions. None has been written over yet, so that position p stays in slot p."""
        self.k_SKH, self.v_SKH = (np.concatenate([old, np.empty((n_slots - len(old), *old.shape[1:]), old.dtype)])
                                  for old in (self.k_SKH, self.v_SKH))


class Cache:
    """The cache of one sequence: up to `n_ctx` positions, up to `max_rows` rows in a call; `length` positions are committed.

    A ring has room for its window and `max_rows` more, so that rows which are never committed do not overwrite a key that is still
    visible.
    """

    def __init__(self, config: Config, n_ctx: int, max_rows: int, dtype: np.dtype):
        self.n_ctx, self.max_rows, self.length = n_ctx, max_rows, 0
        self._written = 0                      # highest position ever written, plus 1
        self.layers = {
            spec.index: LayerCache(spec.n_kv, spec.head_dim, max_rows, n_ctx if spec.window is None else min(n_ctx, spec.window + max_rows),
                                   spec.window, dtype)
            for spec in config.layers if spec.has_own_kv}

    @property
    def n_bytes(self) -> int:
        """Memory held by all layers now, in bytes."""
        return sum(layer.n_bytes for layer in self.layers.values())

    def reserve(self, n_rows: int):
        """Makes room for a call of `n_rows` rows. Raises ContextFull, or ValueError for more than `max_rows`."""
        if n_rows > self.max_rows:
            raise ValueError(f"{n_rows} rows in one call, the cache was made for {self.max_rows}")
        end = self.length + n_rows
        if end > self.n_ctx:
            raise ContextFull(f"{end} tokens do not fit in a context of {self.n_ctx}")
        for layer in self.layers.values():
            if end > layer.n_slots and layer.n_slots < layer.most:
                layer.grow(min(layer.most, max(end, 2 * layer.n_slots)))
        self._written = max(self._written, end)

    def advance(self, n_rows: int):
        """Commits the first `n_rows` of the rows that the last call wrote."""
        if not 0 <= n_rows <= self._written - self.length:
            raise ValueError(f"cannot commit {n_rows} rows, {self._written - self.length} were written")
        self.length += n_rows

    def roll_back(self, length: int):
        """Drops the positions from `length` on. Raises ValueError where a ring no longer holds what is visible from there."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length}, {self.length} positions are committed")
        for i, layer in self.layers.items():
            if self._written - layer.n_slots > layer.first_visible(length):
                raise ValueError(f"cannot roll back to {length}: the ring of layer {i} has moved on to {self._written}")
        self.length = length


def cache_bytes(config: Config, n_ctx: int, max_rows: int, dtype: np.dtype) -> int:
    """Memory that a cache holds when all `n_ctx` positions are taken."""
    size = 2 * np.dtype(dtype).itemsize
    return sum(size * spec.n_kv * spec.head_dim * (n_ctx if spec.window is None else min(n_ctx, spec.window + max_rows))
               for spec in config.layers if spec.has_own_kv)
