"""Draft tokens that cost nothing: what followed the latest tokens when they came before, in the prompt or in the answer (Saxena 2023,
"Prompt lookup decoding").
"""

from collections.abc import Sequence
from itertools import takewhile

N = 3       # so many tokens must be the same


class Repeats:
    """An index of all runs of N tokens in a text that grows."""

    def __init__(self):
        self._after: dict[tuple[int, ...], int] = {}        # N tokens -> where the latest of such runs ends
        self._n = 0                                         # tokens that are in the index

    def offer(self, ids: Sequence[int], most: int) -> list[int]:
        """At most `most` ids that followed what `ids` end with; `ids` go on from those of the last call."""
        for end in range(max(N, self._n + 1), len(ids)):    # not the latest run: it is the one that is looked for
            self._after[tuple(ids[end - N:end])] = end
        self._n = max(self._n, len(ids) - 1)
        found = self._after.get(tuple(ids[-N:])) if len(ids) >= N else None
        return [] if found is None else list(takewhile(lambda i: i >= 0, ids[found:found + most]))      # up to a picture
