"""The attention kernel against a statement in float64, and its bits against themselves however the work is cut."""

import numpy as np
import pytest
from kernel_cases import ATTENTION, attention_case, cache_arrays, causal, in_blocks, same

from refimpl.kernels import attention
from refimpl.kernels.attention import CHUNK, SPAN, attend
from refimpl.model.blocks import BLOCK, GONE, LayerCache, empty_block, layer_of
from refimpl.reference.attention import attend as reference


def statement(q_TNH, kept, first_T, end_T):
    """What attention is, in float64, a query head at a time."""
    n_tok, n_head, _ = q_TNH.shape
    group = n_head // kept.shape[1]
    out_TNH = np.empty(q_TNH.shape)
    for t in range(n_tok):
        both = [x.astype(np.float64) for x in kept.read(first_T[t], end_T[t])]
        for n in range(n_head):
            k, v = (x[:, n // group] for x in both)
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
        for shift, limit in ((0, 2e-4), (1e4, 3e-3)):             # scores have steps of 6e-5 and of 1e-3 there
            k[:, 0, 0] -= shift
            kept = layer_of(k, v)
            assert np.abs(attend(q, kept, first, end) - statement(q, kept, first, end)).max() < limit


def test_one_position_gives_its_value():
    q, k, v = cache_arrays(3, 4, 2, 32, 10, np.float16)
    first = np.array([4, 13, 700])
    want = v[first % 10].astype(np.float32).repeat(2, axis=1)
    assert np.array_equal(attend(q, in_blocks(k, v, first, first + 1), first, first + 1), want)


# ---- bits

def test_positions_out_of_sight_do_not_matter():
    """Not even where a neighbour sees them, and not even if there is no number."""
    q, k, v = cache_arrays(8, 4, 2, 32, 200, np.float16)
    first, end = causal(8, 100, 70)
    alone = attend(q[3:4], layer_of(k, v), first[3:4], end[3:4])
    for kept in (k, v):
        kept[:first[3]] = np.nan
        kept[end[3]:] = np.inf
    together = attend(q, layer_of(k, v), first, end)
    assert same(together[3:4], alone) and same(attend(q[3:4], layer_of(k, v), first[3:4], end[3:4]), alone)
    assert not np.isfinite(together[[0, 7]]).any()


@pytest.mark.parametrize("name", ATTENTION)
def test_rows_in_any_company(name):
    q, kept, first, end = attention_case(name)
    whole = attend(q, kept, first, end)
    for size in (1, 2, 5):
        parts = [attend(q[t:t + size], kept, first[t:t + size], end[t:t + size]) for t in range(0, len(q), size)]
        assert same(np.concatenate(parts), whole), size
    order = np.random.default_rng(1).permutation(len(q))
    assert same(attend(q[order], kept, first[order], end[order]), whole[order])


def test_rows_with_ranges_of_all_kinds():
    """Neighbours that share all, some or none of their positions, and some far beyond the others."""
    rng = np.random.default_rng(2)
    q, k, v = cache_arrays(60, 4, 2, 16, 150, np.float16)
    for spread in (50, 500, 10**6):
        n_seen = rng.integers(1, 151, 60)
        first = rng.integers(0, spread, 60)
        kept = in_blocks(k, v, first, first + n_seen)
        together = attend(q, kept, first, first + n_seen)
        one_by_one = [attend(q[t:t + 1], kept, first[t:t + 1], first[t:t + 1] + n_seen[t]) for t in range(60)]
        assert same(together, np.concatenate(one_by_one))
        assert np.abs(together - statement(q, kept, first, first + n_seen)).max() < 1.5e-6


def test_blocks_lie_anywhere_in_memory():
    """In any order, among other layers', and without those that no query sees."""
    q, k, v = cache_arrays(4, 4, 2, 32, 1500, np.float16)
    first, end = causal(4, 1400, 700)
    want, other = attend(q, layer_of(k, v), first, end), layer_of(k, v)
    table, blocks = other.table, dict(other.table.blocks)
    table.layers, table.shape = 3 * list(table.layers), (3, *table.shape[1:])
    table.offset_B[:] = GONE
    for number in np.random.default_rng(0).permutation(np.arange(first[0] // BLOCK, -(-end[-1] // BLOCK))):
        scattered = empty_block(table.shape, np.float16)
        scattered[:] = np.nan
        scattered[1] = blocks[number][0]
        table.put(int(number), scattered)
    assert same(attend(q, LayerCache(table, 1), first, end), want)
    assert not np.isfinite(attend(q, LayerCache(table, 2), first, end)).any()


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
    cases = [(q, in_blocks(k, v, *both), *both) for both in ranges]
    want = [attend(*case) for case in cases]
    monkeypatch.setattr(attention, "attend_rows", attention.attend_rows.py_func)
    monkeypatch.setattr(attention, "plan", attention.plan.py_func)
    for case, compiled in zip(cases, want):
        assert same(attend(*case), compiled)


# ---- arguments

def test_queries_in_any_order_of_memory_and_none_at_all():
    q, kept, first, end = attention_case("prompt")
    turned = q.transpose(1, 0, 2).copy().transpose(1, 0, 2)
    assert not turned.flags.c_contiguous and same(attend(turned, kept, first, end), attend(q, kept, first, end))
    assert attend(q[:0], kept, first[:0], end[:0]).shape == (0, 4, 32)


def test_wrong_arguments_are_refused():
    q, kept, first, end = attention_case("prompt")
    k, v = kept.read(0, 9)
    later = layer_of(k, v, first=64)            # without a block for positions 0 to 63
    wrong = {
        "float32 queries": [(q.astype(np.float64), kept, first, end), (q[0], kept, first, end),
                            (q, layer_of(k.astype(np.float64), v.astype(np.float64)), first, end)],
        "do not fit": [(q[:, :3], kept, first, end), (q[:, :, :16], kept, first, end), (q[:, :0], kept, first, end),
                       (q[:, :, :24].copy(), layer_of(k[:, :, :24], v[:, :, :24]), first, end),
                       (q, layer_of(k[:, :0], v[:, :0]), first, end)],
        "positions in int64": [(q, kept, first.astype(np.int32), end), (q, kept, first[:8], end[:8]), (q, kept, first[:, None], end)],
        "key range": [(q[:1], kept, first[:1] - 1, end[:1]), (q, kept, end, end), (q, kept, first + 64, end + 64),
                      (q, kept, first, end + 64), (q, kept, first + 2**62, end + 2**62), (q, kept, first - 2**62, end),
                      (q, kept, first, end + 2**62),
                      (q, later, first, end), (q, later, first, end + 64)],
    }
    for words, calls in wrong.items():
        for arguments in calls:
            with pytest.raises(ValueError, match=words):
                attend(*arguments)
    assert (BLOCK, GONE) == (CHUNK, attention.GONE), "the kernel has its own"
