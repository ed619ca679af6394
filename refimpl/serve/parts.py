"""Parts of answers: what is said while a prompt is read, pieces with their tokens, the end; and a Reader, which makes them of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from refimpl.decode.request import Reading, Stats, Token
from refimpl.serve.asking import Want
from refimpl.serve.errors import ApiError
from refimpl.text.answer import AnswerSplitter, CallArguments, CallEnd, CallStart, Content, Piece, Thought
from refimpl.text.stops import StopStrings
from refimpl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Progress:
    """So much of the prompt has been read, `seconds` after the request came."""

    reading: Reading
    seconds: float


@dataclass(frozen=True)
class Said:
    """Pieces, and the tokens that completed them."""

    pieces: list[Piece]
    tokens: list[Token]


@dataclass(frozen=True)
class End:
    """The answer has ended. `why`: "stop" (by itself), "stop_string" (`stopped_by`; "" if by a token's id), "length" or "tool_calls"."""

    why: str
    stopped_by: str
    n_generated: int
    stats: Stats


Part = Progress | Said | End


@dataclass
class Reader:
    """Takes the tokens of one answer. Stop strings are looked for in the answer's text, not in thoughts and calls."""

    tokenizer: Tokenizer
    want: Want
    ended: bool = False
    stopped_by: str = ""
    _tokens: list[Token] = field(default_factory=list)          # whose text is not in a piece yet
    _unshown: str = ""                                          # text that may be the beginning of a stop string
    _n_calls: int = 0

    def __post_init__(self):
        self._splitter = RawSplitter(self.tokenizer) if self.want.raw else AnswerSplitter(self.tokenizer)
        self._stops = StopStrings(self.want.stops)

    def push(self, token: Token) -> Said | None:
        """What is certain with this token."""
        if token.id in self.want.stop_ids:
            self.ended = True
            return None
        self._tokens.append(token)
        return self._said(self._splitter.push(token.id))

    def finish(self) -> Said | None:
        """What was held back."""
        return None if self.ended else self._said(self._splitter.finish(), last=True)

    def why(self, stop: str) -> str:
        """Why the answer has ended; `stop` is why the run has."""
        if self.ended:
            return "stop_string"
        if stop in ("limit", "context"):
            return "length"
        if stop != "end":
            raise ApiError(503, "the server is being stopped")
        return "tool_calls" if self._n_calls else "stop"

    def _said(self, pieces: list[Piece], last: bool = False) -> Said | None:
        shown: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Content):
                self._content(piece.text, shown)
                if self.ended:
                    break
            else:
                self._n_calls += isinstance(piece, CallEnd) and not piece.broken
                self._flush(shown)
                shown.append(piece)
        if last and not self.ended:
            self._flush(shown)
        if not shown and not (self._tokens and (last or self.ended)):
            return None
        tokens, self._tokens = self._tokens, []
        return Said(shown, tokens)

    def _content(self, text: str, shown: list[Piece]):
        self._unshown += text
        text, self.ended = self._stops.push(text)
        if text:
            shown.append(Content(text))
        self._unshown = self._unshown[len(text):]
        if self.ended:
            # what is not shown begins with the stop string that was complete first
            self.stopped_by = min((stop for stop in self.want.stops if self._unshown.startswith(stop)), key=len)

    def _flush(self, shown: list[Piece]):
        if text := self._stops.finish():
            shown.append(Content(text))
        self._unshown = ""


class RawSplitter:
    """The face of an AnswerSplitter for text as it is."""

    def __init__(self, tokenizer: Tokenizer):
        self._stream = tokenizer.stream()

    def push(self, token_id: int) -> list[Piece]:
        """The text that is certain with this token."""
        return [Content(text)] if (text := self._stream.push(token_id)) else []

    def finish(self) -> list[Piece]:
        """What was held back."""
        return [Content(text)] if (text := self._stream.finish()) else []


@dataclass
class Block:
    """Pieces of one kind in a row: "thought", "content" or "call". `text` of a call is its arguments."""

    kind: str
    text: str = ""
    name: str = ""
    index: int = 0


def kind_of(piece: Piece) -> str:
    """The kind of block that a piece belongs to."""
    return "thought" if isinstance(piece, Thought) else "content" if isinstance(piece, Content) else "call"


def append(blocks: list[Block], piece: Piece):
    """Adds a piece to the last block, or begins one."""
    kind = kind_of(piece)
    if isinstance(piece, CallStart):
        blocks.append(Block(kind, name=piece.name, index=piece.index))
    elif isinstance(piece, CallArguments):
        blocks[-1].text += piece.json
    elif not isinstance(piece, CallEnd):
        if not blocks or blocks[-1].kind != kind:
            blocks.append(Block(kind))
        blocks[-1].text += piece.text
