"""Again, and in company: is an answer the same whatever the endpoint remembers, and whoever else asks?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.lab.judge.answers import Answer
from refimpl.lab.judge.ask import AGAIN, NEW, SHARED, TOGETHER, Answers
from refimpl.lab.judge.endpoint import Endpoint
from refimpl.lab.judge.measure import Position
from refimpl.lab.judge.verdicts.probabilities import by_prompt, lower_quartile, of_texts
from refimpl.lab.judge.verdicts.verdict import DEPARTS, LIMIT, RIGHT, UNKNOWN, Verdict, level, reason, rises, rounding, surely_above

WORSE = 2.0         # by how much a single prompt is farther away than it was, and than rounding moves the worst tenth of all positions


def again(end: Endpoint, found: Answers, positions: Sequence[Position]) -> Verdict:
    """Where the endpoint may have kept the prompt, or its first half."""
    return _same("again", end, found, positions, AGAIN, (AGAIN, SHARED), "what it kept is not what it computed")


def company(end: Endpoint, found: Answers, positions: Sequence[Position]) -> Verdict:
    """Where others are asked for at the same time."""
    return _same("company", end, found, positions, TOGETHER, (TOGETHER,), "the rows of others show in an answer")


def _same(question: str, end: Endpoint, found: Answers, positions: Sequence[Position], twin: str, ways: Sequence[str],
          mistake: str) -> Verdict:
    first = {asked.name: asked.answer for asked in found.of(NEW)}
    pairs = {asked.name: (first[asked.name], asked.answer) for asked in found.of(twin) if asked.name in first}
    if not pairs:
        return Verdict(question, UNKNOWN, reason(end, found, "completions", "no prompt was answered twice"))
    by_probability, n = all(a.steps and b.steps for a, b in pairs.values()), len(pairs)
    basis = "probabilities compared to the last digit" if by_probability else "texts compared"
    compared = {name: compared_steps(a, b) for name, (a, b) in pairs.items()}
    differ, apart = [name for name, (same, _, _) in compared.items() if not same], max(largest for _, largest, _ in compared.values())
    of_way = {way: [p for p in positions if p.asked.way == way] for way in ways}
    once = [p for p in positions if p.asked.way == NEW]         # of the same prompts: others are shorter, and may see less of a mistake
    at_first, levels = level(once), {way: level(there) for way, there in of_way.items()}
    known = {way: size for way, size in ({"at first": at_first} | levels).items() if size == size}          # not NaN
    figures = {"prompts": n, "differ": differ, "apart": apart, "levels": known}
    far = {way: levels[way] for way, there in of_way.items() if rises(once, there) or surely_above(there) and at_first <= LIMIT}
    if far:
        way = max(far, key=far.get)
        return Verdict(question, DEPARTS, f"{mistake}: {way} {far[way]:.3g} of rounding, at first {at_first:.2g}; {len(differ)} of {n} "
                       "answers differ", basis, figures)
    texts = of_texts(positions)
    worse = {way: _worse(texts, there) for way, there in of_way.items()}
    if any(worse.values()):
        way = max(worse, key=lambda way: max(worse[way].values(), default=0.0))
        name = max(worse[way], key=worse[way].get)
        return Verdict(question, DEPARTS, f"{mistake}: {way} {name!r} is {worse[way][name]:.3g} times as far away as at first, and as "
                       f"rounding moves anything; {len(differ)} of {n} answers differ", basis, figures | {"worse": worse})
    if differ and by_probability:
        size = "within rounding as a whole" if at_first <= LIMIT else "from probabilities that depart at first already"
        return Verdict(question, DEPARTS, f"{len(differ)} of {n} answers have other bits, {size}: log-probabilities differ by up to "
                       f"{apart:.2g}", basis, figures)
    if differ:
        return Verdict(question, DEPARTS, f"{len(differ)} of {n} greedy texts differ", basis, figures)
    drawn = sum(other for _, _, other in compared.values())
    note = f"; in {drawn} of them another token is drawn: the seed is not kept to" if drawn else ""
    return Verdict(question, RIGHT, f"{n} of {n} answers are the same{note}", basis, figures)


def _worse(once: Sequence[Position], later: Sequence[Position]) -> dict[str, float]:
    """Prompts that are far off by themselves, though they were not at first: name -> lower quartile of their distances over the upper one
    at first, or over rounding where that is more.
    """
    if not once:
        return {}
    usual, first, found = float(np.quantile([p.rounding for p in once], 0.9)), by_prompt(once), {}
    for name, own in by_prompt(later).items():
        if name in first:
            size = lower_quartile(own) / max(rounding(own), usual, float(np.quantile([p.distance for p in first[name]], 0.75)))
            if size > WORSE:
                found[name] = size
    return found


def compared_steps(a: Answer, b: Answer) -> tuple[bool, float, bool]:
    """(same probabilities as far as both have the same tokens?, largest difference of a log-probability there, is another token drawn from
    the same probabilities?). Texts, where there are no probabilities.
    """
    if not a.steps or not b.steps:
        return a.text == b.text, 0.0, False
    largest, same = 0.0, True
    for x, y in zip(a.steps, b.steps):
        theirs = {(token.bytes, token.id): token.logprob for token in y.top}
        largest = max([largest, *(abs(t.logprob - theirs[t.bytes, t.id]) for t in x.top if (t.bytes, t.id) in theirs)])
        same &= x.top == y.top
        if (x.chosen.bytes, x.chosen.id) != (y.chosen.bytes, y.chosen.id):
            return same, largest, same
    return same and len(a.steps) == len(b.steps), largest, False
