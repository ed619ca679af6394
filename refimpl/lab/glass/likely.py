"""What else was likely: the most probable tokens at every place of a text, and how probable they are at other temperatures."""

from collections.abc import Sequence

import numpy as np

from refimpl.lab.glass.packing import largest, packed

N_TOP = 10
TEMPERATURES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0)


def log_sums(logit_TV: np.ndarray, temperatures: Sequence[float]) -> np.ndarray:
    """log(sum(exp(logit / temperature))) over the vocabulary, float32 (T, temperatures): a token's probability at a temperature is
    exp(logit / temperature - this).
    """
    top_T1 = logit_TV.max(axis=-1, keepdims=True)
    relative_TV = logit_TV - top_T1
    sums = [np.log(np.exp(relative_TV / np.float32(t)).sum(axis=-1, dtype=np.float64)) + top_T1[:, 0] / t for t in temperatures]
    return np.stack(sums, axis=-1).astype(np.float32)


class Likely:
    """Collects rows of logits: `add` takes the next ones, with the ids that follow in the text (one less where the text ends)."""

    def __init__(self, first: int):
        """The first row is that of the token at place `first`; it says what is likely at the place behind it."""
        self.first, self._rows = first, []

    def add(self, logit_TV: np.ndarray, next_ids: Sequence[int]):
        """The next rows, float32 (T, V)."""
        id_TK = largest(logit_TV, N_TOP)
        logit_TK = np.take_along_axis(logit_TV, id_TK, -1)
        n = len(next_ids)
        its_T = np.full(len(logit_TV), np.nan, np.float32)
        its_T[:n] = logit_TV[np.arange(n), next_ids]
        rank_T = (logit_TV > its_T[:, None]).sum(axis=-1)
        self._rows.append((id_TK.astype(np.uint32), logit_TK, its_T, rank_T.astype(np.uint32), log_sums(logit_TV, TEMPERATURES)))

    @property
    def shown(self) -> np.ndarray:
        """All ids in it."""
        return np.concatenate([row[0].ravel() for row in self._rows])

    def as_json(self) -> dict[str, object]:
        """`ids` and `logits` (T, 10), most probable first; `chosen` and `rank` (T,): logit of the token that came, and how many are above
        it; `log_sums` (T, temperatures).
        """
        names = ("ids", "logits", "chosen", "rank", "log_sums")
        columns = [np.concatenate(column) for column in zip(*self._rows)]
        columns[2] = np.nan_to_num(columns[2], nan=0.0)
        return {"first": self.first, "temperatures": list(TEMPERATURES)} | {name: packed(column) for name, column in zip(names, columns)}
