"""A tool call as Gemma writes it, to JSON, while it is being written.

`<|tool_call>call:NAME{key:value,...}<tool_call|>`: keys are bare, strings stand between `<|"|>` tokens and have no escapes; numbers, true,
false, null, {} and [] are as in JSON.

Broken calls (a model can write them unless a grammar keeps it from that) never raise. One that breaks before its arguments begin is
given back as text. One that breaks later is closed so that its arguments are valid JSON, its CallEnd says `broken`, and what follows
up to `<tool_call|>` is text. A call that the end of the answer cuts off is closed too: whoever executes calls should leave broken ones.
"""

import json
import re
from dataclasses import dataclass

CALL, CALL_END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
HEAD = "call:"
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
WORDS = {"true": "true", "false": "false", "null": "null", "None": "null"}      # None: what Google's template makes of null
MAX_DEPTH = 256
"""Deepest nesting of arguments; a call that goes deeper is broken."""


@dataclass(frozen=True)
class Content:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A tool call begins; `index` counts them from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of a call's arguments; all of them joined are a JSON object."""

    index: int
    json: str


@dataclass(frozen=True)
class CallEnd:
    """A call has ended. `broken`: the model did not write it to its end, or not correctly."""

    index: int
    broken: bool = False


class _Broken(Exception):
    """The text is not a call's."""


class CallReader:
    """One call: what is between its markers goes in, pieces come out. Goes over every character once."""

    def __init__(self, index: int):
        self.index, self.started = index, False
        self._state = "head"            # what comes next, or is being read
        self._held: list[str] = []      # characters of a head, a key or a bare value that has not ended
        self._open: list[str] = []      # what closes the brackets that are open: } and ]
        self._comma = ""                # written before the next key or element
        self._json: list[str] = []      # certain, but not in a piece yet

    def text(self, text: str) -> list[Content | CallStart | CallArguments | CallEnd]:
        """Characters outside or inside of a string."""
        pieces = []
        for at, character in enumerate(text):
            if self._state == "string":
                self._json.append(json.dumps(text[at:], ensure_ascii=False)[1:-1])
                break
            if self._state == "broken":
                return [Content(text[at:])]
            try:
                if name := self._character(character):
                    pieces.append(CallStart(self.index, name))
            except _Broken:
                return pieces + self._close() + [Content("".join(self._held) + text[at:])]
        return pieces + self._arguments()

    def quote(self) -> list[Content | CallArguments | CallEnd]:
        """A quote token: begins or ends a string."""
        state, held = self._state, "".join(self._held)
        if state == "string":
            self._json.append('"')
            self._state = "next"
        elif state in ("first value", "value") and not held:
            self._begin("string", '"')
        elif state in ("first key", "key") and not held.strip():
            self._state, self._held = "quoted key", []
        elif state == "quoted key":
            self._state = "colon"
        else:
            return [*(self._close() if state != "broken" else []), Content((held if state != "broken" else "") + '"')]
        return self._arguments()

    def end(self, cut: bool) -> list[Content | CallArguments | CallEnd]:
        """`<tool_call|>`, or another marker in its place, or the end of the answer (`cut`)."""
        if self._state == "broken":
            return []
        if not self.started:
            return [Content("".join(self._held))] if self._held else []
        if not cut:
            try:
                self._bare_value()
            except _Broken:
                pass
        return self._close()

    def _close(self) -> list[CallArguments | CallEnd]:
        """Completes the JSON, wherever it is."""
        state, self._state = self._state, "broken"
        if not self.started:
            return []
        if state == "value" and self._open[-1] == "}":
            self._json.append("null")
        self._json += ['"' if state == "string" else "", *reversed(self._open)]
        return self._arguments() + [CallEnd(self.index, broken=state != "done")]

    def _arguments(self) -> list[CallArguments]:
        json_, self._json = "".join(self._json), []
        return [CallArguments(self.index, json_)] if json_ else []

    def _character(self, character: str) -> str:
        """Goes on by a character that is in no string of the arguments. Returns the call's name when it is over."""
        if self._state == "head":
            return self._head(character)
        if self._state == "quoted key":
            self._held.append(character)
        elif self._state in ("first key", "key", "colon"):
            self._key(character)
        else:
            self._value(character)
        return ""

    def _head(self, character: str) -> str:
        if character != "{":
            if (at := len(self._held)) < len(HEAD) and character != HEAD[at]:
                raise _Broken
            self._held.append(character)
            return ""
        name = "".join(self._held).removeprefix(HEAD).strip()
        if len(self._held) < len(HEAD) or not name:
            raise _Broken
        self.started, self._held = True, []
        self._bracket("{")
        return name

    def _key(self, character: str):
        if character == ":":
            key = "".join(self._held) if self._state == "colon" else "".join(self._held).strip()
            self._held = []
            self._begin("value", json.dumps(key, ensure_ascii=False) + ":")
        elif character == "}" and self._state == "first key" and not "".join(self._held).strip():
            self._held = []
            self._closed()
        elif character in ",{}[]" or self._state == "colon" and not character.isspace():
            raise _Broken
        elif self._state != "colon":
            self._held.append(character)

    def _value(self, character: str):
        """A value, or what follows one."""
        if character in ",}]" or character.isspace():
            self._bare_value()
        if self._state in ("first value", "value") and (self._held or not character.isspace() and character not in "{[,}]"):
            self._held.append(character)
        elif character.isspace():
            pass
        elif self._state in ("first value", "value") and character in "{[" and len(self._open) < MAX_DEPTH:
            self._bracket(character)
        elif self._state in ("next", "first value") and self._open and character == self._open[-1]:
            self._closed()
        elif self._state == "next" and character == ",":
            self._comma, self._state = ",", "key" if self._open[-1] == "}" else "value"
        else:
            raise _Broken

    def _bare_value(self):
        """What is held, if it is a value, ends here."""
        if self._state in ("first value", "value") and self._held:
            text = "".join(self._held)
            if text not in WORDS and not NUMBER.fullmatch(text):
                raise _Broken
            self._held = []
            self._begin("next", WORDS.get(text, text))

    def _begin(self, state: str, json_: str):
        self._json.append(self._comma + json_)
        self._state, self._comma = state, ""

    def _bracket(self, bracket: str):
        self._begin("first key" if bracket == "{" else "first value", bracket)
        self._open.append("}" if bracket == "{" else "]")

    def _closed(self):
        self._json.append(self._open.pop())
        self._state, self._comma = "next" if self._open else "done", ""
