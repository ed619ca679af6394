"""Routing: what is counted is what the routers did; and what notebook 4 says of the built-in model."""

import numpy as np
import pytest

from refimpl.lab.explain import experts
from refimpl.lab.explain.experts import (
    KINDS,
    balance_loss,
    distinct,
    distinct_if_independent,
    kinds_of,
    passage,
    picks,
    route,
    share_by_kind,
)
from refimpl.loading.model import load as load_model
from refimpl.model.tap import no_tap
from refimpl.tiny.corpus import read_corpus
from refimpl.tiny.evaluate import model_bits


@pytest.fixture(scope="module")
def model():
    return load_model(threads=1)


@pytest.fixture(scope="module")
def passages(model):
    return [passage(model, text, 256) for text in read_corpus().heldout.values() if len(text) > 6000][:8]


@pytest.fixture(scope="module")
def routes(model, passages):
    return route(model, [part.ids for part in passages])


def test_kinds_of_letters():
    text = 'if x1 == 25:  # "no" if\n    s = f"is {y} in" \'a\'\n'
    chunks = ["if ", "x", "1", " ==", " ", "25", ":", "  ", "# ", '"no" ', "if\n", "    ", "s ", "= ", 'f"', "is", "\n"]
    chunks[-1:] = [" {", "y", "} ", "in", '" ', "'a", "'\n"]
    kinds = [KINDS[kind] for kind in kinds_of(text, chunks)]
    assert kinds[:16] == ["keyword", "name", "name", "operator", "space", "number", "operator", "space", "comment", "comment", "comment",
                          "space", "name", "operator", "string", "string"]
    assert kinds[-2:] == ["string", "string"]
    with pytest.raises(ValueError, match="not the beginning"):
        kinds_of(text, ["x"])


def test_a_passage_lies_in_the_middle(model):
    text = "".join(f"x{i} = {i}\n" for i in range(200))
    part = passage(model, text, 100)
    assert len(part.ids) == 101 and len(part.chunks) == len(part.kind_T) == 100 and part.ids[0] == model.tokenizer.bos
    at = text.index("".join(part.chunks))
    assert 0.4 < (at + len("".join(part.chunks)) / 2) / len(text) < 0.6
    assert len(passage(model, "x = 1\n", 100).chunks) == len(model.tokenizer.encode("x = 1\n")) - 1


def test_routes_are_what_the_routers_did_over_several_calls(model):
    """A text longer than a chunk; without its first token, and only that."""
    ids = np.random.default_rng(0).integers(300, 4000, 600)
    seen = {}
    model.prefill(ids, model.new_cache(), tap=lambda name, value: seen.setdefault(name, []).append(value.copy()))
    found = route(model, [ids, ids[:50]])
    assert found.id_LTX.shape == (6, 599 + 49, 8)
    for i in range(6):
        assert (found.id_LTX[i, :599] == np.concatenate(seen[f"ffn_moe_topk-{i}"])[1:]).all()
    assert (found.id_LTX[:, 599:] == found.id_LTX[:, :49]).all()


def test_shares_and_load_count_every_pick(routes, passages):
    kind_T = np.concatenate([part.kind_T for part in passages])
    share = share_by_kind(routes.id_LTX[0], kind_T, 128)
    present = np.unique(kind_T)
    np.testing.assert_allclose(share[present].sum(axis=1), 8)
    assert picks(routes.id_LTX[0], 128).sum() == routes.id_LTX[0].size
    assert experts.load(routes.id_LTX[0], 128).mean() == pytest.approx(1)
    chunks = [chunk for part in passages for chunk in part.chunks]
    kind, expert, times, _ = experts.specialists(routes.id_LTX[2], kind_T, chunks, 128, 10)[0]
    assert kind == "keyword" and times == pytest.approx(share_by_kind(routes.id_LTX[2], kind_T, 128)[0, expert]
                                                        / picks(routes.id_LTX[2], 128)[:, expert].mean())


def test_balance_is_1_for_even_use_and_e_for_one_expert():
    even = np.arange(16).reshape(8, 2)
    assert balance_loss(even, np.full((8, 16), 1 / 16)) == pytest.approx(1)
    one = np.zeros((8, 16))
    one[:, 3] = 1
    assert balance_loss(np.full((8, 1), 3), one) == pytest.approx(16)


def test_distinct_counts_sets_and_the_formula_holds_for_independent_rows():
    id_TX = np.array([[0, 1], [1, 2], [5, 6]])
    assert distinct(id_TX, 1) == 2 and distinct(id_TX, 2) == (3 + 4) / 2 and distinct(id_TX, 3) == 5
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(128)[:8] for _ in range(4000)])
    for n in (1, 2, 5, 16):
        assert distinct(rows, n) == pytest.approx(float(distinct_if_independent(128, 8, n)), rel=0.01)


def test_as_many_experts_as_before_change_nothing_and_fewer_are_the_first_ones(model, passages):
    ids = passages[0].ids
    same, three = (experts.with_used(model, n) for n in (8, 3))
    assert (model.logits(ids).view(np.uint32) == same.logits(ids).view(np.uint32)).all()
    first = model.config.layers[0].index
    seen = [{}, {}]
    for which, tap in zip((model, three), seen):
        which.forward(which.checked(ids[:50]), which.new_cache(), tap.__setitem__)
    assert (seen[1][f"ffn_moe_topk-{first}"] == seen[0][f"ffn_moe_topk-{first}"][:, :3]).all()
    assert (model.logits(ids, no_tap) == same.logits(ids)).all()
    for wrong in (0, 129):
        with pytest.raises(ValueError, match=f"n_used={wrong}: layer 0 has 128 experts"):
            experts.with_used(model, wrong)


def test_what_the_notebook_says(model, passages, routes):
    texts = [part.ids for part in passages]
    error = experts.shortened_error(model, texts, [1, 4, 8])
    assert (error[2] == 0).all() and (error[0] > error[1]).all() and (error[1] > 0.02).all()
    bits = {n: sum(model_bits(experts.with_used(model, n), ids) for ids in texts) for n in (1, 4, 8, 16)}
    assert bits[1] > bits[4] > bits[8]
    assert bits[4] / bits[8] - 1 < 0.25 * error[1].mean()                  # the output changes far more than what the model says
    assert abs(bits[16] / bits[8] - 1) < 0.02                              # next to no difference
    shuffled = routes.id_LTX[:, np.random.default_rng(0).permutation(routes.id_LTX.shape[1])]
    for n in (3, 5):
        near, far = (np.mean([distinct(id_TX, n) for id_TX in rows]) for rows in (routes.id_LTX, shuffled))
        formula = float(distinct_if_independent(128, 8, n))
        assert near < far <= formula and far > 0.97 * formula and near > 0.85 * formula
    for i in range(6):
        assert experts.load(routes.id_LTX[i], 128).min() > 0 and 1 < balance_loss(routes.id_LTX[i], routes.probability_LTE[i]) < 1.3
