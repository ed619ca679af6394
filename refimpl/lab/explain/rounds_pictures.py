"""Pictures of draft and verify: rounds as boxes, the text by who wrote it, acceptance, tokens per round, costs and what they allow."""

from collections.abc import Mapping, Sequence

from refimpl.lab.explain.rounds import Costs, Round, Run, rates
from refimpl.lab.explain.show import BLACK, BLUE, COLOURS, GREEN, ORANGE, RED, figure, legend, lines_figure, picture, text_figure, visible
from refimpl.text.tokenizer import Tokenizer

IDLE = "#DDDDDD"
KEY = ((GREEN, "draft, accepted"), (RED, "draft, rejected"), (IDLE, "draft behind it, not judged"), (BLUE, "the target's own"))


def rounds_picture(tokenizer: Tokenizer, rounds: Sequence[Round]):
    """One line for each round: its drafts, and the token that the target put behind the accepted ones."""
    def text(token: int) -> str:
        return visible(tokenizer.decode([token], special=True))
    lines = []
    for number, r in enumerate(rounds, 1):
        line = [(f"{number:2d} ", "white", "0.4")]
        for i, token in enumerate(r.drafted):
            back, ink = (GREEN, "white") if i < r.n_accepted else (RED, "white") if i == r.n_accepted else (IDLE, "0.4")
            line.append((text(token), back, ink))
        lines.append([*line, ("\u2192", "white", "0.4"), (text(r.emitted[-1]), BLUE, "white")])
    return picture(lines_figure(lines, KEY), "Rounds of drafting: accepted drafts, rejected ones, and the target's own tokens.")


def authors_picture(tokenizer: Tokenizer, prompt: Sequence[int], run: Run, width: int = 84):
    """The text of a run: the prompt, tokens that were accepted drafts, and tokens that the target chose itself."""
    backs = ["#FFFFFF"] * len(prompt) + [BLUE]
    for r in run.rounds:
        backs += [GREEN] * (len(r.emitted) - 1) + [BLUE]
    pieces = [tokenizer.decode([token], special=True) for token in [*prompt, *run.ids]]
    inks = [BLACK if back == "#FFFFFF" else "white" for back in backs]
    fig = text_figure(pieces, backs[:len(pieces)], inks[:len(pieces)], width, ((GREEN, "accepted drafts"), (BLUE, "the target's own")))
    return picture(fig, "The text, coloured by who wrote it.")


def acceptance_picture(curves: Mapping[str, Sequence[float]], alphas: Mapping[str, float]):
    """Share of rounds in which drafts 1 to i were all accepted, and alpha^i, dashed."""
    fig, axes = figure(7, 3)
    for (name, chances), colour in zip(curves.items(), (GREEN, ORANGE)):
        n = range(1, len(chances) + 1)
        axes.plot(n, chances, "o-", color=colour, lw=2, ms=5, label=name)
        axes.plot(n, [alphas[name] ** i for i in n], "--", color=colour, lw=1, label=f"{alphas[name]:.2f} to the power of i")
    axes.set(xlabel="drafts 1 to i", ylabel="rounds in which all were accepted", ylim=(0, 1))
    legend(axes, ncols=2)
    return picture(fig, "Acceptance by position, greedy and sampled.")


def tokens_picture(measured: Mapping[str, Mapping[int, float]], formula: Mapping[str, Mapping[int, float]],
                   foretold: Mapping[str, Mapping[int, float]]):
    """Tokens a round over the number of drafts: measured, by equation 1, and as the longest rounds foretell it."""
    fig, panels = figure(9, 3.2, 1, len(measured), sharey=True)
    for axes, name in zip(panels, measured):
        axes.plot(*zip(*formula[name].items()), "--", color=BLUE, lw=1.5, label="equation 1, \u03b1 of the same rounds")
        axes.plot(*zip(*foretold[name].items()), ":", color=RED, lw=2, label="1 + a\u2081 + ... of the rounds of 8")
        axes.plot(*zip(*measured[name].items()), "o", color=BLACK, ms=6, label="measured")
        axes.set(title=name, xlabel="drafts in a round", ylim=(0, None))
    panels[0].set_ylabel("tokens a round")
    legend(panels[0], loc="lower right")
    return picture(fig, "Tokens per round over the number of drafts, measured and expected.")


def costs_picture(costs: Costs, chances: Mapping[str, Sequence[float]]):
    """Left, milliseconds of a round by its parts; right, tokens per second that follow, one line for each entry of `chances`."""
    fig, (left, right) = figure(9, 3.2, 1, 2)
    n = range(len(costs.verify))
    verify, draft = [1e3 * seconds for seconds in costs.verify], [1e3 * costs.draft * k for k in n]
    left.bar(n, verify, color=BLUE, label="the target: one row more than drafts")
    left.bar(n, draft, bottom=verify, color=ORANGE, label="the drafter")
    left.set(xlabel="drafts in a round", ylabel="milliseconds a round", ylim=(0, 1.3 * (verify[-1] + draft[-1])))
    legend(left, loc="upper left")
    for (name, accepted), colour in zip(chances.items(), (GREEN, ORANGE, RED)):
        found = rates(costs.verify, costs.draft, accepted)
        best = max(range(len(found)), key=found.__getitem__)
        right.plot(range(len(found)), found, "o-", color=colour, ms=4, label=name)
        right.plot(best, found[best], "o", color=colour, ms=10, mfc="none")
    right.set(xlabel="drafts in a round", ylabel="tokens a second", ylim=(0, None))
    legend(right)
    return picture(fig, "Costs of a round and the tokens per second that follow.")


def depths_picture(runs: Mapping[str, Run]):
    """How many tokens were drafted in each round, one panel for each run."""
    fig, panels = figure(9, 1.5 * len(runs) + 0.3, len(runs), 1, sharey=True)
    most = max(len(r.drafted) for run in runs.values() for r in run.rounds)
    for axes, (name, run) in zip(panels, runs.items()):
        depth = [len(r.drafted) for r in run.rounds]
        axes.bar(range(1, len(depth) + 1), depth, width=1, color=ORANGE, label="drafted")
        axes.bar(range(1, len(depth) + 1), [r.n_accepted for r in run.rounds], width=1, color=GREEN, label="accepted")
        axes.set(title=name, ylabel="tokens", xlim=(0.5, len(depth) + 0.5), yticks=range(0, most + 1, 2), ylim=(0, most + 1.5))
    panels[-1].set_xlabel("round")
    legend(panels[0], loc="upper right", ncols=2)
    return picture(fig, "Drafts in each round as the automatic depth chose them.")


def gains_picture(gains: Mapping[str, Sequence[float]]):
    """Speed against plain decoding over the number of drafts, one line for each entry."""
    fig, axes = figure(7, 3.2)
    for (name, ratio), colour in zip(gains.items(), COLOURS):
        axes.plot(range(len(ratio)), ratio, "o-", color=colour, ms=5, label=name)
    axes.axhline(1, color="0.5", lw=0.8, ls="--")
    axes.set(xlabel="drafts in a round", ylabel="tokens for the same bytes,\nplain decoding = 1", ylim=(0, None), xticks=range(len(ratio)))
    legend(axes, loc="upper left")
    return picture(fig, "Estimated gain of drafting for the true shapes.")
