"""The attention kernel against a statement in float64, and its bits against themselves however the work is cut."""

import numpy as np
import pytest
from kernel_cases import ATTENTION, attention_case, cache_arrays, causal, same

from refimpl.kernels import attention
from refimpl.kernels.attention import CHUNK, SPAN, attend
from refimpl.reference.attention import attend as reference


def statement(q_TNH, k_SKH, v_SKH, first_T, end_T):
    """What attention is, in float64, a query head at a time."""
    n_tok, n_head, _ = q_TNH.shape
    group = n_head // k_SKH.shape[1]
    out_TNH = np.empty(q_TNH.shape)
    for t in range(n_tok):
        slot = np.arange(first_T[t], end_T[t]) % len(k_SKH)
        for n in range(n_head):
            k, v = (x[slot, n // group].astype(np.float64) for x in (k_SKH, v_SKH))
            score = k @ q_TNH[t, n].astype(np.float64)
            weight = np.exp(score - score.max())
            out_TNH[t, n] = weight @ v / weight.sum()
    return out_TNH


# ---- numbers

@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name", ATTENTION)
def test_against_float64(name, dtype):
    arguments = attention_case(name, dtype)
    got, want = attend(*arguments), statement(*arguments)
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.abs(got - want).max() < 1.5e-6


@pytest.mark.parametrize("name", ATTENTION)
def test_near_to_the_twin(name):
    arguments = attention_case(name)
    assert np.abs(attend(*arguments) - reference(*arguments)).max() < 2e-6


def test_scores_of_any_size():
    """Scores far from 0, growing and falling along the positions: every chunk brings a larger one, or none does."""
    for sign in (1, -1):
        q, k, v = cache_arrays(2, 2, 1, 16, 1200, np.float32)
        k[:, 0, 0] = sign * np.arange(1200)
        q[:, :, 0] = 1
        first, end = causal(2, 1150, 1100)
        assert np.abs(attend(q, k, v, first, end) - statement(q, k, v, first, end)).max() < 2e-4         # scores have steps of 6e-5 there
        k[:, 0, 0] -= 1e4
        assert np.abs(attend(q, k, v, first, end) - statement(q, k, v, first, end)).max() < 3e-3         # and of 1e-3


def test_one_position_gives_its_value():
    q, k, v = cache_arrays(3, 4, 2, 32, 10, np.float16)
    first = np.array([4, 13, 700])
    want = v[first % 10].astype(np.float32).repeat(2, axis=1)
    assert np.array_equal(attend(q, k, v, first, first + 1), want)


# ---- bits

def test_positions_out_of_sight_do_not_matter():
    """Not even where a neighbour sees them, and not even if there is no number."""
    q, k, v = cache_arrays(8, 4, 2, 32, 200, np.float16)
    first, end = causal(8, 100, 70)
    alone = attend(q[3:4], k, v, first[3:4], end[3:4])
    for slots in (k, v):
        slots[:first[3]] = np.nan
        slots[end[3]:] = np.inf
    together = attend(q, k, v, first, end)
    assert same(together[3:4], alone) and same(attend(q[3:4], k, v, first[3:4], end[3:4]), alone)
    assert not np.isfinite(together[[0, 7]]).any()


@pytest.mark.parametrize("name", ATTENTION)
def test_rows_in_any_company(name):
    q, k, v, first, end = attention_case(name)
    whole = attend(q, k, v, first, end)
    for size in (1, 2, 5):
        parts = [attend(q[t:t + size], k, v, first[t:t + size], end[t:t + size]) for t in range(0, len(q), size)]
        assert same(np.concatenate(parts), whole), size
    order = np.random.default_rng(1).permutation(len(q))
    assert same(attend(q[order], k, v, first[order], end[order]), whole[order])


def test_rows_with_ranges_of_all_kinds():
    """Neighbours that share all, some or none of their positions, and some far beyond the others."""
    rng = np.random.default_rng(2)
    q, k, v = cache_arrays(60, 4, 2, 16, 150, np.float16)
    for spread in (50, 500, 10**6):
        n_seen = rng.integers(1, 151, 60)
        first = rng.integers(0, spread, 60)
        together = attend(q, k, v, first, first + n_seen)
        one_by_one = [attend(q[t:t + 1], k, v, first[t:t + 1], first[t:t + 1] + n_seen[t]) for t in range(60)]
        assert same(together, np.concatenate(one_by_one))
        assert np.abs(together - statement(q, k, v, first, first + n_seen)).max() < 1.5e-6


def test_a_ring_gives_what_the_whole_cache_gives():
    q, k, v = cache_arrays(4, 4, 2, 32, 1500, np.float16)
    first, end = causal(4, 1400, 100)
    for n_slots in (103, 128, 200, 1024):
        ring = [np.zeros((n_slots, 2, 32), np.float16) for _ in range(2)]
        for position in range(1404 - n_slots, 1404):
            ring[0][position % n_slots], ring[1][position % n_slots] = k[position], v[position]
        assert same(attend(q, *ring, first, end), attend(q, k, v, first, end))


def test_pieces_of_work_of_any_size(monkeypatch):
    want = [attend(*attention_case(name)) for name in ATTENTION]
    monkeypatch.setattr(attention, "plan", attention.plan.py_func)
    for room, queries in ((1, 1), (30_000, 4), (10**9, 1000)):
        monkeypatch.setattr(attention, "ROOM_BYTES", room)
        monkeypatch.setattr(attention, "QUERIES", queries)
        assert all(same(attend(*attention_case(name)), whole) for name, whole in zip(ATTENTION, want))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_kernel_in_plain_python(monkeypatch, dtype):
    """Every access checked against the array it goes to."""
    q, k, v = cache_arrays(3, 3, 1, 80, 40, dtype)
    ranges = [(np.array([0, 1, 0]), np.array([1, 3, 20])), (np.array([SPAN - 3, SPAN - 1, SPAN]), np.array([SPAN, SPAN + 5, SPAN + 4])),
              (np.array([3 * CHUNK - 20, 3 * CHUNK - 19, 3 * CHUNK - 18]), np.array([3 * CHUNK + 1, 3 * CHUNK + 2, 3 * CHUNK + 3]))]
    want = [attend(q, k, v, first, end) for first, end in ranges]
    monkeypatch.setattr(attention, "attend_rows", attention.attend_rows.py_func)
    monkeypatch.setattr(attention, "plan", attention.plan.py_func)
    for (first, end), compiled in zip(ranges, want):
        assert same(attend(q, k, v, first, end), compiled)


# ---- arguments

def test_queries_in_any_order_of_memory_and_none_at_all():
    q, k, v, first, end = attention_case("prompt")
    turned = q.transpose(1, 0, 2).copy().transpose(1, 0, 2)
    assert not turned.flags.c_contiguous and same(attend(turned, k, v, first, end), attend(q, k, v, first, end))
    assert attend(q[:0], k, v, first[:0], end[:0]).shape == (0, 4, 32)


def test_wrong_arguments_are_refused():
    q, k, v, first, end = attention_case("prompt")
    wide = np.zeros((9, 2, 64), np.float16)
    wrong = {
        "float32 queries": [(q.astype(np.float64), k, v, first, end), (q[0], k, v, first, end), (q, k[0], v[0], first, end),
                            (q, k, v[:8], first, end), (q, k, v.astype(np.float32), first, end), (q, k[:0], v[:0], first, end)],
        "contiguous keys": [(q, k.astype(np.float64), v.astype(np.float64), first, end), (q, wide[:, :, ::2], v, first, end),
                            (q, k, wide[:, :, ::2], first, end)],
        "do not fit": [(q[:, :3], k, v, first, end), (q[:, :, :16], k, v, first, end), (q[:, :0], k, v, first, end),
                       (q[:, :, :24].copy(), k[:, :, :24].copy(), v[:, :, :24].copy(), first, end), (q, k[:, :0], v[:, :0], first, end)],
        "positions in int64": [(q, k, v, first.astype(np.int32), end), (q, k, v, first[:8], end[:8]), (q, k, v, first[:, None], end)],
        "key range": [(q[:1], k, v, first[:1] - 1, end[:1]), (q, k, v, end, end), (q, k, v, first + 3, end), (q, k, v, first, end + 1),
                      (q, k, v, first + 2**62, end + 2**62), (q, k, v, first - 2**62, end), (q, k, v, first, end + 2**62)],
    }
    for words, calls in wrong.items():
        for arguments in calls:
            with pytest.raises(ValueError, match=words):
                attend(*arguments)
