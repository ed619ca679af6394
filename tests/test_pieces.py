"""Work in pieces: every unit is done once, whoever is slow, and no two threads are given the same."""

import numba
import numpy as np
import pytest

from refimpl.kernels.cores.threads import running
from refimpl.kernels.machine.intrinsics import address, take
from refimpl.kernels.machine.pieces import next_piece, share_end, shares

N_TAKE = 20_000


@numba.njit
def wait(counter_1, least):
    """Until the counter is so high, or some seconds have passed."""
    for _ in range(10**9):
        if take(address(counter_1), 0) >= least:
            return


@numba.njit(parallel=True)
def race(next_NL, begun_1, taken_NT):
    for thread in numba.prange(len(taken_NT)):
        take(address(begun_1), 1)
        wait(begun_1, len(taken_NT))
        for i in range(taken_NT.shape[1]):
            taken_NT[thread, i] = take(address(next_NL), 3)


@numba.njit(parallel=True)
def run(n_units, n, size, done_U, by_U):
    next_NL = shares(n_units, n)
    for part in numba.prange(n):
        thread = np.int64(part)
        for turn in range(n):
            owner = (thread + turn) % n
            end, first = share_end(n_units, n, owner), next_piece(next_NL, owner, size)
            while first < end:
                for unit in range(first, min(first + size, end)):
                    done_U[unit] += 1
                    by_U[unit] = thread
                first = next_piece(next_NL, owner, size)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread")
def test_a_counter_gives_every_number_once():
    """Compiled, from threads at the same time; and as plain Python."""
    next_NL, taken = np.full((1, 8), 7), np.zeros((2, N_TAKE), np.int64)
    with running(2):
        race(next_NL, np.zeros(1, np.int64), taken)
    assert np.array_equal(np.sort(taken.ravel()), 7 + 3 * np.arange(2 * N_TAKE)) and next_NL.tolist() == [[7 + 6 * N_TAKE] + [7] * 7]
    assert (np.diff(taken) > 0).all()
    assert [take(address(next_NL), 5) for _ in range(2)] == [7 + 6 * N_TAKE, 12 + 6 * N_TAKE]


@pytest.mark.parametrize("n_units,n,size", [(0, 2, 4), (1, 3, 4), (7, 3, 1), (64, 2, 4), (101, 4, 8), (5, 8, 2)])
@pytest.mark.parametrize("function", [run, run.py_func], ids=["compiled", "plain"])
def test_every_unit_is_done_once(function, n_units, n, size):
    done, by = np.zeros(n_units, np.int64), np.full(n_units, -1)
    function(n_units, n, size, done, by)
    assert (done == 1).all()
    if function is run.py_func:                 # the others have not begun when the first has done all
        assert (by == 0).all()


@numba.njit(parallel=True)
def beside_a_slow_one(by_U, begun_1, done_1):
    """The second thread does not finish its first unit before all others are done; the first does not begin before that one has begun."""
    n_units = len(by_U)
    next_NL = shares(n_units, 2)
    for part in numba.prange(2):
        thread = np.int64(part)
        if thread == 0:
            wait(begun_1, 1)
        for turn in range(2):
            owner = (thread + turn) % 2
            end, unit = share_end(n_units, 2, owner), next_piece(next_NL, owner, 1)
            while unit < end:
                by_U[unit] = thread
                if thread == 1:
                    take(address(begun_1), 1)
                    wait(done_1, n_units - 1)
                take(address(done_1), 1)
                unit = next_piece(next_NL, owner, 1)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread")
def test_the_share_of_a_slow_thread_is_done_by_others():
    by, begun, done = np.full(40, -1), np.zeros(1, np.int64), np.zeros(1, np.int64)
    with running(2):
        beside_a_slow_one(by, begun, done)
    assert done[0] == 40 and (by[:20] == 0).all() and by[20] == 1 and (by[21:] == 0).all()
