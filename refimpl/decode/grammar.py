"""Grammars that an answer must follow: JSON by a schema, a regular expression, Lark or GBNF, tool calls. llguidance does the parsing.

Every function returns a Grammar for one answer. With `thinking` the answer may begin with a thought, `<|channel>thought ... <channel|>`,
in which anything goes. End-of-generation tokens are allowed exactly where the grammar can end. Where only one text can follow, its tokens
are those that the tokenizer makes of it, and no others are allowed: so they are drafts that are always accepted.

Grammars come from strangers: texts, their nesting, and the work and memory llguidance may spend on one are bounded, and what is beyond
is a ValueError of one line. So is a grammar that allows nothing.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from refimpl.decode.tool_grammar import CallRules
from refimpl.text.calls import CALL, CALL_END
from refimpl.text.chat import CHANNEL_END, THOUGHT
from refimpl.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_CHARS, MAX_GRAMMAR_CHARS, MAX_PATTERN_CHARS = 128 * 1024, 32 * 1024, 8 * 1024
"""Longest schema; grammar; regular expression or all patterns of a schema. Some expressions take time and memory that go with the square
of their length: the worst that is accepted took 4 s and 0.5 GB."""
MAX_DEPTH = 64
"""Deepest nesting of brackets."""
STACK_BYTES = 256 * 1024 * 1024
"""llguidance recurses along chains of rules and would end the process at the end of the stack; what is not touched takes no memory."""
LIMITS = {"initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000, "max_items_in_row": 2000,
          "max_lexer_states": 50_000, "max_grammar_size": 100_000, "verbose_errors": False}
"""Of llguidance: about 50 ms to build a lexer's expressions, 15 ms a token, 100 MB of states."""
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}
"""In one line: a model can write white space for ever, and what it has no choice about takes no time. oneOf is read as anyOf: that no other
branch fits cannot be told in advance."""
ANY = r"(?s:.)"
JSON_STRING = r'"(?:[^"\\]|\\.)*"'

_tokenizers: weakref.WeakKeyDictionary[Tokenizer, LLTokenizer] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class Grammar:
    """A Constraint (constraint.py) that follows a grammar. `notes`: what of a tool's schema is not enforced, one line each."""

    def __init__(self, tokenizer: Tokenizer, grammar: str, *, end: int | None = None, notes: Sequence[str] = ()):
        """`grammar`: llguidance's Lark or its JSON. `end`: the end-of-generation token to draft where nothing else can follow.

        Raises ValueError: not a grammar, too large, or one that allows nothing.
        """
        from llguidance import LLMatcher, LLParserLimits

        self.notes = tuple(notes)
        self._tokenizer = tokenizer             # llguidance asks it, and holds it weakly
        self._end = tokenizer.eos if end is None else end
        parser_tokenizer, limits = _parser_tokenizer(tokenizer), LLParserLimits(**LIMITS)
        self._matcher = _on_a_large_stack(lambda: LLMatcher(parser_tokenizer, grammar, log_level=0, limits=limits))
        self._forced: list[int] = []            # what must follow, in order
        self._allowed_V = np.zeros(0, bool)
        self._is_current = False
        self._allowed()

    def mask(self, logits_V: np.ndarray) -> np.ndarray:
        """A copy with -inf where a token is not allowed. Raises ValueError if the grammar has become too complex to go on."""
        allowed_V = self._allowed()
        masked_V = np.full_like(logits_V, -np.inf)
        n = min(len(allowed_V), len(logits_V))
        masked_V[:n][allowed_V[:n]] = logits_V[:n][allowed_V[:n]]
        return masked_V

    def accept(self, token: int):
        """Goes on by `token`. Raises ValueError if it was not allowed."""
        if not self._matcher.consume_token(int(token)):
            raise ValueError(f"token {token} does not follow the grammar: {_line(self._matcher.get_error())}")
        self._is_current = False
        del self._forced[:1]

    def forced(self) -> list[int]:
        """The tokens of the text that must come next; where nothing can, an end-of-generation token."""
        self._allowed()
        return [self._end] if self._matcher.is_stopped() else list(self._forced)

    def _allowed(self) -> np.ndarray:
        """Whether each token is allowed now."""
        if not self._is_current:
            if not self._matcher.is_error():
                bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
                self._allowed_V = np.unpackbits(bits, bitorder="little").view(bool)
            if self._matcher.is_error() and not self._matcher.get_error().startswith("NoExtension"):
                raise ValueError(f"grammar: {_line(self._matcher.get_error())}")
            if self._matcher.is_error() or not self._allowed_V.any():
                raise ValueError("grammar: nothing is allowed here, neither a token nor the end")
            if not self._forced and not self._matcher.is_stopped():
                self._forced = self._matcher.compute_ff_tokens()
            if self._forced:
                self._allowed_V = np.zeros_like(self._allowed_V)
                self._allowed_V[self._forced[0]] = True
            self._is_current = True
        return self._allowed_V


def json_schema(tokenizer: Tokenizer, schema: Mapping | bool, *, thinking: bool = False) -> Grammar:
    """JSON that a JSON schema describes. Keys come in the schema's order. Raises ValueError (what llguidance does not know it refuses)."""
    text = _schema_text(schema)
    return _lark(tokenizer, f"%json {text}", thinking)


def json_object(tokenizer: Tokenizer, *, thinking: bool = False) -> Grammar:
    """Any JSON object."""
    return json_schema(tokenizer, {"type": "object"}, thinking=thinking)


def regex(tokenizer: Tokenizer, pattern: str, *, thinking: bool = False) -> Grammar:
    r"""Text that a regular expression matches as a whole (Rust's syntax: no look-around, no back references). `\d` is 0 to 9."""
    from llguidance import regex_to_lark

    _check(pattern, "the regular expression", MAX_PATTERN_CHARS)
    return _lark(tokenizer, f"TEXT\nTEXT: /{regex_to_lark(pattern, 'd')}/", thinking)


def lark(tokenizer: Tokenizer, text: str, *, thinking: bool = False) -> Grammar:
    """Text by a grammar in llguidance's variant of Lark, from its rule `start`."""
    _check(text, "the grammar", MAX_GRAMMAR_CHARS)
    return _nested(tokenizer, text, thinking)


def gbnf(tokenizer: Tokenizer, text: str, *, thinking: bool = False) -> Grammar:
    """Text by a grammar in llama.cpp's GBNF, from its rule `root`."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    _check(text, "the grammar", MAX_GRAMMAR_CHARS // 2)         # what it becomes is a little longer, and converting it takes long
    try:
        converted = gbnf_to_lark(text)
    except Exception as error:      # the converter raises whatever comes
        raise ValueError(f"grammar: not GBNF: {_line(str(error) or type(error).__name__)}") from None
    return _nested(tokenizer, converted, thinking)


def tool_calls(tokenizer: Tokenizer, tools: Sequence[Mapping], choice: str = "auto", *, parallel: bool = True,
               thinking: bool = False) -> Grammar:
    """Calls of `tools` (OpenAI's form) that can always be read, with arguments by the tool's schema.

    `choice`: "auto" (text, calls or both), "required" (at least one call), "none" (no call) or the name of the one tool to call;
    `parallel`: more than one call is allowed. What of a schema is not enforced is in the grammar's `notes` (tool_grammar.py).
    Raises ValueError: no such tool, a schema that nothing satisfies, or one too large.
    """
    if not isinstance(choice, str):
        raise ValueError(f"the choice of a tool must be a string, not {choice!r:.60}")
    ids = {marker: tokenizer.id_of(marker) for marker in (CALL, CALL_END)}
    if None in ids.values():
        raise ValueError("this model's vocabulary has no tokens for tool calls")
    _check(_plain(tools), "the tools", skip=JSON_STRING)
    rules = CallRules(tokenizer, tools, None if choice in ("auto", "required", "none") else choice)
    calls = "call+" if parallel else "call"
    if choice in ("auto", "none"):
        start = "start: TEXT? (thought TEXT?)*" if thinking else "start: TEXT?"
        start += f" ({calls})?" if choice == "auto" else ""
    else:
        start = f"start: thought? {calls}" if thinking else f"start: {calls}"
    text = "\n".join([start, *_thought(tokenizer, thinking), f"TEXT: /{ANY}+/", f"call: <[{ids[CALL]}]> function <[{ids[CALL_END]}]>",
                      *rules.lines])
    end = tokenizer.id_of("<turn|>" if choice in ("auto", "none") else "<|tool_response>")
    return Grammar(tokenizer, text, end=end, notes=rules.notes)


def _lark(tokenizer: Tokenizer, body: str, thinking: bool) -> Grammar:
    """A grammar by what its rule `body` is; other rules may follow in new lines."""
    start = "start: thought? body" if thinking else "start: body"
    return Grammar(tokenizer, "\n".join([start, *_thought(tokenizer, thinking), f"body: {body}"]), end=tokenizer.id_of("<turn|>"))


def _nested(tokenizer: Tokenizer, text: str, thinking: bool) -> Grammar:
    """A whole grammar, after a thought if there may be one."""
    grammars = [{"lark_grammar": text}]
    if thinking:
        first = "\n".join(["start: thought? @body", *_thought(tokenizer, True)])
        grammars = [{"lark_grammar": first}, {"name": "body", "lark_grammar": text}]
    return Grammar(tokenizer, json.dumps({"grammars": grammars}), end=tokenizer.id_of("<turn|>"))


def _thought(tokenizer: Tokenizer, thinking: bool) -> list[str]:
    begin, end = tokenizer.id_of(THOUGHT), tokenizer.id_of(CHANNEL_END)
    if thinking and None in (begin, end):
        raise ValueError("this model's vocabulary has no tokens for thoughts")
    return [f"thought: <[{begin}]> THOUGHT <[{end}]>", rf"THOUGHT: /thought\n{ANY}*/"] if thinking else []


def _schema_text(schema: object) -> str:
    if not isinstance(schema, Mapping | bool):
        raise ValueError(f"a JSON schema must be an object or a boolean, not {str(schema)[:60]!r}")
    text = _plain(schema)
    _check(text, "the schema", skip=JSON_STRING)
    if (n := _pattern_chars(schema)) > MAX_PATTERN_CHARS:
        raise ValueError(f"the patterns of the schema have {n} characters; at most {MAX_PATTERN_CHARS} are accepted")
    return text if isinstance(schema, bool) else _plain({**schema, "x-guidance": JSON_OPTIONS})


def _pattern_chars(value: object) -> int:
    """Characters of all regular expressions in a schema."""
    if isinstance(value, Mapping):
        own = sum(len(item) for key, item in value.items() if key == "pattern" and isinstance(item, str))
        keys = sum(map(len, value.get("patternProperties", {}))) if isinstance(value.get("patternProperties"), Mapping) else 0
        return own + keys + sum(map(_pattern_chars, value.values()))
    return sum(map(_pattern_chars, value)) if isinstance(value, list | tuple) else 0


def _plain(value: object) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a schema must be plain JSON: {_line(str(error))}") from None


def _check(text: object, what: str, most: int = MAX_CHARS, skip: str = r"\\."):
    """Refuses a text that is too long or nested too deeply, by the brackets outside of what matches `skip`."""
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a string, not {str(text)[:60]!r}")
    if len(text) > most:
        raise ValueError(f"{what} has {len(text)} characters; at most {most} are accepted")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds a lone surrogate, which no text can") from None
    level = 0
    for bracket in re.findall(r"[()\[\]{}]", re.sub(skip, "", text, flags=re.DOTALL)):
        level = max(level + (1 if bracket in "([{" else -1), 0)
        if level > MAX_DEPTH:
            raise ValueError(f"{what} is nested more than {MAX_DEPTH} brackets deep")


def _line(message: str) -> str:
    """The first 300 characters of a message, in one line."""
    return " ".join(message.replace("<non-verbose/>", "").split())[:300]


def _on_a_large_stack(work: Callable[[], object]) -> object:
    """What `work` returns, which runs in a thread of its own."""
    results = []
    with _lock:
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    return results[0]


def _parser_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    """llguidance's view of the vocabulary, made once for each: a second or so for 262,144 tokens."""
    with _lock:
        if tokenizer not in _tokenizers:
            from llguidance import LLTokenizer

            _tokenizers[tokenizer] = LLTokenizer(_Vocabulary(tokenizer), n_vocab=tokenizer.n_vocab,
                                                 eos_token=sorted(tokenizer.end_of_generation))
        return _tokenizers[tokenizer]


class _Vocabulary:
    """What llguidance asks of a tokenizer. Markers are special: no text, only a rule that names them, can be one."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer):
        special = {tokenizer.id_of(marker) for marker in tokenizer.markers}
        self.eos_token_id, self.bos_token_id, self.special_token_ids = tokenizer.eos, tokenizer.bos, sorted(special)
        self.tokens = [tokenizer.token(i).encode() if i in special else tokenizer.bytes_of(i) for i in range(tokenizer.n_vocab)]
        self._tokenizer = weakref.ref(tokenizer)            # it is the key under which this is kept

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer().encode(text, bos=False)
