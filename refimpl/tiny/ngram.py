"""A 5-gram model with interpolated Kneser-Ney smoothing: a table of counts as the baseline of the trained model.

Kneser & Ney 1995; the interpolated form and its discount are in Chen & Goodman 1998 (TR-10-98), section 3. An n-gram is packed into
one integer of 12 bits a token, so that five of a vocabulary of 4,096 fit into 60 bits and all counting is sorting.
"""

from collections.abc import Sequence

import numpy as np

BITS = 12


class NgramModel:
    """Counts of all n-grams up to `order` in some files of token ids below 4,096."""

    def __init__(self, files: Sequence[np.ndarray], order: int = 5):
        self.order, self.tables = order, []
        counts = {n: np.unique(np.concatenate([_pack(ids, n) for ids in files]), return_counts=True) for n in range(1, order + 1)}
        for n in range(1, order + 1):
            gram, count = counts[n]
            if n < order:       # below the highest order a gram counts by how many different tokens precede it
                gram, count = np.unique(counts[n + 1][0] & _mask(n), return_counts=True)
            history, first, n_followers = np.unique(gram >> BITS, return_index=True, return_counts=True)
            total = np.add.reduceat(count, first)
            once, twice = (count == 1).sum(), (count == 2).sum()
            self.tables.append((gram, count, history, total, n_followers, (once + 0.5) / (once + 2 * twice + 1)))

    def bits(self, ids: np.ndarray) -> float:
        """Bits that the model needs for ids[1:], each token after the ones before it."""
        ids = np.asarray(ids)
        probability = np.full(len(ids) - 1, 2.0 ** -BITS)
        for n in range(1, self.order + 1):
            gram, count, history, total, n_followers, discount = self.tables[n - 1]
            keys = _pack(ids, n)[max(0, 2 - n):]                     # the grams that end in ids[n - 1:] (ids[1:] at least)
            at = len(probability) - len(keys)
            seen = _look_up(history, total, keys >> BITS)
            followers = _look_up(history, n_followers, keys >> BITS)
            known = seen > 0
            p = (np.maximum(_look_up(gram, count, keys) - discount, 0) + discount * followers * probability[at:]) / np.maximum(seen, 1)
            probability[at:] = np.where(known, p, probability[at:])
        return float(-np.log2(probability).sum())


def _mask(n: int) -> int:
    return (1 << (BITS * n)) - 1


def _pack(ids: np.ndarray, n: int) -> np.ndarray:
    ids = np.asarray(ids, np.int64)
    key = np.zeros(max(0, len(ids) - n + 1), np.int64)
    for i in range(n):
        key = (key << BITS) | ids[i:i + len(key)]
    return key


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values where keys (sorted) equal wanted, 0 elsewhere."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
