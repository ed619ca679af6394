"""Pieces of an answer to the Responses API's output items, and to the events that tell of them while they grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from uuid import uuid4

from refimpl.serve.parts import Said, kind_of
from refimpl.text.answer import CallArguments, CallEnd, CallStart, Piece

Event = tuple[str, dict[str, object]]       # its type and its fields
PARTS = {"thought": ("reasoning_text", "response.reasoning_text"), "content": ("output_text", "response.output_text")}
"""The type of a part, and what the types of the events of its text begin with."""


class ItemWriter:
    """Writes `items` piece by piece. `n_thought`: tokens of thoughts."""

    def __init__(self, namespaces: Mapping[str, str]):
        """`namespaces`: of tools, by their names (`Tools` in responses_input.py)."""
        self._namespaces = namespaces
        self.items: list[dict] = []
        self.n_thought = 0
        self._kind = ""             # of the item that is open, "" if none is
        self._text: list[str] = []

    def write(self, said: Said) -> Iterator[Event]:
        """The events of some pieces."""
        if said.pieces and kind_of(said.pieces[-1]) == "thought":
            self.n_thought += len(said.tokens)
        for piece in said.pieces:
            yield from self._piece(piece)

    def close(self, cut: bool = False) -> Iterator[Event]:
        """The end of the item that is open. `cut`: the answer would have gone on."""
        if not self._kind:
            return
        kind, item, text = self._kind, self.items[-1], "".join(self._text)
        self._kind, self._text = "", []
        item["status"] = "incomplete" if cut else "completed"
        if kind == "call":
            item["arguments"] = text
            yield "response.function_call_arguments.done", {**self._at(item), "name": item["name"], "arguments": text}
        else:
            item["content"][0]["text"] = text
            at, more = self._at(item) | {"content_index": 0}, _logprobs(kind)
            yield f"{PARTS[kind][1]}.done", {**at, "text": text, **more}
            yield "response.content_part.done", {**at, "part": item["content"][0]}
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def _piece(self, piece: Piece) -> Iterator[Event]:
        kind = kind_of(piece)
        if isinstance(piece, CallEnd):
            yield from self.close(piece.broken)
        elif isinstance(piece, CallStart):
            namespace = self._namespaces.get(piece.name)
            named = {"name": piece.name} if namespace is None else {"name": piece.name[len(namespace) + 1:], "namespace": namespace}
            yield from self._open(kind, {"id": _id("fc"), "type": "function_call", "status": "in_progress", "arguments": "",
                                         "call_id": _id("call"), **named})
        elif isinstance(piece, CallArguments):
            self._text.append(piece.json)
            yield "response.function_call_arguments.delta", {**self._at(self.items[-1]), "delta": piece.json}
        else:
            if self._kind != kind:
                yield from self._open(kind, _empty(kind))
                yield "response.content_part.added", {**self._at(self.items[-1]), "content_index": 0, "part": _part(kind)}
                self.items[-1]["content"].append(_part(kind))
            self._text.append(piece.text)
            yield f"{PARTS[kind][1]}.delta", {**self._at(self.items[-1]), "content_index": 0, "delta": piece.text, **_logprobs(kind)}

    def _open(self, kind: str, item: dict) -> Iterator[Event]:
        yield from self.close()
        self._kind = kind
        self.items.append(item)
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": item}

    def _at(self, item: dict) -> dict[str, object]:
        return {"item_id": item["id"], "output_index": len(self.items) - 1}


def _empty(kind: str) -> dict[str, object]:
    if kind == "thought":
        return {"id": _id("rs"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
    return {"id": _id("msg"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}


def _part(kind: str) -> dict[str, object]:
    return {"type": PARTS[kind][0], "text": "", **({"annotations": []} if kind == "content" else {})} | _logprobs(kind)


def _logprobs(kind: str) -> dict[str, list]:
    return {"logprobs": []} if kind == "content" else {}


def _id(kind: str) -> str:
    return f"{kind}_{uuid4().hex[:24]}"
