"""Rings, growth, commit and roll-back."""

import numpy as np
import pytest
from shapes import SHAPES, prompt, random_model, reference, write_model

from refimpl.model import gemma4
from refimpl.model.cache import Cache, ContextFull, LayerCache, cache_bytes


def model_of(shape, tmp_path):
    return reference(write_model(tmp_path / "m.gguf", random_model(shape)))


def test_ring_gives_positions_back_in_order_across_the_wrap():
    layer = LayerCache(n_kv=1, head_dim=1, n_slots=5, most=5, window=3, dtype=np.dtype(np.float32))
    for pos in range(13):
        layer.write(pos, np.full((1, 1, 1), pos, np.float32), np.full((1, 1, 1), -pos, np.float32))
        first = layer.first_visible(pos)
        slots = np.arange(first, pos + 1) % 5
        k, v = layer.k_SKH[slots], layer.v_SKH[slots]
        assert k.ravel().tolist() == list(range(first, pos + 1)) and v.ravel().tolist() == [-p for p in range(first, pos + 1)]
        assert pos + 1 - first == min(pos + 1, 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_rejected_rows_leave_no_trace(shape, tmp_path):
    """Drafts that are run and then taken back (not committed, or rolled back) change nothing, far past the window's wrap."""
    model = model_of(shape, tmp_path)
    ids = prompt(50)
    plain = model.prefill(ids, model.new_cache())
    cache, done, states, wrong = Cache(model.config, 512, 5, model.backend.kv_type), 0, [], [7, 8, 9]
    while done < len(ids):
        take = min(2, len(ids) - done)
        x = gemma4.forward(model.config, model.weights, model.backend, np.array([*ids[done:done + take], *wrong]), cache)
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
    model.prefill(prompt(40), cache)
    cache.roll_back(37)
    with pytest.raises(ValueError, match="ring of layer 0"):
        cache.roll_back(30)
    with pytest.raises(ValueError, match="committed"):
        cache.roll_back(38)
    with pytest.raises(ValueError, match="cannot commit"):
        cache.advance(9)


def test_context_end_and_row_limit(tmp_path):
    model = model_of("12B", tmp_path)
    cache = Cache(model.config, 10, 4, model.backend.kv_type)
    model.prefill(prompt(10), cache)
    with pytest.raises(ContextFull, match="11 tokens do not fit in a context of 10"):
        model.prefill([5], cache)
    with pytest.raises(ValueError, match="5 rows in one call"):
        gemma4.forward(model.config, model.weights, model.backend, np.arange(5, 10), Cache(model.config, 10, 4, model.backend.kv_type))


def test_full_layers_grow_and_rings_do_up_to_their_window(tmp_path):
    model = model_of("12B", tmp_path)
    cache = Cache(model.config, 512, 8, model.backend.kv_type)
    sizes = [(i, layer.n_slots) for i, layer in cache.layers.items()]
    model.prefill(prompt(100), cache)
    grown = {i: layer.n_slots for i, layer in cache.layers.items()}
    for i, before in sizes:
        window = model.config.layers[i].window
        assert grown[i] >= 100 if window is None else before == 8 and grown[i] == window + 8
    assert cache.n_bytes <= cache_bytes(model.config, 512, 8, np.float32)
