"""Notebook 3: which tokens attend to which, from a model's own queries and keys; pictures of RoPE and of attention."""

from collections.abc import Sequence

import numpy as np

from refimpl.lab.explain.show import BLACK, BLUE, ORANGE, RED, figure, legend, picture, text_figure
from refimpl.loading.model import Model
from refimpl.model.blocks import layer_of
from refimpl.model.config import Config
from refimpl.reference.attention import attend
from refimpl.reference.ops import rope_angles


def weights_of(q_TNH: np.ndarray, k_SKH: np.ndarray, first_T: np.ndarray, end_T: np.ndarray) -> np.ndarray:
    """The weights in `attend`, float32 (N, T, S): what it gives when the values are the rows of an identity matrix.

    Values are as wide as a head, so the identity goes in H columns at a time. Position p of the keys is k_SKH[p].
    """
    n_keys, n_kv, width = k_SKH.shape
    unit_SS = np.eye(n_keys, -(-n_keys // width) * width, dtype=np.float32)
    parts = [attend(q_TNH, layer_of(k_SKH, np.repeat(unit_SS[:, None, at:at + width], n_kv, axis=1)), first_T, end_T)
             for at in range(0, n_keys, width)]
    return np.concatenate(parts, axis=-1)[..., :n_keys].transpose(1, 0, 2)


def attention_maps(model: Model, ids: Sequence[int]) -> list[np.ndarray]:
    """The weights of every layer on `ids`, float32 (N, T, T) each: row t of a head sums to 1 over the positions that token t sees.

    The queries and keys are those of the model, before its cache rounds keys to float16.
    """
    seen: dict[str, np.ndarray] = {}
    model.logits(ids, tap=lambda name, value: seen.setdefault(name, value.copy()) if name[1:].startswith("cur_pos-") else None)
    pos_T = np.arange(len(ids))
    maps = []
    for spec in model.config.layers:
        first_T = np.maximum(0, pos_T - spec.window + 1) if spec.window else np.zeros_like(pos_T)
        maps.append(weights_of(seen[f"Qcur_pos-{spec.index}"], seen[f"Kcur_pos-{spec.kv_from}"], first_T, pos_T + 1))
    return maps


HABITS = ("the token itself", "the one before", "the same token earlier", "after the same token", "<bos>", "elsewhere")


def habits(maps: Sequence[np.ndarray], ids: Sequence[int]) -> np.ndarray:
    """Where the weight of each head goes, on average over the text: (L, N, 6), shares in the order of HABITS.

    A place that fits several is counted for the first. "After the same token": the token there follows an earlier copy of the one that
    looks. The first two tokens do not count, for whom most of these are one and the same.
    """
    pos, ids = np.arange(len(ids)), np.asarray(ids)
    before = np.concatenate([[-1], ids[:-1]])
    free_TS, found = np.tril(np.ones((len(ids), len(ids)), bool)), []
    for fits in (pos[:, None] == pos, pos[:, None] == pos + 1, ids[:, None] == ids, ids[:, None] == before, pos == 0, free_TS):
        taken_TS = fits & free_TS
        free_TS = free_TS & ~taken_TS
        found.append([(weight_NTS * taken_TS).sum(axis=-1)[:, 2:].mean(axis=-1) for weight_NTS in maps])
    return np.array(found).transpose(1, 2, 0)


# ---- pictures

def turns_picture(frequencies: dict[str, np.ndarray], n_pos: int):
    """cos(angle) of every pair over `n_pos` positions, a panel for each entry of `frequencies` (angle per position of each pair)."""
    fig, panels = figure(9, 3.2, 1, len(frequencies))
    for axes, (name, frequency_R) in zip(panels, frequencies.items()):
        cos_TR, _ = rope_angles(np.arange(n_pos), frequency_R)
        image = axes.imshow(cos_TR.T, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest", origin="lower",
                            extent=(0, n_pos, 0, len(frequency_R)))
        axes.set(title=name, xlabel="position", ylabel="pair")
    fig.colorbar(image, ax=panels, label="cosine of the angle", shrink=0.9)
    return picture(fig, "Cosine of the rotation angle of each pair over positions.")


def periods_picture(frequencies: dict[str, np.ndarray], marks: dict[str, int]):
    """Positions that each pair takes for a whole turn; `marks` are distances worth a line. Pairs that never turn have no point."""
    fig, axes = figure(7, 3)
    for (name, frequency_R), colour in zip(frequencies.items(), (ORANGE, BLUE)):
        pair = np.flatnonzero(frequency_R > 1e-20)
        still = len(frequency_R) - len(pair)
        axes.semilogy(pair, 2 * np.pi / frequency_R[pair], color=colour, lw=2,
                      label=name + (f" ({still} pairs never turn)" if still else ""))
    for name, distance in marks.items():
        axes.axhline(distance, color="0.6", lw=0.8, ls="--")
        axes.text(1, distance * 1.15, name, fontsize=8, color="0.35")
    axes.set(xlabel="pair", ylabel="positions for a whole turn", xlim=(0, None))
    legend(axes, loc="lower right")
    return picture(fig, "Positions for a whole turn of each pair, in sliding and in full layers.")


def maps_picture(config: Config, maps: Sequence[np.ndarray]):
    """The largest weight over the heads of every layer: rows look at columns."""
    columns = 3
    fig, panels = figure(9, 2.9 * -(-len(maps) // columns), -(-len(maps) // columns), columns, sharex=True, sharey=True, squeeze=False)
    for axes, spec, weight_NTS in zip(panels.flat, config.layers, maps):
        image = axes.imshow(np.sqrt(weight_NTS.max(axis=0)), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"layer {spec.index}: " + ("everything" if spec.window is None else f"the latest {spec.window}"))
    for axes in panels[-1]:
        axes.set_xlabel("token looked at")
    for axes in panels[:, 0]:
        axes.set_ylabel("token that looks")
    bar = fig.colorbar(image, ax=panels, shrink=0.7, label="largest weight of any head")
    bar.set_ticks([0, 0.1**0.5, 0.25**0.5, 0.5**0.5, 1], labels=["0", "0.1", "0.25", "0.5", "1"])
    return picture(fig, "Attention maps of all layers: a band in sliding layers, a triangle in the full one.")


def habits_picture(share_LNB: np.ndarray):
    """How much of each head's weight goes where (columns as in HABITS)."""
    n_layer, n_head, n_habit = share_LNB.shape
    table = share_LNB.reshape(-1, n_habit)
    fig, axes = figure(7, 0.21 * len(table) + 1)
    axes.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=1)
    for row, column in np.ndindex(table.shape):
        axes.text(column, row, f"{table[row, column]:.2f}", ha="center", va="center", fontsize=7,
                  color="white" if table[row, column] < 0.55 else BLACK)
    axes.set(xticks=range(n_habit), yticks=range(len(table)),
             yticklabels=[f"layer {i}, head {n}" if n == 0 else f"head {n}" for i in range(n_layer) for n in range(n_head)])
    axes.set_xticks(range(n_habit), labels=HABITS[:n_habit], rotation=18, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for i in range(1, n_layer):
        axes.axhline(i * n_head - 0.5, color="white", lw=2)
    return picture(fig, "Share of each head's attention by kind of place.")


def look_picture(tokens: Sequence[str], weight_S: np.ndarray, query: int):
    """The text up to token `query`, which has a red ground; the darker the ground of the others, the more weight it gives them."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shades = [to_hex(colormaps["Blues"](0.9 * float(weight))) if weight > 0.01 else "#FFFFFF" for weight in weight_S[:query + 1]]
    inks = ["white" if weight > 0.6 else BLACK for weight in weight_S[:query]] + ["white"]
    fig = text_figure(tokens[:query + 1], shades[:query] + [RED], inks, width=72)
    best = np.argsort(-weight_S, kind="stable")[:3]
    return picture(fig, "Text shaded by attention weight; the most goes to " + ", ".join(repr(tokens[s]) for s in best))
