"""Keys and values in blocks of 64 positions, as PagedAttention keeps them (Kwon et al. 2023, arXiv:2309.06180).

A sequence has a table for all layers of one shape: block b has their keys and values at positions 64 b to 64 b + 63. Sequences with a
common start share blocks. To fork a sequence, to go back in it and to drop what a sliding window has left behind changes tables and moves
no bytes.

A block in more than one table is one that NumPy refuses to write to (`flags.writeable`). Who has to write to it takes a copy first. Python
counts the references: a block that is in no table any more is freed.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from refimpl.model.config import LayerSpec

BLOCK = 64              # positions; the chunk that the attention kernel computes at a time
GONE = -2 ** 63         # in `offset_B`: no block
ALIGNMENT = 64          # bytes, a line of the processor's caches


class BlockTable:
    """The blocks of one sequence for layers of the same heads and window, float (L, 2, 64, K, H) each: keys, then values.

    blocks    number -> block, of `block_bytes` bytes
    offset_B  where each block begins, in bytes from the beginning of `origin`, int64; GONE where there is none. For compiled code.
    """

    def __init__(self, layers: Sequence[LayerSpec], dtype: np.dtype):
        """An empty table for blocks of numbers of the type `dtype`."""
        first = layers[0]
        self.layers, self.window, self.dtype = layers, first.window, dtype
        self.shape = (len(layers), 2, BLOCK, first.n_kv, first.head_dim)
        self.block_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self.blocks: dict[int, np.ndarray] = {}
        self.origin, self.offset_B = np.zeros(1, np.uint8), np.full(16, GONE, np.int64)
        self._spare: list[np.ndarray] = []

    @property
    def n_bytes(self) -> int:
        """Memory held, in bytes, that of shared blocks too."""
        return (len(self.blocks) + len(self._spare)) * self.block_bytes

    def first_visible(self, pos: int | np.ndarray) -> int | np.ndarray:
        """The earliest position that a query at `pos` sees; elementwise for an array."""
        return np.zeros_like(pos) if self.window is None else np.maximum(0, pos - self.window + 1)

    def put(self, number: int, block: np.ndarray):
        """Makes `block` the one with this number."""
        while number >= len(self.offset_B):
            self.offset_B = np.concatenate([self.offset_B, np.full_like(self.offset_B, GONE)])
        self.blocks[number] = block
        self.offset_B[number] = block.ctypes.data - self.origin.ctypes.data

    def make_room(self, first: int, end: int):
        """Makes sure that positions first..end-1 can be written to. Those before `first` keep their keys and values, later ones do not."""
        for number in range(first // BLOCK, (end - 1) // BLOCK + 1):
            old = self.blocks.get(number)
            if old is None or not old.flags.writeable:
                new = self._spare.pop() if self._spare else empty_block(self.shape, self.dtype)
                if old is not None and (n_kept := first - number * BLOCK) > 0:
                    new[:, :, :n_kept] = old[:, :, :n_kept]
                self.put(number, new)

    def drop_before(self, pos: int):
        """Drops the blocks that end at `pos` or before. Those that nobody else has are used again."""
        if pos < BLOCK:                 # of full layers in every call, whose blocks are many
            return
        for number in [number for number in self.blocks if (number + 1) * BLOCK <= pos]:
            block = self.blocks.pop(number)
            self.offset_B[number] = GONE
            if block.flags.writeable:
                self._spare.append(block)

    def has(self, first: int, end: int) -> bool:
        """Are there blocks for positions first..end-1?"""
        return all(number in self.blocks for number in range(first // BLOCK, -(-end // BLOCK)))

    def shared(self, length: int) -> "BlockTable":
        """A table of the same blocks for positions below `length`. From now on neither may write to them."""
        other = BlockTable(self.layers, self.dtype)
        for number, block in self.blocks.items():
            if number * BLOCK < length:
                block.flags.writeable = False
                other.put(number, block)
        return other


class LayerCache:
    """One layer's keys and values in a table: what attention reads.

    `shape` is that of the keys, and of the values, in a block: (64, K, H). They begin `k_offset` and `v_offset` bytes from its beginning.
    """

    def __init__(self, table: BlockTable, place: int):
        """The layer with number `place` of the table's layers."""
        self.table, self.place = table, place
        self.shape, self.dtype = table.shape[2:], table.dtype
        n_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self.k_offset, self.v_offset = 2 * place * n_bytes, (2 * place + 1) * n_bytes

    @property
    def origin(self) -> np.ndarray:
        """As in the table."""
        return self.table.origin

    @property
    def offset_B(self) -> np.ndarray:
        """As in the table."""
        return self.table.offset_B

    def first_visible(self, pos: int | np.ndarray) -> int | np.ndarray:
        """As in the table."""
        return self.table.first_visible(pos)

    def write(self, pos: int, k_TKH: np.ndarray, v_TKH: np.ndarray):
        """Stores the keys and values of positions pos, pos + 1, ..., for which there must be room."""
        for rows, kept in self._parts(pos, pos + len(k_TKH)):
            for part, new in zip(kept, (k_TKH, v_TKH)):
                part[...] = new[rows]

    def read(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(keys, values) of positions first..end-1, (S, K, H) each: copies."""
        keys, values = zip(*(kept for _, kept in self._parts(first, end)))
        return np.concatenate(keys), np.concatenate(values)

    def _parts(self, first: int, end: int) -> Iterator[tuple[slice, np.ndarray]]:
        """For every block with positions of first..end-1: which ones they are, counted from `first`, and its part of (2, S, K, H)."""
        for number in range(first // BLOCK, (end - 1) // BLOCK + 1):
            begin, low, high = number * BLOCK, max(first, number * BLOCK), min(end, number * BLOCK + BLOCK)
            yield slice(low - first, high - first), self.table.blocks[number][self.place, :, low - begin:high - begin]


def empty_block(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory for a block, its contents undefined."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(n_bytes + ALIGNMENT, np.uint8)
    return raw[-raw.ctypes.data % ALIGNMENT:][:n_bytes].view(dtype).reshape(shape)


def layer_of(k_SKH: np.ndarray, v_SKH: np.ndarray, first: int = 0) -> LayerCache:
    """Keys and values of positions first, first + 1, ... as a layer of their own, in blocks that are one array."""
    n_kv, head_dim = k_SKH.shape[1:]
    end = first + len(k_SKH)
    spec = LayerSpec(0, None, n_kv, n_kv, head_dim, None, 0, True, False, None)
    table = BlockTable([spec], k_SKH.dtype)
    numbers = range(first // BLOCK, -(-end // BLOCK))
    whole = empty_block((len(numbers), *table.shape), k_SKH.dtype)
    table.origin = whole.reshape(-1).view(np.uint8)
    for number, block in zip(numbers, whole):
        table.put(number, block)
    layer = LayerCache(table, 0)
    layer.write(first, k_SKH, v_SKH)
    return layer
