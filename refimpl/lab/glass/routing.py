"""Which experts the routers chose, and how sure they were."""

import numpy as np

from refimpl.lab.glass.packing import packed, shares
from refimpl.model.config import Config, MoeFfn
from refimpl.reference.ops import softmax


class Routing:
    """A look that keeps the choice of every router."""

    def __init__(self, config: Config):
        self._layers = [spec for spec in config.layers if isinstance(spec.ffn, MoeFfn)]
        self._chosen: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {spec.index: [] for spec in self._layers}
        self._chance: dict[int, np.ndarray] = {}

    def look(self, name: str, value: np.ndarray):
        """The router's logits, then its choice."""
        role, _, layer = name.rpartition("-")
        if role == "ffn_moe_logits":
            self._chance[int(layer)] = softmax(value)
        elif role == "ffn_moe_topk":
            chance_TE = self._chance.pop(int(layer))
            self._chosen[int(layer)].append((value.astype(np.uint16), shares(np.take_along_axis(chance_TE, value, -1))))

    def as_json(self) -> list[dict[str, object]]:
        """For every layer with experts: its number, how many there are, `ids` (T, X) and `chance` (T, X), the router's probability of each,
        as shares. Empty for a model without experts.
        """
        found = []
        for spec in self._layers:
            ids, chance = (np.concatenate(part) for part in zip(*self._chosen[spec.index]))
            found.append({"layer": spec.index, "n_expert": spec.ffn.n_expert, "ids": packed(ids), "chance": packed(chance)})
        return found
