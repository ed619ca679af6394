"""A weight matrix as it is in a file: rows of blocks, dequantized on request."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import dequantize

CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Matrix:
    """`shape` is (O, D): O output rows of D weights each; or (E, O, D) for the experts of a layer.

    `raw` is uint8 of shape (O, Y) or (E, O, Y), usually a read-only view of the mapped file; `type` names the block type.
    """

    raw: np.ndarray
    type: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in weights, not bytes."""
        block = BLOCKS[self.type]
        return (*self.raw.shape[:-1], self.raw.shape[-1] // block.n_bytes * block.elements)

    @property
    def n_bytes(self) -> int:
        """Bytes in this form."""
        return self.raw.nbytes

    def expert(self, e: int) -> "Matrix":
        """The matrix of expert `e`."""
        return Matrix(self.raw[e], self.type)

    def rows(self, first: int, end: int) -> "Matrix":
        """Output rows first..end-1 (of every expert, where there are experts). No copy."""
        return Matrix(self.raw[..., first:end, :], self.type)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """The rows with these ids, as float32 (len(ids), D). For embeddings: only these rows are dequantized."""
        return dequantize(self.raw[ids], self.type)

    def float32(self) -> np.ndarray:
        """All weights as float32."""
        return dequantize(self.raw, self.type)

    def row_chunks(self):
        """Yields (first row, end row) over all output rows: as many at a time as make CHUNK_BYTES of float32 weights."""
        n_rows, n_cols = self.shape
        step = max(1, CHUNK_BYTES // (4 * n_cols))
        for first in range(0, n_rows, step):
            yield first, min(first + step, n_rows)

    def dequantized(self) -> "Matrix":
        """The same weights held as float32 in memory: quicker to use, 7 times the size of Q4_0."""
        return Matrix(np.ascontiguousarray(self.float32()).view(np.uint8), "F32")


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix that has not been read: its type and shape, (O, D) or (E, O, D), so that memory is counted before any is taken.

    `read()` returns it as a Matrix: a view of the mapped file, or a new array where the file holds it in another form.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    read: Callable[[], Matrix]

    @property
    def n_bytes(self) -> int:
        """Bytes that `read()` will have."""
        return math.prod(self.shape[:-1]) * BLOCKS[self.type].row_bytes(self.shape[-1])

    def rows(self, first: int, end: int, name: str) -> "StoredMatrix":
        """Output rows first..end-1 (of every expert, where there are experts), as a matrix of this name."""
        return StoredMatrix(name, self.type, (*self.shape[:-2], end - first, self.shape[-1]), lambda: self.read().rows(first, end))


def stored_bytes(matrix: Matrix | StoredMatrix) -> int:
    """Bytes of a matrix as it is in the file: `Backend.held` of the reference."""
    return matrix.n_bytes
