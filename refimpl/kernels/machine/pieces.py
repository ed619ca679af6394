"""Work in pieces: each thread has an equal share of the units, takes it piece by piece, and then pieces of other threads' shares.

So a thread that loses its core to another program, or has a slower one, leaves what it has not begun to the others; while all are equally
fast, each reads its own share from front to back, memory that it has touched first. A unit must not add to what another one writes: then
bits do not depend on who takes what. Taking costs some 10 ns; a piece should be 1 us at least. (New tokens, whose steps are shorter than
another program's turn, were not faster by it beside one: see busy.py.)
"""

import numpy as np

from refimpl.kernels.machine.intrinsics import address, at, take
from refimpl.kernels.machine.jit import inline

LINE = 64           # bytes of a cache line: counters that threads use at the same time lie apart


@inline
def shares(n_units, n):
    """A counter for each of n threads, int64 (n, LINE / 8): the unit that its share of n_units begins with."""
    next_NL = np.empty((n, LINE // 8), np.int64)
    for owner in range(n):
        next_NL[owner, 0] = owner * n_units // n
    return next_NL


@inline
def share_end(n_units, n, owner):
    """Where the share of thread `owner` ends."""
    return (owner + 1) * n_units // n


@inline
def next_piece(next_NL, owner, size):
    """Takes the next `size` units of a share and returns the first; nothing is left if that is not below the share's end."""
    return take(at(address(next_NL), LINE * owner), size)
