"""What a difference looks like. Each test is a few lines: it makes from our values what theirs would be if that were the mistake, and asks
whether that fits. The first that fits names the difference; they are ordered from the particular to the general.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refimpl.lab.names import NAMES, graph_order, place_of
from refimpl.reference.ops import gelu


@dataclass(frozen=True)
class Symptom:
    """`kind` is a word for programs, `text` says it to people."""

    kind: str
    text: str


@dataclass(frozen=True)
class Scene:
    """A tensor that departs: ours and theirs, (rows, ...), the rows' positions, the tolerance. `beside(name)` gives another tensor of both
    traces in the same rows, or None.
    """

    name: str
    ours: np.ndarray
    theirs: np.ndarray
    positions: np.ndarray
    tolerance: float
    beside: Callable[[str], tuple[np.ndarray, np.ndarray] | None]

    def near(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A tensor of the same layer and stage."""
        place = place_of(self.name)
        return self.beside(f"{place.prefix}{name}" + ("" if place.layer is None else f"-{place.layer}"))


def symptom_of(scene: Scene) -> Symptom:
    """The first symptom that fits."""
    for test in TESTS:
        found = test(scene)
        if found is not None:
            return Symptom(test.__name__.replace("_", " "), found)
    return Symptom("other", "none of the known kinds")


def row_errors(a: np.ndarray, b: np.ndarray, resolution: float = 0.0) -> np.ndarray:
    """rms(a - b) / rms(a) of every row; rows much smaller than the rest are measured by a thousandth of the whole. NaN is infinite."""
    x, y = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (a, b))
    apart = np.maximum(np.abs(x - y) - resolution, 0)
    size = np.maximum(np.sqrt(np.mean(x * x, axis=1)), 1e-3 * np.sqrt(np.mean(x * x)) + 1e-30)
    errors = np.sqrt(np.mean(apart * apart, axis=1)) / size
    return np.where(np.isfinite(errors), errors, np.inf)


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """rms(x - y) / rms(y) over everything."""
    x, y = (np.asarray(v, np.result_type(v, np.float64)) for v in (x, y))
    return float(np.sqrt(np.mean(np.abs(x - y) ** 2)) / (np.sqrt(np.mean(np.abs(y) ** 2)) + 1e-30))


def fits(scene: Scene, made: np.ndarray, theirs: np.ndarray | None = None) -> bool:
    """Does `made` explain theirs: as near as rounding would bring it, or by removing all but a thirtieth of the difference?"""
    theirs = scene.theirs if theirs is None else theirs
    return distance(made, theirs) <= max(scene.tolerance, distance(scene.ours, scene.theirs) / 30)


def ratio(scene: Scene) -> np.ndarray:
    """theirs / ours in float64, NaN where ours is next to nothing."""
    ours = np.asarray(scene.ours, np.float64)
    small = np.abs(ours) < 1e-3 * np.sqrt(np.mean(ours * ours))
    return np.where(small, np.nan, np.asarray(scene.theirs, np.float64) / np.where(small, 1, ours))


def median(x: np.ndarray, axis) -> np.ndarray:
    """Of the numbers among them, 1 where there are none, axes kept."""
    known = ~np.isnan(x)
    filled = np.nanmedian(np.where(known.any(axis=axis, keepdims=True), x, 1.0), axis=axis, keepdims=True)
    return filled


# ---- the tests, particular first

def another_shape(s: Scene) -> str | None:
    """Not the same number of elements."""
    return None if s.ours.shape == s.theirs.shape else f"its shape is {s.theirs.shape[1:]} in each position, expected {s.ours.shape[1:]}"


def not_finite(s: Scene) -> str | None:
    """NaN or infinite."""
    bad = ~np.isfinite(s.theirs)
    return f"{bad.sum()} of {bad.size} values are NaN or infinite" if bad.any() else None


def other_choice(s: Scene) -> str | None:
    """Ids instead of values."""
    if s.ours.dtype.kind not in "iu":
        return None
    changed = sum(set(a) != set(b) for a, b in zip(s.ours.tolist(), s.theirs.tolist()))
    return f"other ids in {changed} of {len(s.ours)} rows, from logits that agree"


def zeros(s: Scene) -> str | None:
    """Nothing was computed."""
    return "all zeros" if not s.theirs.any() else None


def sign(s: Scene) -> str | None:
    """b = -a."""
    return "the sign is the other one" if fits(s, -s.ours) else None


def constant_factor(s: Scene) -> str | None:
    """b = c * a."""
    a, b = np.asarray(s.ours, np.float64), np.asarray(s.theirs, np.float64)
    c = float((a * b).sum() / (a * a).sum())
    return f"a constant factor of {c:.6g}{in_words(c, s)}" if c and fits(s, c * a) else None


def in_words(c: float, s: Scene) -> str:
    """A factor as a root of a size nearby."""
    inputs = s.beside("inp_scaled")
    sizes = {"H or P": s.ours.shape[-1], "2": 2, "D": inputs[0].shape[-1] if inputs else s.ours.shape[-1]}
    for what, n in sizes.items():
        for value, words in ((n ** 0.5, f"sqrt({n})"), (n ** -0.5, f"1/sqrt({n})")):
            if abs(c / value - 1) < 1e-3:
                return f", about {words}" + (f": {what} is {n}" if n != 2 else "")
    return ""


def shifted_rows(s: Scene) -> str | None:
    """b[t] = a[t - k]."""
    for k in (1, -1, 2, -2, 3, -3):
        if len(s.ours) > abs(k) + 1:
            a, b = (s.ours[:-k], s.theirs[k:]) if k > 0 else (s.ours[-k:], s.theirs[:k])
            if (row_errors(a, b) <= max(s.tolerance, 1e-3)).mean() > 0.8:
                return f"row t holds what belongs to row {'t - ' + str(k) if k > 0 else 't + ' + str(-k)}"
    return None


def stale_row(s: Scene) -> str | None:
    """A few rows hold other rows of ours."""
    bad = departing(s)
    if not 0 < len(bad) <= max(1, len(s.ours) // 4):
        return None
    for t in bad:
        other = [u for u in range(len(s.ours)) if u != t and distance(s.ours[u], s.theirs[t]) <= max(s.tolerance, 1e-3)]
        if not other:
            return None
    return f"position {s.positions[bad[-1]]} holds what belongs to position {s.positions[other[0]]}"


def swapped_halves(s: Scene) -> str | None:
    """The last axis, or blocks of it, with halves exchanged."""
    for block in blocks(s):
        a = s.ours.reshape(*s.ours.shape[:-1], -1, 2, block // 2)
        if fits(s, a[..., ::-1, :].reshape(s.ours.shape)):
            return f"halves of every {block} elements are exchanged"
    return None


def interleaved_pairs(s: Scene) -> str | None:
    """The halves' elements in turn, or even and odd ones apart, in the last axis or blocks of it."""
    for block in blocks(s):
        a = s.ours.reshape(*s.ours.shape[:-1], -1, block)
        half = block // 2
        for made, words in ((np.stack([a[..., :half], a[..., half:]], -1), "halves are interleaved"),
                            (np.concatenate([a[..., ::2], a[..., 1::2]], -1), "even and odd elements are taken apart")):
            if fits(s, made.reshape(s.ours.shape)):
                return f"{words} in every {block} elements"
    return None


def blocks(s: Scene) -> list[int]:
    """Even sizes that divide the last axis: a format's blocks, and the whole of it."""
    n = s.ours.shape[-1]
    return [block for block in sorted({n, 32, 64, 256}) if n % block == 0 and block % 2 == 0]


def transposed(s: Scene) -> str | None:
    """(N, H) read as (H, N)."""
    if s.ours.ndim == 3 and fits(s, np.swapaxes(s.ours, 1, 2).reshape(s.ours.shape)):
        return f"{s.ours.shape[1:]} is stored as {s.ours.shape[:0:-1]}"
    return None


def permuted_heads(s: Scene) -> str | None:
    """Heads, or experts' weights, in another order."""
    if s.ours.ndim != 3 or s.ours.shape[1] < 2:
        return None
    order = [int(np.argmin([distance(s.ours[:, m], s.theirs[:, n]) for m in range(s.ours.shape[1])])) for n in range(s.ours.shape[1])]
    return f"heads in the order {order}" if order != sorted(order) and fits(s, s.ours[:, order]) else None


def permuted(s: Scene) -> str | None:
    """The values of every row, in another order."""
    a, b = (np.sort(v.reshape(len(v), -1), axis=1) for v in (s.ours, s.theirs))
    return "every row has its values in another order" if a.shape[1] > 8 and fits(s, a, b) else None


def another_activation(s: Scene) -> str | None:
    """ffn_geglu by other functions of gate and up."""
    gate, up = s.near("ffn_gate"), s.near("ffn_up")
    if place_of(s.name).name != "ffn_geglu" or gate is None or up is None:
        return None
    g, u = (np.asarray(pair[1], np.float64) for pair in (gate, up))
    erf = np.vectorize(math.erf)
    made = {"gate and up are exchanged": gelu(u.astype(np.float32)) * g, "GELU by erf, not by tanh": 0.5 * g * (1 + erf(g / 2**0.5)) * u,
            "SiLU": g / (1 + np.exp(-g)) * u, "GELU by the sigmoid of 1.702 x": g / (1 + np.exp(-1.702 * g)) * u, "ReLU": np.maximum(g, 0) * u,
            "no activation": g * u, "the product with up is left out": gelu(g.astype(np.float32)),
            "a table of GELU indexed by float16": gelu(g.astype(np.float16).astype(np.float32)).astype(np.float16).astype(np.float64) * u}
    return next((words for words, values in made.items() if fits(s, values)), None)


def other_rotation(s: Scene) -> str | None:
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
    per_position = np.angle(halves(a) / halves(x))[:, 0] / np.maximum(s.positions, 1)[:, None]
    moved = np.abs(angle) > 10 * max(s.tolerance, 1e-6)
    first, n_moved = int(np.argmax(moved.any(0))), int(moved.any(0).sum())
    for k in (1, -1, 2, -2):
        row = list(s.positions).index(1) if 1 in s.positions else len(s.positions) - 1
        slow = np.abs(per_position[row]) < 1.5 if s.positions[row] == 1 else np.zeros(half, bool)
        if slow.any() and np.abs(np.exp(1j * angle[:, slow]) - np.exp(1j * k * per_position[row][slow])).max() < max(1e-3, 10 * s.tolerance):
            return f"it is rotated as if it stood {'behind' if k > 0 else 'ahead of'} its place by {abs(k)}: the position is {k:+d}"
    return f"rotated by other angles in {n_moved} of {half} pairs, from pair {first} on: other frequencies or positions"


def skipped_step(s: Scene) -> str | None:
    """Theirs is an earlier tensor as it was: the step between was left out."""
    for name, x in earlier(s):
        if fits(s, x.reshape(s.theirs.shape)):
            return f"it is {name} unchanged: the step between was left out"
    return None


def another_tensor(s: Scene) -> str | None:
    """Theirs is made from another tensor: the same up to a factor for each row, as a norm leaves it."""
    for name, x in earlier(s):
        x = x.reshape(s.theirs.shape).astype(np.float64)
        c = (x * s.theirs).sum(-1, keepdims=True) / ((x * x).sum(-1, keepdims=True) + 1e-30)
        if s.theirs.shape[-1] > 4 and fits(s, c * x):
            return f"it is {name}, up to a factor for each row"
    return None


def missing_term(s: Scene) -> str | None:
    """Ours and theirs differ by another tensor: one that was not added, or added once more."""
    for name, x in earlier(s):
        x = x.reshape(s.theirs.shape)
        if fits(s, s.ours - x):
            return f"{name} is not added"
        if fits(s, s.ours + x):
            return f"{name} is added once more"
    return None


def earlier(s: Scene) -> list[tuple[str, np.ndarray]]:
    """Their tensors of the same size around: of this layer, the output of the one before, the input."""
    place, found = place_of(s.name), []
    before = ("l_out",) if place.layer != 0 else ("inp_scaled", "pre_proj")
    candidates = [f"{place.prefix}{name}" + ("" if place.layer == 0 else f"-{last_layer(s) if place.layer is None else place.layer - 1}")
                  for name in before]
    candidates += [f"{place.prefix}{n.name}" + ("" if place.layer is None else f"-{place.layer}") for n in NAMES
                   if n.layered == (place.layer is not None)]
    candidates = graph_order([*candidates, s.name])
    for name in candidates[:candidates.index(s.name)]:
        pair = s.beside(name)
        if pair is not None and pair[1].dtype.kind == "f" and pair[1].size == s.theirs.size:
            found.append((name, np.asarray(pair[1])))
    return found


def last_layer(s: Scene) -> int:
    """The number of the last layer's output that is there."""
    prefix, i = place_of(s.name).prefix, 0
    while s.beside(f"{prefix}l_out-{i + 1}") is not None:
        i += 1
    return i


def factor_per_expert(s: Scene) -> str | None:
    """b = c[expert] * a for the experts' weights."""
    ids = s.near("ffn_moe_topk")
    if place_of(s.name).name != "ffn_moe_weights" or ids is None:
        return None
    r, id_TX = ratio(s), np.sort(ids[0], axis=1)
    factor = {e: np.nanmedian(r[id_TX == e]) for e in np.unique(id_TX) if not np.isnan(r[id_TX == e]).all()}
    made = s.ours * np.array([[factor.get(e, 1.0) for e in row] for row in id_TX.tolist()])
    spread = max(factor.values()) - min(factor.values())
    return "a factor for each expert: their scales" if spread > s.tolerance and len(factor) < r.size / 2 and fits(s, made) else None


def factor_per_row(s: Scene) -> str | None:
    """b[t] = c[t] * a[t]: something that is taken over a row, such as a norm without weight, or renormalising."""
    rows = median(ratio(s), -1)
    if s.ours.shape[-1] < 3 or not fits(s, rows * s.ours):
        return None
    words = "another epsilon of a norm, or a factor ahead of one" if np.abs(rows - 1).max() < 1e-2 else "a norm, or a sum taken over the row"
    return f"a factor for each row, {rows.min():.5g} to {rows.max():.5g}: {words}"


def factor_per_channel(s: Scene) -> str | None:
    """b[:, i] = c[i] * a[:, i]: a weight of a norm, or a scale."""
    channels = median(ratio(s), tuple(range(s.ours.ndim - 1)))
    return f"a factor for each channel, {channels.min():.4g} to {channels.max():.4g}: a norm's weight or a scale" if (
        len(s.ours) > 2 and fits(s, channels * s.ours)) else None


def missing_norm(s: Scene) -> str | None:
    """b[t, i] = r[t] * c[i] * a[t, i]: a norm with its weight was left out, or put in once more."""
    r = ratio(s)
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.where(np.isfinite(r) & (r > 0), np.log(np.abs(r)), np.nan)
    if len(s.ours) < 3 or np.isnan(logs).mean() > 0.1:
        return None
    axes = tuple(range(s.ours.ndim - 1))
    channel = np.nanmedian(logs - np.nanmedian(logs, axis=-1, keepdims=True), axis=axes, keepdims=True)
    row = np.nanmedian(logs - channel, axis=-1, keepdims=True)
    if fits(s, s.ours * np.exp(row + channel)):
        return "a factor for each row times one for each channel: a norm is left out, or done twice"
    return None


def offset(s: Scene) -> str | None:
    """b = a + c, of the whole tensor or for each channel."""
    apart = np.asarray(s.theirs, np.float64) - s.ours
    if fits(s, s.ours + np.median(apart)):
        return f"a constant {np.median(apart):+.4g} is added"
    each = np.median(apart, axis=tuple(range(apart.ndim - 1)))
    return "a constant for each channel is added" if len(s.ours) > 2 and fits(s, s.ours + each) else None


def rounded(s: Scene) -> str | None:
    """Theirs has fewer bits: it is ours in another format, or lies on its grid."""
    theirs = np.ascontiguousarray(s.theirs, np.float32)
    if distance(s.ours, theirs) > 0.02:
        return None
    if not (theirs.view(np.uint32) & 0xFFFF).any():
        return "values of bfloat16"
    if (theirs.astype(np.float16) == theirs).all():
        return "values of float16"
    return None


def pointwise_function(s: Scene) -> str | None:
    """b = f(a) with the same rising f everywhere: a soft cap, a clip, another activation."""
    a, b = (np.asarray(v, np.float64).ravel() for v in (s.ours, s.theirs))
    order = np.argsort(a)
    a, b = a[order], b[order]
    if len(a) < 64 or distance(np.maximum.accumulate(b), b) > max(s.tolerance, distance(a, b) / 30):
        return None
    return f"a rising function of ours: {a[0]:.4g} to {a[-1]:.4g} became {b[0]:.4g} to {b[-1]:.4g}; a soft cap left out, or done twice?"


def from_a_position(s: Scene) -> str | None:
    """Right up to some position and wrong from there on: a window, or a cache that ran full."""
    bad = departing(s)
    if place_of(s.name).name != "kqv_out" or not len(bad) or s.positions[bad[0]] < 2 or len(bad) < 0.7 * (len(s.ours) - bad[0]):
        return None
    return (f"right up to position {s.positions[bad[0] - 1]}, wrong from {s.positions[bad[0]]} on: a window of another length, or "
            "a cache that has come round")


def other_scores(s: Scene) -> str | None:
    """Attention that is right at position 0, where there is one key to look at."""
    bad = departing(s)
    if place_of(s.name).name != "kqv_out" or s.positions[0] != 0 or 0 in bad or len(bad) < 0.7 * (len(s.ours) - 1):
        return None
    return "right at position 0, which sees one key, and wrong from 1 on: other scores (a factor, a mask, queries of another head)"


def noise(s: Scene) -> str | None:
    """Small, and of either sign: more rounding than the arithmetic explains."""
    apart = (np.asarray(s.theirs, np.float64) - s.ours).ravel()
    size, ours = np.sqrt(np.mean(apart**2)), np.asarray(s.ours, np.float64).ravel()
    tilt = abs((apart * ours).sum()) / (np.sqrt((apart**2).sum() * (ours**2).sum()) + 1e-30)
    return f"noise of {distance(s.ours, s.theirs):.1e}: rounding of another kind" if (
        distance(s.ours, s.theirs) < 0.05 and abs(apart.mean()) < 0.2 * size and tilt < 0.3) else None


def departing(s: Scene) -> np.ndarray:
    """The rows that are further away than the tolerance."""
    return np.flatnonzero(row_errors(s.ours, s.theirs) > s.tolerance)


TESTS = (another_shape, not_finite, other_choice, zeros, sign, rounded, constant_factor, shifted_rows, stale_row, another_activation,
         other_rotation, skipped_step, swapped_halves, interleaved_pairs, transposed, permuted_heads, permuted, missing_term, another_tensor,
         factor_per_expert, factor_per_row, factor_per_channel, missing_norm, offset, pointwise_function, from_a_position, other_scores, noise)
