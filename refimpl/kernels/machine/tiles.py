"""How the kernels hold a weight matrix: 16 rows side by side, so that a lane of a vector is a row.

    in the file: row by row                     a tile: the same bytes, 16 rows interleaved unit by unit
    row 0   | block 0 | block 1 | ...           block 0 | unit 0: row 0, row 1 .. row 15 | unit 1: row 0 .. | ...
    row 1   | block 0 | block 1 | ...           block 1 | ...
    ...                                         ...

A unit is what a kernel reads of a row at once: 2 bytes for a float16 scale, 1 for the scale of MXFP4 and for the small scales of
sub-blocks, 4 for everything else (the weights that one integer dot instruction multiplies). A tile has as many bytes as its rows; the last
tile of a matrix is padded with zeros.

A type without kernels (IQ1 to IQ3, TQ, NVFP4, ...: every type that can be decoded and is not in unpack.py) is dequantized on loading and
held as tiles of F32, 4 bytes a weight: everything works with it, in exact arithmetic, but it saves neither memory nor time.

Why not in place: a kernel for Q4_0 that gathers the same 4 bytes of 16 rows from the file's layout reads 6 GB/s, this one 28 GB/s with one
thread and 33 with two (all that the machine has). Interleaving runs at 3 GB/s a thread.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numba import prange

from refimpl.formats.matrix import CHUNK_BYTES, Matrix, StoredMatrix
from refimpl.formats.quants.blocks import BLOCKS, Block
from refimpl.formats.quants.codecs import dequantize
from refimpl.kernels.machine.intrinsics import address, at, copy1, copy2, copy4
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.jit import kernel
from refimpl.kernels.machine.unpack import LAYOUTS


@dataclass(frozen=True)
class Tiles:
    """A matrix (O, D), or (E, O, D) for experts, in tiles: `raw` is uint8 (E, tiles, bytes of a tile), E = 1 for a plain matrix."""

    raw: np.ndarray
    type: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        return self.raw.nbytes


def units(block: Block) -> np.ndarray:
    """(offset in the block, bytes) of every unit, int64 (U, 2)."""
    found, offset = [], 0
    for name, dtype, count in block.fields:
        n_bytes = np.dtype(dtype).itemsize * count
        step = 1 if name.startswith("scales") else min(4, n_bytes)
        found += [(offset + u, step) for u in range(0, n_bytes, step)]
        offset += n_bytes
    return np.array(found, np.int64)


def held_type(type_name: str) -> str:
    """The type in which `tiled` holds weights: their own where there are kernels for it, else F32."""
    return type_name if type_name in LAYOUTS else "F32"


def held_bytes(matrix: Matrix) -> int:
    """Bytes that a matrix takes in tiles (without the padding of its last tile)."""
    return matrix.n_bytes if matrix.type in LAYOUTS else 4 * math.prod(matrix.shape)


def tiles_shape(matrix: Matrix | StoredMatrix) -> tuple[int, int, int]:
    """(experts or 1, tiles, bytes of a tile): the shape of `Tiles.raw` for a matrix."""
    *experts, n_rows, width = matrix.shape
    return math.prod(experts), -(-n_rows // LANES), LANES * BLOCKS[held_type(matrix.type)].row_bytes(width)


def layout_digest() -> str:
    """64 hex digits that change with the layout of the tiles of any type: what copies of tiles on disk have to agree on."""
    table = {name: (BLOCKS[name].n_bytes, units(BLOCKS[name]).tolist()) for name in sorted(LAYOUTS)}
    return hashlib.sha256(repr((LANES, table)).encode()).hexdigest()


def tiled(matrix: Matrix, n_threads: int) -> Tiles:
    """The same weights in tiles of `held_type`. Needs at most CHUNK_BYTES of memory beside the matrix and the tiles.

    Raises UnsupportedType (a ValueError) for a type that cannot be decoded.
    """
    raw = matrix.raw if matrix.raw.ndim == 3 else matrix.raw[None]
    block, (n_expert, n_tiles, tile_bytes) = BLOCKS[held_type(matrix.type)], tiles_shape(matrix)
    step = n_tiles if block.name == matrix.type else max(1, CHUNK_BYTES // max(1, tile_bytes))
    out = np.empty((n_expert, n_tiles, tile_bytes), np.uint8)
    if raw.shape[1] % LANES:
        out[:, -1] = 0
    for e in range(n_expert):
        for tile in range(0, n_tiles, step):
            rows = raw[e, LANES * tile:LANES * (tile + step)]
            rows = np.ascontiguousarray(rows) if block.name == matrix.type else dequantize(rows, matrix.type).view(np.uint8)
            interleave_rows(rows, block.n_bytes, units(block), out[e, tile:tile + step], n_threads)
    return Tiles(out, block.name, matrix.shape)


@kernel(parallel=True)
def interleave_rows(source, block_bytes, unit_U2, out, n):
    """Interleaves 16 rows of blocks: `source`, uint8 (rows, bytes), into the tiles of `out`, on n threads."""
    n_rows, row_bytes = source.shape
    n_tiles, tile_bytes = out.shape
    rows, tiles = address(source), address(out)
    for thread in prange(n):
        for tile in range(thread * n_tiles // n, (thread + 1) * n_tiles // n):
            here = min(LANES, n_rows - LANES * tile)
            for b in range(0, row_bytes, block_bytes):
                for u in range(len(unit_U2)):
                    offset, width = b + unit_U2[u, 0], unit_U2[u, 1]
                    first, to = at(rows, LANES * tile * row_bytes + offset), at(tiles, tile * tile_bytes + LANES * offset)
                    if width == 4:
                        for r in range(here):
                            copy4(at(to, 4 * r), at(first, r * row_bytes))
                    elif width == 2:
                        for r in range(here):
                            copy2(at(to, 2 * r), at(first, r * row_bytes))
                    else:
                        for r in range(here):
                            copy1(at(to, r), at(first, r * row_bytes))
