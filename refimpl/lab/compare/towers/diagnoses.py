"""Diagnoses that know pictures and sounds: their inputs, rotation by x and y, which keys a row sees. See ../diagnoses.py."""

from dataclasses import replace

import numpy as np

from refimpl.lab.compare.mismatch import Mismatch, departing, distance, fits, row_errors
from refimpl.lab.compare.names import place_of
from refimpl.media.mel import FLOOR

MOST_KEYS = 4096        # all intervals of keys are tried: of no more than this many


def of_soft_rows(s: Mismatch) -> Mismatch:
    """The rows of soft tokens, where those of text agree; otherwise all."""
    soft = np.array(s.ids) < 0
    bad = departing(s) if s.ids and s.ours.shape == s.theirs.shape else []
    if not len(bad) or soft.all() or not soft[bad].all():
        return s

    def beside(name: str) -> tuple[np.ndarray, np.ndarray] | None:
        pair = s.beside(name)
        return None if pair is None else (pair[0][soft], pair[1][soft])
    return replace(s, ours=s.ours[soft], theirs=s.theirs[soft], positions=s.positions[soft], beside=beside, ids=())


def another_row(s: Mismatch) -> str | None:
    """All rows are one row, as where they are looked up under one id."""
    def same(x: np.ndarray) -> bool:
        return len(x) > 1 and bool((row_errors(x, np.broadcast_to(x[0], x.shape)) <= max(s.tolerance, 1e-6)).all())
    return "every row is the same one, and not ours: another row of a table" if same(s.ours) and same(s.theirs) else None


def colours(s: Mismatch) -> str | None:
    """Patches as blue, green, red."""
    if place_of(s.name).name != "patches" or s.ours.shape[1] % 3:
        return None
    reversed_TP = s.ours.reshape(len(s.ours), -1, 3)[..., ::-1].reshape(s.ours.shape)
    return "colours are in the order blue, green, red" if fits(s, reversed_TP) else None


def other_pixels(s: Mismatch) -> str | None:
    """Patches of whole grey levels, but not ours: the picture was scaled by another filter, or not stretched."""
    if place_of(s.name).name != "patches" or not np.allclose(s.theirs * 255, np.rint(s.theirs * 255), atol=1e-3):
        return None
    levels = np.abs(np.rint(s.theirs * 255.0) - np.rint(s.ours * 255.0))
    n_black = int((~s.theirs.any(axis=1) & s.ours.any(axis=1)).sum())
    words = f"{n_black} patches are black: a letterbox?" if n_black else "another filter of the resize, or none that averages?"
    return f"{(levels > 0).mean():.0%} of the values are other grey levels, by up to {levels.max():.0f} of 255: {words}"


def floor(s: Mismatch) -> str | None:
    """log(max(x, floor)) instead of log(x + floor)."""
    if place_of(s.name).tower != "audio" or place_of(s.name).name != "frames":
        return None
    made = np.log(np.maximum(np.exp(s.ours.astype(np.float64)) - FLOOR, FLOOR))
    return f"the logarithm is of max(x, {FLOOR:g}), not of x + {FLOOR:g}" if fits(s, made) else None


def permuted_rows(s: Mismatch) -> str | None:
    """The rows, in another order."""
    direction = np.random.default_rng(0).normal(size=s.ours[0].size)
    order, other = (np.argsort(v.reshape(len(v), -1).astype(np.float64) @ direction, kind="stable") for v in (s.ours, s.theirs))
    if len(s.ours) < 4 or not fits(s, s.ours[order], s.theirs[other]):
        return None
    t = int(np.argmax(row_errors(s.ours, s.theirs) > s.tolerance))
    return f"the rows are in another order: row {t} holds row {order[list(other).index(t)]}"


def rotation_in_two_directions(s: Mismatch) -> str | None:
    """Queries and keys of patches, of which one half is turned by x, the other by y."""
    place = place_of(s.name)
    before = s.near(place.name.removesuffix("_pos"))
    if place.tower != "image" or not place.name.endswith("_pos") or before is None:
        return None
    half, quarter = s.ours.shape[-1] // 2, s.ours.shape[-1] // 4
    x, a, b = ([v[..., first:first + quarter] + 1j * v[..., first + quarter:first + half] for first in (0, half)]
               for v in (np.asarray(v, np.float64) for v in (before[1], s.ours, s.theirs)))
    if not all(fits(s, np.abs(from_), np.abs(to)) for from_, to in zip(x, b)):
        return "other pairs are turned than (i, i + H/4) in each half"
    if all(fits(s, from_, to) for from_, to in zip(x, b)):
        return "it is not turned"
    turn_x, turn_y = ((to * np.conj(from_)).sum(1, keepdims=True) for to, from_ in zip(a, x))
    turns, halves = [turn / np.maximum(np.abs(turn), 1e-30) for turn in (turn_x, turn_y)], ("x", "y")
    wrong = [k for k in (0, 1) if not fits(s, a[k], b[k])]
    if all(fits(s, x[k] * turns[1 - k], b[k]) for k in wrong):
        return " and ".join(f"the half for {halves[k]} is turned by {halves[1 - k]}" for k in wrong)
    return f"the half for {' and the one for '.join(halves[k] for k in wrong)} turned by other angles: other frequencies or positions"


def keys_in_sight(s: Mismatch) -> str | None:
    """Attention in a prompt with pictures or sounds, or of patches, over another interval of keys. Computes it for a row in the middle."""
    place = place_of(s.name)
    sees_media = place.tower == "image" or any(i < 0 for i in s.ids)
    if place.name != "kqv_out" or not sees_media or s.ours.shape != s.theirs.shape or not len(bad := departing(s)):
        return None
    q, k, v = (s.near(name) for name in ("Qcur_pos", "Kcur_pos", "Vcur_normed"))
    if q is None or k is None or v is None or len(k[1]) > MOST_KEYS or not np.array_equal(s.positions, np.arange(len(k[1]))):
        return None
    t = int(bad[len(bad) // 2])
    ours, theirs = (interval(q[1][t, 0], k[1][:, 0], v[1][:, 0], out[t, 0], t) for out in (s.ours, s.theirs))
    if ours is None or theirs is None or ours == theirs:
        return None
    return f"row {t} sees keys {theirs[0]} to {theirs[1]}, expected {ours[0]} to {ours[1]}; {len(bad)} of {len(s.ours)} rows depart"


def interval(q_H: np.ndarray, k_SH: np.ndarray, v_SH: np.ndarray, out_H: np.ndarray, t: int) -> tuple[int, int] | None:
    """(first, last) of the keys that attention from row `t` saw to give `out_H`; None where no interval around `t` gives it."""
    score_S = k_SH.astype(np.float64) @ q_H
    weight_S = np.exp(score_S - score_S.max())
    sums = np.concatenate([[0], np.cumsum(weight_S)])
    totals = np.concatenate([np.zeros((1, v_SH.shape[1])), np.cumsum(weight_S[:, None] * v_SH, axis=0)])
    best, found = 1e-3, None
    for end in range(t + 1, len(k_SH) + 1):
        made = (totals[end] - totals[:t + 1]) / np.maximum(sums[end] - sums[:t + 1], 1e-300)[:, None]
        apart = np.abs(made - out_H).max(axis=1)
        first = int(np.argmin(apart))
        if apart[first] < best * np.abs(out_H).max():
            best, found = apart[first] / np.abs(out_H).max(), (first, end - 1)
    return found


def scaled_scores(s: Mismatch) -> str | None:
    """Attention of patches with scores divided by sqrt(H), as in other models."""
    place, q, k, v = place_of(s.name), *(s.near(name) for name in ("Qcur_pos", "Kcur_pos", "Vcur_normed"))
    if place.tower != "image" or place.name != "kqv_out" or q is None or k is None or v is None:
        return None
    some = np.arange(0, len(s.theirs), max(1, len(s.theirs) // 16))
    score = np.einsum("TNH,SNH->NTS", q[1][some].astype(np.float64), k[1]) * q[1].shape[-1] ** -0.5
    weight = np.exp(score - score.max(-1, keepdims=True))
    made = np.einsum("NTS,SNH->TNH", weight / weight.sum(-1, keepdims=True), v[1])
    close = distance(made, s.theirs[some]) < distance(s.ours[some], s.theirs[some]) / 30
    return f"scores are divided by sqrt({q[1].shape[-1]}), Gemma 4's are not scaled" if close else None
