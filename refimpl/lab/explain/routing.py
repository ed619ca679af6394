"""Which experts a text goes through: what was chosen, for which kind of token, how evenly, and what fewer of them would change."""

import io
import keyword
import tokenize
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from refimpl.loading.model import Model
from refimpl.model.config import MoeFfn
from refimpl.model.gemma4 import moe_ffn
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
    """Tokens from the midst of a Python file: their ids, with <bos> in front, and without it what they say and their places in KINDS."""

    ids: list[int]
    pieces: list[str]
    kind_T: np.ndarray


def passage(model: Model, text: str, n_tok: int) -> Passage:
    """`n_tok` tokens from the middle of a Python source (all of a shorter one)."""
    bos, *ids = model.tokenizer.encode(text)
    stream = model.tokenizer.stream(special=False)
    pieces = [stream.push(token) for token in ids]
    part = slice(max(0, (len(ids) - n_tok) // 2), max(0, (len(ids) - n_tok) // 2) + n_tok)
    return Passage([bos, *ids[part]], pieces[part], kinds_of(text, pieces)[part])


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


def kinds_of(text: str, pieces: Sequence[str]) -> np.ndarray:
    """For each of `pieces`, which together begin the Python source `text`: its place in KINDS. int (T,).

    A piece is what its first letter is that is no space, by Python's own tokenizer; one of spaces and newlines alone is "space", also
    within a string. Raises ValueError where the pieces are not the beginning of the text.
    """
    if not text.startswith("".join(pieces)):
        raise ValueError("these pieces are not the beginning of the text")
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
    for piece in pieces:
        blank = len(piece) - len(piece.lstrip())
        kinds.append(kind_of_letter[at + blank] if blank < len(piece) else KINDS.index("space"))
        at += len(piece)
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


def specialists(id_TX: np.ndarray, kind_T: np.ndarray, pieces: Sequence[str], n_expert: int, at_least: int
                ) -> list[tuple[str, int, float, list[str]]]:
    """For each kind the expert that prefers it most: (kind, expert, how many times as often as for any token, its commonest pieces).

    Among experts with `at_least` tokens of the kind; a kind without any is left out.
    """
    share, overall_E = share_by_kind(id_TX, kind_T, n_expert), picks(id_TX, n_expert).mean(axis=0)
    found = []
    for kind, name in enumerate(KINDS):
        enough_E = share[kind] * (kind_T == kind).sum() >= at_least
        if enough_E.any():
            times_E = np.where(enough_E, share[kind] / np.maximum(overall_E, 1e-9), 0)
            expert = int(times_E.argmax())
            common = Counter(pieces[t] for t in np.flatnonzero((id_TX == expert).any(axis=1))).most_common(6)
            found.append((name, expert, float(times_E[expert]), [piece for piece, _ in common]))
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
    """The same model, its routers told to choose `n_used` experts. Raises ValueError for more than it has, or none."""
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

    The mean over all tokens, of what is added to the dense branch (behind the norm). Every layer gets its true input, so that errors of
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
    with backend.running():
        moe_ffn(layer, layer.ffn, backend, x_TD, backend.rms_norm(x_TD, layer.norm_before_ffn_D, eps), eps, seen.__setitem__)
    off_T = np.linalg.norm(seen["ffn_moe"] - y_TD, axis=1)
    return float((off_T / np.linalg.norm(y_TD, axis=1)).mean())


def distinct(id_TX: np.ndarray, n_rows: int) -> float:
    """Distinct experts that `n_rows` rows next to each other go through, the mean over all places."""
    windows = np.lib.stride_tricks.sliding_window_view(id_TX, n_rows, axis=0).reshape(len(id_TX) - n_rows + 1, -1)
    ordered = np.sort(windows, axis=1)
    return float(1 + (np.diff(ordered, axis=1) != 0).sum(axis=1).mean())


def distinct_if_independent(n_expert: int, n_used: int, n_rows):
    """n_expert * (1 - (1 - n_used / n_expert)^n_rows): the same for rows that choose evenly and know nothing of each other."""
    return n_expert * (1 - (1 - n_used / n_expert) ** np.asarray(n_rows))
