"""The logit lens: what each layer would have said, if it had been the last one (nostalgebraist 2020, "interpreting GPT: the logit lens").

The state behind a layer goes through the model's last norm and its head, as the state behind the last layer does.
"""

from collections.abc import Callable, Sequence

import numpy as np

from refimpl.lab.glass.packing import largest, packed, shares
from refimpl.loading.model import Model

N_TOP = 3
ROWS = 64               # states that the head takes at a time
FEWEST_LAYERS = 8       # rather fewer tokens than fewer layers


def chosen_layers(model: Model, n_tok: int, budget: int) -> tuple[list[int], int]:
    """The layers to be shown, the last one among them, and of how many tokens, the last ones, so that the head makes about `budget`
    multiply-adds. All layers of all tokens where that is affordable.
    """
    n_states = max(1, budget // (model.config.n_embd * model.config.n_vocab))
    n_layer = model.config.n_layer
    n_shown = int(np.clip(n_states // n_tok, min(FEWEST_LAYERS, n_layer), n_layer))
    layers = sorted({round(i) for i in np.linspace(0, n_layer - 1, n_shown)})
    return layers, int(np.clip(n_states // len(layers), 1, n_tok))


class Lens:
    """A look that keeps the states behind layers; `read` turns them into tokens."""

    def __init__(self, model: Model, layers: Sequence[int], first: int):
        """Those of tokens before place `first` are left out."""
        self._model, self._layers, self._first = model, layers, first
        self._states: dict[int, list[np.ndarray]] = {i: [] for i in layers}
        self.shown = np.zeros(0, np.uint32)             # all ids in it, once they are known

    def look(self, name: str, value: np.ndarray, pos: int):
        """`pos`: the place of the first row."""
        role, _, layer = name.rpartition("-")
        if role == "l_out" and int(layer) in self._states:
            self._states[int(layer)].append(value[max(0, self._first - pos):].copy())

    def as_json(self, pause: Callable[[], None]) -> dict[str, object]:
        """`ids` and `chance` (layers, T, 3): the most probable tokens behind each layer, and their probabilities as shares."""
        model, ids, chances = self._model, [], []
        for states in self._states.values():
            x_TD = np.concatenate(states)
            for begin in range(0, len(x_TD), ROWS):
                with model.backend.running(len(x_TD[begin:begin + ROWS])):
                    normed_TD = model.backend.rms_norm(x_TD[begin:begin + ROWS], model.weights.norm_D, model.config.norm_eps)
                logit_TV = model.head(normed_TD)
                pause()
                id_TK = largest(logit_TV, N_TOP)
                relative_TV = logit_TV - logit_TV.max(axis=-1, keepdims=True)
                chance_TV = np.exp(relative_TV) / np.exp(relative_TV).sum(axis=-1, keepdims=True)
                ids.append(id_TK.astype(np.uint32))
                chances.append(shares(np.take_along_axis(chance_TV, id_TK, -1)))
        self.shown = np.concatenate(ids)
        shape = (len(self._layers), -1, ids[0].shape[-1])
        return {"layers": list(self._layers), "first": self._first, "ids": packed(self.shown.reshape(shape)),
                "chance": packed(np.concatenate(chances).reshape(shape))}
