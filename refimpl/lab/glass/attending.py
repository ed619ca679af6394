"""Whom each token attended to: the largest attention weights of every head, from the very queries and keys of a run."""

import numpy as np

from refimpl.lab.glass.packing import largest, packed, shares
from refimpl.model.cache import Cache
from refimpl.model.config import Config
from refimpl.reference.ops import softmax

ROWS = 64               # queries at a time
MOST, FEWEST = 16, 4    # places kept of a head


class Attending:
    """A look at a run of one sequence that keeps the `k` largest weights of every query and head, and where they point."""

    def __init__(self, config: Config, cache: Cache, k: int):
        """`cache`: the run's."""
        self._config, self._cache, self._k, self._end_T = config, cache, k, np.arange(0)
        self._query: dict[int, np.ndarray] = {}
        self._kept: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {spec.index: [] for spec in config.layers}

    def begin(self, end_T: np.ndarray):
        """A call begins, whose rows see positions below `end_T` in sliding layers: tokens of pictures look ahead."""
        self._end_T = end_T

    def look(self, name: str, value: np.ndarray):
        """Queries, then what they got."""
        role, _, layer = name.rpartition("-")
        if role == "Qcur_pos":
            self._query[int(layer)] = value
        elif role == "kqv_out":                         # by now the keys of these rows are in the cache
            self._read(int(layer), self._query.pop(int(layer)))

    def _read(self, i: int, q_TNH: np.ndarray):
        spec, kept = self._config.layers[i], self._cache.layers[self._config.layers[i].kv_from]
        n_tok, n_head, head_dim = q_TNH.shape
        for begin in range(0, n_tok, ROWS):
            q_tKGH = q_TNH[begin:begin + ROWS].reshape(-1, spec.n_kv, n_head // spec.n_kv, head_dim)
            pos_t = self._cache.length + begin + np.arange(len(q_tKGH))
            first_t = kept.first_visible(pos_t)
            end_t = pos_t + 1 if spec.window is None else self._end_T[begin:begin + ROWS]
            low, high = int(first_t.min()), int(end_t.max())
            k_SKH, _ = kept.read(low, high)
            score_tKGS = np.einsum("tKGH,SKH->tKGS", q_tKGH, k_SKH.astype(np.float32), optimize=True)
            place_S = np.arange(low, high)
            seen_tS = (place_S >= first_t[:, None]) & (place_S < end_t[:, None])
            weight_tNS = softmax(np.where(seen_tS[:, None, None], score_tKGS, np.float32(-np.inf))).reshape(-1, n_head, high - low)
            at_tNk = largest(weight_tNS, self._k)
            found = shares(np.take_along_axis(weight_tNS, at_tNk, -1))
            room = ((0, 0), (0, 0), (0, self._k - at_tNk.shape[-1]))
            self._kept[i].append((np.pad((at_tNk + low).astype(np.uint16), room), np.pad(found, room)))

    def as_json(self) -> list[dict[str, object]]:
        """For every layer `at` and `weight`, (T, N, k): positions, and weights as shares; 0 where there are fewer."""
        return [{"at": packed(np.concatenate(at)), "weight": packed(np.concatenate(weight))}
                for at, weight in (zip(*parts) for parts in self._kept.values())]


def places(config: Config, n_tok: int, budget: int) -> int:
    """How many places of each head can be kept of `n_tok` tokens in about `budget` bytes."""
    heads = sum(spec.n_head for spec in config.layers)
    return int(np.clip(budget // (4 * heads * max(1, n_tok)), FEWEST, MOST))
