"""A difference that lies in one place: one element, channel, head, block of 32, position or expert of a tensor whose rest agrees.

An element departs if it is further away than the largest of a correct engine's errors; the smallest place that holds all elements which
depart is named. It is a place only if the tensor has others beside it.
"""

from dataclasses import dataclass, replace

import numpy as np

from refimpl.lab.compare.mismatch import LARGEST, Mismatch, departing, fits
from refimpl.lab.compare.names import place_of

BLOCK = 32              # elements that share a scale in most formats
CALLED = {"N": "head", "K": "head", "L": "layer", "E": "expert", "V": "token", "X": "choice"}     # what an axis of this letter counts
AFTER_EXPERTS = ("ffn_moe_out", "ffn_moe")      # of a row, what its experts gave


@dataclass(frozen=True)
class Place:
    """Where all of the difference is: `kind` for programs, `text` for people, and the part of the mismatch that lies there."""

    kind: str
    text: str
    part: Mismatch


@dataclass(frozen=True)
class Part:
    """Some columns of a row whose axes are flattened."""

    kind: str
    text: str
    columns: np.ndarray


def place_of_difference(s: Mismatch) -> Place | None:
    """The smallest place that holds every element which departs, None where it is the whole tensor or in several places."""
    if s.ours.shape != s.theirs.shape or s.ours.dtype.kind != "f" or s.ours.ndim < 2:
        return None
    apart = elements_apart(s).reshape(len(s.ours), -1)
    rows, columns = np.flatnonzero(apart.any(1)), np.flatnonzero(apart.any(0))
    if not len(rows):
        return None
    at = f"{'position' if place_of(s.name).is_of_prompt else 'row'} {s.positions[rows[0]]}" if len(rows) == 1 and len(apart) > 1 else ""
    if len(rows) == len(columns) == 1 and apart.size > 1:
        text = f"one element of {apart.size:,}: {', '.join(filter(None, (at, column_in_words(s, columns[0]))))}"
        return Place("one element", text, part_of(s, rows, columns))
    place = None if place_of(s.name).name == "ffn_moe_weights" and not at else smallest_part(s, columns)
    rows = rows if at else np.arange(len(apart))
    if place is not None:
        return Place(place.kind, f"only {place.text}" + (f", at {at}" if at else ""), part_of(s, rows, place.columns))
    if at:
        return Place("one position", f"only {at}", part_of(s, rows, np.arange(apart.shape[1])))
    return one_expert(s, apart.reshape(s.ours.shape))


def elements_apart(s: Mismatch) -> np.ndarray:
    """A mask of the elements that depart; of a row that departs by many small differences, all."""
    a, b = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (s.ours, s.theirs))
    rms = np.maximum(np.sqrt(np.mean(a * a, axis=1, keepdims=True)), 1e-3 * np.sqrt(np.mean(a * a)) + 1e-30)
    mask, bad = ~(np.abs(a - b) <= LARGEST * s.tolerance * rms), departing(s)
    mask[bad[~mask[bad].any(1)]] = True
    return mask.reshape(s.ours.shape)


def smallest_part(s: Mismatch, columns: np.ndarray) -> Part | None:
    """The smallest part of a row that holds these columns, None where it is the whole row."""
    n, width, found = s.ours[0].size, s.ours.shape[-1], []
    called = axis_in_words(s, 0) if s.ours.ndim > 2 else ""
    if len(columns) == 1:
        kind = "one expert" if axis_in_words(s, 0) == "expert" else "one channel"
        found.append(Part(kind, column_in_words(s, columns[0]), columns))
    elif called and len(set(columns % width)) == 1:
        channel = columns[0] % width
        found.append(Part("one channel", f"channel {channel}, of several {called}s", np.arange(channel, n, width)))
    if called and len(set(columns // width)) == 1:
        first = columns[0] // width * width
        found.append(Part(f"one {called}", f"{called} {columns[0] // width}", np.arange(first, first + width)))
    if len(set(columns // BLOCK)) == 1:
        first = columns[0] // BLOCK * BLOCK
        block = np.arange(first, min(first + BLOCK, n))
        found.append(Part("one block", f"one block of {BLOCK}, elements {first} to {block[-1]}", block))
    return min((part for part in found if len(part.columns) < n), key=lambda part: len(part.columns), default=None)


def one_expert(s: Mismatch, apart: np.ndarray) -> Place | None:
    """Rows that depart because one expert does: those that chose it, and no others. Of the experts' weights, its own in all rows."""
    name, near = place_of(s.name).name, s.near("ffn_moe_topk")
    if near is None or name not in (*AFTER_EXPERTS, "ffn_moe_weights"):
        return None
    if name == "ffn_moe_weights":
        id_TX = np.sort(near[0], axis=1)                # as pairs.by_expert orders them
        wrong, of = np.unique(id_TX[apart]), id_TX.shape
        if len(wrong) != 1 or not (id_TX != wrong[0]).any():
            return None
        here = id_TX == wrong[0]
        part = replace(s, ours=s.ours[here][:, None], theirs=s.theirs[here][:, None], positions=s.positions[here.any(1)], ids=(),
                       beside=lambda name: None)
        return Place("one expert", f"only expert {wrong[0]}, chosen at {here.sum()} of {of[0]} positions", part)
    id_TX, rows = near[0], np.flatnonzero(apart.any(1))
    users = {int(e): np.flatnonzero((id_TX == e).any(1)) for e in np.unique(id_TX[rows])}
    unharmed = {e: len(at) - len(rows) for e, at in users.items() if np.isin(rows, at).all() and len(at) < len(id_TX)}
    if not unharmed or min(unharmed.values()) > len(rows) / 4:
        return None
    fits = [e for e, n in unharmed.items() if n == min(unharmed.values())]
    text = f"only expert {' or '.join(map(str, fits))}, chosen at {len(users[fits[0]])} of {len(id_TX)} positions"
    return Place("one expert", text, part_of(s, rows, np.arange(apart.shape[1])))


def part_of(s: Mismatch, rows: np.ndarray, columns: np.ndarray) -> Mismatch:
    """Some rows and columns. Other tensors are beside it where all columns are there."""
    whole = len(columns) == s.ours[0].size
    ours, theirs = (v[rows] if whole else v.reshape(len(v), -1)[np.ix_(rows, columns)] for v in (s.ours, s.theirs))

    def beside(name: str) -> tuple[np.ndarray, np.ndarray] | None:
        pair = s.beside(name) if whole else None
        return None if pair is None else (pair[0][rows], pair[1][rows])
    ids = tuple(s.ids[t] for t in rows) if s.ids else ()
    return replace(s, ours=ours, theirs=theirs, positions=s.positions[rows], beside=beside, ids=ids)


def what_is_there(s: Mismatch) -> str:
    """What became of the values of a place, "" where none of these simple changes fits."""
    a, b = (np.asarray(v, np.float64) for v in (s.ours, s.theirs))
    bad = int((~np.isfinite(b)).sum())
    if bad:
        return "all NaN or infinite" if bad == b.size else f"{bad} of {b.size} values are NaN or infinite"
    if a.size == 1:
        return f"{a.item():.6g} and {b.item():.6g}, {b.item() - a.item():+.4g}"
    if not b.any():
        return "all zero"
    c, shift = (a * b).sum() / max((a * a).sum(), 1e-300), np.median(b - a)
    for words, made in (("the sign is the other one", -a), (f"x {c:.6g}", c * a), (f"{shift:+.4g}", a + shift)):
        if fits(s, made):
            return words
    return ""


def axis_in_words(s: Mismatch, axis: int) -> str:
    """What an axis after the first counts: "head", "channel", ..."""
    if s.name.endswith((".top", ".ids", ".logsumexp")):
        return "entry"
    place = place_of(s.name)
    letters = next(name.shape for name in place.names if name.name == place.name).split()[1:]
    return CALLED.get(letters[axis], "channel") if axis < len(letters) else "channel"


def column_in_words(s: Mismatch, column: int) -> str:
    """A column; of a row of two axes, a channel of a head."""
    if s.ours.ndim == 2:
        return f"{axis_in_words(s, 0)} {column}"
    return f"channel {column % s.ours.shape[-1]} of {axis_in_words(s, 0)} {column // s.ours.shape[-1]}"
