"""What keys and values take: the sum over layers, the caches that are really made, and what notebook 3 says."""

import numpy as np
import pytest

from refimpl.files.synth import SHAPES
from refimpl.lab.explain.cache_memory import HALF, by_kind, savings, true_config, value_projections
from refimpl.model.cache import Cache, cache_bytes
from refimpl.reference.ops import rope_frequencies


@pytest.mark.parametrize("name", SHAPES)
def test_a_cache_of_the_true_shape_takes_what_is_said(name):
    config = true_config(name)
    cache, most = Cache(config, 4096, 5, HALF), 0
    while cache.length < 4096:
        cache.reserve(n := min(5, 4096 - cache.length))
        cache.advance(n)
        most = max(most, cache.n_bytes)
    assert sum(by_kind(config, 4096, 5)) == most == cache_bytes(config, 4096, 5, HALF)


def test_by_hand():
    """31B at 262,144: 10 full layers with 4 heads of 512, 50 windows of 1,024 with 16 heads of 256, two numbers of 2 bytes each."""
    full, sliding = by_kind(true_config("31B"), 262_144, 5)
    assert full == 10 * 4 * 512 * 2 * 2 * 262_144 and sliding == 50 * 16 * 256 * 2 * 2 * 18 * 64        # 1,028 positions in 18 blocks
    everything, windows, shared = savings(true_config("E2B"), 131_072, 5).values()
    assert everything == (28 * 256 + 7 * 512) * 4 * 131_072
    assert windows == 28 * 256 * 4 * 10 * 64 + 7 * 512 * 4 * 131_072
    assert shared == 12 * 256 * 4 * 10 * 64 + 3 * 512 * 4 * 131_072


def test_every_saving_saves_and_only_small_models_share():
    for name in SHAPES:
        config = true_config(name)
        everything, windows, shared = savings(config, config.n_ctx, 5).values()
        assert everything > 2 * windows and (shared < windows) == (name in ("E2B", "E4B"))
        full, sliding = by_kind(config, 131_072, 5)
        assert full > 5 * sliding                                         # "most of it belongs to the full layers"


def test_values_are_keys_in_the_large_models():
    assert [value_projections(true_config(name)) > 0 for name in SHAPES] == [False, False, True, True, True]
    assert value_projections(true_config("12B")) == 8 * 512 * 3840
    assert all(config.layers[-1].window is None for config in map(true_config, SHAPES))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown shape '7B'"):
        true_config("7B")


def test_a_quarter_of_the_pairs_turns():
    from refimpl.loading.hf_names import rope_divisors
    frequency_R = rope_frequencies(512, 1e6, rope_divisors(512, 0.25))
    assert np.count_nonzero(frequency_R > 1e-20) == 64 and (frequency_R[:64] > 1e-20).all()
