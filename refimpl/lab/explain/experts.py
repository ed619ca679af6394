"""Notebook 4: which experts a text is routed to, for which kind of token, how evenly, and what fewer experts would change; pictures."""

import io
import keyword
import tokenize
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from refimpl.lab.explain.show import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, figure, legend, picture
from refimpl.lab.explain.weight_traffic import PARTS, distinct_if_independent
from refimpl.loading.model import Model
from refimpl.model.config import MoeFfn
from refimpl.model.gemma4 import Step, moe_ffn
from refimpl.model.tap import tap_of
from refimpl.model.weights import LayerWeights
from refimpl.reference.ops import softmax

KINDS = ("keyword", "name", "number", "operator", "string", "comment", "space")


@dataclass(frozen=True)
class Routes:
    """What the routers of L layers decided for T tokens: the ids of the X experts chosen, in falling order of their probability, the
    weights they got, and the logits of all E.
    """

    id_LTX: np.ndarray
    weight_LTX: np.ndarray
    logit_LTE: np.ndarray

    @property
    def probability_LTE(self) -> np.ndarray:
        """The softmax over all experts, from which the choice is made."""
        return softmax(self.logit_LTE)


@dataclass(frozen=True)
class Passage:
    """Tokens from the middle of a Python file: their ids, with <bos> in front; without it, the text of each and its index in KINDS."""

    ids: list[int]
    chunks: list[str]
    kind_T: np.ndarray


def passage(model: Model, text: str, n_tok: int) -> Passage:
    """`n_tok` tokens from the middle of a Python source (all of a shorter one)."""
    bos, *ids = model.tokenizer.encode(text)
    stream = model.tokenizer.stream(special=False)
    chunks = [stream.push(token) for token in ids]
    part = slice(max(0, (len(ids) - n_tok) // 2), max(0, (len(ids) - n_tok) // 2) + n_tok)
    return Passage([bos, *ids[part]], chunks[part], kinds_of(text, chunks)[part])


def tapped(model: Model, texts: Sequence[Sequence[int]], names: Sequence[str]) -> list[np.ndarray]:
    """Values of each name in every layer with experts, (L, T, ...), for the texts one after the other, each from an empty cache.

    The first token of a text, <bos>, is left out.
    """
    found: dict[str, list[np.ndarray]] = {}
    for ids in texts:
        rows: dict[str, list[np.ndarray]] = {}           # a long text runs in several calls
        model.prefill(ids, model.new_cache(), tap=lambda name, value, rows=rows: rows.setdefault(name, []).append(value.copy())
                     if name.rpartition("-")[0] in names else None)
        for name, parts in rows.items():
            found.setdefault(name, []).append(np.concatenate(parts)[1:])
    layers = [layer.index for layer in model.config.layers if isinstance(layer.ffn, MoeFfn)]
    return [np.stack([np.concatenate(found[f"{name}-{i}"]) for i in layers]) for name in names]


def route(model: Model, texts: Sequence[Sequence[int]]) -> Routes:
    """What the routers decide for the texts (see `tapped`)."""
    return Routes(*tapped(model, texts, ("ffn_moe_topk", "ffn_moe_weights", "ffn_moe_logits")))


def kinds_of(text: str, chunks: Sequence[str]) -> np.ndarray:
    """For each of `chunks`, which together begin the Python source `text`: its index in KINDS. int (T,).

    The kind of a chunk is that of its first letter that is not a space, by Python's own tokenizer; spaces and newlines alone are
    "space", also within a string. Raises ValueError where the chunks are not the beginning of the text.
    """
    if not text.startswith("".join(chunks)):
        raise ValueError("these chunks are not the beginning of the text")
    starts = np.cumsum([0, *map(len, text.splitlines(keepends=True))])
    kind_of_letter = np.full(len(text) + 1, KINDS.index("space"))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if token.type == tokenize.NAME:
            kind = "keyword" if keyword.iskeyword(token.string) else "name"
        else:
            kind = {"NUMBER": "number", "OP": "operator", "COMMENT": "comment"}.get(name, "string" if "STRING" in name else None)
        if kind is not None:
            first, end = (starts[line - 1] + column for line, column in (token.start, token.end))
            kind_of_letter[first:end] = KINDS.index(kind)
    kinds, at = [], 0
    for chunk in chunks:
        blank = len(chunk) - len(chunk.lstrip())
        kinds.append(kind_of_letter[at + blank] if blank < len(chunk) else KINDS.index("space"))
        at += len(chunk)
    return np.array(kinds)


def share_by_kind(id_TX: np.ndarray, kind_T: np.ndarray, n_expert: int) -> np.ndarray:
    """(kinds, E): the share of the tokens of a kind that went through an expert. A row sums to X; NaN for a kind without tokens."""
    picked_TE = picks(id_TX, n_expert)
    with np.errstate(invalid="ignore"):
        return np.stack([picked_TE[kind_T == kind].sum(axis=0) / np.float64((kind_T == kind).sum()) for kind in range(len(KINDS))])


def picks(id_TX: np.ndarray, n_expert: int) -> np.ndarray:
    """bool (T, E): did the token go through the expert?"""
    picked_TE = np.zeros((len(id_TX), n_expert), bool)
    np.put_along_axis(picked_TE, id_TX, True, axis=1)
    return picked_TE


def specialists(id_TX: np.ndarray, kind_T: np.ndarray, chunks: Sequence[str], n_expert: int, at_least: int
                ) -> list[tuple[str, int, float, list[str]]]:
    """For each kind the expert that prefers it most: (kind, expert, how many times as often as for any token, its most frequent tokens).

    Among experts with `at_least` tokens of the kind; a kind without any is left out.
    """
    share, overall_E = share_by_kind(id_TX, kind_T, n_expert), picks(id_TX, n_expert).mean(axis=0)
    found = []
    for kind, name in enumerate(KINDS):
        enough_E = share[kind] * (kind_T == kind).sum() >= at_least
        if enough_E.any():
            times_E = np.where(enough_E, share[kind] / np.maximum(overall_E, 1e-9), 0)
            expert = int(times_E.argmax())
            common = Counter(chunks[t] for t in np.flatnonzero((id_TX == expert).any(axis=1))).most_common(6)
            found.append((name, expert, float(times_E[expert]), [chunk for chunk, _ in common]))
    return found


def load(id_TX: np.ndarray, n_expert: int) -> np.ndarray:
    """(E,): tokens that each expert got, as a multiple of the mean."""
    count_E = np.bincount(id_TX.ravel(), minlength=n_expert)
    return count_E / count_E.mean()


def balance_loss(id_TX: np.ndarray, probability_TE: np.ndarray) -> float:
    """E * sum over experts of f_e * P_e: f_e the share of all picks that expert e got, P_e the mean probability it was given.

    1 where all experts are used alike. Fedus et al. 2021 (arXiv:2101.03961), section 2.2, equations 4 to 6, for X picks instead of one.
    """
    n_expert = probability_TE.shape[1]
    f_E = np.bincount(id_TX.ravel(), minlength=n_expert) / id_TX.size
    return float(n_expert * (f_E * probability_TE.mean(axis=0)).sum())


def with_used(model: Model, n_used: int) -> Model:
    """The same model with routers that choose `n_used` experts. Raises ValueError for more than it has, or none."""
    for layer in model.config.layers:
        if isinstance(layer.ffn, MoeFfn) and not 1 <= n_used <= layer.ffn.n_expert:
            raise ValueError(f"n_used={n_used}: layer {layer.index} has {layer.ffn.n_expert} experts")
    specs = tuple(replace(layer, ffn=replace(layer.ffn, n_used=n_used)) if isinstance(layer.ffn, MoeFfn) else layer
                  for layer in model.config.layers)
    layers = tuple(replace(layer, spec=spec) for layer, spec in zip(model.weights.layers, specs))
    other = copy(model)
    other.config, other.weights = replace(model.config, layers=specs), replace(model.weights, layers=layers)
    return other


def shortened_error(model: Model, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> np.ndarray:
    """(counts, L): how far off the experts' output is when routers choose so many: length of the difference, relative to the output.

    The mean over all tokens, of what is added to the dense branch (after the norm). Every layer gets its true input, so that errors of
    earlier layers do not add up.
    """
    x_LTD, y_LTD = tapped(model, texts, ("attn_out", "ffn_moe"))
    errors = []
    for n_used in counts:
        layers = [layer for layer in with_used(model, n_used).weights.layers if isinstance(layer.spec.ffn, MoeFfn)]
        errors.append([_relative_error(model, layer, x_TD, y_TD) for layer, x_TD, y_TD in zip(layers, x_LTD, y_LTD)])
    return np.array(errors)


def _relative_error(model: Model, layer: LayerWeights, x_TD: np.ndarray, y_TD: np.ndarray) -> float:
    backend, eps, seen = model.backend, model.config.norm_eps, {}
    step = Step([], np.arange(0), {}, {}, backend, eps, tap_of(seen.__setitem__))     # no attention here
    with backend.running():
        moe_ffn(layer.ffn, layer.spec.ffn.n_used, x_TD, backend.rms_norm(x_TD, layer.norm_before_ffn_D, eps), step)
    off_T = np.linalg.norm(seen["ffn_moe"] - y_TD, axis=1)
    return float((off_T / np.linalg.norm(y_TD, axis=1)).mean())


def distinct(id_TX: np.ndarray, n_rows: int) -> float:
    """Distinct experts that `n_rows` rows next to each other go through, the mean over all places."""
    windows = np.lib.stride_tricks.sliding_window_view(id_TX, n_rows, axis=0).reshape(len(id_TX) - n_rows + 1, -1)
    ordered = np.sort(windows, axis=1)
    return float(1 + (np.diff(ordered, axis=1) != 0).sum(axis=1).mean())


# ---- pictures

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
        axes.set_xlabel("experts, the most probable first")
        axes.xaxis.set_major_formatter("{x:.0f}")
    return picture(fig, "Probability held, error and bits per token over the number of experts that run.")


def bytes_picture(reads: dict[str, dict[str, float]]):
    """Stacked bars of what a token reads, by part (see lab/explain/weight_traffic.py)."""
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
