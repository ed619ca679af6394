"""Rounds as recorded: those of the real loop; the formulas of notebook 5; and costs that have the form the depth needs."""

import itertools

import numpy as np
import pytest

from refimpl.decode.draft_length import FixedDraftLength
from refimpl.decode.drafter import load_drafter
from refimpl.decode.generate import generate
from refimpl.lab.explain.drafting import (
    Charged,
    Costs,
    Round,
    Stubborn,
    acceptance,
    best,
    costs,
    expected_tokens,
    rates,
    run,
    tokens_per_round,
)
from refimpl.loading.model import load


@pytest.fixture(scope="module")
def pair():
    model = load(threads=1)
    return model, load_drafter(None, model), model.tokenizer.encode("def read(path):\n    with open(path) as f:\n")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "seed": 3}])
def test_a_recorded_run_is_the_run_that_generate_makes(pair, sampling):
    model, drafter, ids = pair
    out = generate(model, ids, max_new_tokens=48, drafter=drafter, draft_max=3, **{"temperature": 0.0, "top_k": 0, "top_p": 1.0} | sampling)
    assert out.stats.stop == "limit"
    found = run(model, ids, 48, drafter, FixedDraftLength(3), **sampling)
    assert found.ids == out.ids == run(model, ids, 48, **sampling).ids
    stats = out.stats.draft
    assert len(found.rounds) == stats.rounds
    assert sum(len(r.drafted) for r in found.rounds) == stats.n_proposed and sum(r.n_accepted for r in found.rounds) == stats.n_accepted
    assert [found.ids[0], *itertools.chain.from_iterable(r.emitted for r in found.rounds)] == found.ids


def test_the_logits_are_those_of_every_token_to_the_bit(pair):
    model, drafter, ids = pair
    plain, drafted = run(model, ids, 40), run(model, ids, 40, drafter, FixedDraftLength(4))
    assert plain.logit_TV.shape == (40, model.config.n_vocab) and not plain.rounds
    assert (plain.logit_TV.view(np.uint32) == drafted.logit_TV.view(np.uint32)).all()
    assert plain.logit_TV.argmax(axis=1).tolist() == plain.ids
    whole = model.logits([*ids, *plain.ids])[len(ids) - 1:-1]
    assert (plain.logit_TV.view(np.uint32) == whole.view(np.uint32)).all()


def test_acceptance_by_hand():
    rounds = [Round([1, 2], [1, 2, 9]), Round([1, 2], [1, 3]), Round([1, 2], [4]), Round([1], [1, 5])]      # the last was cut short
    assert [r.n_accepted for r in rounds] == [2, 1, 0, 1]
    assert acceptance(rounds, 2) == ([2 / 3, 1 / 3], 3 / 5)
    assert tokens_per_round(rounds, 2) == 2 == 1 + sum(acceptance(rounds, 2)[0])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_equation_1_is_what_independent_drafts_give(alpha):
    rng = np.random.default_rng(0)
    runs = (rng.random((200_000, 4)) < alpha).cumprod(axis=1).sum(axis=1) + 1
    assert expected_tokens(alpha, 4) == pytest.approx(runs.mean(), rel=0.01)
    assert expected_tokens(alpha, 4) == pytest.approx(sum(alpha ** i for i in range(5)))


def test_rates_and_the_best_depth():
    verify, accepted = [1.0, 1.1, 1.2], [0.8, 0.1]
    assert rates(verify, 0.1, accepted) == pytest.approx([1, 1.8 / 1.2, 1.9 / 1.4])
    assert best(verify, 0.1, accepted) == 1 and best(verify, 0.1, [0, 0]) == 0 and best(verify, 5.0, accepted) == 0
    assert rates([1.0, 1.1, 1.2, 1.3], 0.1, accepted) == pytest.approx(rates(verify, 0.1, accepted) + [1.9 / 1.6])
    assert best([1.0, 1.1, 1.2, 0.1], 0.1, accepted) == 1                   # no acceptance is known of a third draft


def test_costs_are_of_every_depth_and_leave_the_text_alone(pair):
    model, drafter, ids = pair
    found = costs(model, drafter, ids * 2, turns=2)
    assert len(found.verify) == 9 and min(found.verify) > 0 and found.draft > 0


def test_a_stubborn_drafter_changes_nothing_and_is_hardly_asked(pair):
    model, drafter, ids = pair
    stubborn = Stubborn(drafter, model.tokenizer.bos)
    charged = Charged(Costs([1.0 + 0.1 * k for k in range(9)], 0.2))
    found = run(model, ids, 100, stubborn, charged)
    assert found.ids == run(model, ids, 100).ids and not any(r.n_accepted for r in found.rounds)
    assert sum(len(r.drafted) for r in found.rounds) <= 6
    good = run(model, ids, 100, drafter, Charged(Costs([1.0] * 9, 0.0)))
    assert good.ids == found.ids and len(good.rounds) < 60                  # what costs nothing is used


def test_what_the_notebook_says_of_the_true_shapes():
    from refimpl.lab.explain.weight_traffic import drafter_bytes, read_bytes
    gains = {}
    for name, accepted in (("12B", (0.92, 0.79, 0.68, 0.59)), ("31B", (0.92, 0.79, 0.68, 0.59)), ("26B-A4B", (0.84, 0.60, 0.39, 0.27))):
        verify = [sum(read_bytes(name, n + 1).values()) for n in range(5)]
        gains[name] = np.array(rates(verify, drafter_bytes(name), accepted)) * verify[0]
        assert (np.array(rates(verify, drafter_bytes(name), [0.0] * 4))[1:] < 1 / verify[0]).all()
    assert (np.diff(gains["12B"]) > 0).all() and (np.diff(gains["31B"]) > 0).all()
    assert gains["26B-A4B"].argmax() < 4 and gains["26B-A4B"].max() < 1.5
