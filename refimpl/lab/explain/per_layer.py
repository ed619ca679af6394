"""Notebook 8: what embeddings in every layer, shared keys and values and a centroid head do in a model like E2B; pictures."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from refimpl.decode.drafter import Drafter
from refimpl.formats.matrix import Matrix
from refimpl.lab.explain.show import BLUE, COLOURS, RED, figure, legend, picture
from refimpl.lab.explain.weight_traffic import part_of, tensors_of
from refimpl.loading.model import Model
from refimpl.model.drafter import CentroidHead
from refimpl.model.tap import Look, no_tap
from refimpl.reference.ops import softmax

PARTS = ("embedding and head", "per-layer table", "attention", "feed-forward", "the rest")


def parts_of(name: str, recipe: str = "google-q4_0") -> dict[str, tuple[int, int, int]]:
    """(weights, bytes in the file, bytes that a token reads) of each part of a published model, from its shape (files/synth.py)."""
    found = {part: (0, 0, 0) for part in PARTS}
    for tensor, n_weights, n_bytes, row_bytes in tensors_of(name, recipe):
        table = tensor == "per_layer_token_embd.weight"
        labels = {"head": PARTS[0], "attention": PARTS[2], "dense feed-forward": PARTS[3]}
        part = PARTS[1] if table else labels.get(part_of(tensor), PARTS[4])
        found[part] = tuple(a + b for a, b in zip(found[part], (n_weights, n_bytes, row_bytes if table else n_bytes)))
    return found


def bits_per_token(model: Model, texts: Sequence[Sequence[int]], look: Look = no_tap) -> float:
    """Bits the model needs for a token of the texts, on average; each from an empty cache, its first token not counted."""
    nats, n_tok = 0.0, 0
    for ids in texts:
        logit_TV = model.head(model.prefill(ids[:-1], model.new_cache(), tap=look))
        p_T = softmax(logit_TV.astype(np.float64))[np.arange(len(ids) - 1), ids[1:]]
        nats, n_tok = nats - float(np.log(p_T).sum()), n_tok + len(ids) - 1
    return nats / n_tok / math.log(2)


def erase(names: Collection[str]) -> Look:
    """A tap that makes these values zero, and so what the rest of the run reads of them."""
    def look(name: str, value: np.ndarray):
        if name in names:
            value[:] = 0
    return look


def neighbours(table_VP: np.ndarray, token: int, n: int) -> list[int]:
    """The `n` tokens whose rows point most in the direction of this token's."""
    unit_VP = table_VP / np.maximum(np.linalg.norm(table_VP, axis=1, keepdims=True), 1e-12)
    score_V = unit_VP @ unit_VP[token]
    score_V[token] = -np.inf
    return [int(i) for i in np.argsort(-score_V, kind="stable")[:n]]


def per_layer_table(model: Model) -> np.ndarray:
    """The table of per-layer inputs, float32 (V, L, P)."""
    c = model.config
    return model.weights.per_layer.table_VLP.take(np.arange(c.n_vocab)).reshape(c.n_vocab, c.n_layer, c.n_ple)


# ---- the drafter's head

def draft_states(model: Model, drafter: Drafter, ids: Sequence[int]) -> np.ndarray:
    """The drafter's normed state for the token after each one of the text but the first, float32 (T - 1, D)."""
    cache, found = model.new_cache(), []

    def keep(name: str, value: np.ndarray):
        if name == "draft0.result_norm":
            found.append(value[0].copy())
    for before, token in zip(ids[:-1], ids[1:]):
        state_C = model.prefill([before], cache)[-1]
        drafter.draft(token, state_C, cache, 1, tap=keep)
    return np.array(found)


def head_rows(drafter: Drafter) -> Matrix:
    """The matrix of the drafter's head, (V, D), as in its file."""
    info = drafter.file.tensors["token_embd.weight"]
    return Matrix(drafter.file.raw(info.name), info.type)


def with_groups(drafter: Drafter, group_V: np.ndarray, n_top: int) -> Drafter:
    """The same drafter with a centroid head: groups of equal size, the centroid of each the mean of its rows."""
    table, backend = head_rows(drafter), drafter.target.backend
    token_ZV = np.argsort(group_V, kind="stable").reshape(group_V.max() + 1, -1)
    centroid_ZD = np.ascontiguousarray(table.float32()[token_ZV].mean(axis=1))
    with backend.running():
        head = CentroidHead(backend.prepare(Matrix(centroid_ZD.view(np.uint8), "F32")), token_ZV,
                            backend.prepare(Matrix(table.raw[token_ZV], table.type)), n_top)
    return Drafter(drafter.file, drafter.config, replace(drafter.weights, head=head), drafter.target)


def group_ranks(drafter: Drafter, z_TD: np.ndarray) -> np.ndarray:
    """The rank, from 0, that the group of the whole head's token has among the scores of the centroids, int (T,)."""
    head, backend = drafter.weights.head, drafter.target.backend
    every_X = np.repeat(np.arange(len(head.token_ZV))[None], len(z_TD), axis=0)
    with backend.running():
        best_T = backend.matmul_chosen(z_TD, every_X, head.table_ZVD).max(axis=-1).argmax(axis=-1)
        score_TZ = backend.matmul(z_TD, head.centroid_ZD)
    return (score_TZ > np.take_along_axis(score_TZ, best_T[:, None], axis=1)).sum(axis=1)


# ---- pictures

def parts_picture(parts: dict[str, tuple[int, int, int]]):
    """Bytes of a model by part: in the file, and those that one token reads."""
    fig, axes = figure(9, 1.9)
    for row, column in enumerate((1, 2)):
        start = 0.0
        for (part, counts), colour in zip(parts.items(), COLOURS):
            size = counts[column] / 1e9
            axes.barh(row, size, left=start, color=colour, label=part if row == 0 else None)
            start += size
        axes.text(start, row, f" {start:.2f}", va="center", fontsize=9)
    axes.set(yticks=(0, 1), yticklabels=("in the file", "read for a token"), ylim=(1.6, -0.6), xlabel="GB")
    axes.margins(x=0.08)
    legend(axes, ncols=len(parts), loc="lower left", bbox_to_anchor=(-0.12, 1))
    return picture(fig, "Bytes by part: " + "; ".join(f"{part} {counts[1] / 1e9:.2f} GB in the file, {counts[2] / 1e9:.2f} read"
                                                      for part, counts in parts.items()))


def costs_picture(bits: dict[str, float], whole: float):
    """Bits per token lost by each change, as bars from 0, which is the whole model."""
    fig, axes = figure(7.5, 0.28 * len(bits) + 0.9)
    lost = [value - whole for value in bits.values()]
    axes.barh(range(len(bits)), lost, color=BLUE)
    for row, value in enumerate(lost):
        axes.text(max(value, 0), row, f" {value:+.3f}", va="center", fontsize=8)
    axes.set(yticks=range(len(bits)), yticklabels=list(bits), ylim=(len(bits) - 0.4, -0.6), xlabel=f"bits per token more than {whole:.3f}")
    axes.margins(x=0.12)
    return picture(fig, "Bits per token lost: " + "; ".join(f"{name} {value:+.3f}" for name, value in zip(bits, lost)))


def shared_picture(maps: Sequence[np.ndarray], query: int, tokens: Sequence[str], layers: Sequence[int]):
    """Where one token looks in each head of layers that share keys and values, a panel for each layer."""
    fig, panels = figure(9, 1.35 * len(layers) + 0.9, len(layers), 1, sharex=True, squeeze=False)
    first = max(0, query - 31)
    for axes, i in zip(panels[:, 0], layers):
        image = axes.imshow(maps[i][:, query, first:query + 1], aspect="auto", cmap="Blues", vmin=0, vmax=1)
        axes.set(title=f"layer {i}", yticks=range(len(maps[i])), yticklabels=[f"head {n}" for n in range(len(maps[i]))])
    panels[-1, 0].set_xticks(range(query + 1 - first), tokens[first:query + 1], rotation=60, ha="right", rotation_mode="anchor",
                             family="monospace", parse_math=False)
    fig.colorbar(image, ax=panels, label="weight", shrink=0.8)
    return picture(fig, f"Where the token {tokens[query]!r} looks in the layers {', '.join(map(str, layers))}, which read the same keys.")


def ranks_picture(ranks: Mapping[str, np.ndarray], n_group: int, n_top: int):
    """How often the group with the right token has each rank among the centroids' scores, a panel for each kind of centroid."""
    fig, panels = figure(9, 2.6, 1, len(ranks), sharey=True, squeeze=False)
    found = {}
    for axes, (name, rank_T) in zip(panels[0], ranks.items()):
        share = np.bincount(rank_T, minlength=n_group)[:n_group] / len(rank_T)
        found[name] = share[:n_top].sum()
        axes.bar(np.arange(n_group) + 1, share, 0.9, color=[BLUE if i < n_top else RED for i in range(n_group)])
        axes.axvline(n_top + 0.5, color="0.4", lw=1, ls="--")
        axes.set(title=f"{name}: {found[name]:.1%} in the best {n_top}", xlabel="rank of the group that has the whole head's token",
                 xlim=(0, max(rank_T.max() for rank_T in ranks.values()) + 2))
    panels[0, 0].set(ylabel="share of tokens", ylim=(0, None))
    return picture(fig, f"Rank of the group with the whole head's token, in the best {n_top}: "
                   + "; ".join(f"{name} {share:.1%}" for name, share in found.items()) + ".")
