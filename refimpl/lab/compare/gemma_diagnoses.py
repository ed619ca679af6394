"""Diagnoses that know the model: which tensors come before this one, how rotation, experts and windows go wrong. See diagnoses.py."""

import math

import numpy as np

from refimpl.lab.compare.mismatch import Mismatch, departing, earlier, fits, ratio
from refimpl.lab.compare.names import place_of
from refimpl.reference.ops import gelu


def other_choice(s: Mismatch) -> str | None:
    """Ids instead of values."""
    if s.ours.dtype.kind not in "iu":
        return None
    changed = sum(set(a) != set(b) for a, b in zip(s.ours.tolist(), s.theirs.tolist()))
    return f"other ids in {changed} of {len(s.ours)} rows, from logits that agree"


def another_activation(s: Mismatch) -> str | None:
    """ffn_geglu by other functions of gate and up."""
    gate, up = s.near("ffn_gate"), s.near("ffn_up")
    if place_of(s.name).name != "ffn_geglu" or gate is None or up is None:
        return None
    g, u = (np.asarray(pair[1], np.float64) for pair in (gate, up))
    erf = np.vectorize(math.erf)
    made = {"gate and up are exchanged": gelu(u.astype(np.float32)) * g, "GELU by erf, not by tanh": 0.5 * g * (1 + erf(g / 2**0.5)) * u,
            "SiLU": g / (1 + np.exp(-g)) * u, "GELU by the sigmoid of 1.702 x": g / (1 + np.exp(-1.702 * g)) * u,
            "ReLU": np.maximum(g, 0) * u, "no activation": g * u, "the product with up is left out": gelu(g.astype(np.float32)),
            "a table of GELU indexed by float16": gelu(g.astype(np.float16).astype(np.float32)).astype(np.float16).astype(np.float64) * u}
    return next((words for words, values in made.items() if fits(s, values)), None)


def other_rotation(s: Mismatch) -> str | None:
    """Rotated queries or keys that come from the right ones before: in other pairs, or by other angles."""
    place = place_of(s.name)
    before = s.near(place.name.replace("_pos", "_normed"))
    if not place.name.endswith("cur_pos") or before is None:
        return None
    x, a, b = (np.asarray(v, np.float64) for v in (before[1], s.ours, s.theirs))
    half = x.shape[-1] // 2

    def halves(v):
        return v[..., :half] + 1j * v[..., half:]

    def neighbours(v):
        return v[..., ::2] + 1j * v[..., 1::2]
    if not fits(s, np.abs(halves(x)), np.abs(halves(b))):
        if fits(s, np.abs(neighbours(x)), np.abs(neighbours(b))):
            return "neighbours are rotated as pairs, (0, 1) (2, 3), not halves"
        return "neighbours are rotated as pairs and put back as halves" if fits(s, np.abs(neighbours(x)), np.abs(halves(b))) else None
    if fits(s, halves(x), halves(b)):
        return "it is not rotated"
    if fits(s, halves(x) * np.conj(halves(a) / halves(x)), halves(b)):
        return "it is rotated the other way round"
    weight = np.abs(halves(x)) ** 2
    angle = np.angle((halves(b) / halves(a) * weight).sum(1))                          # (rows, pairs), of all heads together
    moved = np.abs(angle) > 10 * max(s.tolerance, 1e-6)
    first, n_moved = int(np.argmax(moved.any(0))), int(moved.any(0).sum())
    if 1 in s.positions:
        row = list(s.positions).index(1)
        step = np.angle((halves(a) / halves(x) * weight)[row].sum(0))                  # what one position more turns each pair by
        for k in (1, -1, 2, -2):
            if np.abs(np.exp(1j * angle) - np.exp(1j * k * step)).max() < max(1e-3, 10 * s.tolerance):
                return f"it is rotated as if at another place: the position is {k:+d}"
    return f"rotated by other angles in {n_moved} of {half} pairs, from pair {first} on: other frequencies or positions"


def skipped_step(s: Mismatch) -> str | None:
    """Theirs is an earlier tensor as it was: the step between was left out."""
    for name, x in earlier(s):
        if fits(s, x.reshape(s.theirs.shape)):
            return f"it is {name} unchanged: the step between was left out"
    return None


def another_tensor(s: Mismatch) -> str | None:
    """Theirs is made from another tensor: the same up to a factor for each row, as a norm leaves it."""
    for name, x in earlier(s):
        x = x.reshape(s.theirs.shape).astype(np.float64)
        c = (x * s.theirs).sum(-1, keepdims=True) / ((x * x).sum(-1, keepdims=True) + 1e-30)
        if s.theirs.shape[-1] > 4 and fits(s, c * x):
            return f"it is {name}, up to a factor for each row"
    return None


def missing_term(s: Mismatch) -> str | None:
    """Ours and theirs differ by another tensor: one that was not added, or added once more."""
    for name, x in earlier(s):
        x = x.reshape(s.theirs.shape)
        if fits(s, s.ours - x):
            return f"{name} is not added"
        if fits(s, s.ours + x):
            return f"{name} is added once more"
    return None


def factor_per_expert(s: Mismatch) -> str | None:
    """b = c[expert] * a for the experts' weights."""
    ids = s.near("ffn_moe_topk")
    if place_of(s.name).name != "ffn_moe_weights" or ids is None:
        return None
    r, id_TX = ratio(s), np.sort(ids[0], axis=1)
    factor = {e: np.nanmedian(r[id_TX == e]) for e in np.unique(id_TX) if not np.isnan(r[id_TX == e]).all()}
    made = s.ours * np.array([[factor.get(e, 1.0) for e in row] for row in id_TX.tolist()])
    spread = max(factor.values()) - min(factor.values())
    return "a factor for each expert: their scales" if spread > s.tolerance and len(factor) < r.size / 2 and fits(s, made) else None


def from_a_position(s: Mismatch) -> str | None:
    """Right up to some position and wrong from there on: a window, or a ring cache that wrapped."""
    bad = departing(s)
    if place_of(s.name).name != "kqv_out" or not len(bad) or s.positions[bad[0]] < 2 or len(bad) < 0.7 * (len(s.ours) - bad[0]):
        return None
    return (f"right up to position {s.positions[bad[0] - 1]}, wrong from {s.positions[bad[0]]} on: a window of another length, or "
            "a ring cache that wrapped wrongly")


def other_scores(s: Mismatch) -> str | None:
    """Attention that is right at position 0, where there is one key to look at."""
    bad = departing(s)
    if place_of(s.name).name != "kqv_out" or s.positions[0] != 0 or 0 in bad or len(bad) < 0.7 * (len(s.ours) - 1):
        return None
    return "right at position 0, which sees one key, and wrong from 1 on: other scores (a factor, a mask, queries of another head)"
