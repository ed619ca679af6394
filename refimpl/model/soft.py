"""Soft tokens: rows of a prompt that have no id, as a tower makes them out of a picture or a sound.

In a list of ids each of them is a negative number, made of a hash of what it comes from. So whatever works on ids (a prefix tree, a
snapshot, a fork) tells two pictures apart and knows one again; only the forward pass looks behind the number.

Where a model looks ahead in images (`Config.looks_ahead_in_images`), the rows of one see each other in sliding layers: then all that
are not in the cache have to be in one call.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refimpl.model.tap import Look, no_tap


@dataclass(frozen=True)
class SoftTokens:
    """The rows of one picture or sound.

    digest    SHA-256 of all that they are made of
    n         how many there are
    together  they see each other in sliding layers
    make      computes them, float32 (n, D), with a look at values on the way; called when the first of them is read, so never for what is
              known already
    """

    digest: bytes
    n: int
    together: bool
    make: Callable[[Look], np.ndarray]

    @cached_property
    def ids(self) -> list[int]:
        """The numbers that stand for them, -2^62 to -1."""
        hashes = (hashlib.sha256(self.digest + row.to_bytes(4, "little")).digest() for row in range(self.n))
        return [-1 - (int.from_bytes(found[:8], "little") >> 2) for found in hashes]

    @cached_property
    def x_TD(self) -> np.ndarray:
        """The rows as they enter the text model: they are not scaled there."""
        return self._made(no_tap)

    @property
    def known(self) -> bool:
        """Have they been computed?"""
        return "x_TD" in self.__dict__

    def compute(self, look: Look):
        """Computes them now, unless that has been done."""
        if not self.known:
            self.__dict__["x_TD"] = self._made(look)

    def _made(self, look: Look) -> np.ndarray:
        x_TD = self.make(look)
        if len(x_TD) != self.n:
            raise ValueError(f"{len(x_TD)} soft tokens were made, {self.n} expected")
        return x_TD


class Soft:
    """The soft tokens of a prompt, or of several: number -> (what it is a row of, which one)."""

    def __init__(self, parts: Iterable[SoftTokens] = ()):
        self.place = {i: (part, row) for part in parts for row, i in enumerate(part.ids)}

    @classmethod
    def of(cls, several: Iterable["Soft"]) -> "Soft":
        """Those of all of them."""
        found = cls()
        for soft in several:
            found.place |= soft.place
        return found

    def fill(self, x_TD: np.ndarray, ids_T: np.ndarray) -> np.ndarray:
        """`x_TD` with the rows of soft tokens in their places."""
        for t in np.flatnonzero(ids_T < 0):
            part, row = self.place[int(ids_T[t])]
            x_TD[t] = part.x_TD[row]
        return x_TD

    def unknown(self, ids: Sequence[int]) -> tuple[int, SoftTokens | None]:
        """How many of these ids can be read before something has to be computed, and what that is: None where nothing has to."""
        for n, i in enumerate(ids):
            if i < 0 and not (part := self.place[i][0]).known:
                return n, part
        return len(ids), None

    def ends(self, ids_T: np.ndarray, pos_T: np.ndarray) -> np.ndarray:
        """Where the view of each row of one sequence ends in a sliding layer: behind itself, or behind the picture that it belongs to.

        Raises ValueError where a picture does not end in this call.
        """
        end_T = pos_T + 1
        for t in np.flatnonzero(ids_T < 0):
            part, row = self.place[int(ids_T[t])]
            if part.together:
                end_T[t] = pos_T[t] - row + part.n
        if missing := end_T.max(initial=0) - pos_T[-1] - 1:
            raise ValueError(f"the soft tokens of a picture see each other and must be read in one call: {missing} are missing")
        return end_T

    def cut(self, ids: Sequence[int], first: int, end: int) -> int:
        """Where a call that begins at `first` may end: at `end`, or before the picture that it would cut; behind it where the call begins
        there, or inside.
        """
        if end < len(ids) and ids[end] < 0:
            part, row = self.place[int(ids[end])]
            if part.together and row:
                return end - row if end - row > first else end - row + part.n
        return end

    def chunks(self, ids_T: np.ndarray, most: int) -> Iterator[np.ndarray]:
        """The ids in calls of at most so many, but for a picture that takes more (`cut`)."""
        end = 0
        while end < len(ids_T):
            first, end = end, self.cut(ids_T, end, min(end + most, len(ids_T)))
            yield ids_T[first:end]


NO_SOFT = Soft()
