"""Keys and values of the positions so far. Full layers keep all of them, sliding layers a ring of the latest.

The forward pass appends a call's keys and values layer by layer; they count only once the caller commits them with `advance`. What
was committed can be taken back with `roll_back` (for drafts that were rejected) as far as the rings still hold what is needed then.
"""

import numpy as np

from refimpl.model.config import Config


class ContextFull(Exception):
    """More tokens than the context holds."""


class LayerCache:
    """Keys and values of one layer, (slots, K, H) each, of the type `dtype`. Position p lies in slot p % slots.

    `window` is the layer's sliding window, None for a layer that keeps everything (there, slot = position). It grows up to `most` slots
    before any slot is used twice: what a file says about windows and contexts takes no memory by itself.
    """

    def __init__(self, n_kv: int, head_dim: int, n_slots: int, most: int, window: int | None, dtype: np.dtype):
        self.k_SKH = np.empty((min(n_slots, most), n_kv, head_dim), dtype)
        self.v_SKH = np.empty_like(self.k_SKH)
        self.window, self.most = window, most

    @property
    def n_slots(self) -> int:
        """Room, in positions."""
        return len(self.k_SKH)

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        return self.k_SKH.nbytes + self.v_SKH.nbytes

    def first_in_sight(self, pos):
        """The earliest position that a query at `pos` sees: of one position, or an array of them."""
        return np.zeros_like(pos) if self.window is None else np.maximum(0, pos - self.window + 1)

    def write(self, pos: int, k_TKH: np.ndarray, v_TKH: np.ndarray):
        """Stores the keys and values of positions pos, pos + 1, ..."""
        slots = (pos + np.arange(len(k_TKH))) % self.n_slots
        self.k_SKH[slots], self.v_SKH[slots] = k_TKH, v_TKH

    def grow(self, n_slots: int):
        """Makes room for more positions."""
        self.k_SKH, self.v_SKH = (np.concatenate([old, np.empty((n_slots - len(old), *old.shape[1:]), old.dtype)])
                                  for old in (self.k_SKH, self.v_SKH))


class Cache:
    """The cache of one sequence: up to `n_ctx` positions, up to `max_rows` rows in a call; `length` positions are committed.

    A ring has room for its window and `max_rows` more, so that rows which are not committed, or are taken back, never overwrite a
    key that is still in sight.
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
        """Memory held by all layers now."""
        return sum(layer.n_bytes for layer in self.layers.values())

    def reserve(self, n_rows: int):
        """Before a call of `n_rows` rows: grows what must grow. Raises ContextFull, or ValueError for more than `max_rows`."""
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
        """Commits the first `n_rows` of the rows written since the last commit."""
        if not 0 <= n_rows <= self._written - self.length:
            raise ValueError(f"cannot commit {n_rows} rows, {self._written - self.length} were written")
        self.length += n_rows

    def roll_back(self, length: int):
        """Forgets the positions from `length` on. Raises ValueError where a ring no longer holds what would be in sight then."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length}, {self.length} positions are committed")
        for i, layer in self.layers.items():
            if self._written - layer.n_slots > layer.first_in_sight(length):
                raise ValueError(f"cannot roll back to {length}: the ring of layer {i} has moved on to {self._written}")
        self.length = length


def cache_bytes(config: Config, n_ctx: int, max_rows: int, dtype: np.dtype) -> int:
    """Memory that a full cache of `n_ctx` positions will hold."""
    size = 2 * np.dtype(dtype).itemsize
    return sum(size * spec.n_kv * spec.head_dim * (n_ctx if spec.window is None else min(n_ctx, spec.window + max_rows))
               for spec in config.layers if spec.has_own_kv)
