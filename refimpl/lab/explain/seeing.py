"""What happens between a picture and the text model: where patches look, what their places are to them, and what each step costs."""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from refimpl.formats.quants.codecs import dequantize
from refimpl.formats.source import TensorSource
from refimpl.lab.explain.show import BLUE, GREEN, ORANGE, RED, figure, legend, picture
from refimpl.loading.model import Model
from refimpl.loading.projector import Projector
from refimpl.media.patches import PATCH, POOL, n_tokens
from refimpl.model.rotation import angles_at
from refimpl.model.soft import Soft, SoftTokens
from refimpl.model.towers.config import ROPE_BASE, VisionConfig
from refimpl.reference.ops import rope_frequencies, rotate, softmax
from refimpl.text.prompt import Part

# The vision towers of the published models (transformers' Gemma4VisionConfig in their config.json); n_out is the text model's width.
TOWERS = {
    "E2B": VisionConfig(side=16, n_embd=768, n_layer=16, n_head=12, head_dim=64, n_ff=3072, n_positions=10240, norm_eps=1e-6, n_out=1536),
    "26B-A4B": VisionConfig(side=16, n_embd=1152, n_layer=27, n_head=16, head_dim=72, n_ff=4304, n_positions=10240, norm_eps=1e-6,
                            n_out=2816),
}
CELL_12B, WIDTH_12B = 48 * 48 * 3, 3840     # numbers of a cell, and width of what two matrices make of it


def tower_work(config: VisionConfig, n_patches: int) -> tuple[float, float]:
    """Floating-point operations of the tower for a picture: (its matrices, the products of queries, keys and values)."""
    d, a = config.n_embd, config.n_head * config.head_dim
    layer = 4 * d * a + 3 * d * config.n_ff
    matrices = n_patches * (3 * config.side**2 * d + config.n_layer * layer) + n_patches // POOL**2 * d * config.n_out
    return 2.0 * matrices, 4.0 * config.n_layer * a * n_patches**2


def cells_work(n_cells: int) -> float:
    """The same of the 12B, which has no tower but two matrices."""
    return 2.0 * n_cells * (CELL_12B * WIDTH_12B + WIDTH_12B**2)


def attention_of(projector: Projector, patches_TP: np.ndarray, pos_T2: np.ndarray) -> list[np.ndarray]:
    """The weights of every layer of a tower, float32 (N, T, T) each: row t of a head sums to 1 over all patches."""
    seen: dict[str, np.ndarray] = {}
    projector.image_tokens(patches_TP, pos_T2, tap=lambda name, value: seen.setdefault(name, value.copy()) if "cur_pos" in name else None)
    return [softmax(np.einsum("TNH,SNH->NTS", seen[f"Qcur_pos-{i}"], seen[f"Kcur_pos-{i}"]))
            for i in range(projector.config.vision.n_layer)]


def rotation_scores(head_dim: int, pos_T2: np.ndarray, centre: int) -> tuple[np.ndarray, np.ndarray]:
    """What the rotation alone makes of the score between patch `centre` and every patch, for a query and a key that are equal in all their
    pairs: (of the half that turns by x, of the half that turns by y), 1 where nothing turned.
    """
    half = head_dim // 2
    frequency = rope_frequencies(half, ROPE_BASE, np.ones(half // 2, np.float32))
    found = []
    for axis in (0, 1):
        turned_TNH = rotate(np.full((len(pos_T2), 1, half), half**-0.5, np.float32), *angles_at(pos_T2[:, axis], frequency))
        found.append(turned_TNH[:, 0] @ turned_TNH[centre, 0])
    return found[0], found[1]


def sight(soft: Soft, ids: Sequence[int], window: int | None, looks_ahead: bool) -> np.ndarray:
    """Which tokens a token sees in a layer, bool (T, T): in a sliding one (of this window) pictures see themselves where the model looks
    ahead; full ones (None) are causal.
    """
    ids_T, pos_T = np.array(ids), np.arange(len(ids))
    end_T = soft.ends(ids_T, pos_T) if looks_ahead and window is not None else pos_T + 1
    first_T = np.zeros_like(pos_T) if window is None else np.maximum(0, pos_T - window + 1)
    return (pos_T >= first_T[:, None]) & (pos_T < end_T[:, None])


def next_probabilities(model: Model, projector: Projector, parts: Sequence[Part]) -> np.ndarray:
    """The probability of every token behind a prompt of parts, float64 (V,)."""
    return softmax(model.logits(parts, projector=projector)[-1].astype(np.float64))


def chance_of(model: Model, soft_TD: np.ndarray, ids: Sequence[int], token: int) -> float:
    """The probability of `token` behind `ids`, whose negative ones stand for the rows of `soft_TD`."""
    together = model.config.looks_ahead_in_images
    part = SoftTokens(sha256(soft_TD.tobytes()).digest(), len(soft_TD), together, lambda look: soft_TD.copy())
    rows, soft = iter(part.ids), Soft([part])
    own = [next(rows) if i < 0 else i for i in ids]
    return float(softmax(model.head(model.prefill(own, model.new_cache(), soft=soft)[-1:])[0].astype(np.float64))[token])


def falls_without(model: Model, soft_TD: np.ndarray, blank_TD: np.ndarray, ids: Sequence[int], token: int) -> np.ndarray:
    """How the probability of `token` changes where one soft token after the other is replaced with that of a blank picture: (n,)."""
    whole, found = chance_of(model, soft_TD, ids, token), []
    for i in range(len(soft_TD)):
        changed_TD = soft_TD.copy()
        changed_TD[i] = blank_TD[i]
        found.append(chance_of(model, changed_TD, ids, token) - whole)
    return np.array(found)


def numbers_of(file: TensorSource, name: str) -> np.ndarray:
    """A tensor of a projector as float32, with one row for each of its first dimension."""
    info = file.tensors[name]
    return dequantize(file.raw(name), info.type).reshape(info.shape[0], -1)


# ---- pictures

def grid_picture(rgb_HWC: np.ndarray, side: int = PATCH, pool: int = POOL, marks: Sequence[tuple[int, str]] = ()):
    """A scaled picture with its patches (thin lines) and its soft tokens (thick). `marks`: patches with a coloured frame."""
    from matplotlib.patches import Rectangle

    height, width, _ = rgb_HWC.shape
    fig, axes = figure(8, 8 * height / width)
    axes.imshow(rgb_HWC, interpolation="nearest", extent=(0, width, height, 0))
    for at in range(0, width + 1, side):
        axes.axvline(at, color=BLUE, lw=1.4 if at % (side * pool) == 0 else 0.3)
    for at in range(0, height + 1, side):
        axes.axhline(at, color=BLUE, lw=1.4 if at % (side * pool) == 0 else 0.3)
    for patch, colour in marks:
        y, x = divmod(patch, width // side)
        axes.add_patch(Rectangle((x * side, y * side), side, side, fill=False, color=colour, lw=2.5))
    axes.set(xticks=range(0, width + 1, side * pool), yticks=range(0, height + 1, side * pool), xlabel="pixels")
    return picture(fig, f"A picture of {width} x {height} pixels cut into {width // side} x {height // side} patches, "
                   f"{pool} x {pool} of them a soft token.")


def filters_picture(matrix_DP: np.ndarray, side: int = PATCH):
    """The rows of the matrix for patches as little pictures, the largest first; grey is zero."""
    order = np.argsort(-np.linalg.norm(matrix_DP, axis=1), kind="stable")
    columns = 16
    rows = -(-len(order) // columns)
    fig, panels = figure(8, 0.53 * rows, rows, columns)
    for axes in panels.flat:
        axes.axis("off")
    for axes, row in zip(panels.flat, order):
        planes = matrix_DP[row].reshape(3, side, side).transpose(1, 2, 0)
        axes.imshow(0.5 + 0.5 * planes / np.abs(planes).max(), interpolation="nearest")
    return picture(fig, f"The {len(order)} rows of the matrix that takes patches, as pictures.")


def places_picture(values: dict[str, np.ndarray], n_columns: int, centre: int, label: str):
    """One number for each patch or soft token of a picture, a panel for each entry; `centre` is marked."""
    fig, panels = figure(4.5 * len(values), 2.3, 1, len(values), squeeze=False)
    y, x = divmod(centre, n_columns)
    for axes, (name, value_T) in zip(panels[0], values.items()):
        image = axes.imshow(value_T.reshape(-1, n_columns), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.plot(x, y, "o", color="black", ms=4)
        axes.set(title=name, xlabel="x", ylabel="y")
    fig.colorbar(image, ax=panels, label=label, shrink=0.9)
    return picture(fig, f"{label} by place: " + "; ".join(values))


def looks_picture(rgb_HWC: np.ndarray, maps: Sequence[np.ndarray], query: int, side: int = PATCH):
    """Where one patch (red frame) looks, by layer (rows) and head (columns): the darker the red, the more weight a patch gets."""
    from matplotlib.patches import Rectangle

    n_columns, n_head = rgb_HWC.shape[1] // side, len(maps[0])
    fig, panels = figure(9, 2.3 * len(maps), len(maps), n_head, squeeze=False)
    y, x = divmod(query, n_columns)
    for i, row in enumerate(panels):
        for n, axes in enumerate(row):
            weight = maps[i][n, query].reshape(-1, n_columns)
            axes.imshow(rgb_HWC, extent=(-0.5, n_columns - 0.5, len(weight) - 0.5, -0.5), alpha=0.45)
            axes.imshow(weight / weight.max(), cmap="Reds", alpha=0.65, interpolation="nearest")
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, color=BLUE, lw=2))
            axes.set(title=f"layer {i}, head {n}: at most {weight.max():.0%} on one patch", xticks=(), yticks=())
    return picture(fig, "Where one patch looks in each layer and head of the tower.")


def similarity_picture(before_TD: np.ndarray, after_TD: np.ndarray, n_columns: int, query: int):
    """Cosine of one patch's row with all others, before the first layer and behind the last."""
    values = {}
    for name, x_TD in (("in front of the first layer", before_TD), ("behind the last layer", after_TD)):
        unit_TD = x_TD / np.linalg.norm(x_TD, axis=1, keepdims=True)
        values[name] = unit_TD @ unit_TD[query]
    return places_picture(values, n_columns, query, "cosine")


def sight_picture(masks: dict[str, np.ndarray]):
    """Which tokens see which, a panel for each mask."""
    fig, panels = figure(3.1 * len(masks), 3.1, 1, len(masks), squeeze=False)
    for axes, (name, mask_TT) in zip(panels[0], masks.items()):
        axes.imshow(mask_TT, cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        axes.set(title=name, xlabel="token seen", ylabel="token that sees")
    return picture(fig, "Which tokens see which: " + "; ".join(masks))


def next_picture(tokens: Sequence[str], chances: dict[str, np.ndarray]):
    """Bars of the probabilities of a few next tokens, with a colour for each prompt."""
    fig, axes = figure(8, 2.6)
    width = 0.8 / len(chances)
    for i, ((name, chance), colour) in enumerate(zip(chances.items(), (BLUE, ORANGE, GREEN, RED))):
        axes.bar(np.arange(len(tokens)) + i * width, chance, width, color=colour, label=name)
    axes.set(xticks=np.arange(len(tokens)) + 0.4 - width / 2, xticklabels=tokens, ylabel="probability", ylim=(0, 1))
    legend(axes)
    return picture(fig, "Probabilities of the next token: " + "; ".join(chances))


def work_picture(budgets: Sequence[int], size: tuple[int, int]):
    """What a picture of this size (height, width) costs in two towers, by budget: matrices, and attention, which grows with its square."""
    fig, panels = figure(8, 2.8, 1, len(TOWERS))
    tokens = [n_tokens(*size, budget) for budget in budgets]
    for axes, (name, config) in zip(panels, TOWERS.items()):
        matrices, attention = np.array([tower_work(config, POOL**2 * n) for n in tokens]).T / 1e12
        axes.bar(range(len(tokens)), matrices, color=BLUE, label="matrices")
        axes.bar(range(len(tokens)), attention, bottom=matrices, color=ORANGE, label="attention")
        axes.set(title=name, xticks=range(len(tokens)), xticklabels=budgets, xlabel="budget", ylabel="10^12 operations")
        legend(axes)
    return picture(fig, "Operations of the vision towers by budget.")
