"""From answers and distances to verdicts: one for each question, with its evidence. Nothing is asked and nothing computed here.

A level is the median of the distances of many positions over the median of what rounding does there. The median, because a mixture of
experts makes both heavy-tailed: where two experts score alike, a right engine may take either, and that position is far off. A right engine
is at a level of about 1 by our own rounding, and was never above LIMIT (README.md); a level of half of that is nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from refimpl.lab.compare.tolerance import SAFETY as LIMIT
from refimpl.lab.judge.ask import AGAIN, FIRST, NEW, SHARED, TOGETHER, Answers, Asked
from refimpl.lab.judge.endpoint import Endpoint
from refimpl.lab.judge.measure import Position
from refimpl.text.tokenizer import Tokenizer

RIGHT, DEPARTS, UNKNOWN = "right", "departs", "cannot tell"
LEAST = 8                   # positions that a level needs
STEP, STEP_Z = 2.5, 4.5     # by how much the level rises at the window, and how surely (normal quantile of the rank-sum test)
ALONE = 20                  # level of a single prompt that is far off where the others are not
FLOOR = 1e-5                # of a distance: log-probabilities come in float32
OTHER_MODEL = 0.5           # nats of KL and share of same most probable tokens, beyond which it is not this model


@dataclass(frozen=True)
class Verdict:
    """`answer`: RIGHT, DEPARTS or UNKNOWN. `basis`: what it rests on, such as "ids compared" or "384 positions"."""

    question: str
    answer: str
    evidence: str
    basis: str = ""
    figures: dict[str, object] = field(default_factory=dict)


def level(positions: Sequence[Position]) -> float:
    """Median distance over median rounding; NaN for too few positions."""
    if len(positions) < LEAST:
        return float("nan")
    return _distance(positions) / _rounding(positions)


def surely(positions: Sequence[Position]) -> bool:
    """Is the level above LIMIT, by the lower end of the median's confidence interval (order statistics, 99.9 %), too?"""
    n, ordered = len(positions), sorted(p.distance for p in positions)
    lower = max(0, int(np.floor(n / 2 - 3.3 * np.sqrt(n) / 2)))
    return n >= LEAST and ordered[lower] > LIMIT * _rounding(positions)


def _distance(positions: Sequence[Position]) -> float:
    return float(np.median([p.distance for p in positions]))


def _rounding(positions: Sequence[Position]) -> float:
    return max(float(np.median([p.rounding for p in positions])), FLOOR)


# ---- text and tokens

def template(end: Endpoint, found: Answers, tokenizer: Tokenizer) -> Verdict:
    """Does a conversation become the same prompt?"""
    if found.rendered:
        wrong, note = [], ""
        for name, (ours, text) in found.rendered.items():
            theirs = tokenizer.encode(text, special=True)
            theirs = theirs[1:] if theirs[1:2] == [tokenizer.bos] else theirs
            if theirs == tokenizer.encode(tokenizer.decode(ours, special=True), special=True, bos=False) != ours:
                note = "; control tokens that a user writes become such, as in transformers (here they stay text)"
            elif theirs != ours:
                wrong.append((name, ours, theirs))
        n = len(found.rendered)
        if not wrong:
            return Verdict("template", RIGHT, f"{n} of {n} conversations become the same text{note}", "texts compared")
        name, ours, theirs = wrong[0]
        return Verdict("template", DEPARTS, f"{len(wrong)} of {n} conversations become another text; {name}: {_differ(tokenizer, ours, theirs)}",
                       "texts compared", {"differ": [each[0] for each in wrong]})
    chats = [asked for asked in found.asked if asked.chat and asked.answer.n_prompt is not None]
    if not chats:
        return Verdict("template", UNKNOWN, _why(end, found, "chat", "it says neither the prompt of a conversation nor how many tokens it has"))
    wrong = [asked for asked in chats if asked.answer.n_prompt not in (len(asked.ids), _n_marked(tokenizer, asked.ids))]
    if not wrong:
        return Verdict("template", RIGHT, f"{len(chats)} of {len(chats)} conversations have as many tokens as here", "counts only")
    less = {asked.answer.n_prompt - len(asked.ids) for asked in wrong}
    hint = "; <bos> is missing" if less == {-1} and len(wrong) == len(chats) else ""
    return Verdict("template", DEPARTS, f"{len(wrong)} of {len(chats)} conversations have another number of tokens; {wrong[0].name}: "
                   f"{wrong[0].answer.n_prompt}, here {len(wrong[0].ids)}{hint}", "counts", {"differ": [asked.name for asked in wrong]})


def ids(end: Endpoint, found: Answers, tokenizer: Tokenizer, others: Sequence[str]) -> Verdict:
    """Does a text become the same ids? `others`: tokens that have another text there."""
    if found.ids:
        wrong = [(name, ours, theirs) for name, (ours, theirs) in found.ids.items() if ours != theirs]
        n = len(found.ids)
        if wrong:
            name, ours, theirs = wrong[0]
            return Verdict("ids", DEPARTS, f"{len(wrong)} of {n} texts become other ids; {name}: {_differ(tokenizer, ours, theirs)}",
                           "ids compared", {"differ": [each[0] for each in wrong]})
        if others:
            return Verdict("ids", DEPARTS, f"ids are the same, tokens are not: {others[0]}", "ids compared")
        return Verdict("ids", RIGHT, f"{n} of {n} texts become the same ids", "ids compared")
    if others:
        return Verdict("ids", DEPARTS, f"another vocabulary: {others[0]}", "ids and texts of answers")
    if not found.counts:
        return Verdict("ids", UNKNOWN, _why(end, found, "completions", "it says neither the ids of a text nor how many they are"))
    wrong = [name for name, (ours, theirs) in found.counts.items() if theirs not in ours]
    n = len(found.counts)
    if wrong:
        ours, theirs = found.counts[wrong[0]]
        hint = "; <bos> is missing" if len(wrong) == n and all(found.counts[name][1] + 1 in found.counts[name][0] for name in wrong) else ""
        return Verdict("ids", DEPARTS, f"{len(wrong)} of {n} texts have another number of tokens; {wrong[0]}: {theirs}, here {ours[0]}{hint}",
                       "counts", {"differ": wrong})
    return Verdict("ids", RIGHT, f"{n} of {n} texts have as many tokens as here", "counts only")


def _n_marked(tokenizer: Tokenizer, ids: list[int]) -> int:
    return len(tokenizer.encode(tokenizer.decode(ids, special=True), special=True, bos=False))


def _differ(tokenizer: Tokenizer, ours: list[int], theirs: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))

    def shown(ids: list[int]) -> str:
        known = [i for i in ids[at:at + 4] if 0 <= i < tokenizer.n_vocab]
        return repr(tokenizer.decode(known, special=True)) if known else "its end" if at >= len(ids) else f"id {ids[at]}"
    return f"at token {at} {shown(theirs)}, here {shown(ours)}"


# ---- probabilities

def probabilities(end: Endpoint, found: Answers, positions: Sequence[Position], name: str) -> Verdict:
    """Are they those of the file, within rounding? `name`: of the arithmetic that the rounding is of."""
    known = [p for p in positions if p.asked.way in (FIRST, NEW) and not p.asked.chat]
    if len(known) < LEAST:
        return Verdict("probabilities", UNKNOWN, _no_probabilities(end, found, known))
    figures = _figures(known)
    said = f"{figures['level']:.2g} of the rounding of {name} (limit {LIMIT}), KL at least {figures['kl_low']:.2g} nats"
    basis = f"{len(known)} positions, {figures['listed']} tokens each"
    if figures["level"] > LIMIT:
        return _above("probabilities", known, said, basis, figures)
    alone = _alone(known)
    if alone:
        worst = max(alone, key=alone.get)
        return Verdict("probabilities", DEPARTS, f"{said}, but {worst!r} is at {alone[worst]:.3g}"
                       + (f", and {len(alone) - 1} more prompts" if len(alone) > 1 else ""), basis, figures | {"alone": alone})
    return Verdict("probabilities", RIGHT, said, basis, figures)


def chat_probabilities(end: Endpoint, found: Answers, positions: Sequence[Position], tokenizer: Tokenizer, name: str) -> Verdict:
    """The same of answers to conversations: template, tokens and forward pass together."""
    known = [p for p in positions if p.asked.chat and _stays_text(p.asked, tokenizer)]
    if len(known) < LEAST:
        return Verdict("chat", UNKNOWN, _why(end, found, "chat", f"{len(known)} positions of its chats have probabilities"))
    figures = _figures(known)
    said = f"{figures['level']:.2g} of the rounding of {name} (limit {LIMIT})"
    basis = f"{len(known)} positions"
    if figures["level"] > LIMIT:
        return _above("chat", known, said, basis, figures)
    alone = _alone(known)
    if alone:
        return Verdict("chat", DEPARTS, f"{said}, but far off in {', '.join(alone)}", basis, figures | {"alone": alone})
    return Verdict("chat", RIGHT, said, basis, figures)


def _above(question: str, known: Sequence[Position], said: str, basis: str, figures: dict) -> Verdict:
    if surely(known):
        return Verdict(question, DEPARTS, f"{said}; {_looks_like(known)}", basis, figures)
    return Verdict(question, UNKNOWN, f"{said}: too few positions to be sure", basis, figures)


def _stays_text(asked: Asked, tokenizer: Tokenizer) -> bool:
    """A prompt in which no control token is spelled as text: such a one is another prompt at most endpoints, which `template` says."""
    return _n_marked(tokenizer, asked.ids) == len(asked.ids)


def window(positions: Sequence[Position], windows: set[int]) -> Verdict:
    """Do they depart from the sliding window's length on?"""
    known = [p for p in positions if p.asked.way in (FIRST, NEW) and not p.asked.chat]
    if not windows:
        return Verdict("window", RIGHT, "the model has no sliding window", "the file")
    length = min(windows)
    before, after = ([p for p in known if (p.at + 1 >= length) == late] for late in (False, True))
    if len(before) < LEAST or len(after) < LEAST:
        return Verdict("window", UNKNOWN, f"{len(before)} positions with probabilities before {length} tokens, the window, and {len(after)} "
                       f"after; {LEAST} are needed")
    levels = level(before), level(after)
    basis = f"{len(before)} positions before, {len(after)} after"
    figures = {"length": length, "before": levels[0], "after": levels[1]}
    said = f"{levels[0]:.2g} of rounding before {length} tokens, {levels[1]:.2g} after"
    z = _rank_sum(*([np.log(max(p.distance, FLOOR) / max(p.rounding, FLOOR)) for p in part] for part in (before, after)))
    if levels[1] >= max(1.0, STEP * levels[0]) and z > STEP_Z:
        usual = max(_rounding(known), 3 * float(np.quantile([p.distance for p in before], 0.9)))
        first = min((p.at for p in after if p.distance > usual), default=length - 1)
        return Verdict("window", DEPARTS, f"{said}: other keys are seen than the latest {length} (first clearly at position {first})", basis,
                       figures | {"z": z, "first": first})
    if levels[0] > LIMIT:
        return Verdict("window", UNKNOWN, f"they depart before {length} tokens already", basis, figures)
    if surely(after):
        return Verdict("window", DEPARTS, said, basis, figures)
    return Verdict("window", RIGHT if levels[1] <= LIMIT else UNKNOWN, said, basis, figures)


def _rank_sum(a: Sequence[float], b: Sequence[float]) -> float:
    """How many standard deviations the ranks of `b` are above what chance makes of them (Mann & Whitney 1947, normal approximation)."""
    n, m = len(a), len(b)
    order = np.concatenate([a, b]).argsort(kind="stable").argsort(kind="stable")
    return float((order[n:].sum() - m * (n + m - 1) / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def _figures(positions: Sequence[Position]) -> dict[str, object]:
    lows, highs = [p.low for p in positions], [p.high for p in positions]
    return {"positions": len(positions), "listed": int(np.median([p.n_listed for p in positions])), "level": level(positions),
            "distance": _distance(positions), "rounding": _rounding(positions), "kl_low": float(np.mean(lows)),
            "kl_high": float(np.mean(highs)) if np.isfinite(highs).all() else None,
            "rounding_kl": float(np.mean([np.mean(p.noise) for p in positions])),
            "same_top": float(np.mean([p.same_top for p in positions]))}


def _alone(positions: Sequence[Position]) -> dict[str, float]:
    """Prompts whose own level is far off: name -> level, by the larger of their own rounding and that of all."""
    usual, found = _rounding(positions), {}
    for name in {p.asked.name: None for p in positions}:
        own = [p for p in positions if p.asked.name == name]
        if len(own) >= LEAST // 2 and (size := _distance(own) / max(_rounding(own), usual)) > ALONE:
            found[name] = size
    return found


def _looks_like(positions: Sequence[Position]) -> str:
    """What a departure resembles, where it resembles something."""
    kl, same = float(np.mean([p.low for p in positions])), float(np.mean([p.same_top for p in positions]))
    slope, shift, rest = np.median([p.temperature for p in positions], axis=0)
    spread = float(np.median([abs(p.temperature[0] - slope) for p in positions]))
    rounding = _rounding(positions)
    if abs(slope - 1) > 0.02 and spread < abs(slope - 1) / 3 and rest < 2 * LIMIT * rounding:
        return f"as if logits were divided by {1 / slope:.3g}: probabilities after the temperature, or a scale that is missing"
    if shift > LIMIT * rounding and abs(slope - 1) < 0.02 and rest < 2 * LIMIT * rounding:
        return "as if the distribution had been cut and renormalised: probabilities after top-k, top-p or min-p"
    if kl > OTHER_MODEL and same < OTHER_MODEL:
        return f"the most probable token is the same at {same:.0%} of positions: another model, or a forward pass that is badly wrong"
    first = next((p.at for p in sorted(positions, key=lambda p: p.at) if p.distance > LIMIT * max(p.rounding, rounding)), None)
    return f"most probable token the same at {same:.1%} of positions" + ("" if first is None else f"; first clearly at position {first}")


# ---- again, and in company

def again(end: Endpoint, found: Answers, positions: Sequence[Position]) -> Verdict:
    """Is an answer the same when the endpoint remembers its prompt, or the beginning of it?"""
    return _same("again", end, found, positions, (AGAIN,), (AGAIN, SHARED), "what it remembers is not what it computed")


def company(end: Endpoint, found: Answers, positions: Sequence[Position]) -> Verdict:
    """Is an answer the same when others are asked for at the same time?"""
    return _same("company", end, found, positions, (TOGETHER,), (TOGETHER,), "the rows of others show in an answer")


def _same(question: str, end: Endpoint, found: Answers, positions: Sequence[Position], twins: Sequence[str], ways: Sequence[str],
          mistake: str) -> Verdict:
    first = {asked.name: asked for asked in found.of(NEW)}
    pairs = [(first[asked.name], asked) for asked in found.of(*twins) if asked.name in first]
    if not pairs:
        return Verdict(question, UNKNOWN, _why(end, found, "completions", "no prompt was answered twice"))
    by_probability = all(a.answer.steps and b.answer.steps for a, b in pairs)
    n, basis = len(pairs), "probabilities compared to the last digit" if by_probability else "texts compared"
    differ, apart, seeds = [], 0.0, 0
    for a, b in pairs:
        same, largest, seed = _compared(a.answer, b.answer)
        differ += [] if same else [a.name]
        apart, seeds = max(apart, largest), seeds + seed
    levels = {way: level([p for p in positions if p.asked.way in way]) for way in ((FIRST, NEW), *((way,) for way in ways))}
    at_first = levels.pop((FIRST, NEW))
    far = {way: size for (way,), size in levels.items() if surely([p for p in positions if p.asked.way == way]) and not at_first > LIMIT}
    figures = {"prompts": n, "differ": differ, "apart": apart, "levels": {"at first": at_first} | {way[0]: size for way, size in levels.items()}}
    if far:
        way = max(far, key=far.get)
        return Verdict(question, DEPARTS, f"{mistake}: {way} {far[way]:.3g} of rounding, at first {at_first:.2g}; {len(differ)} of {n} answers "
                       f"differ", basis, figures)
    if differ and by_probability:
        return Verdict(question, DEPARTS, f"{len(differ)} of {n} answers differ, log-probabilities by up to {apart:.2g}: not the same bits, "
                       + ("but within rounding" if at_first <= LIMIT else "whatever the cause"), basis, figures)
    if differ:
        return Verdict(question, DEPARTS, f"{len(differ)} of {n} greedy texts differ", basis, figures)
    note = f"; in {seeds} of them another token is drawn: the seed is not kept to" if seeds else ""
    return Verdict(question, RIGHT, f"{n} of {n} answers are the same{note}", basis, figures)


def _compared(a, b) -> tuple[bool, float, bool]:
    """(same probabilities as far as both have the same tokens?, largest difference of a log-probability, is another token drawn from the
    same probabilities?).
    """
    if not a.steps or not b.steps:
        return a.text == b.text, 0.0, False
    largest = 0.0
    for x, y in zip(a.steps, b.steps):
        theirs = {(token.bytes, token.id): token.logprob for token in y.top}
        shared = [abs(token.logprob - theirs[token.bytes, token.id]) for token in x.top if (token.bytes, token.id) in theirs]
        largest = max([largest, *shared])
        if x.top != y.top:
            return False, largest, False
        if (x.chosen.bytes, x.chosen.id) != (y.chosen.bytes, y.chosen.id):
            return True, largest, True
    return len(a.steps) == len(b.steps), largest, False


def _why(end: Endpoint, found: Answers, what: str, otherwise: str) -> str:
    """Why something is not known."""
    return end.why.get(what) or (found.failed[-1] if found.stopped and found.failed else otherwise)


def _no_probabilities(end: Endpoint, found: Answers, known: Sequence[Position]) -> str:
    if not end.completes:
        return end.why.get("completions", "it continues no text")
    if found.stopped or known:
        return found.failed[-1] if found.failed else f"{len(known)} positions have probabilities; {LEAST} are needed"
    return "the endpoint gives no logprobs" if not end.n_top else (found.failed or ["no answer had probabilities"])[-1]
