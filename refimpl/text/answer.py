"""Takes an answer apart while it is being written: thoughts, text and tool calls, told apart by the ids of their markers.

Text that merely spells a marker is text: `<|channel>` written letter by letter has other ids than the token. How a call is written, and
what becomes of one that is broken, says calls.py.
"""

from dataclasses import dataclass

from refimpl.text.calls import CALL, CALL_END, QUOTE, CallArguments, CallEnd, CallReader, CallStart, Content
from refimpl.text.chat import CHANNEL_END, THOUGHT
from refimpl.text.thoughts import ThoughtSplitter
from refimpl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Thought:
    """A piece of a thought."""

    text: str


Piece = Thought | Content | CallStart | CallArguments | CallEnd


class AnswerSplitter:
    """Takes the ids of an answer one by one. Control tokens have no text, and the markers of thoughts and calls are never shown."""

    def __init__(self, tokenizer: Tokenizer, in_thought: bool = False):
        """`in_thought`: the prompt ends inside of a thought, after its name."""
        self._markers = {i: marker for marker in (THOUGHT, CHANNEL_END, CALL, CALL_END, QUOTE)
                         if (i := tokenizer.id_of(marker)) is not None}
        self._stream, self._thoughts = tokenizer.stream(), ThoughtSplitter()
        self._call: CallReader | None = None
        self._n_calls = 0
        self._thoughts.switch(in_thought, named=True)

    def push(self, token_id: int) -> list[Piece]:
        """The pieces that are certain with this token. Raises ValueError for an id outside of the vocabulary."""
        marker = self._markers.get(token_id)
        if marker is None:
            return self._text(self._stream.push(token_id))
        pieces = self._text(self._stream.finish())
        if marker == QUOTE:
            return pieces + (self._call.quote() if self._call else [])
        pieces += self._end_call(cut=False)
        if marker != CALL_END:
            pieces += self._said(self._thoughts.switch(marker == THOUGHT))
        if marker == CALL:
            self._call = CallReader(self._n_calls)
        return pieces

    def finish(self) -> list[Piece]:
        """The answer has ended: what was held back, and the end of a call that was cut off."""
        pieces = self._text(self._stream.finish()) + self._end_call(cut=True)
        return pieces + self._said(self._thoughts.finish())

    def _text(self, text: str) -> list[Piece]:
        if not text:
            return []
        return self._call.text(text) if self._call else self._said(self._thoughts.text(text))

    @staticmethod
    def _said(pieces: list[tuple[bool, str]]) -> list[Piece]:
        return [Thought(text) if thought else Content(text) for thought, text in pieces]

    def _end_call(self, cut: bool) -> list[Piece]:
        call, self._call = self._call, None
        if call is None:
            return []
        pieces = call.end(cut)
        self._n_calls += call.started
        return pieces
