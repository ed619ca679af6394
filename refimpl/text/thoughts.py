"""Thought and answer of a text while it is being written: what `split_thought` says of the whole, chunk by chunk."""

from refimpl.text.chat import CHANNEL_END, THOUGHT

MARKERS = (THOUGHT, CHANNEL_END)
NAME = "thought"            # of the channel, written after its marker


class ThoughtSplitter:
    """Takes a text in chunks, cut anywhere, and returns pieces (is it a thought, text) without the markers.

    All thoughts in a row and all answers in a row are the two texts that `split_thought` returns.
    """

    def __init__(self):
        self.thinking = False
        self._held = ""             # may be the beginning of a marker
        self._name = ""             # beginning of a thought: perhaps the channel's name
        self._space = ""            # the end of a thought so far: dropped if nothing follows
        self._named = self._begun = self._earlier = False       # the name is over; this thought has text; one before it has

    def push(self, chunk: str) -> list[tuple[bool, str]]:
        """The pieces that are certain with this chunk."""
        text, pieces = self._held + chunk, []
        while found := min(((at, marker) for marker in MARKERS if (at := text.find(marker)) >= 0), default=None):
            at, marker = found
            pieces += self.text(text[:at]) + self.switch(marker == THOUGHT)
            text = text[at + len(marker):]
        n_held = max(n for marker in MARKERS for n in range(len(marker)) if text.endswith(marker[:n]))
        self._held = text[len(text) - n_held:]
        return pieces + self.text(text[:len(text) - n_held])

    def finish(self) -> list[tuple[bool, str]]:
        """The pieces that were held back because a marker could have followed."""
        text, self._held = self._held, ""
        return self.text(text) + self.switch(self.thinking)

    def text(self, text: str) -> list[tuple[bool, str]]:
        """The same for text in which no marker is looked for (answer.py knows them by their ids)."""
        if self.thinking:
            if not self._named:
                text, self._name = self._name + text, ""
                if len(text) < len(NAME) and NAME.startswith(text):
                    self._name = text
                    return []
                text, self._named = text.removeprefix(NAME), True
            text = self._space + text if self._begun else text.lstrip()
            kept = text.rstrip()
            self._space = text[len(kept):]
            if kept and not self._begun:
                kept, self._begun, self._earlier = "\n" * self._earlier + kept, True, True
            text = kept
        return [(self.thinking, text)] if text else []

    def switch(self, thinking: bool, named: bool = False) -> list[tuple[bool, str]]:
        """A marker begins a thought (`named`: its name has been written already) or ends it: what is left, a name that was none."""
        name, self._name = self._name.removeprefix(NAME), ""
        self._named = True
        pieces = self.text(name) if self.thinking and name else []
        self._space, self._begun = "", False
        self.thinking, self._named = thinking, named
        return pieces
