"""Sampling against transformers' logits warpers, and its own promises: ties, one draw a token, errors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refimpl.decode.sampling import Sampler, Sampling

WIDE_OPEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def by_transformers(logits_V, s: Sampling):
    """Probabilities over the whole vocabulary after transformers' warpers, in the order its generate() applies them."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    config = GenerationConfig(do_sample=True, temperature=float(s.temperature), top_k=s.top_k, top_p=s.top_p,
                              min_p=s.min_p or None)
    with torch.no_grad():
        warpers = GenerationMixin._get_logits_processor(_Stub(), config, input_ids_seq_length=1)
        scores = warpers(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(logits_V.copy())[None])
        return torch.softmax(scores.double(), -1)[0].numpy()


class _Stub:
    """As much of a model as _get_logits_processor asks for."""

    class config:
        is_encoder_decoder = False

    device = "cpu"

    def __getattr__(self, name):
        from transformers.generation.utils import GenerationMixin

        return getattr(GenerationMixin, name).__get__(self)


def dense(logits_V, **options):
    id_K, p_K = Sampler(Sampling(**(WIDE_OPEN | options))).distribution(logits_V)
    assert np.all(np.diff(id_K) > 0) and p_K.dtype == np.float64
    p_V = np.zeros(len(logits_V))
    p_V[id_K] = p_K
    return p_V


OPTIONS = [
    {}, {"temperature": 0.7}, {"top_k": 1}, {"top_k": 20}, {"top_k": 5000}, {"top_p": 0.95}, {"top_p": 0.01}, {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 64, "top_p": 0.95}, {"temperature": 0.3, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 2.5, "top_p": 0.9, "min_p": 0.02}, {"temperature": 0.5, "min_p": 0.3}, {"top_k": 30, "top_p": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_keeps_the_tokens_and_probabilities_of_transformers(options):
    for seed in range(5):
        random = np.random.default_rng(seed)
        logits_V = (random.standard_normal(1000) * (1 + 3 * seed)).astype(np.float32)
        logits_V[random.integers(0, 1000, 20)] = -np.inf
        expected_V, got_V = by_transformers(logits_V, Sampling(**(WIDE_OPEN | options))), dense(logits_V, **options)
        # tokens below the smallest float32 probability may be dropped by either: compare the sets above it
        np.testing.assert_array_equal(expected_V > 1e-30, got_V > 1e-30)
        np.testing.assert_allclose(got_V, expected_V, rtol=1e-5, atol=1e-12)  # transformers divides in float32


def test_all_tokens_tied_with_the_kth_stay_as_in_transformers():
    logits_V = np.array([1, 3, 2, 2, 0, 2], np.float32)
    expected_V = by_transformers(logits_V, Sampling(**(WIDE_OPEN | {"top_k": 2})))
    np.testing.assert_allclose(dense(logits_V, top_k=2), expected_V, rtol=1e-6)
    assert np.flatnonzero(dense(logits_V, top_k=2)).tolist() == [1, 2, 3, 5]


def test_top_p_takes_the_lower_id_of_equal_tokens():
    assert np.flatnonzero(dense(np.zeros(10, np.float32), top_p=0.45)).tolist() == [0, 1, 2, 3, 4]
    logits_V = np.log(np.array([0.2, 0.4, 0.2, 0.2], np.float32))
    assert np.flatnonzero(dense(logits_V, top_p=0.75)).tolist() == [0, 1, 2]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(logits_V=arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([-5.0, -1.0, 0.0, 0.5, 0.5, 3.0, -np.inf])),
       p=st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.999]))
def test_top_p_is_the_smallest_prefix_of_the_sorted_tokens(logits_V, p):
    """Also through the shortcut that leaves light tokens out of the sort."""
    if not np.isfinite(logits_V).any():
        return
    p_V = dense(logits_V)
    order_V = np.argsort(-p_V, kind="stable")
    n_kept = 1 + int((np.cumsum(p_V[order_V])[:-1] < p - 1e-12).sum())
    kept = np.flatnonzero(dense(logits_V, top_p=p)).tolist()
    assert kept == sorted(order_V[:n_kept].tolist())


def test_greedy_takes_the_lowest_of_equal_ids_and_draws_nothing():
    sampler = Sampler(Sampling(temperature=0.0, seed=3))
    assert sampler.pick(np.array([1, 7, 7, 2], np.float32)) == 1
    assert [a.tolist() for a in sampler.distribution(np.array([1, 7, 7, 2], np.float32))] == [[1], [1.0]]
    assert sampler._random.random() == np.random.Generator(np.random.PCG64(3)).random()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_draw_for_each_token(options):
    """The n-th pick uses the n-th number of the generator, also where only one token is left."""
    sampler, twin = Sampler(Sampling(**(WIDE_OPEN | options), seed=11)), np.random.Generator(np.random.PCG64(11))
    random = np.random.default_rng(0)
    for _ in range(20):
        logits_V = (random.standard_normal(300) * 4).astype(np.float32)
        id_K, p_K = sampler.distribution(logits_V)
        u = twin.random()
        expected = id_K[np.flatnonzero(np.cumsum(p_K) > u)[0]]
        assert sampler.pick(logits_V) == expected
    assert sampler._random.random() == twin.random()


@pytest.mark.parametrize("u, expected", [(0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2**-53, 3)])
def test_a_draw_takes_the_first_token_whose_cumulative_probability_exceeds_it(u, expected):
    class Fixed:
        def random(self):
            return u

    sampler = Sampler(Sampling(**WIDE_OPEN))
    sampler._random = Fixed()
    assert sampler.pick(np.array([-np.inf, 0, -np.inf, 0, -np.inf], np.float32)) == expected


def test_a_seed_repeats_and_another_does_not():
    logits_V = np.random.default_rng(1).standard_normal(500).astype(np.float32)
    runs = []
    for seed in (5, 5, 6):
        sampler = Sampler(Sampling(seed=seed))
        runs.append([sampler.pick(logits_V) for _ in range(30)])
    assert runs[0] == runs[1] != runs[2]


def test_frequencies_match_the_probabilities():
    logits_V = np.log(np.array([0.05, 0.3, 0.0001, 0.25, 0.4], np.float32))
    sampler = Sampler(Sampling(**WIDE_OPEN, seed=0))
    counts_V = np.bincount([sampler.pick(logits_V) for _ in range(20000)], minlength=5)
    expected_V = sampler.distribution(logits_V)[1] * 20000
    chi_square = ((counts_V - expected_V) ** 2 / expected_V).sum()
    assert chi_square < 18.5, counts_V  # 99.9 % quantile for 4 degrees of freedom; the seed is fixed


def test_suppressed_tokens_are_never_picked_and_the_callers_logits_stay():
    logits_V = np.array([0, 9, 8, 1], np.float32)
    before = logits_V.copy()
    assert Sampler(Sampling(temperature=0), suppress=(1,)).pick(logits_V) == 2
    sampler = Sampler(Sampling(**WIDE_OPEN), suppress=np.array([1, 2]))
    assert {sampler.pick(logits_V) for _ in range(200)} == {0, 3}
    np.testing.assert_array_equal(logits_V, before)
    for outside in (4, -1):
        with pytest.raises(ValueError, match="suppressed ids"):
            Sampler(Sampling(), suppress=(outside,)).pick(logits_V)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad, words", [
    ([0, np.nan, 1], "NaN"), ([0, np.inf, 1], r"\+inf"), ([-np.inf] * 3, "nothing but -inf"),
    ([], "non-empty"), ([[1, 2]], "shape")])
def test_refuses_logits_that_mean_nothing(temperature, bad, words):
    with pytest.raises(ValueError, match=words):
        Sampler(Sampling(temperature=temperature)).pick(np.array(bad, np.float32))


def test_a_tiny_temperature_is_greedy():
    for temperature in (1e-4, 1e-30, 1e-320):
        assert Sampler(Sampling(temperature=temperature)).pick(np.array([-3e38, 2, 3e38], np.float32)) == 2


@pytest.mark.parametrize("options", [
    {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": "1"},
    {"temperature": True},
    {"top_k": -1}, {"top_k": 2.5}, {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": -1}, {"min_p": -0.1}, {"min_p": 1.0}, {"seed": -1},
    {"seed": 1.5}], ids=str)
def test_refuses_values_that_mean_nothing(options):
    (name, value), = options.items()
    with pytest.raises(ValueError, match=f"^{name} must be .*{value!r}"):
        Sampling(**options)


def test_values_of_a_file():
    assert Sampling.from_metadata({}) == Sampling(1.0, 64, 0.95, 0.0, 0)
    file = {"general.sampling.temp": np.float32(0.7), "general.sampling.top_k": np.uint32(40),
            "general.sampling.top_p": 0.8999999761581421, "general.sampling.min_p": np.float32(0.05)}
    assert Sampling.from_metadata(file) == Sampling(0.7, 40, 0.9, 0.05, 0)
    assert Sampling.from_metadata(file, temperature=0.0, top_k=None, seed=4) == Sampling(0.0, 40, 0.9, 0.05, 4)
    with pytest.raises(ValueError, match="top_p"):
        Sampling.from_metadata({"general.sampling.top_p": 7.0})
    with pytest.raises(TypeError):
        Sampling.from_metadata(file, top_q=1)


def test_penalties_count_what_was_picked_and_biases_are_added():
    """OpenAI's definition: n * frequency + presence is taken from the logit of a token that was picked n times."""
    sampling = Sampling(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((3, 1.0),))
    sampler, logits_V = Sampler(sampling), np.array([2.0, 1.3, 0.9, 0.5], np.float32)
    # what is left of the logits before each pick: 2.0 1.3 0.9 1.5; 1.25 1.3 0.9 1.5; 1.25 1.3 0.9 0.75; 1.25 0.55 ...; 0.75 ... 0.9
    assert [sampler.pick(logits_V) for _ in range(5)] == [0, 3, 1, 0, 2]
    assert logits_V.tolist() == np.array([2.0, 1.3, 0.9, 0.5], np.float32).tolist()
    with pytest.raises(ValueError, match="logit_bias: token id 4 is outside"):
        Sampler(Sampling(logit_bias=((4, 1.0),))).pick(logits_V)
    for bad in ({"presence_penalty": np.nan}, {"frequency_penalty": "1"}, {"logit_bias": ((1, np.inf),)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampling(**bad)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_decides_before_anything_else(temperature):
    """The filters see what is allowed only, and the constraint hears of each pick."""
    class Small:
        def __init__(self):
            self.heard = []

        def mask(self, logits_V):
            return np.where(np.arange(len(logits_V)) < 2, logits_V, -np.inf).astype(np.float32)

        def accept(self, token):
            self.heard.append(token)
    small = Small()
    sampler = Sampler(Sampling(temperature=temperature, top_k=3, top_p=0.9, seed=1), constraint=small)
    picked = [sampler.pick(np.array([0.0, 0.1, 9.0, 9.0], np.float32)) for _ in range(20)]
    assert picked == small.heard and set(picked) == ({1} if temperature == 0 else {0, 1})
