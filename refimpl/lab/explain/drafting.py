"""Notebook 5: rounds of drafting and verifying, token by token; what acceptance says about speed; pictures."""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.decode.draft_length import MAX_DRAFT, AutoDraftLength, DraftLength, best_draft_length
from refimpl.decode.drafter import Drafter
from refimpl.decode.generate import plain
from refimpl.decode.sampling import Sampler, Sampling
from refimpl.decode.speculative import Round, speculative
from refimpl.lab.explain.show import BLACK, BLUE, COLOURS, GREEN, ORANGE, RED, figure, legend, lines_figure, picture, text_figure, visible
from refimpl.loading.model import Model
from refimpl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Run:
    """A generation: its ids, the logits each was chosen from, float32 (T, V), and the rounds after the first token (none for plain)."""

    ids: list[int]
    logit_TV: np.ndarray
    rounds: list[Round]
    seconds: float


class Witness(Sampler):
    """A sampler that keeps the logits of every choice it makes."""

    def __init__(self, sampling: Sampling, suppress):
        super().__init__(sampling, suppress)
        self.seen: list[np.ndarray] = []

    def pick(self, logits_V: np.ndarray) -> int:
        """As in Sampler."""
        self.seen.append(logits_V.copy())
        return super().pick(logits_V)


class Stubborn:
    """A drafter at its real cost that always proposes the same token: as good as useless."""

    def __init__(self, drafter: Drafter, token: int):
        self.drafter, self.token, self.target, self.auto = drafter, token, drafter.target, AutoDraftLength()

    def draft(self, token, state_C, cache, n: int, min_p: float = 0.0) -> list[int]:
        """As in Drafter."""
        return [self.token] * len(self.drafter.draft(token, state_C, cache, n, min_p))


class Blinded:
    """A drafter that gets zeros in place of one of its inputs: "embedding" (of the newest token), "state" (of the target), "keys"."""

    def __init__(self, drafter: Drafter, without: str):
        self.drafter, self.without, self.target, self.auto = drafter, without, drafter.target, AutoDraftLength()

    def draft(self, token, state_C, cache, n: int, min_p: float = 0.0) -> list[int]:
        """As in Drafter."""
        return self.drafter.draft(token, state_C, cache, n, min_p, self._erase)

    def _erase(self, name: str, value: np.ndarray):
        value_name, width = name.partition(".")[2], self.target.config.n_embd
        if value_name == "inp_xh" and self.without == "embedding":
            value[:, :width] = 0
        elif value_name == "inp_xh" and self.without == "state":
            value[:, width:] = 0
        elif value_name.startswith("kqv_out-") and self.without == "keys":
            value[:] = 0


def run(model: Model, ids: Sequence[int], n_new: int, drafter: Drafter | Stubborn | Blinded | None = None,
        draft_length: DraftLength | None = None, **sampling) -> Run:
    """`n_new` tokens after `ids`, with a drafter (`draft_length`: of the rounds) or without. `sampling` as in Sampling; greedy
    unless a temperature is given. Does not stop at the end of a text, so that all runs are equally long.
    """
    witness = Witness(Sampling(**{"temperature": 0.0, "top_k": 0, "top_p": 1.0} | sampling), model.tokenizer.suppress)
    cache, rounds = model.new_cache(len(ids) + n_new), []
    state_D = model.prefill(ids, cache)[-1]
    started = time.perf_counter()
    if drafter is None:
        made = list(itertools.islice(plain(model, cache, witness, state_D), n_new))
    else:
        first = witness.pick(model.head(state_D[None])[0])
        rounds = list(speculative(model, drafter.draft, cache, witness, first, state_D, n_new - 1, draft_length))
        made = [first, *itertools.chain.from_iterable(done.emitted for done in rounds)]
    return Run(made, np.stack(witness.seen), rounds, time.perf_counter() - started)


def acceptance(rounds: Sequence[Round], n_draft: int) -> tuple[list[float], float]:
    """(a_1 ... a_n, alpha): the share of rounds in which draft tokens 1 to i were all accepted, and of those that were judged.

    A draft token is judged if all before it were accepted. Rounds cut short, at the end of a text, do not count.
    """
    accepted = [r.n_accepted for r in rounds if len(r.drafted) == n_draft]
    judged = sum(min(n + 1, n_draft) for n in accepted)
    return [sum(n >= i for n in accepted) / len(accepted) for i in range(1, n_draft + 1)], sum(accepted) / judged


def tokens_per_round(rounds: Sequence[Round], n_draft: int) -> float:
    """Tokens that a round of `n_draft` draft tokens gave, on average. Rounds cut short do not count."""
    return statistics.fmean(len(r.emitted) for r in rounds if len(r.drafted) == n_draft)


def expected_tokens(alpha: float, n_draft: int) -> float:
    """(1 - alpha^(n + 1)) / (1 - alpha): tokens of a round if each draft token were accepted with probability alpha.

    Leviathan et al. 2023 (arXiv:2211.17192), section 3.1, equation 1.
    """
    return (1 - alpha ** (n_draft + 1)) / (1 - alpha) if alpha < 1 else n_draft + 1.0


# ---- what it costs on this machine

@dataclass(frozen=True)
class Costs:
    """Seconds of a call of 1, 2, ... rows, head included, and of a step of the drafter: the quickest of several turns."""

    verify: list[float]
    draft: float


def costs(model: Model, drafter: Drafter, ids: Sequence[int], turns: int = 15) -> Costs:
    """Measures both after `ids`, each once a turn, every time with other tokens of the text in the rows. Commits nothing.

    The quickest turn is the one that other programs on the machine disturbed least.
    """
    cache = model.new_cache(len(ids) + MAX_DRAFT + 1)
    state_D, ids_T = model.prefill(ids, cache)[-1], model.checked(ids)
    verify: list[list[float]] = [[] for _ in range(MAX_DRAFT + 1)]
    draft: list[float] = []
    for turn in range(turns + 1):
        for n_draft, times in enumerate(verify):
            first = (turn * 7) % (len(ids) - MAX_DRAFT)
            began = time.perf_counter()
            model.head(model.forward(ids_T[first:first + n_draft + 1], cache))
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        drafter.draft(int(ids_T[-1]), state_D, cache, MAX_DRAFT)
        draft.append((time.perf_counter() - began) / MAX_DRAFT)
    return Costs([min(times[1:]) for times in verify], min(draft[1:]))


class Charged(AutoDraftLength):
    """The automatic draft length, with costs measured before instead of those of the moment, which other programs may disturb."""

    def __init__(self, costs: Costs):
        super().__init__()
        self.costs = costs

    def observe(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float):
        """As in AutoDraftLength."""
        super().observe(drafted, accepted, drafted * self.costs.draft, self.costs.verify[drafted])


def rates(verify: Sequence[float], draft: float, accepted: Sequence[float]) -> list[float]:
    """Tokens per unit of cost with 0, 1, ... draft tokens: what `best_draft_length` (decode/draft_length.py) maximises."""
    expected = np.cumsum([1.0, *accepted, *[0.0] * len(verify)])
    return [float(tokens / (cost + n * draft)) for n, (tokens, cost) in enumerate(zip(expected, verify))]


def best(verify: Sequence[float], draft: float, accepted: Sequence[float]) -> int:
    """`best_draft_length`, of at most as many draft tokens as both lists have."""
    return best_draft_length(verify[:len(accepted) + 1], draft, accepted)


# ---- pictures

IDLE = "#DDDDDD"
KEY = ((GREEN, "draft token, accepted"), (RED, "rejected"), (IDLE, "after a rejected one, not judged"), (BLUE, "the target's own"))


def rounds_picture(tokenizer: Tokenizer, rounds: Sequence[Round]):
    """One line for each round: its draft tokens, and the token that the target put after the accepted ones."""
    def text(token: int) -> str:
        return visible(tokenizer.decode([token], special=True))
    lines = []
    for number, r in enumerate(rounds, 1):
        line = [(f"{number:2d} ", "white", "0.4")]
        for i, token in enumerate(r.drafted):
            back, ink = (GREEN, "white") if i < r.n_accepted else (RED, "white") if i == r.n_accepted else (IDLE, "0.4")
            line.append((text(token), back, ink))
        lines.append([*line, ("\u2192", "white", "0.4"), (text(r.emitted[-1]), BLUE, "white")])
    return picture(lines_figure(lines, KEY), "Rounds of drafting: accepted draft tokens, rejected ones, and the target's own tokens.")


def authors_picture(tokenizer: Tokenizer, prompt: Sequence[int], run: Run, width: int = 84):
    """The text of a run: the prompt, accepted draft tokens, and tokens that the target chose itself."""
    backs = ["#FFFFFF"] * len(prompt) + [BLUE]
    for r in run.rounds:
        backs += [GREEN] * (len(r.emitted) - 1) + [BLUE]
    tokens = [tokenizer.decode([token], special=True) for token in [*prompt, *run.ids]]
    inks = [BLACK if back == "#FFFFFF" else "white" for back in backs]
    key = ((GREEN, "accepted draft tokens"), (BLUE, "the target's own"))
    fig = text_figure(tokens, backs[:len(tokens)], inks[:len(tokens)], width, key)
    return picture(fig, "The text, coloured by who wrote it.")


def inputs_picture(first: Mapping[str, float]):
    """How often the first draft token is accepted, a bar for each entry."""
    fig, axes = figure(7, 0.32 * len(first) + 0.9)
    axes.barh(range(len(first)), list(first.values()), color=[BLUE, *[ORANGE] * (len(first) - 1)])
    for row, share in enumerate(first.values()):
        axes.text(share, row, f" {share:.0%}", va="center", fontsize=9)
    axes.set(yticks=range(len(first)), yticklabels=list(first), ylim=(len(first) - 0.4, -0.6), xlim=(0, 1),
             xlabel="rounds in which the first draft token is accepted")
    return picture(fig, "First draft token accepted: " + "; ".join(f"{name} {share:.0%}" for name, share in first.items()))


def acceptance_picture(curves: Mapping[str, Sequence[float]], alphas: Mapping[str, float]):
    """Share of rounds in which draft tokens 1 to i were all accepted, and alpha^i, dashed."""
    fig, axes = figure(7, 3)
    for (name, chances), colour in zip(curves.items(), (GREEN, ORANGE)):
        n = range(1, len(chances) + 1)
        axes.plot(n, chances, "o-", color=colour, lw=2, ms=5, label=name)
        axes.plot(n, [alphas[name] ** i for i in n], "--", color=colour, lw=1, label=f"{alphas[name]:.2f} to the power of i")
    axes.set(xlabel="draft tokens 1 to i", ylabel="rounds in which all were accepted", ylim=(0, 1))
    legend(axes, ncols=2)
    return picture(fig, "Acceptance by position, greedy and sampled.")


def tokens_picture(measured: Mapping[str, Mapping[int, float]], formula: Mapping[str, Mapping[int, float]],
                   predicted: Mapping[str, Mapping[int, float]]):
    """Tokens a round over the draft length: measured, by equation 1, and as predicted from the longest rounds."""
    fig, panels = figure(9, 3.2, 1, len(measured), sharey=True)
    for axes, name in zip(panels, measured):
        axes.plot(*zip(*formula[name].items()), "--", color=BLUE, lw=1.5, label="equation 1, \u03b1 of the same rounds")
        axes.plot(*zip(*predicted[name].items()), ":", color=RED, lw=2, label="1 + a\u2081 + ... of the rounds of 8")
        axes.plot(*zip(*measured[name].items()), "o", color=BLACK, ms=6, label="measured")
        axes.set(title=name, xlabel="draft tokens in a round", ylim=(0, None))
    panels[0].set_ylabel("tokens a round")
    legend(panels[0], loc="lower right")
    return picture(fig, "Tokens per round over the draft length, measured and expected.")


def costs_picture(costs: Costs, chances: Mapping[str, Sequence[float]]):
    """Left, milliseconds of a round by its parts; right, tokens per second that follow, one line for each entry of `chances`."""
    fig, (left, right) = figure(9, 3.2, 1, 2)
    n = range(len(costs.verify))
    verify, draft = [1e3 * seconds for seconds in costs.verify], [1e3 * costs.draft * k for k in n]
    left.bar(n, verify, color=BLUE, label="the target: one row more")
    left.bar(n, draft, bottom=verify, color=ORANGE, label="the drafter")
    left.set(xlabel="draft tokens in a round", ylabel="milliseconds a round", ylim=(0, 1.3 * (verify[-1] + draft[-1])))
    legend(left, loc="upper left")
    for (name, accepted), colour in zip(chances.items(), (GREEN, ORANGE, RED)):
        found = rates(costs.verify, costs.draft, accepted)
        best = max(range(len(found)), key=found.__getitem__)
        right.plot(range(len(found)), found, "o-", color=colour, ms=4, label=name)
        right.plot(best, found[best], "o", color=colour, ms=10, mfc="none")
    right.set(xlabel="draft tokens in a round", ylabel="tokens a second", ylim=(0, None))
    legend(right)
    return picture(fig, "Costs of a round and the tokens per second that follow.")


def lengths_picture(runs: Mapping[str, Run]):
    """How many tokens were drafted in each round, one panel for each run."""
    fig, panels = figure(9, 1.5 * len(runs) + 0.3, len(runs), 1, sharey=True)
    most = max(len(r.drafted) for run in runs.values() for r in run.rounds)
    for axes, (name, run) in zip(panels, runs.items()):
        length = [len(r.drafted) for r in run.rounds]
        axes.bar(range(1, len(length) + 1), length, width=1, color=ORANGE, label="drafted")
        axes.bar(range(1, len(length) + 1), [r.n_accepted for r in run.rounds], width=1, color=GREEN, label="accepted")
        axes.set(title=name, ylabel="tokens", xlim=(0.5, len(length) + 0.5), yticks=range(0, most + 1, 2), ylim=(0, most + 1.5))
    panels[-1].set_xlabel("round")
    legend(panels[0], loc="upper right", ncols=2)
    return picture(fig, "Draft tokens in each round, as the automatic draft length chose.")


def gains_picture(gains: Mapping[str, Sequence[float]]):
    """Speed against plain decoding over the draft length, one line for each entry."""
    fig, axes = figure(7, 3.2)
    for (name, ratio), colour in zip(gains.items(), COLOURS):
        axes.plot(range(len(ratio)), ratio, "o-", color=colour, ms=5, label=name)
    axes.axhline(1, color="0.5", lw=0.8, ls="--")
    axes.set(xlabel="draft tokens in a round", ylabel="tokens for the same bytes,\nplain decoding = 1", ylim=(0, None),
             xticks=range(len(ratio)))
    legend(axes, loc="upper left")
    return picture(fig, "Estimated gain of drafting for the true shapes.")
