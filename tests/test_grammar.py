"""Grammars: whatever the logits, what is picked under the mask can be read; and grammars that mean harm."""

import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from answers import METADATA, TOKENIZER, parts_of, pieces_of
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.decode import grammar
from refimpl.decode.constraint import FREE, Constraint, ThinkingBudget
from refimpl.decode.grammar import gbnf, json_object, json_schema, lark, regex, tool_calls
from refimpl.decode.sampling import Sampler, Sampling
from refimpl.text.tokenizer import Tokenizer

CLOSING = [i for i in range(TOKENIZER.n_vocab) if TOKENIZER.token(i) in ('"', "}", "]", '<|"|>', "<channel|>", "<tool_call|>")
           or i in TOKENIZER.end_of_generation]


def walk(rules: Constraint, seed: int, most: int = 600) -> list[int]:
    """An answer by random logits that ask for its end more and more. Checks every mask and every draft."""
    random, ids, promised = np.random.default_rng(seed), [], []
    sampler = Sampler(Sampling(temperature=0), constraint=rules)
    while not ids or ids[-1] not in TOKENIZER.end_of_generation:
        assert len(ids) < most, TOKENIZER.decode(ids, special=True)
        logits_V = random.normal(size=TOKENIZER.n_vocab).astype(np.float32)
        logits_V[CLOSING] += len(ids) / 20
        before_V = logits_V.copy()
        masked_V, forced = rules.mask(logits_V), rules.forced()
        assert np.array_equal(logits_V, before_V) and masked_V is not logits_V and masked_V.dtype == np.float32
        allowed_V = masked_V != -np.inf
        assert allowed_V.any() and np.array_equal(masked_V[allowed_V], logits_V[allowed_V])
        assert np.array_equal(rules.mask(logits_V), masked_V)           # `forced` changes nothing
        assert forced[:len(promised)] == promised, "what was forced stays so"
        if forced and forced[0] not in TOKENIZER.end_of_generation and not isinstance(rules, ThinkingBudget):
            assert np.flatnonzero(allowed_V).tolist() == forced[:1], "a draft that is always accepted"
        promised = forced[1:]
        ids.append(sampler.pick(logits_V))
    assert set(np.flatnonzero(rules.mask(logits_V) != -np.inf)) == TOKENIZER.end_of_generation       # nothing follows the end
    return ids[:-1]


ALL = {"type": "object", "required": ["s", "n"], "additionalProperties": False, "properties": {
    "s": {"type": "string"}, "n": {"type": "integer", "minimum": 3, "maximum": 40}, "b": {"type": ["boolean", "null"]},
    "e": {"enum": ["x", 1, None]}, "l": {"type": "array", "items": {"type": "number"}, "maxItems": 3}, "o": {"$ref": "#/$defs/o"}},
    "$defs": {"o": {"type": "object", "properties": {"p": {"type": "string", "maxLength": 4}}, "additionalProperties": False}}}


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32), st.integers(0, 40))
def test_a_thought_ends_where_its_budget_does(seed, most):
    """As soon as the grammar lets it, which wants "thought" and a line's end, and whole characters, of up to four byte tokens."""
    begin, end = (TOKENIZER.id_of(marker) for marker in ("<|channel>", "<channel|>"))
    ids = walk(ThinkingBudget(json_schema(TOKENIZER, ALL, thinking=True), most, begin, end), seed)
    thought, text, _ = parts_of(pieces_of(ids))
    assert {"s", "n"} <= set(json.loads(text))
    if begin in ids:
        assert ids.index(end) - ids.index(begin) - 1 <= max(most, len(TOKENIZER.encode("thought\n", bos=False))) + 3
    free, logits_V = ThinkingBudget(FREE, 2, begin, end), np.random.default_rng(seed).normal(size=TOKENIZER.n_vocab).astype(np.float32)
    other = TOKENIZER.encode("x", bos=False)[0]
    for token in (other, other, other, begin, other, end, other, other, begin, other):          # two in two thoughts
        assert free.mask(logits_V) is logits_V and free.forced() == []
        free.accept(token)
    assert np.flatnonzero(free.mask(logits_V) != -np.inf).tolist() == free.forced() == [end]
    free.accept(end)
    assert free.mask(logits_V) is logits_V


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32), st.booleans())
def test_a_walk_by_a_schema_is_json_of_the_schema(seed, thinking):
    thought, text, calls = parts_of(pieces_of(walk(json_schema(TOKENIZER, ALL, thinking=thinking), seed)))
    value = json.loads(text)
    assert not calls and (thinking or not thought)
    assert {"s", "n"} <= set(value) <= set(ALL["properties"]) and isinstance(value["s"], str) and 3 <= value["n"] <= 40
    assert value.get("b") in (True, False, None) and value.get("e") in ("x", 1, None) and len(value.get("l", [])) <= 3


@pytest.mark.parametrize("seed", range(4))
def test_other_grammars(seed):
    assert isinstance(json.loads(TOKENIZER.decode(walk(json_object(TOKENIZER), seed))), dict)
    assert re.fullmatch(r"[a-f]+/\d{2}", TOKENIZER.decode(walk(regex(TOKENIZER, r"[a-f]+/\d{2}"), seed)))
    for rules in (lark(TOKENIZER, 'start: "(" start ")" | /[01]+/'), gbnf(TOKENIZER, 'root ::= "(" root ")" | [01]+')):
        text = TOKENIZER.decode(walk(rules, seed))
        assert re.fullmatch(r"\(*[01]+\)*", text) and text.count("(") == text.count(")")
    thought, text, _ = parts_of(pieces_of(walk(lark(TOKENIZER, 'start: "a" | "b"', thinking=True), seed)))
    assert text in ("a", "b")


def tool(name: str, parameters: object = None) -> dict:
    return {"type": "function", "function": {"name": name, "description": "d"} | ({} if parameters is None else {"parameters": parameters})}


PARAMETERS = {"type": "object", "required": ["city", "unit"], "properties": {
    "city": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "F {a}:,"]},
    "days": {"type": "INTEGER", "minimum": 1, "maximum": 9},
    "a b:c": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    "near": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
    "x": {"type": "number"}, "any": {}, "const": {"const": {"k": ["v", 1.5, None, True, {}]}}},
    "$defs": {"place": {"type": "object", "properties": {"city": {"type": "string", "nullable": True}, "in": {"$ref": "#/$defs/place"}},
                        "required": ["city"], "additionalProperties": False}}}
TOOLS = [tool("get_weather", PARAMETERS), tool("now"), tool("get", {"type": "object", "properties": {}, "additionalProperties": True})]


def check_place(place: dict):
    assert {"city"} <= set(place) <= {"city", "in"} and isinstance(place["city"], str | None)
    if "in" in place:
        check_place(place["in"])


def check_call(name: str, arguments: dict, broken: bool):
    assert not broken
    if name == "now":
        assert arguments == {}
    elif name == "get_weather":
        assert {"city", "unit"} <= set(arguments) <= set(PARAMETERS["properties"]) and isinstance(arguments["city"], str)
        assert arguments["unit"] in ("C", "F {a}:,") and arguments.get("days", 1) in range(1, 10)
        assert arguments.get("a b:c") in (True, False, None) and isinstance(arguments.get("x", 1), int | float)
        assert arguments.get("const", PARAMETERS["properties"]["const"]["const"]) == {"k": ["v", 1.5, None, True, {}]}
        assert len(arguments.get("near", [])) <= 2
        for place in arguments.get("near", []):
            check_place(place)
    else:
        assert name == "get"


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from(["auto", "required", "none", "get_weather", "now"]), st.booleans(), st.booleans())
def test_a_walk_by_tools_is_calls_that_can_be_read(seed, choice, parallel, thinking):
    rules = tool_calls(TOKENIZER, TOOLS, choice, parallel=parallel, thinking=thinking)
    thought, text, calls = parts_of(pieces_of(walk(rules, seed)))
    assert rules.notes == () and (thinking or not thought) and (parallel or len(calls) <= 1)
    for call in calls:
        check_call(*call)
    if choice == "none":
        assert not calls
    elif choice != "auto":
        assert calls and not text and (choice == "required" or {name for name, _, _ in calls} == {choice})


@pytest.mark.parametrize("choice, said", [("auto", {"calls", "text", "both", "nothing"}), ("required", {"calls"})])
def test_what_a_choice_allows_is_reached(choice, said):
    seen = set()
    for seed in range(60):
        random = np.random.default_rng(seed)
        rules, ids = tool_calls(TOKENIZER, TOOLS[1:2], choice, parallel=False), []
        for _ in range(60):
            logits_V = random.normal(size=TOKENIZER.n_vocab).astype(np.float32)
            logits_V[[TOKENIZER.id_of("<|tool_call>"), *TOKENIZER.end_of_generation]] += 2
            ids.append(int(np.argmax(rules.mask(logits_V))))
            rules.accept(ids[-1])
            if ids[-1] in TOKENIZER.end_of_generation:
                _, text, calls = parts_of(pieces_of(ids))
                seen.add("both" if text and calls else "text" if text else "calls" if calls else "nothing")
                break
    assert seen == said


def test_every_order_of_keys_is_allowed_and_each_key_once():
    def can(*parts: str) -> bool:
        rules = tool_calls(TOKENIZER, [tool("f", {"properties": {k: {"type": "null"} for k in "abc"}, "required": ["b"]})], "f")
        ids = [TOKENIZER.id_of("<|tool_call>"), *TOKENIZER.encode("call:f{" + ",".join(f"{k}:null" for k in parts) + "}", bos=False)]
        try:
            for i in ids:
                rules.accept(i)
        except ValueError:
            return False
        return True

    assert can("b") and can("a", "b") and can("b", "a") and can("c", "b", "a") and can("a", "c", "b")
    assert not can() and not can("a") and not can("b", "b") and not can("b", "d") and not can("a", "a", "b")


def test_drafts_are_what_must_come():
    rules = tool_calls(TOKENIZER, TOOLS[1:2], "required", parallel=False)
    forced = rules.forced()
    assert TOKENIZER.decode(forced, special=True) == "<|tool_call>call:now{}<tool_call|>"[:len(TOKENIZER.decode(forced, special=True))]
    while not (forced and forced[0] in TOKENIZER.end_of_generation):
        for i in forced or [int(np.argmax(rules.mask(np.ones(TOKENIZER.n_vocab, np.float32))))]:
            rules.accept(i)
        forced = rules.forced()
    assert forced == [TOKENIZER.id_of("<|tool_response>")]
    assert json_schema(TOKENIZER, {"const": 1}).forced() != []


def test_a_token_that_is_not_allowed_is_an_error():
    with pytest.raises(ValueError, match="does not follow the grammar"):
        json_object(TOKENIZER).accept(TOKENIZER.encode("x", bos=False)[0])


def test_text_cannot_be_a_marker_nor_be_cut_by_one():
    """A string of a call goes on until the quote token; no other marker can be in it."""
    rules = tool_calls(TOKENIZER, [tool("f", {"properties": {"a": {"type": "string"}}})], "f")
    for i in [TOKENIZER.id_of("<|tool_call>"), *TOKENIZER.encode("call:f{a:", bos=False), TOKENIZER.id_of('<|"|>'),
              *TOKENIZER.encode('}<tool_call|><|"|>', bos=False)]:
        rules.accept(i)
    allowed = np.flatnonzero(rules.mask(np.zeros(TOKENIZER.n_vocab, np.float32)) == 0)
    assert {TOKENIZER.token(i) for i in allowed} & set(TOKENIZER.markers) == {'<|"|>'}


REFUSED = [
    (json_schema, False, "false"), (json_schema, {"enum": []}, "empty"), (json_schema, {"type": "x"}, "Invalid type"),
    (json_schema, {"not": {}}, "Unimplemented"), (json_schema, {"$ref": "#/x"}, "does not exist"),
    (json_schema, {"$ref": "#"}, "nothing is"),
    (json_schema, [], "object or a boolean"), (json_schema, {"a": {1}}, "plain JSON"),
    (json_schema, {"type": "string", "pattern": "("}, "regex"),
    (json_schema, {"type": "string", "pattern": "a" * 9000}, "patterns"), (json_schema, {"description": "x" * 140_000}, "characters"),
    (regex, "(", "regex"), (regex, r"(?=a)b", "look-around"), (regex, "a*" * 5000, "characters"),
    (regex, "(" * 65 + ")" * 65, "nested"),
    (regex, "\ud800", "surrogate"), (regex, None, "string"), (lark, "", "grammar"), (lark, "start: start", "nothing is"),
    (lark, "start: x", "grammar"), (lark, "a" * 40_000, "characters"), (gbnf, 'root ::= "a', "GBNF"), (gbnf, "", "root"),
    (gbnf, "root ::= x", "not found")]


@pytest.mark.parametrize("make, what, says", REFUSED)
def test_what_is_no_grammar_is_refused_in_one_line(make, what, says):
    with pytest.raises(ValueError, match=says) as caught:
        make(TOKENIZER, what)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def chain(n: int) -> dict:
    return {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)} | {f"d{n}": {}}


REFUSED_TOOLS = [
    ({"properties": {"a": False}, "required": ["a"]}, "false"), ({"properties": {"a": {"enum": []}}}, "enum"), ([], "object"),
    ({"properties": {"a": {"type": "text"}}}, "no type"), ({"properties": {"a": {"$ref": "#/$defs/x"}}}, "leads nowhere"),
    ({"properties": {"a": {"$ref": "http://x/y"}}}, "not within"), ({"type": "string"}, "must be an object"),
    ({"properties": {"a": {"$ref": "#/properties/a"}}}, "nothing finite"),
    ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "finite"),
    ({"properties": {f"k{i}": {} for i in range(65)}}, "65 keys"), ({"properties": 1}, "properties"),
    ({"properties": {"a": 1}}, "no schema"),
    ({"properties": {"a": {"allOf": [{}, {}]}}}, "allOf"), ({"properties": {"a": {"type": "array", "minItems": -1}}}, "minItems"),
    ({"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 1}}}, "grammar"),
    ({"properties": {"a": {"minimum": "x"}}}, "bounds"),
    ({"$ref": "#/$defs/d0", "$defs": {f"d{i}": {"type": "object", "properties": {"x": True}, "anyOf": [
        {"$ref": f"#/$defs/d{i + 1}"}, {"oneOf": [{"$ref": f"#/$defs/d{i + 1}"}]}]} for i in range(1200)}
        | {"d1200": {}}}, "more than|characters"),
    (json.loads("[" * 70 + "]" * 70), "nested")]


@pytest.mark.parametrize("parameters, says", REFUSED_TOOLS)
def test_schemas_of_tools_are_refused_in_one_line(parameters, says):
    with pytest.raises(ValueError, match=says) as caught:
        tool_calls(TOKENIZER, [tool("f", parameters)])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("tools, choice, says", [
    ([], "auto", "list of 1 to"), ([tool("f"), tool("f")], "auto", "two tools"), ([tool("f{")], "auto", "'name'"),
    ([{}], "auto", "'function'"),
    ([tool("f")], "g", "no tool 'g'"), ([tool("f")], None, "must be a string"), ("f", "auto", "list of 1 to")])
def test_tools_that_are_none(tools, choice, says):
    with pytest.raises(ValueError, match=says):
        tool_calls(TOKENIZER, tools, choice)


def test_what_is_not_enforced_is_noted():
    rules = tool_calls(TOKENIZER, [tool("f", {"properties": {"a": {"type": "string", "pattern": "x", "title": "t"}}, "minProperties": 1})])
    assert rules.notes == ("tool f: minProperties is not enforced", "tool f: pattern is not enforced")


def test_long_chains_do_not_end_the_process():
    """llguidance recurses along them: on the stack of a thread of a server they would."""
    chains = [lambda: json_schema(TOKENIZER, {"$ref": "#/$defs/d0", "$defs": chain(2500)}),
              lambda: lark(TOKENIZER, "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(2000)) + '\nr2000: "a"'),
              lambda: tool_calls(TOKENIZER, [tool("f", {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": chain(1500)})])]
    made, usual = [], threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=lambda: made.extend(make() for make in chains))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(usual)
    assert len(made) == 3 and threading.stack_size() == usual


def test_a_vocabulary_is_prepared_once_and_let_go():
    tokenizer = Tokenizer.from_metadata(METADATA, "tiny")
    n = len(grammar._tokenizers)
    json_object(tokenizer), json_object(tokenizer)
    assert len(grammar._tokenizers) == n + 1
    del tokenizer
    assert len(grammar._tokenizers) == n


def test_the_library_is_imported_when_it_is_needed():
    code = "import sys, refimpl, refimpl.decode.grammar, refimpl.text.answer; print('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
