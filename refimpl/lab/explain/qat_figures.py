"""Notebook 2: rounding to the grids of the training, in NumPy; pictures of losses, of weights on the grid, of changing codes."""

from collections.abc import Mapping, Sequence

import numpy as np

from refimpl.formats.quants.basic.q4_0 import symmetric_codes
from refimpl.formats.quants.codecs import dequantize, quantize
from refimpl.lab.explain.show import BLUE, GREEN, ORANGE, RED, figure, legend, picture

ROUNDED, TRAINED = ORANGE, BLUE
BINS_PER_LEVEL = 16


def on_signed_maximum(w: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 weights -> (the weights rounded to the codes -half .. half - 1, the scale of each block of 32). Half 8 is Q4_0.

    The numbers of `SignedMaximum` in refimpl/tiny/training/grids.py, which needs torch.
    """
    d, q = symmetric_codes(w.reshape(-1, 32), half)
    d = d.astype(np.float16).astype(np.float32)
    return (d[:, None] * (q.astype(np.float32) - half)).reshape(w.shape), d


def on_w4a16(w: np.ndarray) -> np.ndarray:
    """float32 weights -> the weights of a W4A16 file: the numbers of `Symmetric` in refimpl/tiny/training/grids.py."""
    blocks = w.reshape(-1, 32)
    scale = _bfloat16(np.abs(blocks).max(axis=1, keepdims=True) / np.float32(7.5))
    q = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0).round().clip(-8, 7).astype(np.int8)
    return _bfloat16(scale * q.astype(np.float32)).reshape(w.shape)


def _bfloat16(x: np.ndarray) -> np.ndarray:
    return dequantize(quantize(x, "BF16"), "BF16")


def block_picture(weights: np.ndarray, halves: Mapping[str, int]):
    """One block of 32 weights, rounded to the grids of 2 * half codes (title -> half): the lines are what can be stored."""
    fig, panels = figure(9, 2.6, 1, len(halves), sharey=True)
    for axes, (name, half) in zip(panels, halves.items()):
        values, (d,) = on_signed_maximum(weights, half)
        for code in range(-half, half):
            axes.axhline(code * d, color="0.9", lw=0.8, zorder=0)
        axes.vlines(np.arange(32), weights, values, color=RED, lw=1)
        axes.plot(np.arange(32), weights, "o", color="0.4", ms=3, label="weight")
        axes.plot(np.arange(32), values, "s", color=BLUE, ms=3, label="stored")
        axes.set(title=name, xlabel="index in the block", ylim=(-1.15 * np.abs(weights).max(), 1.15 * np.abs(weights).max()))
    legend(panels[-1])
    return picture(fig, "A block of 32 weights and where each grid puts them.")


def comparison_picture(found: Mapping[str, object], titles: Mapping[str, str]):
    """Bits per byte above the float control of the same seed: rounded afterwards and trained on the grid, every seed a dot."""
    control = {row["seed"]: row["bits_per_byte"] for row in found["rows"] if row["stored"] == "float"}
    names = [name for name in titles if name != "float"]
    groups = ((names[:3], "4 bits"), (names[3:], "3 and 2 bits"))
    fig, panels = figure(9, 3.2, 1, 2)
    for axes, (shown, title) in zip(panels, groups):
        for i, name in enumerate(shown):
            for trained, colour, shift, label in (("float", ROUNDED, -0.12, "control, rounded"), (name, TRAINED, 0.12, "trained on it")):
                above = [row["bits_per_byte"] - control[row["seed"]] for row in found["rows"]
                         if (row["trained"], row["stored"]) == (trained, name)]
                axes.plot([i + shift] * len(above), above, "o", color=colour, ms=5, alpha=0.8, label=label if i == 0 else None)
                if above:
                    axes.hlines(np.mean(above), i + shift - 0.09, i + shift + 0.09, color=colour, lw=2)
        axes.axhline(0, color="0.6", lw=0.8)
        axes.set(xticks=range(len(shown)), xticklabels=[titles[name] for name in shown], xlim=(-0.5, len(shown) - 0.5), title=title,
                 ylabel="bits per byte above the float control")
    legend(panels[1])
    return picture(fig, "Bits per byte above the control for every grid: rounded afterwards and trained on the grid.")


Grids = Mapping[str, tuple[Sequence[Mapping[str, object]], Sequence[Mapping[str, object]], str, int]]
"""Title -> (histograms of a training at several steps, of its control, grid, half of its codes)."""


def histogram_picture(histories: Grids):
    """A panel for each entry: where weights lie between the codes of their block after the last step, the control's as a line."""
    fig, panels = figure(9, 2.6, 1, len(histories), squeeze=False)
    for axes, (title, (trained, control, grid, half)) in zip(panels[0], histories.items()):
        centres = (np.arange((2 * half + 1) * BINS_PER_LEVEL) + 0.5) / BINS_PER_LEVEL - half - 0.5
        ours, theirs = (np.array(histograms[-1][grid]) / sum(histograms[-1][grid]) * BINS_PER_LEVEL for histograms in (trained, control))
        axes.fill_between(centres, ours, color=BLUE, lw=0, step="mid", alpha=0.7, label="trained on it")
        axes.step(centres, theirs, color="0.2", lw=1, where="mid", label="control")
        for border in range(-half, half - 1):
            axes.axvline(border + 0.5, color=RED, lw=0.6, ls=":")
        # the largest weight of every block has the code -half by definition: it is cut off
        axes.set(title=f"{title}, step {trained[-1]['step']}", xlabel="weight / scale of its block", yticks=[],
                 xticks=range(-half, half + 1, max(1, half // 2)), ylim=(0, 1.15 * ours[np.abs(centres + half) > 0.2].max()))
    legend(panels[0, 0], loc="upper right")
    return picture(fig, "Histograms of weights in units of their block's scale after training on a grid, and of the float control: nearly "
                   "the same bells; with 2 bits the top is flatter.")


def density_picture(histories: Grids):
    """A panel for each entry: the density of weights at each point after the last step, divided by the control's."""
    fig, panels = figure(9, 2.6, 1, len(histories), squeeze=False)
    for axes, (title, (trained, control, grid, half)) in zip(panels[0], histories.items()):
        centres = (np.arange((2 * half + 1) * BINS_PER_LEVEL) + 0.5) / BINS_PER_LEVEL - half - 0.5
        inside = np.abs(centres) < half - 0.2
        ours, theirs = (np.array(histograms[-1][grid])[inside] for histograms in (trained, control))
        axes.plot(centres[inside], (ours / ours.sum()) / (theirs / theirs.sum()), color=BLUE, lw=1.2)
        for border in range(-half, half - 1):
            axes.axvline(border + 0.5, color=RED, lw=0.6, ls=":")
        axes.axhline(1, color="0.6", lw=0.8)
        axes.set(title=title, xlabel="weight / scale of its block", ylabel="density against the control's", xticks=range(-half, half + 1,
                 max(1, half // 4)))
    return picture(fig, "Density of the weights relative to the control's; dotted lines are the borders between codes.")


def flips_picture(histories: Mapping[str, Mapping[str, object]], titles: Mapping[str, str]):
    """Share of codes that change in a step, mean of ten steps."""
    fig, axes = figure(6.5, 2.8)
    for name, colour in zip(histories, (BLUE, ORANGE, GREEN, RED, "0.4")):
        flips = histories[name]["flips"]
        axes.plot(10 * np.arange(len(flips)) + 5, np.array(flips) * 100, "o-", ms=3, color=colour, label=titles[name])
    axes.set(xlabel="step", ylabel="codes that change in a step, %", ylim=(0, None))
    legend(axes)
    return picture(fig, "Share of codes that change in a step, falling with the learning rate.")


def releases_picture(found: Mapping[str, object], titles: Mapping[str, str]):
    """Agreement with a bfloat16 release after conversion to Q4_0: "absmax", by the rule, and "recovered", by finding the grid."""
    mean = {(m["trained"], m["converted"]): m for m in found["releases_mean"]}
    names = [name for name in titles if (name, "absmax") in mean]
    fig, (left, right) = figure(9, 2.8, 1, 2)
    for axes, metric, factor, label in ((left, "top1", 100, "same top-1 token, %"), (right, "kl", 1, "KL from the release, nats")):
        for shift, converted, colour in ((-0.2, "absmax", ORANGE), (0.2, "recovered", BLUE)):
            heights = [factor * mean[name, converted][metric] for name in names]
            axes.bar(np.arange(len(names)) + shift, heights, 0.36, color=colour, label=converted)
        axes.set(xticks=range(len(names)), xticklabels=[titles[name] for name in names], ylabel=label)
    legend(right)
    return picture(fig, "Agreement of converted files with the release, by the rule and by finding the grid.")
