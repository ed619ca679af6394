"""Blocks, commit, roll-back and forks."""

from types import SimpleNamespace

import numpy as np
import pytest
from few_layers import few_layers
from shapes import SHAPES, prompt, random_model, reference, write_model

from refimpl.model.cache import Cache, ContextFull, cache_bytes
from refimpl.model.config import LayerSpec


def model_of(shape, tmp_path):
    return reference(write_model(tmp_path / "m.gguf", random_model(shape, **few_layers(shape))))


def positions(layer, first, end):
    """What `test_blocks_...` wrote there."""
    k, v = layer.read(first, end)
    assert np.array_equal(k, -v)
    return k.ravel().tolist()


def write(cache, n):
    """n positions more: keys are the numbers of positions, values their negatives."""
    cache.reserve(n)
    for layer in cache.layers.values():
        pos = np.arange(cache.length, cache.length + n, dtype=np.float32)[:, None, None]
        layer.write(cache.length, pos, -pos)
    cache.advance(n)


def config_of_one_number(window):
    spec = LayerSpec(0, None, 1, 1, 1, window, 0, True, False, None)
    return SimpleNamespace(layers=(spec,))


@pytest.mark.parametrize("window", [None, 3, 64, 65, 200])
def test_blocks_give_what_is_visible_back_and_no_more_stays(window):
    cache, rng = Cache(config_of_one_number(window), 5000, 70, np.float32), np.random.default_rng(0)
    while cache.length < 4000:
        write(cache, int(rng.integers(1, 71)))
        layer, end = cache.layers[0], cache.length
        first = int(layer.first_visible(end))
        assert end - first == (end if window is None else min(end, window - 1))
        if first < end:
            assert positions(layer, first, end) == list(range(first, end))
    kept = cache_bytes(cache.config, 5000, 70, np.float32) // (8 * 64)
    assert len(cache.tables[0].blocks) <= kept <= (5000 + 63) // 64 and cache.n_bytes <= kept * 8 * 64


@pytest.mark.parametrize("window, at", [(None, 128), (None, 150), (70, 150), (70, 128), (3, 65)])
def test_a_fork_shares_blocks_and_neither_sees_what_the_other_writes(window, at):
    cache = Cache(config_of_one_number(window), 1000, 64, np.float32)
    while cache.length < at:
        write(cache, min(50, at - cache.length))
    other = cache.fork()
    table, theirs = cache.tables[0], other.tables[0]
    assert other.length == at and all(theirs.blocks[b] is block for b, block in table.blocks.items() if 64 * b < at)
    first = int(cache.layers[0].first_visible(at))
    for mine, sign in ((cache, 1), (other, -1)):
        mine.reserve(20)
        ten = np.full((20, 1, 1), 10_000 * sign, np.float32)
        mine.layers[0].write(at, ten, -ten)
        mine.advance(20)
    for mine, sign in ((cache, 1), (other, -1)):
        assert positions(mine.layers[0], first, at + 20) == [*range(first, at), *[10_000 * sign] * 20]
    assert sum(theirs.blocks.get(b) is block for b, block in table.blocks.items()) == sum(64 * b + 64 <= at for b in table.blocks)


def test_what_is_kept_beyond_the_window_can_be_gone_back_to():
    cache = Cache(config_of_one_number(100), 5000, 64, np.float32, keep=1000)
    while cache.length < 3000:
        write(cache, 60)
    cache.roll_back(2100)
    write(cache, 7)
    assert positions(cache.layers[0], 2001, 2107) == list(range(2001, 2107))
    with pytest.raises(ValueError, match="cannot roll back to 1800"):
        cache.roll_back(1800)


@pytest.mark.parametrize("shape", SHAPES)
def test_rejected_rows_leave_no_trace(shape, tmp_path):
    """Drafts that are run and then taken back (not committed, or rolled back) change nothing, far past the window's wrap."""
    model = model_of(shape, tmp_path)
    ids = prompt(140)
    plain = model.prefill(ids, model.new_cache())
    cache, done, states, wrong = Cache(model.config, 512, 5, model.backend.kv_type), 0, [], [7, 8, 9]
    while done < len(ids):
        take = min(2, len(ids) - done)
        x = model.forward(np.array([*ids[done:done + take], *wrong]), cache)
        if done % 4:
            cache.advance(take)
        else:
            cache.advance(take + 3)
            cache.roll_back(done + take)
        states.append(x[:take])
        done += take
    assert np.array_equal(np.concatenate(states), plain)


def test_roll_back_too_far_is_refused(tmp_path):
    model = model_of("12B", tmp_path)
    cache = Cache(model.config, 512, 4, model.backend.kv_type)
    model.prefill(prompt(140), cache)
    cache.roll_back(135)
    with pytest.raises(ValueError, match="to 130: from there the layers with a window of 7 see position 124, whose block is gone"):
        cache.roll_back(130)
    with pytest.raises(ValueError, match="committed"):
        cache.roll_back(138)
    with pytest.raises(ValueError, match="cannot commit"):
        cache.advance(9)


def test_context_end_and_row_limit(tmp_path):
    model = model_of("12B", tmp_path)
    cache = Cache(model.config, 10, 4, model.backend.kv_type)
    model.prefill(prompt(10), cache)
    with pytest.raises(ContextFull, match="11 tokens do not fit in a context of 10"):
        model.prefill([5], cache)
    with pytest.raises(ValueError, match="5 rows in one call"):
        model.forward(np.arange(5, 10), Cache(model.config, 10, 4, model.backend.kv_type))


def test_only_what_is_visible_takes_memory(tmp_path):
    model = model_of("12B", tmp_path)
    cache = Cache(model.config, 512, 8, model.backend.kv_type)
    assert cache.n_bytes == 0
    model.prefill(prompt(300), cache)
    assert {table.window: sorted(table.blocks) for table in cache.tables} == {7: [4], None: [0, 1, 2, 3, 4]}
    assert cache.n_bytes <= cache_bytes(model.config, 512, 8, np.float32)
