"""What departs in one place is named by that place: planted at random in random tensors, between rounding errors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.lab.compare.diagnoses import diagnose
from refimpl.lab.compare.mismatch import Mismatch

SHAPES = {"Qcur-3": ((4, 16), (3, 64), (8, 32)), "l_out-2": ((64,), (96,)), "inp_per_layer": ((5, 16),), "ffn_moe_logits-0": ((16,),)}
CHANGES = {
    "all zero": lambda x, random: 0 * x,
    "x 1.37": lambda x, random: np.float32(1.37) * x,
    "the sign is the other one": lambda x, random: -x,
    "+0.75": lambda x, random: x + np.float32(0.75),
    "NaN or infinite": lambda x, random: x * np.float32(np.nan),
    "": lambda x, random: 3 * random.standard_normal(x.shape).astype(np.float32),
}
EXPERTS = {"ffn_moe_weights-1": 4, "ffn_moe_out-1": 32}


class Planted:
    """Ours, and theirs with errors of at most a fifth of the tolerance; `beside` has the choice of experts."""

    def __init__(self, data, names=tuple(SHAPES)):
        self.random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        self.name, self.n_rows = data.draw(st.sampled_from(names)), data.draw(st.integers(4, 9))
        self.tolerance = data.draw(st.sampled_from([1e-6, 1e-4, 1e-2]))
        tail = (EXPERTS[self.name],) if self.name in EXPERTS else data.draw(st.sampled_from(SHAPES[self.name]))
        self.ours = self.random.standard_normal((self.n_rows, *tail)).astype(np.float32)
        self.ours += np.sign(self.ours) * np.float32(0.3)               # a change of any element is one that shows
        noise = self.random.uniform(-1, 1, self.ours.shape).astype(np.float32)
        self.theirs = self.ours + np.float32(self.tolerance / 5) * noise
        self.words, self.change = data.draw(st.sampled_from(list(CHANGES.items())))
        self.positions, self.beside = np.arange(self.n_rows) + 10, {}

    def plant(self, where):
        """Changes theirs there."""
        changed = self.theirs.copy()
        changed[where] = self.change(self.ours[where], self.random)
        return diagnose(Mismatch(self.name, self.ours, changed, self.positions, self.tolerance, self.beside.get))

    def assert_named(self, where, kind, *texts):
        """The diagnosis is of this kind, or not finite, and says where and what."""
        found = self.plant(where)
        assert found.kind == ("not finite" if "NaN" in self.words else kind), found
        assert all(text in found.text for text in texts), (found, texts)
        assert kind == "one element" or self.words in found.text, (found, self.words)


def planted(check, names=tuple(SHAPES)):
    """A test of `check(planted, draw)` on many of them."""
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(st.data())
    def test(data):
        check(Planted(data, names), lambda n: data.draw(st.integers(0, n - 1)))
    return test


def one_element(x, draw):
    where = tuple(map(draw, x.ours.shape))
    words = {"Qcur-3": "channel {2} of head {1}", "l_out-2": "channel {1}", "inp_per_layer": "channel {2} of layer {1}",
             "ffn_moe_logits-0": "expert {1}"}[x.name]
    x.assert_named(where, "one element", f"one element of {x.ours.size:,}: position {where[0] + 10}, {words.format(*where)}")


def one_channel(x, draw):
    where = tuple(map(draw, x.ours.shape[1:]))
    words = {"Qcur-3": "channel {1} of head {0}", "l_out-2": "channel {0}", "inp_per_layer": "channel {1} of layer {0}",
             "ffn_moe_logits-0": "expert {0}"}[x.name]
    x.assert_named((slice(None), *where), "one expert" if "moe" in x.name else "one channel", f"only {words.format(*where)}: ")


def one_channel_of_all_heads(x, draw):
    channel = draw(x.ours.shape[-1])
    x.assert_named((..., channel), "one channel", f"only channel {channel}, of several ")


def one_head(x, draw):
    head, what = draw(x.ours.shape[1]), "layer" if x.name == "inp_per_layer" else "head"
    x.assert_named((slice(None), head), f"one {what}", f"only {what} {head}: ")


def one_head_at_one_position(x, draw):
    row, head, what = draw(x.n_rows), draw(x.ours.shape[1]), "layer" if x.name == "inp_per_layer" else "head"
    x.assert_named((row, head), f"one {what}", f"only {what} {head}, at position {row + 10}: ")


def one_position(x, draw):
    row = draw(x.n_rows)
    x.assert_named(row, "one position", f"only position {row + 10}: ")


def one_block(x, draw):
    x.ours, x.theirs = (v.reshape(len(v), -1)[:, :64].copy() for v in (x.ours, x.theirs))
    x.name, block, row = "l_out-2", draw(2), draw(x.n_rows)
    part = slice(32 * block, 32 * block + 32)
    x.assert_named((slice(None), part), "one block", f"only one block of 32, elements {32 * block} to {32 * block + 31}: ")
    x.assert_named((row, part), "one block", f"elements {32 * block} to {32 * block + 31}, at position {row + 10}: ")


def one_expert(x, draw):
    chosen = np.array([x.random.permutation(np.r_[0:4, 5:12])[:4] for _ in range(x.n_rows)])
    users = [draw(x.n_rows // 2), x.n_rows // 2 + draw(x.n_rows // 2)]
    chosen[users, 2] = 4                                                # in no other row
    x.beside["ffn_moe_topk-1"] = chosen, chosen
    where = tuple(np.argwhere(np.sort(chosen, axis=1) == 4).T) if "weights" in x.name else users
    found = x.plant(where)
    if x.name == "ffn_moe_out-1" and "expert 4," not in found.text:     # others were chosen in just these rows
        return
    assert found.kind == ("not finite" if "NaN" in x.words else "one expert") and "only expert 4, chosen at 2 of" in found.text, found
    assert x.words in found.text, found


heads = ("Qcur-3", "inp_per_layer")
test_one_element, test_one_channel, test_one_position = map(planted, (one_element, one_channel, one_position))
test_one_block = planted(one_block, ("Qcur-3", "l_out-2"))
test_one_head, test_one_head_at_one_position = (planted(check, heads) for check in (one_head, one_head_at_one_position))
test_one_channel_of_all_heads = planted(one_channel_of_all_heads, heads)
test_one_expert = planted(one_expert, tuple(EXPERTS))


@pytest.mark.parametrize("shape", [(1, 64), (6, 4, 16)])
def test_what_is_everywhere_is_in_no_place(shape):
    ours = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    for theirs in (ours * 2, ours[..., ::-1].copy(), ours + np.float32(0.1) * np.sign(ours)):
        found = diagnose(Mismatch("l_out-2" if len(shape) == 2 else "Qcur-3", ours, theirs, np.arange(len(ours)), 1e-6, lambda name: None))
        assert not found.kind.startswith("one "), found
