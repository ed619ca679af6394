"""What a difference looks like. Each test is a few lines: it computes from our values what theirs would be with that mistake, and asks
whether that fits. The first that fits names the difference; they are ordered from the particular to the general.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.lab.compare.gemma_diagnoses import (
    another_activation,
    another_tensor,
    factor_per_expert,
    from_a_position,
    missing_term,
    other_choice,
    other_rotation,
    other_scores,
    skipped_step,
)
from refimpl.lab.compare.local_diagnoses import place_of_difference, what_is_there
from refimpl.lab.compare.mismatch import Mismatch, departing, distance, fits, median, ratio, row_errors
from refimpl.lab.compare.names import place_of
from refimpl.lab.compare.towers.diagnoses import (
    another_row,
    colours,
    floor,
    keys_in_sight,
    of_soft_rows,
    other_pixels,
    permuted_rows,
    rotation_in_two_directions,
    scaled_scores,
)


@dataclass(frozen=True)
class Diagnosis:
    """What kind of mistake it looks like: `kind` for programs, `text` for people."""

    kind: str
    text: str


def diagnose(mismatch: Mismatch) -> Diagnosis:
    """The first test that fits: of the whole tensor, or of the one place that departs; then those of what may be rounding. Where only rows
    of pictures and sounds depart, these alone are looked at.
    """
    seen = keys_in_sight(mismatch)
    if seen is not None:
        return Diagnosis("keys in sight", seen)
    rows = of_soft_rows(mismatch)
    found = _first_of(OF_THE_WHOLE, rows, rows is not mismatch)
    if found is not None:
        return found
    place = place_of_difference(mismatch)
    if place is not None:
        inside = what_is_there(place.part) or _first_of((*OF_THE_WHOLE, *TESTS), place.part)
        return Diagnosis(place.kind, f"{place.text}: {getattr(inside, 'text', inside) or 'other values'}")
    return _first_of(TESTS, rows, rows is not mismatch) or Diagnosis("other", "none of the known kinds")


def _first_of(tests: Sequence[Callable[[Mismatch], str | None]], s: Mismatch, of_soft_tokens: bool = False) -> Diagnosis | None:
    for test in tests:
        found = test(s)
        if found is not None:
            return Diagnosis(test.__name__.replace("_", " "), found + (", in rows of pictures and sounds" if of_soft_tokens else ""))
    return None


def another_shape(s: Mismatch) -> str | None:
    """Not the same number of elements."""
    if len(s.ours) != len(s.theirs):
        return f"it has {len(s.theirs)} rows, expected {len(s.ours)}"
    return None if s.ours.shape == s.theirs.shape else f"its shape is {s.theirs.shape[1:]} in each position, expected {s.ours.shape[1:]}"


def not_finite(s: Mismatch) -> str | None:
    """NaN or infinite, in one place or many."""
    bad = ~np.isfinite(s.theirs)
    if not bad.any():
        return None
    place = place_of_difference(s)
    return f"{place.text}: {what_is_there(place.part)}" if place is not None else f"{bad.sum()} of {bad.size} values are NaN or infinite"


def zeros(s: Mismatch) -> str | None:
    """Nothing was computed."""
    return "all zeros" if not s.theirs.any() else None


def sign(s: Mismatch) -> str | None:
    """b = -a."""
    return "the sign is the other one" if fits(s, -s.ours) else None


def constant_factor(s: Mismatch) -> str | None:
    """b = c * a."""
    a, b = np.asarray(s.ours, np.float64), np.asarray(s.theirs, np.float64)
    c = float((a * b).sum() / (a * a).sum())
    return f"a constant factor of {c:.6g}{in_words(c, s)}" if c and fits(s, c * a) else None


def in_words(c: float, s: Mismatch) -> str:
    """A factor as a root of a size nearby."""
    inputs = None if place_of(s.name).tower else s.beside("inp_scaled")
    sizes = {"H or P": s.ours.shape[-1], "2": 2, "D": inputs[0].shape[-1] if inputs else s.ours.shape[-1]}
    for what, n in sizes.items():
        for value, words in ((n ** 0.5, f"sqrt({n})"), (n ** -0.5, f"1/sqrt({n})")):
            if abs(c / value - 1) < 1e-3:
                return f", about {words}" + (f": {what} is {n}" if n != 2 else "")
    return ""


def shifted_rows(s: Mismatch) -> str | None:
    """b[t] = a[t - k]."""
    for k in (1, -1, 2, -2, 3, -3):
        if len(s.ours) > abs(k) + 1:
            a, b = (s.ours[:-k], s.theirs[k:]) if k > 0 else (s.ours[-k:], s.theirs[:k])
            if (row_errors(a, b) <= max(s.tolerance, 1e-3)).mean() > 0.8:
                return f"row t holds what belongs to row {'t - ' + str(k) if k > 0 else 't + ' + str(-k)}"
    return None


def stale_row(s: Mismatch) -> str | None:
    """A few rows hold other rows of ours."""
    bad = departing(s)
    if not 0 < len(bad) <= max(1, len(s.ours) // 4):
        return None
    for t in bad:
        other = [u for u in range(len(s.ours)) if u != t and distance(s.ours[u], s.theirs[t]) <= max(s.tolerance, 1e-3)]
        if not other:
            return None
    return f"position {s.positions[bad[-1]]} holds what belongs to position {s.positions[other[0]]}"


def swapped_halves(s: Mismatch) -> str | None:
    """The last axis, or blocks of it, with halves exchanged."""
    for block in blocks(s):
        a = s.ours.reshape(*s.ours.shape[:-1], -1, 2, block // 2)
        if fits(s, a[..., ::-1, :].reshape(s.ours.shape)):
            return f"halves of every {block} elements are exchanged"
    return None


def interleaved_pairs(s: Mismatch) -> str | None:
    """The halves' elements in turn, or even and odd ones apart, in the last axis or blocks of it."""
    for block in blocks(s):
        a = s.ours.reshape(*s.ours.shape[:-1], -1, block)
        half = block // 2
        for made, words in ((np.stack([a[..., :half], a[..., half:]], -1), "halves are interleaved"),
                            (np.concatenate([a[..., ::2], a[..., 1::2]], -1), "even and odd elements are taken apart")):
            if fits(s, made.reshape(s.ours.shape)):
                return f"{words} in every {block} elements"
    return None


def blocks(s: Mismatch) -> list[int]:
    """Even sizes that divide the last axis: a format's blocks, and the whole of it."""
    n = s.ours.shape[-1]
    return [block for block in sorted({n, 32, 64, 256}) if n % block == 0 and block % 2 == 0]


def transposed(s: Mismatch) -> str | None:
    """(N, H) read as (H, N)."""
    if s.ours.ndim == 3 and fits(s, np.swapaxes(s.ours, 1, 2).reshape(s.ours.shape)):
        return f"{s.ours.shape[1:]} is stored as {s.ours.shape[:0:-1]}"
    return None


def permuted_heads(s: Mismatch) -> str | None:
    """Heads, or experts' weights, in another order."""
    if s.ours.ndim != 3 or s.ours.shape[1] < 2:
        return None
    order = [int(np.argmin([distance(s.ours[:, m], s.theirs[:, n]) for m in range(s.ours.shape[1])])) for n in range(s.ours.shape[1])]
    return f"heads in the order {order}" if order != sorted(order) and fits(s, s.ours[:, order]) else None


def permuted(s: Mismatch) -> str | None:
    """The values of every row, in another order."""
    a, b = (np.sort(v.reshape(len(v), -1), axis=1) for v in (s.ours, s.theirs))
    return "every row has its values in another order" if a.shape[1] > 8 and fits(s, a, b) else None


def factor_per_row(s: Mismatch) -> str | None:
    """b[t] = c[t] * a[t]: something that is taken over a row, such as a norm without weight, or renormalising."""
    rows = median(ratio(s), -1)
    if s.ours.shape[-1] < 3 or not fits(s, rows * s.ours):
        return None
    small = np.abs(rows - 1).max() < 1e-2
    words = "another epsilon of a norm, or a factor ahead of one" if small else "a norm, or a sum taken over the row"
    return f"a factor for each row, {rows.min():.5g} to {rows.max():.5g}: {words}"


def factor_per_channel(s: Mismatch) -> str | None:
    """b[:, i] = c[i] * a[:, i]: a weight of a norm, or a scale."""
    channels = median(ratio(s), tuple(range(s.ours.ndim - 1)))
    return f"a factor for each channel, {channels.min():.4g} to {channels.max():.4g}: a norm's weight or a scale" if (
        len(s.ours) > 2 and fits(s, channels * s.ours)) else None


def missing_norm(s: Mismatch) -> str | None:
    """b[t, i] = r[t] * c[i] * a[t, i]: a norm with its weight was left out, or applied twice."""
    r = ratio(s)
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.where(np.isfinite(r) & (r > 0), np.log(np.abs(r)), np.nan)
    if len(s.ours) < 3 or np.isnan(logs).mean() > 0.1:
        return None
    axes = tuple(range(s.ours.ndim - 1))
    channel = np.nanmedian(logs - np.nanmedian(logs, axis=-1, keepdims=True), axis=axes, keepdims=True)
    row = np.nanmedian(logs - channel, axis=-1, keepdims=True)
    if fits(s, s.ours * np.exp(row + channel)):
        return "a factor for each row times one for each channel: a norm is left out, or applied twice"
    return None


def offset(s: Mismatch) -> str | None:
    """b = a + c, of the whole tensor or for each channel."""
    apart = np.asarray(s.theirs, np.float64) - s.ours
    if fits(s, s.ours + np.median(apart)):
        return f"a constant {np.median(apart):+.4g} is added"
    each = np.median(apart, axis=tuple(range(apart.ndim - 1)))
    return "a constant for each channel is added" if len(s.ours) > 2 and fits(s, s.ours + each) else None


def rounded(s: Mismatch) -> str | None:
    """Theirs has fewer bits: it is ours rounded to another format."""
    theirs = np.ascontiguousarray(s.theirs, np.float32)
    if distance(s.ours, theirs) > 0.02:
        return None
    if not (theirs.view(np.uint32) & 0xFFFF).any():
        return "values of bfloat16"
    if (theirs.astype(np.float16) == theirs).all():
        return "values of float16"
    return None


def pointwise_function(s: Mismatch) -> str | None:
    """b = f(a) with the same rising f everywhere: a soft cap, a clip. Every other value follows from those beside it."""
    a, b = (np.asarray(v, np.float64).ravel() for v in (s.ours, s.theirs))
    a, b = a[np.argsort(a)], b[np.argsort(a)]
    if len(a) < 64 or not fits(s, np.interp(a[1::2], a[::2], b[::2]), b[1::2]) or np.corrcoef(a, b)[0, 1] < 0.5:
        return None
    return f"a rising function of ours: {a[0]:.4g} to {a[-1]:.4g} became {b[0]:.4g} to {b[-1]:.4g}; a soft cap left out, or applied twice?"


def noise(s: Mismatch) -> str | None:
    """Small, and of either sign: more rounding than the arithmetic explains."""
    apart = (np.asarray(s.theirs, np.float64) - s.ours).ravel()
    size, ours = np.sqrt(np.mean(apart**2)), np.asarray(s.ours, np.float64).ravel()
    tilt = abs((apart * ours).sum()) / (np.sqrt((apart**2).sum() * (ours**2).sum()) + 1e-30)
    return f"noise of {distance(s.ours, s.theirs):.1e}: rounding of another kind" if (
        distance(s.ours, s.theirs) < 0.05 and abs(apart.mean()) < 0.2 * size and tilt < 0.3) else None


OF_THE_WHOLE = (another_shape, other_choice, not_finite, zeros, sign, another_row, constant_factor, shifted_rows, stale_row, swapped_halves,
                interleaved_pairs, transposed, permuted_heads)
TESTS = (rounded, colours, floor, permuted_rows, another_activation, other_rotation, rotation_in_two_directions,
         scaled_scores, skipped_step, permuted, missing_term, another_tensor, factor_per_expert, factor_per_row, factor_per_channel,
         missing_norm, offset, other_pixels, pointwise_function, from_a_position, other_scores, noise)
