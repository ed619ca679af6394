"""Does an endpoint that only samples draw from our distribution? A sequential test with a stated rate of false alarms.

The first token of an answer at temperature 1 is drawn again and again. Before every draw we bet: `alternative`, a distribution made of what
was drawn so far (counts added to ours, as Krichevsky & Trofimov 1981 do to a uniform one), is our guess of what the endpoint has. After it
the stake grows by alternative(token) / allowed(token), where `allowed` is at least as probable as any right engine could have the token. If
the endpoint's distribution is below `allowed` everywhere, the stake is a supermartingale that starts at 1, and the chance that it ever
exceeds 1 / a is at most a (Ville's inequality; Shafer, JRSS A 184, 2021; Wald's likelihood-ratio test of 1945 is the case of one
alternative). So the test may stop whenever it likes, and its false alarms are at most a whatever the prompts are.

`allowed` is the largest probability that our exact run or one of those that round gives to a token, times exp(LIMIT * r): r is what
rounding does to log-probabilities at this prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from refimpl.lab.evaluate.divergence import divergence, log_sum_exp
from refimpl.lab.judge.ask import Answers
from refimpl.lab.judge.endpoint import Endpoint
from refimpl.lab.judge.verdicts.verdict import DEPARTS, LIMIT, RIGHT, UNKNOWN, Verdict, reason
from refimpl.lab.judge.yardstick import Yardstick
from refimpl.text.tokenizer import Tokenizer

FALSE_ALARMS = 1e-6
N_OUTCOMES, PRIOR = 24, 4.0                     # texts that are told apart; draws that our guess is worth before the first
OTHER = None                                    # the outcome of all other texts


@dataclass
class Stake:
    """The bet on one prompt. `ours`, `allowed`: probability of every outcome (a text, or OTHER)."""

    ours: Mapping[str | None, float]
    allowed: Mapping[str | None, float]
    log: float = 0.0
    drawn: Counter = field(default_factory=Counter)

    def draw(self, text: str):
        """One more token was drawn: its text."""
        outcome = text if text in self.ours else OTHER
        n = self.drawn.total()
        guess = (self.drawn[outcome] + PRIOR * self.ours[outcome]) / (n + PRIOR)
        self.log += float(np.log(guess / self.allowed[outcome])) if guess > 0 else -np.inf
        self.drawn[outcome] += 1

    def most_apart(self) -> str:
        """The text whose share differs most from its probability, in words."""
        n = max(1, self.drawn.total())
        text = max(self.ours, key=lambda outcome: abs(self.drawn[outcome] / n - self.ours[outcome]))
        return f"{'other texts' if text is OTHER else repr(text)} {self.drawn[text]} times of {n}, expected {n * self.ours[text]:.1f}"


def sampling(end: Endpoint, found: Answers, yardstick: Yardstick) -> Verdict:
    """Are its draws ours? For an endpoint that gives no probabilities."""
    draws = [(asked, texts) for asked, texts in found.draws if texts]
    if not draws:
        return Verdict("sampling", UNKNOWN, reason(end, found, "completions", (found.failed or ["nothing was drawn"])[-1]))
    stakes = {}
    for asked, texts in draws:
        last = [len(asked.ids) - 1]
        stake = stake_of(yardstick.exact(asked.ids, last)[0], [rows_RV[0] for rows_RV in yardstick.rounded(asked.ids, last)],
                         texts_of(yardstick.model.tokenizer, stripped=asked.chat))
        for text in texts:
            stake.draw(text)
        stakes[asked.name] = stake
    n, total = sum(len(texts) for _, texts in draws), sum(stake.log for stake in stakes.values())
    figures, basis = {"draws": n, "log_stake": total}, f"{n} draws, false alarms at most {FALSE_ALARMS:g}"
    if total > np.log(1 / FALSE_ALARMS):
        name = max(stakes, key=lambda name: stakes[name].log)
        return Verdict("sampling", DEPARTS, f"it draws from another distribution: {name!r} was followed by {stakes[name].most_apart()}",
                       basis, figures)
    return Verdict("sampling", RIGHT, f"nothing speaks against it, but less than about {smallest_seen(n / len(draws)):.2g} nats of KL "
                   "would not show", basis, figures)


def stake_of(exact_V: np.ndarray, rounded: Sequence[np.ndarray], texts: Mapping[int, str]) -> Stake:
    """The bet on a prompt, from our logits after it, exact and rounded. `texts`: of tokens, as an endpoint says them."""
    log_sum = log_sum_exp(exact_V)
    rounding = max((2 * divergence(row_V, exact_V, log_sum_exp(row_V), log_sum)) ** 0.5 for row_V in rounded)
    runs = [_by_text(row_V, texts) for row_V in (exact_V, *rounded)]
    kept = sorted(runs[0], key=runs[0].get, reverse=True)[:N_OUTCOMES]
    tables = [{text: run.get(text, 0.0) for text in kept} for run in runs]
    for table in tables:
        table[OTHER] = max(0.0, 1 - sum(table.values()))
    slack = float(np.exp(LIMIT * rounding))
    return Stake(tables[0], {outcome: min(1.0, slack * max(table[outcome] for table in tables) + 1e-9) for outcome in tables[0]})


def _by_text(logit_V: np.ndarray, texts: Mapping[int, str]) -> dict[str, float]:
    p_V, found = np.exp(logit_V.astype(np.float64) - log_sum_exp(logit_V)), Counter()
    for i in np.argsort(-p_V)[:4 * N_OUTCOMES].tolist():
        found[texts[i]] += float(p_V[i])
    return found


def texts_of(tokenizer: Tokenizer, stripped: bool) -> dict[int, str]:
    """What an answer of one token shows: nothing for a control token. `stripped`: without blanks around it, as chats may leave them out."""
    texts = {i: tokenizer.decode([i]) for i in range(tokenizer.n_vocab)}
    return {i: text.strip() for i, text in texts.items()} if stripped else texts


def smallest_seen(n_draws: float) -> float:
    """About the KL in nats of a departure that `n_draws` draws of one prompt find: the stake gains n KL, less what guessing costs."""
    cost = np.log(1 / FALSE_ALARMS) + N_OUTCOMES / 4 * np.log(1 + n_draws / PRIOR)
    return float(cost / max(1, n_draws))
