"""The KV cache of a sequence: a table of blocks (blocks.py) for all full layers, and one for all sliding ones.

The forward pass writes the keys and values of its rows layer by layer; they belong to the sequence once the caller commits them with
`advance`. Rows of rejected draft tokens are never committed: the next call writes over them. `roll_back` shortens the committed sequence
(a conversation that goes on from an earlier point), as far as there are blocks for what is visible from there; `fork` gives a second
sequence with the same beginning.
"""

from collections.abc import Hashable

import numpy as np

from refimpl.model.blocks import BLOCK, BlockTable, LayerCache
from refimpl.model.config import Config, LayerSpec


class ContextFull(Exception):
    """More tokens than the context holds."""


class Cache:
    """The cache of one sequence: up to `n_ctx` positions, up to `max_rows` rows in a call; `length` positions are committed.

    Sliding layers keep at least the positions that the next token sees, and `keep` positions before those.

    tables  one for all layers of the same heads and window, in the order of their first layers
    layers  number of a layer that has keys and values of its own -> its part of a table
    """

    def __init__(self, config: Config, n_ctx: int, max_rows: int, dtype: np.dtype, keep: int = 0):
        self.config, self.n_ctx, self.max_rows, self.dtype, self.keep = config, n_ctx, max_rows, np.dtype(dtype), keep
        self.length = self._written = 0        # the latter: highest position ever written, plus 1
        self._use([BlockTable(layers, self.dtype) for layers in groups(config)])

    def _use(self, tables: list[BlockTable]):
        self.tables = tables
        self.layers = {spec.index: LayerCache(table, place) for table in tables for place, spec in enumerate(table.layers)}

    @property
    def n_bytes(self) -> int:
        """Memory held now, in bytes."""
        return sum(table.n_bytes for table in self.tables)

    def reserve(self, n_rows: int):
        """Makes room for a call of `n_rows` rows. Raises ContextFull, or ValueError for more than `max_rows`."""
        if n_rows > self.max_rows:
            raise ValueError(f"{n_rows} rows in one call, the cache was made for {self.max_rows}")
        end = self.length + n_rows
        if end > self.n_ctx:
            raise ContextFull(f"{end} tokens do not fit in a context of {self.n_ctx}")
        for table in self.tables:
            table.drop_before(int(table.first_visible(self.length)) - self.keep)
            table.make_room(self.length, end)
        self._written = max(self._written, end)

    def advance(self, n_rows: int):
        """Commits the first `n_rows` of the rows that the last call wrote."""
        if not 0 <= n_rows <= self._written - self.length:
            raise ValueError(f"cannot commit {n_rows} rows, {self._written - self.length} were written")
        self.length += n_rows

    def start_at(self, length: int):
        """Commits the first `length` positions, whose blocks have been put into the tables of an empty cache."""
        self.length = self._written = length

    def roll_back(self, length: int):
        """Drops the positions from `length` on. Raises ValueError where what is visible from there is gone."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length}, {self.length} positions are committed")
        for table in self.tables:
            if not table.has(first := int(table.first_visible(length)), length):
                raise ValueError(f"cannot roll back to {length}: from there the layers with a window of {table.window} see position "
                                 f"{first}, whose block is gone")
        self.length = length

    def fork(self) -> "Cache":
        """A second sequence with the committed positions of this one. Blocks are shared until one of them writes to them."""
        other = Cache(self.config, self.n_ctx, self.max_rows, self.dtype, self.keep)
        other._use([table.shared(self.length) for table in self.tables])
        other.length = other._written = self._written = self.length
        return other


def groups(config: Config) -> list[list[LayerSpec]]:
    """The layers that have keys and values of their own, those of the same heads and window together."""
    found: dict[Hashable, list[LayerSpec]] = {}
    for spec in config.layers:
        if spec.has_own_kv:
            found.setdefault((spec.window, spec.n_kv, spec.head_dim), []).append(spec)
    return list(found.values())


def cache_bytes(config: Config, n_ctx: int, max_rows: int, dtype: np.dtype) -> int:
    """Memory that a cache holds at most, when all `n_ctx` positions are taken."""
    size, most = 2 * BLOCK * np.dtype(dtype).itemsize, -(-n_ctx // BLOCK)
    return sum(size * spec.n_kv * spec.head_dim * (most if spec.window is None else min(most, _most_blocks(spec.window - 1 + max_rows)))
               for spec in config.layers if spec.has_own_kv)


def _most_blocks(n: int) -> int:
    """How many blocks n positions in a row lie in, at most."""
    return (n - 1 + BLOCK - 1) // BLOCK + 1
