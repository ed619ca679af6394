"""Pictures of routing: experts by kind of token, load, how few experts would do, bytes, experts of several rows."""

from collections.abc import Sequence

import numpy as np

from refimpl.lab.explain.reads import PARTS
from refimpl.lab.explain.routing import KINDS, distinct, distinct_if_independent
from refimpl.lab.explain.show import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, figure, legend, picture


def kinds_picture(shares: dict[str, np.ndarray], kind_T: np.ndarray):
    """A panel for each entry: which share of the tokens of a kind went through an expert; experts ordered by the kind they prefer."""
    fig, panels = figure(9, 1.75 * len(shares) + 0.4, len(shares), 1, squeeze=False)
    present = [kind for kind in range(len(KINDS)) if (kind_T == kind).any()]
    for axes, (name, share) in zip(panels[:, 0], shares.items()):
        share = share[present]
        liking = share / share.mean(axis=0)
        order = np.lexsort((-liking.max(axis=0), liking.argmax(axis=0)))
        image = axes.imshow(np.sqrt(share[:, order]), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        axes.set(title=name, xticks=[], yticks=range(len(present)), yticklabels=[f"{KINDS[k]} ({(kind_T == k).sum():,})" for k in present])
    panels[-1, 0].set_xlabel(f"{share.shape[1]} experts, those that prefer the same kind side by side")
    bar = fig.colorbar(image, ax=panels, shrink=0.7, label="tokens of this kind that go\nthrough the expert, %")
    bar.set_ticks([0, 0.05**0.5, 0.2**0.5, 0.5**0.5, 1], labels=["0", "5", "20", "50", "100"])
    return picture(fig, "Heat maps of experts by kind of token.")


def load_picture(loads: Sequence[np.ndarray]):
    """Sorted load of the experts of every layer, as a multiple of the mean."""
    from matplotlib import colormaps

    fig, axes = figure(7, 3)
    for i, load_E in enumerate(loads):
        axes.plot(np.sort(load_E)[::-1], color=colormaps["viridis"](0.9 * i / max(1, len(loads) - 1)), lw=1.6, label=f"layer {i}")
    axes.axhline(1, color="0.5", lw=0.8, ls="--")
    axes.set(xlabel="experts, the busiest first", ylabel="tokens, mean = 1", ylim=(0, None), xlim=(0, len(load_E) - 1))
    legend(axes, ncols=2)
    return picture(fig, "Load of the experts, sorted, for every layer.")


def fewer_picture(probability_LTE: np.ndarray, n_used: int, counts: Sequence[int], error: np.ndarray, bits: Sequence[float]):
    """Three panels over the number of experts: probability they hold, error of the output against `n_used`, bits per token."""
    fig, (left, middle, right) = figure(9, 3, 1, 3)
    held = np.sort(probability_LTE, axis=-1)[..., ::-1].cumsum(axis=-1).mean(axis=(0, 1))
    left.semilogx(np.arange(1, len(held) + 1), held, base=2, color=BLUE, lw=2)
    left.set(ylabel="probability they hold, mean", ylim=(0, 1.02))
    middle.semilogx(counts, error.mean(axis=1), "o-", base=2, color=ORANGE, ms=4)
    middle.fill_between(counts, error.min(axis=1), error.max(axis=1), color=ORANGE, alpha=0.25, lw=0)
    middle.set(ylabel=f"error of the experts' output\n(against {n_used} experts)", ylim=(0, None))
    right.semilogx(counts, bits, "o-", base=2, color=GREEN, ms=4)
    right.set(ylabel="bits per token, the whole model")
    for axes in (left, middle, right):
        axes.axvline(n_used, color="0.5", lw=0.8, ls="--")
        axes.set_xlabel("experts, the likeliest first")
        axes.xaxis.set_major_formatter("{x:.0f}")
    return picture(fig, "Probability held, error and bits per token over the number of experts that run.")


def bytes_picture(reads: dict[str, dict[str, float]]):
    """Stacked bars of what a token reads, by part (see lab/explain/reads.py)."""
    fig, axes = figure(9, 0.5 * len(reads) + 1.1)
    for row, parts in enumerate(reads.values()):
        start = 0.0
        for part, colour in zip(PARTS, (BLUE, SKY, ORANGE, PINK, BLACK)):
            axes.barh(row, parts[part] / 1e9, left=start, color=colour, label=part if row == 0 else None)
            start += parts[part] / 1e9
        axes.text(start, row, f" {start:.2f}", va="center", fontsize=9)
    axes.set(yticks=range(len(reads)), yticklabels=list(reads), ylim=(len(reads) - 0.4, -0.6), xlabel="weights read for one token, GB")
    axes.margins(x=0.08)
    legend(axes, ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1))
    return picture(fig, "Bytes of weights that a token reads, by part.")


def rows_picture(id_LTX: np.ndarray, shuffled_LTX: np.ndarray, n_expert: int, most: int):
    """Distinct experts of 1 to `most` rows: neighbours in a text, the same rows shuffled, and by the formula."""
    n = np.arange(1, most + 1)
    fig, axes = figure(7, 3.4)
    axes.plot(n, distinct_if_independent(n_expert, id_LTX.shape[-1], n), color=BLACK, ls="--", lw=1.2, label="by the formula")
    for rows_LTX, colour, name in ((shuffled_LTX, RED, "tokens from anywhere"), (id_LTX, BLUE, "neighbouring tokens")):
        found = np.array([[distinct(id_TX, k) for k in n] for id_TX in rows_LTX])
        axes.plot(n, found.mean(axis=0), color=colour, lw=2, label=f"{name}: mean of the layers")
        axes.fill_between(n, found.min(axis=0), found.max(axis=0), color=colour, alpha=0.2, lw=0)
    axes.set(xlabel="rows in one call", ylabel=f"distinct experts of {n_expert}, in a layer", xlim=(1, most), ylim=(0, None))
    legend(axes, loc="upper left")
    return picture(fig, "Distinct experts over the number of rows in a call.")
