"""Attention maps: the weights that `attend` uses; and what notebook 3 says of the heads of the built-in model."""

import ast
from pathlib import Path

import numpy as np
import pytest

from refimpl.lab.explain.attention_maps import HABITS, attention_maps, habits, weights_of
from refimpl.loading.model import load
from refimpl.model.blocks import layer_of
from refimpl.reference.attention import attend

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "03_attention_in_gemma4.py"


@pytest.mark.parametrize("n_keys", [5, 16, 37])
def test_weights_times_values_are_the_output(n_keys):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in ((9, 4, 16), (n_keys, 2, 16), (n_keys, 2, 16)))
    end = np.minimum(np.arange(9) + 1, n_keys)
    first = np.maximum(0, end - 3)
    weight_NTS = weights_of(q, k, first, end)
    out = np.einsum("KGTS,SKH->TKGH", weight_NTS.reshape(2, 2, 9, n_keys), v).reshape(9, 4, 16)
    np.testing.assert_allclose(out, attend(q, layer_of(k, v), first, end), rtol=0, atol=1e-5)
    assert (weight_NTS.sum(axis=-1) == pytest.approx(np.ones((4, 9)), abs=1e-5))
    seen = (np.arange(n_keys) >= first[:, None]) & (np.arange(n_keys) < end[:, None])
    assert (weight_NTS[:, ~seen] == 0).all() and (weight_NTS[:, seen] > 0).all()


@pytest.fixture(scope="module")
def looked():
    """(model, ids, tokens, maps) of the code in the notebook."""
    nodes = ast.walk(ast.parse(NOTEBOOK.read_text()))
    code = next(node.value.value for node in nodes if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "code")
    model = load(threads=1)
    ids = model.tokenizer.encode(code)
    return model, ids, [model.tokenizer.decode([token], special=True) for token in ids], attention_maps(model, ids)


def test_maps_see_the_window_and_no_more(looked):
    model, ids, _, maps = looked
    back = np.arange(len(ids))[:, None] - np.arange(len(ids))
    for spec, weight_NTS in zip(model.config.layers, maps):
        in_sight = (back >= 0) & (back < (spec.window or len(ids)))
        assert (weight_NTS[:, ~in_sight] == 0).all()
        np.testing.assert_allclose(weight_NTS.sum(axis=-1), 1, atol=1e-5)


def test_habits_are_shares_of_everything(looked):
    _, ids, _, maps = looked
    share_LNB = habits(maps, ids)
    assert share_LNB.shape == (6, 4, len(HABITS))
    np.testing.assert_allclose(share_LNB.sum(axis=-1), 1, atol=1e-4)


def test_habits_of_made_up_heads():
    """Tokens 0 7 8 7: heads that look at one place each, from the last token."""
    ids = [0, 7, 8, 7]
    for place, habit in ((3, "the token itself"), (2, "the one before"), (1, "the same token earlier"), (0, "<bos>")):
        weight_NTS = np.zeros((1, 4, 4))
        weight_NTS[0, 2, 2] = weight_NTS[0, 3, place] = 1
        share = dict(zip(HABITS, habits([weight_NTS], ids)[0, 0]))
        assert share[habit] == (1 if place == 3 else 0.5), habit
    ids, weight_NTS = [0, 7, 8, 9, 7], np.zeros((1, 5, 5))
    weight_NTS[0, 4, 2] = 1
    assert dict(zip(HABITS, habits([weight_NTS], ids)[0, 0]))["after the same token"] == pytest.approx(1 / 3)


def test_what_the_notebook_says_of_the_heads(looked):
    model, ids, tokens, maps = looked
    share = {habit: habits(maps, ids)[:, :, i] for i, habit in enumerate(HABITS)}
    assert share["the one before"][1, 2] > 0.8                                          # "does one thing only"
    after = share["after the same token"]
    assert sorted(np.argsort(after, axis=None)[-2:]) == [5 * 4 + 1, 5 * 4 + 2] and after[5, 1:3].min() > 0.15
    assert share["<bos>"][5].max() > 0.4                                                # the sink
    newline = tokens.index(":", 100) + 1
    assert tokens[newline] == "\n" and tokens[int(maps[1][1, newline].argmax())].isspace()
    assert tokens[int(maps[1][1, newline].argmax()) - 1].endswith("\n")                # the spaces that began its line
    assert model.tokenizer.decode([int(model.logits(ids)[newline].argmax())]).isspace()
    quotes = tokens.index("pop") + tokens[tokens.index("pop"):].index('"""')
    assert tokens[int(maps[4][0, quotes].argmax())] == "pop"
    new = tokens.index("new", tokens.index("new") + 1)
    best = int(maps[5][3, new].argmax())
    assert (tokens[best - 1], tokens[best]) == ("new", "est") and new - best > 64
    assert model.tokenizer.decode([int(model.logits(ids)[new].argmax())]) == "est"
