"""What an answer may consist of."""

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """Says, token by token, what may come next."""

    def mask(self, logits_V: np.ndarray) -> np.ndarray:
        """The logits, float32 (V,), with -inf where a token is not allowed now: a copy, or the same array where all are. At least one
        token is allowed; an end-of-generation token is where the answer may end.
        """

    def accept(self, token: int):
        """`token`, which was allowed, has been chosen."""

    def forced(self) -> list[int]:
        """Tokens that are sure, or almost so, to come next, because hardly any others are allowed: drafts. Changes nothing."""


class Free:
    """Allows everything."""

    def mask(self, logits_V: np.ndarray) -> np.ndarray:
        """The same array."""
        return logits_V

    def accept(self, token: int):
        """Nothing."""

    def forced(self) -> list[int]:
        """None."""
        return []


FREE = Free()


class ThinkingBudget:
    """Another constraint, in which thoughts have no more than `most` tokens together: then the one that is being thought ends, as soon as
    the other constraint allows that.

    begin, end  ids of the tokens around a thought; they do not count
    """

    def __init__(self, inner: Constraint, most: int, begin: int, end: int):
        self._inner, self._left, self._begin, self._end, self._thinking = inner, most, begin, end, False

    def mask(self, logits_V: np.ndarray) -> np.ndarray:
        """What the other one allows; of that only the end, where the budget is spent."""
        masked_V = self._inner.mask(logits_V)
        if not self._is_spent() or masked_V[self._end] == -np.inf:
            return masked_V
        only_V = np.full_like(masked_V, -np.inf)
        only_V[self._end] = masked_V[self._end]
        return only_V

    def accept(self, token: int):
        """Counts it."""
        self._inner.accept(token)
        if token in (self._begin, self._end):
            self._thinking = token == self._begin
        elif self._thinking:
            self._left -= 1

    def forced(self) -> list[int]:
        """What the other one forces; else the end, where the budget is spent."""
        return self._inner.forced() or ([self._end] if self._is_spent() else [])

    def _is_spent(self) -> bool:
        return self._thinking and self._left <= 0
