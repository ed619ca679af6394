"""How many tokens to draft: the formula by hand, and the rule on made-up machines where the best answer is known."""

import itertools
import random

import numpy as np
import pytest

from refimpl.decode.draft_length import (
    DRAFTER,
    MAX_DRAFT,
    PROBE_EVERY,
    AutoDraftLength,
    FixedDraftLength,
    best_draft_length,
    draft_length_of,
)
from refimpl.decode.repeats import Repeats


def rate(verify, draft, accepted, k):
    return (1 + sum(accepted[:k])) / (verify[k] + k * draft)


def test_the_formula_by_hand():
    # 1 token in 1 s; 1.5 in 1.3 s; 1.75 in 1.6 s: rates 1, 1.154, 1.094
    assert best_draft_length([1.0, 1.1, 1.2], 0.2, [0.5, 0.25]) == 1
    assert best_draft_length([1.0, 1.1, 1.2], 0.2, [0.9, 0.8]) == 2
    assert best_draft_length([1.0, 1.6, 2.0], 0.2, [0.7, 0.5]) == 0
    assert best_draft_length([1.0, 1.5], 0.0, [0.5]) == 0              # as fast: the smaller
    assert best_draft_length([1.0], 0.1, []) == 0


def test_it_is_the_best_of_all():
    rng = random.Random(0)
    for _ in range(300):
        verify = sorted(rng.uniform(0.5, 3) for _ in range(MAX_DRAFT + 1))
        accepted = sorted((rng.random() for _ in range(MAX_DRAFT)), reverse=True)
        draft = rng.uniform(0, 0.4)
        k = best_draft_length(verify, draft, accepted)
        assert rate(verify, draft, accepted, k) == max(rate(verify, draft, accepted, j) for j in range(MAX_DRAFT + 1))


def simulate(verify, draft, accepted, rounds=1500, seed=0, noise=0.0, spikes=0.0):
    """(speed against the plain loop, average number of drafts of the second half) of AutoDraftLength on a machine with these costs.

    Measured times are up to `noise` too long, and eight times as long with the chance `spikes`.
    """
    rng, depth, tokens, seconds, made = random.Random(seed), AutoDraftLength(), 0, 0.0, []
    for _ in range(rounds):
        k = depth.choose()
        u = rng.random()
        right = sum(u < a for a in accepted[:k])
        blur = 1 + noise * rng.random() + 7 * (rng.random() < spikes)
        depth.observe(k, right, k * draft * blur, verify[k] * blur)
        tokens, seconds = tokens + 1 + right, seconds + verify[k] + k * draft
        made.append(k)
    return tokens * verify[0] / seconds, sum(made[rounds // 2:]) / (rounds - rounds // 2)


DENSE = [1.0 + 0.06 * k for k in range(MAX_DRAFT + 1)]               # a row more costs little
MOE = [1.0, 1.4, 1.7, 2.0, 2.3, 2.6, 2.9, 3.2, 3.5]             # every row brings experts of its own


MACHINES = [
    (DENSE, 0.05, [0.9, 0.81, 0.73, 0.66, 0.59, 0.53, 0.48, 0.43]),
    (DENSE, 0.2, [0.5, 0.25, 0.1, 0.05, 0.0, 0.0, 0.0, 0.0]),
    (MOE, 0.1, [0.84, 0.6, 0.39, 0.27, 0.2, 0.1, 0.1, 0.1]),
    (MOE, 0.1, [0.95] * 8),
]
# every machine with one kind of noise, all kinds among them
OFTEN = [(0, (0.0, 0.0)), (1, (0.3, 0.0)), (2, (0.1, 0.1)), (3, (0.0, 0.0))]


@pytest.mark.parametrize(("verify", "draft", "accepted", "noise", "spikes"), [
    pytest.param(*machine, *noise, marks=() if (i, noise) in OFTEN else pytest.mark.exhaustive)
    for i, machine in enumerate(MACHINES) for noise in ((0.0, 0.0), (0.3, 0.0), (0.1, 0.1))])
def test_it_comes_near_to_the_best_fixed_number(verify, draft, accepted, noise, spikes):
    best = max(rate(verify, draft, accepted, k) / rate(verify, draft, accepted, 0) for k in range(MAX_DRAFT + 1))
    speeds = [simulate(verify, draft, accepted, seed=seed, noise=noise, spikes=spikes)[0] for seed in range(10)]
    assert sum(speeds) / 10 > 0.94 * best and min(speeds) > 0.8 * best


@pytest.mark.parametrize(("verify", "draft"), [(DENSE, 0.05), (DENSE, 0.6), (MOE, 0.3)])
def test_a_useless_drafter_costs_next_to_nothing(verify, draft):
    for seed in range(5):
        speed, made = simulate(verify, draft, [0.0] * MAX_DRAFT, seed=seed, rounds=600)
        assert speed > 0.97 and made < 0.1


def test_it_notices_when_drafting_begins_to_pay_and_when_it_ends():
    depth, chosen = AutoDraftLength(), []
    for turn in range(2400):
        k = depth.choose()
        good = 800 <= turn < 1600
        depth.observe(k, k if good else 0, 0.05 * k, DENSE[k])
        chosen.append(k)
    assert sum(chosen[600:800]) < 20 and sum(chosen[2200:]) < 20
    assert sum(k >= MAX_DRAFT - 2 for k in chosen[1200:1600]) > 390              # a plain round now and then is left


def test_the_first_rounds_find_out_the_costs():
    depth, chosen = AutoDraftLength(), []
    for _ in range(20):
        chosen.append(depth.choose())
        depth.observe(chosen[-1], chosen[-1], 0.01 * chosen[-1], DENSE[chosen[-1]])
    assert chosen[:6] == [0, 0, 0, 1, 1, 1] and all(b - a <= 1 for a, b in itertools.pairwise(chosen)) and max(chosen) == MAX_DRAFT


def test_costs_in_between_are_guessed_along_a_line():
    depth = AutoDraftLength()
    for k, seconds in ((0, 1.0), (1, 1.2), (4, 1.5)):
        depth.observe(k, 0, 0.1 * k, seconds)
    assert depth.verify_seconds() == pytest.approx([1.0, 1.2, 1.3, 1.4, 1.5, 1.6])
    assert depth.accepted()[0] == pytest.approx(1.4 * 0.97**2 / (2 * 0.97**2 + 1 + 0.97)) and len(depth.accepted()) == MAX_DRAFT


@pytest.mark.parametrize("n", [0, -1, 9, 1000, True, 1.5, "4", "automatic", None])
def test_odd_numbers_are_refused(n):
    with pytest.raises(ValueError, match="expected 'auto' or a number from 1 to 8"):
        draft_length_of(n, AutoDraftLength())


def test_a_plain_round_is_measured_again_now_and_then():
    """Drafting seems to pay only because the machine was slow while plain rounds were measured."""
    depth, chosen, rng = AutoDraftLength(), [], random.Random(0)
    for turn in range(2000):
        k = depth.choose()
        depth.observe(k, sum(rng.random() < 0.3 for _ in range(k > 0)), 0.1 * k, 3.0 if turn < 3 else 1 + 0.4 * k)
        chosen.append(k)
    assert sum(chosen[10:110]) >= 90 and sum(chosen[1500:]) < 50


def test_more_rows_never_take_less_time():
    """The machine was slow while plain rounds were measured, and became quicker: a drafter that is never right must still go."""
    depth, chosen = AutoDraftLength(), []
    for turn in range(900):
        k = depth.choose()
        depth.observe(k, 0, 0.1 * k, DENSE[k] * (3 if turn < 3 else 1))
        chosen.append(k)
    assert sum(chosen[300:]) < 40
    for k, seconds in ((0, 2.0), (1, 1.0), (2, 2.5)):
        (depth := depth if k else AutoDraftLength()).observe(k, 0, 0.1 * k, seconds)
    assert depth.verify_seconds() == pytest.approx([2.0, 2.0, 2.5, 4.0])


def test_a_fixed_number_stays():
    depth = draft_length_of(3, AutoDraftLength())
    depth.observe(3, 0, 100, 100)
    assert isinstance(depth, FixedDraftLength) and depth.choose() == 3 and draft_length_of("auto", kept := AutoDraftLength()) is kept


# ---- tokens that cost nothing

def measured(verify, draft, accepted) -> AutoDraftLength:
    """Knows these costs, and of the drafter this acceptance."""
    auto = AutoDraftLength()
    for _ in range(60):
        for k, seconds in enumerate(verify):
            auto.cost(k, [draft], seconds)
        auto.judge(1, int(accepted))
    return auto


def test_what_gives_more_tokens_per_second_drafts():
    auto = measured(DENSE, 0.2, True)
    for _ in range(60):
        auto.judge(4, 4, "sure")
        auto.judge(4, 0, "never")
    assert auto.source(1, {"sure": 4, "never": 4}) == ("sure", 4) and auto.source(1, {"never": 4}) == (DRAFTER, 1)
    assert auto.source(0, {"sure": 2}) == ("sure", 2) and auto.source(3, {"sure": 0}) == (DRAFTER, 3)
    auto = measured([1.0, 2.1, 3.2], 0.2, False)             # where rows cost as much as calls, nothing pays
    auto.rounds = PROBE_EVERY + 1
    assert auto.source(0, {"sure": 2}) == (DRAFTER, 0)
    auto.rounds = PROBE_EVERY
    assert auto.source(0, {"sure": 2}) == ("sure", 1)


def test_costs_are_measured_before_anything_is_believed():
    """Three calls without a draft token, three with one."""
    auto, chosen = AutoDraftLength(), []
    for _ in range(7):
        source, n = auto.source(0, {"sure": 5})
        chosen.append(n)
        auto.observe(n, n, 0.0, 1 + 0.1 * n, source)
    assert chosen == [0, 0, 0, 1, 1, 1, 2] and not auto.draft
    assert auto.choose() == 1, "the drafter's own cost is not known yet"
    auto.observe(1, 1, 0.1, 1.1)
    assert auto.choose() > 1


def test_a_fixed_number_takes_the_first_that_offers_any():
    assert FixedDraftLength(3).source(3, {"a": 0, "b": 5, "c": 9}) == ("b", 3) and FixedDraftLength(3).source(2, {"a": 0}) == (DRAFTER, 2)


def test_repeats():
    """What followed the latest three ids when they came last before; the index grows with the text."""
    repeats = Repeats()
    assert repeats.offer([1, 2], 4) == [] and repeats.offer([1, 2, 3], 4) == []
    assert repeats.offer([1, 2, 3, 4, 1, 2, 3], 4) == [4, 1, 2, 3] and repeats.offer([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 2) == [5, 1]
    text = np.random.default_rng(2).integers(0, 4, 400).tolist()
    repeats = Repeats()
    for n in range(1, 400):
        ends = [end for end in range(3, n) if text[end - 3:end] == text[max(0, n - 3):n]]
        assert repeats.offer(text[:n], 5) == (text[ends[-1]:n][:5] if ends else [])
