"""Probabilities: are they those of the file within rounding, and from where on are they not?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from refimpl.lab.judge.ask import FIRST, NEW, Answers, Asked
from refimpl.lab.judge.endpoint import Endpoint
from refimpl.lab.judge.measure import Position
from refimpl.lab.judge.verdicts.texts import marked, template
from refimpl.lab.judge.verdicts.verdict import (
    DEPARTS,
    LEAST,
    LIMIT,
    RIGHT,
    STEP,
    UNKNOWN,
    Verdict,
    distance,
    level,
    ratios,
    reason,
    rises,
    rounding,
    surely_above,
)
from refimpl.text.tokenizer import Tokenizer

PROMPTS = 3                 # prompts that a departure has to show in, at the least
ALONE = 5                   # level of a single prompt that is far off where the others are not
OTHER_MODEL = 0.5           # nats of KL, and share of same most probable tokens, beyond which it is hardly this model


def of_texts(positions: Sequence[Position]) -> list[Position]:
    """Those of texts that were asked for the first time."""
    return [p for p in positions if p.asked.way in (FIRST, NEW) and not p.asked.chat]


def probabilities(end: Endpoint, found: Answers, positions: Sequence[Position], name: str) -> Verdict:
    """Of texts. `name`: of the arithmetic whose rounding is meant."""
    known = of_texts(positions)
    if len(known) >= LEAST:
        return judged("probabilities", known, name)
    why = "the endpoint gives no logprobs" if end.completes and not end.n_top else f"{len(known)} positions have probabilities"
    return Verdict("probabilities", UNKNOWN, reason(end, found, "completions", why))


def chat_probabilities(end: Endpoint, found: Answers, positions: Sequence[Position], tokenizer: Tokenizer, name: str) -> Verdict:
    """Of answers to conversations. Those are left out that become other prompts there, by the template's verdict, or may, as control tokens
    are spelled in them.
    """
    other = template(end, found, tokenizer).figures.get("differ", ())
    known = [p for p in positions if p.asked.chat and p.asked.name not in other and _stays_text(p.asked, tokenizer)]
    if len(known) >= LEAST:
        return judged("chat", known, name)
    why = "the endpoint gives no logprobs in chats" if end.chat_top == 0 else f"{len(known)} positions have probabilities"
    why += f", without the conversations that become other prompts: {', '.join(other)}" if other else ""
    return Verdict("chat", UNKNOWN, reason(end, found, "chat", why))


def window(positions: Sequence[Position], windows: set[int]) -> Verdict:
    """Do they depart from the sliding window's length on? By the levels before and after, whatever they are."""
    known = of_texts(positions)
    if not windows:
        return Verdict("window", RIGHT, "the model has no sliding window", "the file")
    length = min(windows)
    before, after = ([p for p in known if (p.at + 1 >= length) == late] for late in (False, True))
    if len(before) < LEAST or len(after) < LEAST:
        return Verdict("window", UNKNOWN, f"{len(before)} positions with probabilities before the window's length, {length}, and "
                       f"{len(after)} after")
    levels = level(before), level(after)
    said = f"{levels[0]:.2g} of rounding before {length} tokens, {levels[1]:.2g} after"
    basis = f"{len(before)} positions before, {len(after)} after"
    figures = {"length": length, "before": levels[0], "after": levels[1]}
    if rises(before, after) and _apart(before, after):
        usual = max(rounding(known), 3 * float(np.quantile([p.distance for p in before], 0.9)))
        first = min((p.at for p in after if p.distance > usual), default=length - 1)
        return Verdict("window", DEPARTS, f"{said}: not the latest {length} keys are seen; first clearly at position {first}", basis,
                       figures | {"first": first})
    if levels[0] > LIMIT:
        return Verdict("window", UNKNOWN, f"{said}: they depart before it already", basis, figures)
    return Verdict("window", DEPARTS if surely_above(after) else RIGHT if levels[1] <= LIMIT else UNKNOWN, said, basis, figures)


def _apart(before: Sequence[Position], after: Sequence[Position]) -> bool:
    """Do three quarters of the prompts after lie above all before, by STEP? The rank-sum test takes positions for independent, but those of
    one prompt are not, and before the window's length there are few prompts.
    """
    one, two = ([float(np.median(ratios(own))) for own in by_prompt(some).values()] for some in (before, after))
    return bool(one) and bool(two) and float(np.quantile(two, 0.25)) >= STEP * max(one)


def figures_of(positions: Sequence[Position]) -> dict[str, object]:
    """What a verdict rests on, in numbers."""
    highs = [p.high for p in positions]
    return {"positions": len(positions), "listed": int(np.median([p.n_listed for p in positions])), "level": level(positions),
            "distance": distance(positions), "rounding": rounding(positions), "kl_at_least": float(np.mean([p.low for p in positions])),
            "kl_at_most": float(np.mean(highs)) if np.isfinite(highs).all() else None,
            "kl_of_rounding": float(np.mean([np.mean(p.noise) for p in positions])),
            "same_top": float(np.mean([p.same_top for p in positions]))}


def judged(question: str, known: Sequence[Position], name: str) -> Verdict:
    """By their level, and that of single prompts."""
    figures = figures_of(known)
    said = f"{figures['level']:.2g} of the rounding of {name} (limit {LIMIT:g}), KL {figures['kl_at_least']:.2g} nats or more"
    basis = f"{len(known)} positions, {figures['listed']} tokens each"
    if figures["level"] > LIMIT:
        if not surely_above(known):
            return Verdict(question, UNKNOWN, f"{said}: too few positions to be sure", basis, figures)
        if not _in_most_prompts(known):
            return Verdict(question, UNKNOWN, f"{said}: but not in three quarters of at least {PROMPTS} prompts", basis, figures)
        kind, words = looks_like(known)
        return Verdict(question, DEPARTS, f"{said}; {words}", basis, figures | {"looks_like": kind})
    alone = _alone(known)
    if alone:
        worst = max(alone, key=alone.get)
        more = f", and {len(alone) - 1} more prompts" if len(alone) > 1 else ""
        return Verdict(question, DEPARTS, f"{said}, but {worst!r} is at {alone[worst]:.3g}{more}", basis, figures | {"alone": alone})
    return Verdict(question, RIGHT, said, basis, figures)


def _in_most_prompts(positions: Sequence[Position]) -> bool:
    """Are three quarters of the prompts above LIMIT? Positions of one prompt are not independent: experts that changed places at its first
    tokens, which a right engine may do, show at all that follow.
    """
    above = [float(np.median(ratios(own))) > LIMIT for own in by_prompt(positions, 1).values()]
    return len(above) >= PROMPTS and float(np.mean(above)) >= 0.75


def _alone(positions: Sequence[Position]) -> dict[str, float]:
    """Prompts that are far off by themselves: name -> lower quartile of their distances over the larger of their own rounding and the
    largest tenth of all: experts that changed places early in a prompt show at all positions after it.
    """
    usual, found = float(np.quantile([p.rounding for p in positions], 0.9)), {}
    for name, own in by_prompt(positions).items():
        if (size := lower_quartile(own) / max(rounding(own), usual)) > ALONE:
            found[name] = size
    return found


def by_prompt(positions: Sequence[Position], least: int = LEAST // 2) -> dict[str, list[Position]]:
    """Those of each prompt that has `least` of them, by default enough to be judged by itself."""
    found = defaultdict(list)
    for p in positions:
        found[p.asked.name].append(p)
    return {name: own for name, own in found.items() if len(own) >= least}


def lower_quartile(positions: Sequence[Position]) -> float:
    """Of the distances."""
    return float(np.quantile([p.distance for p in positions], 0.25))


def looks_like(positions: Sequence[Position]) -> tuple[str, str]:
    """What a departure resembles: "temperature", "cut", "another model" or "", and in words."""
    kl, same = float(np.mean([p.low for p in positions])), float(np.mean([p.same_top for p in positions]))
    slope, shift, rest = np.median([p.line for p in positions], axis=0)
    spread, usual = float(np.median([abs(p.line[0] - slope) for p in positions])), rounding(positions)
    if abs(slope - 1) > 0.02 and spread < abs(slope - 1) / 3 and rest < 2 * LIMIT * usual:
        words = "probabilities after the temperature, or a scale that is missing"
        return "temperature", f"as if logits were divided by {1 / slope:.3g}: {words}"
    if shift > LIMIT * usual and abs(slope - 1) < 0.02 and rest < 2 * LIMIT * usual:
        return "cut", "as if the distribution had been cut and renormalised: probabilities after top-k, top-p or min-p"
    if kl > OTHER_MODEL and same < OTHER_MODEL:
        words = "another model, or a forward pass that is badly wrong"
        return "another model", f"the most probable token is the same at {same:.0%} of positions: {words}"
    first = min((p.at for p in positions if p.distance > LIMIT * max(p.rounding, usual)), default=None)
    where = "" if first is None else f"; first clearly at position {first}"
    return "", f"the most probable token is the same at {same:.1%} of positions{where}"


def _stays_text(asked: Asked, tokenizer: Tokenizer) -> bool:
    return marked(tokenizer, asked.ids) == list(asked.ids)
