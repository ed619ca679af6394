"""The innermost loop for AVX2 where codes need 8 bits and there are many rows: a tile is unpacked to int16, once for all of them.

Two products of bytes as large as these do not fit into the 16 bits that `vpmaddubsw` adds them up in, so that each of its results has to be
taken to 32 bits at once, besides signs that have to be moved. `vpmaddwd` adds two products of int16 up in 32 bits right away. The integers,
and so the bits, are those of tile_pairs.py. Measured on Zen 3: Q8_0 with 512 rows 1.4 times as fast.
"""

from refimpl.kernels.machine.intrinsics import address, at, dot2, high_shorts, load_i32, low_shorts, splat_i32, splat_i32_from, store_i32
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.jit import inline, per_row
from refimpl.kernels.machine.tile_rows import ZERO_F, ZERO_I, add_block, along, prefetch_range, row_address, store_totals, zeros
from refimpl.kernels.machine.unpack import block_scale, codes, splat_float

FEWEST = 8              # rows from which on unpacking pays
BLOCK = 4 * LANES * 16  # bytes of an unpacked block: 16 pairs of columns


@inline
def unpack_to_shorts(fmt, tile, n_blocks, ahead, shorts):
    """Writes a tile as int16 without zero points, two columns of 16 rows after the other, to `shorts`."""
    for b in range(n_blocks):
        block = at(tile, b * fmt.n_bytes)
        prefetch_range(block, fmt.n_bytes, ahead)
        for g in range(8):
            w = codes(fmt, block, 0, g)
            store_i32(at(shorts, BLOCK * b + 128 * g), low_shorts(w))
            store_i32(at(shorts, BLOCK * b + 128 * g + 64), high_shorts(w))


@per_row
def _add_two_columns(weights, activations, total):
    return dot2(total, weights, splat_i32_from(activations))


@inline
def shorts_times_rows(fmt, tile, shorts, n_blocks, x, r, out):
    """The tile, unpacked in `shorts`, times the rows of x that the tuple r names: 16 float32 for each to `out`."""
    row, total = row_address(address(x.q_TD), x.q_TD.shape[1], r), zeros(r, splat_float(fmt, ZERO_F))
    for b in range(n_blocks):
        dots, q = zeros(r, splat_i32(ZERO_I)), along(row, 32 * n_blocks + 64 * b)          # behind a row's int8 are its int16
        for pair in range(16):
            dots = _add_two_columns(load_i32(at(shorts, BLOCK * b + 64 * pair)), along(q, 4 * pair), dots)
        total = add_block(fmt, x, r, b, block_scale(fmt, at(tile, b * fmt.n_bytes)), dots, total)
    store_totals(out, total)
