"""Notebook 0: everything that one forward pass computes on the way from a text to its next token; pictures of the stations."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.lab.explain.show import BLACK, BLUE, COLOURS, GREEN, ORANGE, RED, SKY, figure, legend, lines_figure, picture, visible
from refimpl.loading.model import Model
from refimpl.model.config import Config
from refimpl.reference.ops import rms_norm, softmax


@dataclass(frozen=True)
class Pass:
    """A forward pass: the prompt, its tokens as text, every named value (model/tap.py), and the logits after each token, (T, V)."""

    ids: list[int]
    tokens: list[str]
    seen: dict[str, np.ndarray]
    logit_TV: np.ndarray


def follow(model: Model, text: str) -> Pass:
    """Runs `text` through the model and keeps everything."""
    ids, seen = model.tokenizer.encode(text), {}
    logit_TV = model.logits(ids, tap=lambda name, value: seen.setdefault(name, value.copy()))
    return Pass(ids, [visible(model.tokenizer.decode([i], special=True)) for i in ids], seen, logit_TV)


def lens(model: Model, run: Pass) -> list[tuple[str, str, float]]:
    """What the model would say if it stopped early: (after which layer, most probable token, its probability).

    The head is applied to the last token's state after each layer (nostalgebraist 2020, "interpreting GPT: the logit lens").
    """
    found = []
    for name in ("inp_scaled", *(f"l_out-{i}" for i in range(model.config.n_layer))):
        state_1D = rms_norm(run.seen[name][-1:], model.weights.norm_D, model.config.norm_eps)
        p_V = softmax(model.head(state_1D)[0])
        best = int(p_V.argmax())
        found.append(("the embedding" if name == "inp_scaled" else f"layer {name[6:]}", model.tokenizer.decode([best]), float(p_V[best])))
    return found


# ---- pictures

STATIONS = (("text", "", BLACK), ("ids", "0", BLACK), ("embedding", "1, 2", BLUE), ("norm", "0", GREEN), ("attention", "3", ORANGE),
            ("norm", "0", GREEN), ("router", "4", RED), ("8 of 128\nexperts", "4", RED), ("final\nnorm", "0", GREEN),
            ("head", "0", BLUE), ("soft cap", "0", SKY), ("sampling", "0", SKY), ("text", "5", BLACK))


def map_picture(config: Config):
    """The stations in a row, those of a layer framed; below each the notebook that goes deeper."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    fig, axes = figure(11, 2.3)
    axes.set(xlim=(-0.6, len(STATIONS) - 0.4), ylim=(-1.05, 1.35))
    axes.axis("off")
    axes.add_patch(Rectangle((2.52, -0.62), 4.96, 1.5, fc="#F4F4F4", ec="0.6", lw=1))
    axes.text(5, 1.0, f"a layer, {config.n_layer} times: five that slide, one that sees everything", ha="center", fontsize=9)
    for i, (name, notebook, colour) in enumerate(STATIONS):
        axes.add_patch(FancyBboxPatch((i - 0.36, -0.3), 0.72, 0.7, boxstyle="round,pad=0.04", fc="white", ec=colour, lw=1.6))
        axes.text(i, 0.05, name, ha="center", va="center", fontsize=7.5)
        if notebook not in ("", "0"):
            axes.text(i, -0.5, f"notebook {notebook}", ha="center", va="center", fontsize=7, color="0.35")
        if i:
            axes.annotate("", (i - 0.42, 0.05), (i - 0.6, 0.05), arrowprops={"arrowstyle": "->", "color": "0.3", "lw": 1})
    for centre, width, what in ((0.5, 1, "words and their ids"), (5, 7, f"rows of {config.n_embd} numbers, one for each token"),
                                (10, 2.4, f"{config.n_vocab:,} numbers"), (12, 0.8, "one id")):
        axes.plot([centre - width / 2, centre + width / 2], [-0.75, -0.75], color="0.5", lw=1)
        axes.text(centre, -0.92, what, ha="center", va="center", fontsize=8, color="0.35")
    return picture(fig, "The stations of a token: text, ids, embedding; in each layer norm, attention, norm, router and experts; then "
                   "final norm, head, soft cap, sampling, text. Below each the notebook that goes deeper.")


def ids_picture(run: Pass):
    """The tokens of the prompt, each over its id."""
    words = [(token, "#CFE6F5" if i % 2 else "#F5E3C0", BLACK) for i, token in enumerate(run.tokens)]
    wide = [max(len(token), len(str(i))) + 1 for (token, _, _), i in zip(words, run.ids)]
    lines = [[(token.center(n), back, ink) for (token, back, ink), n in zip(words, wide)],
             [(str(i).center(n), "white", "0.4") for i, n in zip(run.ids, wide)]]
    return picture(lines_figure(lines), "The tokens of the prompt and their ids: " + ", ".join(map(str, run.ids)))


def heads_picture(run: Pass, maps: dict[str, np.ndarray]):
    """Where each head of the last token looks, a panel for each entry of `maps`: weights (N, S)."""
    fig, panels = figure(9, 1.75 * len(maps) + 0.4, len(maps), 1, squeeze=False, sharex=True)
    for axes, (name, weight_NS) in zip(panels[:, 0], maps.items()):
        image = axes.imshow(weight_NS, aspect="auto", cmap="Blues", vmin=0, vmax=1)
        for n, s in np.ndindex(weight_NS.shape):
            if weight_NS[n, s] >= 0.1:
                axes.text(s, n, f"{weight_NS[n, s]:.1f}", ha="center", va="center", fontsize=7,
                          color="white" if weight_NS[n, s] > 0.6 else BLACK)
        axes.set(title=name, yticks=range(len(weight_NS)), yticklabels=[f"head {n}" for n in range(len(weight_NS))])
    panels[-1, 0].set_xticks(range(len(run.tokens)), run.tokens, rotation=45, ha="right", rotation_mode="anchor", family="monospace")
    fig.colorbar(image, ax=panels, label="weight", shrink=0.8)
    return picture(fig, "How much weight each head of the last token gives to each token of the prompt: " + "; ".join(maps))


def router_picture(probability_E: np.ndarray, chosen: Sequence[int]):
    """The router's probability for every expert; the chosen ones in colour, with their numbers."""
    fig, axes = figure(9, 2.4)
    n = np.arange(len(probability_E))
    axes.bar(n, probability_E, 1, color="0.75")
    axes.bar(chosen, probability_E[list(chosen)], 1, color=RED)
    axes.set(xlabel="expert", ylabel="probability", xlim=(-1, len(n)), ylim=(0, None), title=f"the {len(chosen)} chosen in red")
    return picture(fig, f"The router's probabilities of {len(n)} experts; chosen are " + ", ".join(map(str, sorted(map(int, chosen)))))


def stream_picture(run: Pass, n_layer: int):
    """How large the last token's state is after each layer, and what attention and feed-forward added to it there."""
    def size(name: str) -> float:
        return float(np.sqrt(np.mean(run.seen[name][-1].astype(np.float64) ** 2)))
    layers = np.arange(n_layer)
    fig, axes = figure(7, 2.8)
    axes.bar(layers - 0.2, [size(f"attn_post_norm-{i}") for i in layers], 0.4, color=ORANGE, label="added by attention")
    axes.bar(layers + 0.2, [size(f"ffn_post_norm-{i}") for i in layers], 0.4, color=RED, label="added by the feed-forward network")
    axes.plot(layers, [size(f"attn_out-{i}") for i in layers], "o-", color=BLUE, label="the state in between")
    axes.set(xlabel="layer", ylabel="root of the mean square", xticks=layers, ylim=(0, None))
    legend(axes, loc="upper left", bbox_to_anchor=(0, 1.28), ncols=3)
    return picture(fig, "Size of the last token's state in each layer, and of what attention and feed-forward add to it.")


def cap_picture(before_V: np.ndarray, cap: float, chosen: dict[str, int]):
    """The soft cap as a curve, with the logits of some tokens on it; below, where all logits are."""
    fig, axes = figure(6.5, 3)
    x = np.linspace(min(before_V.min(), -1.2 * cap), max(before_V.max(), 1.2 * cap), 300)
    axes.plot(x, x, color="0.7", lw=1, ls="--", label="no cap")
    axes.plot(x, cap * np.tanh(x / cap), color=BLUE, lw=2, label=f"{cap:g} tanh(x / {cap:g})")
    axes.plot(before_V, np.full(len(before_V), -1.1 * cap), "|", color="0.6", ms=6, label="all tokens")
    for (name, token), colour in zip(chosen.items(), (RED, GREEN, ORANGE)):
        axes.plot(before_V[token], cap * np.tanh(before_V[token] / cap), "o", color=colour, label=name)
    axes.set(xlabel="logit before the cap", ylabel="after", ylim=(-1.25 * cap, 1.25 * cap))
    legend(axes, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture(fig, "The soft cap: logits below the cap hardly change, larger ones bend towards it.")


def draw_picture(names: Sequence[str], p_K: np.ndarray, u: float):
    """The probabilities of the tokens laid end to end from 0 to 1, and the random number that hits one of them. Those below a hundredth
    are one grey block with their neighbours.
    """
    fig, axes = figure(9, 1.5)
    start = 0.0
    axes.barh(0, 1, color="0.85")
    for i, (name, p) in enumerate(zip(names, p_K)):
        if p >= 0.01:
            axes.barh(0, p, left=start, color=COLOURS[i % len(COLOURS)], alpha=0.75, ec="white")
        if p > 0.04:
            axes.text(start + p / 2, 0, f"{visible(name)}\n{p:.2f}", ha="center", va="center", fontsize=8, family="monospace",
                      parse_math=False)
        start += p
    axes.plot([u, u], [-0.55, 0.75], color=BLACK, lw=1.6)
    axes.text(u, 0.85, f"u = {u:.3f}", ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(0, 1), ylim=(-0.6, 1.5), yticks=[], xlabel="sum of the probabilities, in order of id")
    axes.spines["left"].set_visible(False)
    return picture(fig, f"Probabilities laid end to end; the random number {u:.3f} hits one of them.")
