"""Stop strings in a text that comes in chunks: where the answer ends, and what may be shown before that is known."""

from collections import deque
from collections.abc import Iterable


class StopStrings:
    """Takes a text in chunks, cut anywhere, and shows what is not part of a stop string.

    The stop string that is complete first ends the text; of several that end at the same character, the longest. What may be the
    beginning of one is held back. Every character costs the same, whatever the number of stop strings (Aho and Corasick, 1975).
    """

    def __init__(self, stops: Iterable[str]):
        """Raises ValueError if a stop string is empty or no string."""
        self.stopped = False
        self._held: deque[str] = deque()        # the characters of the state's prefix
        self._state = 0
        # A state is the longest beginning of a stop string that the text ends with: `next` state by character, `fall` to the next
        # shorter one, `depth` its length, `match` the length of the longest stop string that it ends with.
        self._next: list[dict[str, int]] = [{}]
        self._fall, self._depth, self._match = [0], [0], [0]
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"a stop string must be a string that is not empty, not {stop!r:.60}")
            self._add(stop)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                self._fall[child] = self._step(self._fall[state], character)
                self._match[child] = max(self._match[child], self._match[self._fall[child]])
                queue.append(child)

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop string has ended the text. After that there is nothing more to show."""
        if self.stopped:
            return "", True
        if not self._next[0]:
            return text, False
        shown = []
        for character in text:
            self._state = self._step(self._state, character)
            self._held.append(character)
            if n := self._match[self._state]:
                self.stopped = True
                shown += [self._held.popleft() for _ in range(len(self._held) - n)]
                self._held.clear()
                break
            shown += [self._held.popleft() for _ in range(len(self._held) - self._depth[self._state])]
        return "".join(shown), self.stopped

    def finish(self) -> str:
        """The text has ended: what was held back, as it was no stop string."""
        text = "".join(self._held)
        self._held.clear()
        self._state = 0
        return text

    def _add(self, stop: str):
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fall.append(0)
                self._depth.append(self._depth[state] + 1)
                self._match.append(0)
            state = self._next[state][character]
        self._match[state] = len(stop)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fall[state]
        return self._next[state].get(character, 0)
