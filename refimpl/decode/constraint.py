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
