"""Answers taken apart by the ids of markers: thoughts, text, tool calls to JSON, stop strings; and what a model writes wrongly."""

import itertools
import json

import pytest
from answers import BYTES, CALL, CALL_END, CHANNEL_END, MARKERS, QUOTE, THOUGHT, TOKENIZER, ids_of, parts_of, pieces_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refimpl.text import chat
from refimpl.text.answer import AnswerSplitter, CallArguments, Content
from refimpl.text.chat import split_thought
from refimpl.text.stops import StopStrings


def notation(value: object) -> list[str]:
    """A value in Gemma's form, as parts."""
    if isinstance(value, str):
        return [QUOTE, value, QUOTE]
    if isinstance(value, dict):
        pairs = [[f"{key}:", *notation(item), ","] for key, item in value.items()]
        return ["{", *itertools.chain(*pairs)][:-1 if pairs else None] + ["}"]
    if isinstance(value, list):
        return ["[", *itertools.chain(*([*notation(item), ","] for item in value))][:-1 if value else None] + ["]"]
    return [json.dumps(value)]


keys = st.text(st.characters(exclude_characters=",:{}[]\u2581", exclude_categories=("Cs", "Z", "Cc")), min_size=1, max_size=8)
texts = st.text(st.characters(exclude_characters="\u2581", exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    [*map(str, MARKERS), '"\\\n{},:'])
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.dictionaries(keys, values, max_size=4), min_size=1, max_size=3), st.booleans())
def test_any_arguments_come_back_as_json(arguments, in_bytes):
    parts = ["Let me see. "]
    for i, value in enumerate(arguments):
        parts += [CALL, f"call:f_{i}", *notation(value), CALL_END]
    thought, content, calls = parts_of(pieces_of(ids_of(*parts, in_bytes=in_bytes)))
    assert (thought, content) == ("", "Let me see. ")
    assert calls == [(f"f_{i}", value, False) for i, value in enumerate(arguments)]


def test_arguments_are_streamed():
    """A string's text is not held back until the string ends."""
    splitter = AnswerSplitter(TOKENIZER)
    for i in ids_of(CALL, "call:f{a:", QUOTE):
        splitter.push(i)
    assert [splitter.push(i) for i in ids_of("é\n", in_bytes=True)] == [[], [CallArguments(0, "é")], [CallArguments(0, "\\n")]]


BROKEN = {              # parts after CALL -> (content, calls)
    ("call:f{a:1,b:[true", CALL_END): ("", [("f", {"a": 1, "b": [True]}, True)]),
    ("call:f{a:", CALL_END, "x"): ("x", [("f", {"a": None}, True)]),
    ("call:f{a:1,b", CALL_END): ("", [("f", {"a": 1}, True)]),
    ("call:f{a:Paris}", CALL_END): ("Paris}", [("f", {"a": None}, True)]),
    ("call:f{a:1]", CALL_END): ("]", [("f", {"a": 1}, True)]),
    ("call:f{a:[01]}", CALL_END): ("01]}", [("f", {"a": []}, True)]),
    ("call:f{a:1} and more", CALL_END): ("and more", [("f", {"a": 1}, False)]),
    ("call:f{a:", QUOTE, "x"): ("", [("f", {"a": "x"}, True)]),
    ("call:f{a:12",): ("", [("f", {"a": None}, True)]),
    ("call:f{a:1", CALL, "call:g{}", CALL_END): ("", [("f", {"a": 1}, True), ("g", {}, False)]),
    ("call:f{a:", QUOTE, "x", CHANNEL_END, "y"): ("y", [("f", {"a": "x"}, True)]),
    ("call:f{", QUOTE, "a b:c", QUOTE, ":None}", CALL_END): ("", [("f", {"a b:c": None}, False)]),
    ("call:f{ a : 1 , b : [ 1 , { } ] }", CALL_END): ("", [("f", {"a": 1, "b": [1, {}]}, False)]),
    ("call:f{a:1", QUOTE, "x", QUOTE, "}", CALL_END): ('1"x"}', [("f", {"a": None}, True)]),
    ("call:f{a:" + "[" * 300,): ("[" * 45, [("f", {"a": json.loads("[" * 255 + "]" * 255)}, True)]),
    ("f{a:1}", CALL_END, "z"): ("f{a:1}z", []), ("call:", CALL_END): ("call:", []), ("call:{}", CALL_END): ("call:{}", []),
    ("call:f", QUOTE, "x", QUOTE, CALL_END): ('call:f"x"', []), (CALL_END,): ("", []), ("call:f",): ("call:f", []),
}


@pytest.mark.parametrize("parts", BROKEN)
def test_broken_calls_are_closed_or_given_back(parts):
    content, calls = BROKEN[parts]
    assert parts_of(pieces_of(ids_of(CALL, *parts))) == ("", content, calls)


any_parts = st.lists(st.sampled_from([*MARKERS, "call:", "f", "{", "}", "[", "]", ",", ":", "1", "true", " ", "thought", "\n", "x", '"']),
                     max_size=25)


@settings(deadline=None, max_examples=200)
@given(any_parts, st.booleans())
def test_nothing_raises_and_arguments_are_always_json(parts, called):
    """`parts_of` reads the JSON of every call."""
    thought, content, calls = parts_of(pieces_of(ids_of(*([CALL, "call:f{"] if called else []), *parts)))
    assert bool(calls) >= called and all(isinstance(arguments, dict) for _, arguments, _ in calls)


@settings(deadline=None)
@given(st.lists(st.sampled_from([THOUGHT, CHANNEL_END, "thought", "th", "\n", " ", "a", "<", "é"]), max_size=12))
def test_thoughts_are_those_of_the_text(parts):
    assert parts_of(pieces_of(ids_of(*parts))) == (*split_thought("".join(parts)), [])


def test_text_that_spells_a_marker_is_text_and_control_tokens_have_none():
    spelled = f"{chat.THOUGHT}thought\nx{CHANNEL_END}{CALL}call:f{{}}{CALL_END}"
    ids = TOKENIZER.encode(spelled, bos=False)
    assert parts_of(pieces_of([TOKENIZER.bos, *ids, TOKENIZER.id_of("<turn|>")])) == ("", spelled, [])
    assert parts_of(pieces_of(ids_of(THOUGHT, "thought\n", spelled, CHANNEL_END, "y"))) == (spelled, "y", [])


def test_a_prompt_may_end_inside_of_a_thought():
    assert pieces_of(ids_of("thoughtful", CHANNEL_END, "y"), in_thought=True)[-1] == Content("y")
    assert parts_of(pieces_of(ids_of(" thoughtful\n", CHANNEL_END, "y"), in_thought=True)) == ("thoughtful", "y", [])


def test_ids_outside_of_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="outside the vocabulary"):
        AnswerSplitter(TOKENIZER).push(TOKENIZER.n_vocab)


def test_half_a_character_before_a_marker_is_shown_as_such():
    half = BYTES[b"\xc3"]
    assert parts_of(pieces_of([half, *ids_of(CALL, "call:f{a:", QUOTE), half, *ids_of(QUOTE, "}", CALL_END), half])) == (
        "", "\ufffd\ufffd", [("f", {"a": "\ufffd"}, False)])


def ending_of(text: str, stops) -> tuple[str, bool]:
    """What StopStrings means, by trying every end."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[:end - max(map(len, found))], True
    return text, False


@settings(deadline=None, max_examples=300)
@given(st.text("ab", max_size=14), st.lists(st.text("ab", min_size=1, max_size=6), max_size=4), st.lists(st.integers(1, 4), max_size=14))
@example("ababac", ["abac"], [1, 3])
@example("abcd", ["abcd", "bc"], [2])
@example("abc", ["c", "abc"], [1, 1])
def test_stop_strings_end_the_text_wherever_it_is_cut(text, stops, lengths):
    wanted, stopper, shown, rest, stopped = ending_of(text, stops), StopStrings(stops), "", text, False
    for n in [*lengths, len(text)]:
        chunk, rest = rest[:n], rest[n:]
        new, stopped = stopper.push(chunk)
        shown += new
        assert wanted[0].startswith(shown)
    assert (shown + stopper.finish(), stopped) == wanted
    assert stopper.push("a") == ("", True) if stopped else stopper.finish() == ""


def test_no_more_is_held_back_than_may_become_a_stop_string():
    stopper = StopStrings(["END", "\n\n"])
    assert stopper.push("a EN") == ("a ", False)
    assert stopper.push("E") == ("EN", False)
    assert stopper.push("x\n") == ("Ex", False)
    assert stopper.push("\nEND") == ("", True)


@pytest.mark.parametrize("stops", [[""], ["a", None]])
def test_stop_strings_are_not_empty(stops):
    with pytest.raises(ValueError, match="stop string"):
        StopStrings(stops)
