"""The grammar of tool calls: JSON schemas of arguments as rules for Gemma's notation (text/calls.py), in llguidance's Lark.

Enforced: type (also a list, and in capitals, as Google writes them), nullable, properties, required, additionalProperties where there
are no properties, enum, const, items, minItems, maxItems, minimum, maximum, exclusiveMinimum, exclusiveMaximum, multipleOf, anyOf and
oneOf (any of them), allOf of one schema, $ref within the schema, also recursive. Keys come in any order, each once, and only those that
are declared. Other keywords are not enforced and named in `notes`. Refused with ValueError: a schema that is no object or boolean or
false, an empty enum, an unknown type, a $ref that leads nowhere, one that nothing finite satisfies, more than 64 keys, too many rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from refimpl.text.calls import HEAD, QUOTE
from refimpl.text.tokenizer import Tokenizer

MAX_RULES, MAX_CHARS, MAX_DEPTH, MAX_KEYS, MAX_ITEMS, MAX_TOOLS = 4000, 1 << 20, 48, 64, 1000, 256
ANY_DEPTH = 8
"""Deepest nesting of a value that no schema describes."""
KEYWORDS = {"type", "nullable", "properties", "required", "additionalProperties", "enum", "const", "items", "minItems", "maxItems",
            "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf", "oneOf", "allOf", "$ref"}
ANNOTATIONS = {"title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "propertyOrdering",
               "strict", "$schema", "$id", "$comment", "$defs", "definitions", "$anchor", "contentMediaType", "contentEncoding"}
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
NAME = re.compile(r"[^\s{}<>|\"']{1,128}")
BARE_KEY = re.compile(r"[^\s,:{}\[\]<>|\"']+")
TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")


class CallRules:
    """`lines`: the rule `function`, a call without its markers, and the rules it needs. `notes`: what is not enforced."""

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[Mapping], only: str | None = None):
        """`only`: the name of the one tool that may be called. Raises ValueError."""
        quote = tokenizer.id_of(QUOTE)
        if quote is None:
            raise ValueError("this model's vocabulary has no token for the quotes of tool calls")
        self.notes: list[str] = []
        self._quote = f"<[{quote}]>"
        self._rules: dict[str, str] = {}
        self._needs: dict[str, list[set[str]]] = {}     # the rules that each alternative of a rule needs
        self._any: str | None = None
        self._n_chars = 0
        functions = _functions(tools)
        if only is not None and only not in functions:
            raise ValueError(f"there is no tool {only[:60]!r}: {', '.join(functions)[:200]}")
        bodies = []
        for name, function in functions.items():
            if only is None or name == only:
                self._tool, self._root, self._refs, self._waiting = name, function.get("parameters"), {}, []
                if self._root is None or self._root == {}:
                    self._root = {"type": "object", "additionalProperties": False}
                bodies.append(f"{_literal(HEAD + name)} {self._arguments()}")
        self._check_finite()
        self.lines = [f"function: {' | '.join(bodies)}", *(f"{name}: {body}" for name, body in self._rules.items())]

    def _arguments(self) -> str:
        root = self._root
        if not isinstance(root, Mapping):
            raise self._refusal("the parameters must be a JSON schema of an object")
        if "type" not in root and "properties" not in root and not {"$ref", "anyOf", "oneOf", "allOf"} & set(root):
            root = {**root, "type": "object"}
        rule = self._rule_of(root, 0, root=True)
        while self._waiting:
            pointer = self._waiting.pop()
            target = self._rule_of(self._resolved(pointer), 0)
            self._define(target, [{target}], self._refs[pointer])
        return rule

    def _rule_of(self, schema: object, depth: int, root: bool = False) -> str:
        """The name of a rule for a schema."""
        if depth > MAX_DEPTH:
            raise self._refusal(f"the schema is nested more than {MAX_DEPTH} deep")
        if schema is True or schema == {}:
            return self._any_value()
        if not isinstance(schema, Mapping):
            raise self._refusal("nothing satisfies the schema false" if schema is False else f"{str(schema)[:60]!r} is no schema")
        for keyword in sorted(set(map(str, schema)) - KEYWORDS - ANNOTATIONS):
            self._note(f"{keyword[:60]} is not enforced")
        if "$ref" in schema:
            rule = self._reference(schema["$ref"])
            return self._or_null(schema, rule)
        for keyword in ("anyOf", "oneOf", "allOf"):
            if keyword in schema:
                return self._or_null(schema, self._choice(schema, keyword, depth, root))
        if "enum" in schema or "const" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise self._refusal("an enum must be a list of at least one value")
            return self._or_null(schema, self._define(" | ".join(map(self._constant, values))))
        rules = [self._typed(type_, schema, depth) for type_ in self._types(schema, root)]
        return self._or_null(schema, rules[0] if len(rules) == 1 else self._define(" | ".join(rules), [{rule} for rule in rules]))

    def _types(self, schema: Mapping, root: bool) -> list[str]:
        types = schema.get("type", "object" if "properties" in schema else "array" if "items" in schema else list(TYPES))
        types = [types] if isinstance(types, str) else types
        if not isinstance(types, Sequence) or not types or not all(isinstance(t, str) and t.lower() in TYPES for t in types):
            raise self._refusal(f"{str(types)[:60]} is no type")
        types = list(dict.fromkeys(t.lower() for t in types))
        if root and types != ["object"]:
            raise self._refusal("the parameters must be an object")
        return types

    def _typed(self, type_: str, schema: Mapping, depth: int) -> str:
        if type_ == "string":
            return self._once("string_value", f"{self._quote} STRING_TEXT? {self._quote}", "STRING_TEXT: /(?s:.)+/")
        if type_ == "boolean":
            return self._once("boolean_value", '"true" | "false"')
        if type_ == "null":
            return self._once("null_value", '"null"')
        if type_ in ("number", "integer"):
            bounds = {key: schema[key] for key in BOUNDS if key in schema}
            if not all(isinstance(bound, int | float) for bound in bounds.values()):
                raise self._refusal(f"the bounds of a number must be numbers, not {str(bounds)[:60]}")
            if bounds:
                return self._define(f"%json {json.dumps({'type': type_, **bounds})}")
            # as many digits as a double has, and no more: a model can write them for ever
            integer, fraction = r"-?(0|[1-9][0-9]{0,17})", r"(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?"
            name = f"{type_}_value"
            return self._once(name, name.upper(), f"{name.upper()}: /{integer}{fraction if type_ == 'number' else ''}/")
        return self._object(schema, depth) if type_ == "object" else self._array(schema, depth)

    def _object(self, schema: Mapping, depth: int) -> str:
        properties, required, more = schema.get("properties"), schema.get("required") or [], schema.get("additionalProperties", True)
        if not isinstance(properties or {}, Mapping) or not isinstance(required, Sequence) or isinstance(required, str):
            raise self._refusal("properties must be an object and required a list")
        required = list(dict.fromkeys(map(str, required)))
        schemas = {str(key): value for key, value in (properties or {}).items()}
        schemas |= {key: more for key in required if key not in schemas}
        schemas = {key: value for key, value in schemas.items() if value is not False or key in required}
        if not schemas:
            if properties or more is False:
                return self._define('"{" "}"')
            return self._map(self._rule_of(more, depth + 1))
        if len(schemas) > MAX_KEYS:
            raise self._refusal(f"an object has {len(schemas)} keys; at most {MAX_KEYS} are supported")
        if "additionalProperties" in schema and more is not False:
            self._note("additionalProperties beside properties are not written")
        keys = [*required, *(key for key in schemas if key not in required)]
        values = [self._rule_of(schemas[key], depth + 1) for key in keys]
        # Each key once, in any order: bit i of a rule's parameter says that key i has been written; required keys come first.
        full = f"is_ones([0:{len(required)}])" if required else "true"
        name = self._define("")
        first, rest = f"{name}_first", f"{name}_rest"
        pairs = [f"{self._key(key)} {value} {rest}::set_bit({i})" for i, (key, value) in enumerate(zip(keys, values))]
        self._define(" | ".join([*([] if required else ['"}"']), *pairs]), name=f"{first}::_")
        more_pairs = [f'"," {pair} %if bit_clear({i})' for i, pair in enumerate(pairs)]
        self._define(" | ".join([f'"}}" %if {full}', *more_pairs]), name=f"{rest}::_")
        return self._define(f'"{{" {first}::0x0', [set(values[:len(required)])], name)

    def _map(self, value: str) -> str:
        key = self._once("bare_key", "BARE_KEY", r"BARE_KEY: /[A-Za-z0-9_.\-]{1,64}/")
        pair = self._define(f'{key} ":" {value}', [{value}])
        return self._define(f'"{{" ({pair} ("," {pair})*)? "}}"')

    def _array(self, schema: Mapping, depth: int) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        for bound in (least, 0 if most is None else most):
            if not isinstance(bound, int) or bound < 0:
                raise self._refusal(f"minItems and maxItems must be whole numbers, not {str(bound)[:60]}")
        if most is not None and most < least:
            raise self._refusal("nothing satisfies a maxItems below minItems")
        if least > MAX_ITEMS:
            raise self._refusal(f"minItems is more than {MAX_ITEMS}")
        if most is not None and most > MAX_ITEMS:
            self._note(f"maxItems above {MAX_ITEMS} is not enforced")
            most = None
        if most == 0:
            return self._define('"[" "]"')
        item = self._rule_of(schema.get("items", True), depth + 1)
        more = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        return self._define(f'"[" {item} {more} "]"' if least else f'"[" ({item} {more})? "]"', [{item}] if least else [set()])

    def _choice(self, schema: Mapping, keyword: str, depth: int, root: bool) -> str:
        """Any of several schemas; what stands beside them holds for each."""
        options = schema[keyword]
        if not isinstance(options, Sequence) or isinstance(options, str) or not options:
            raise self._refusal(f"{keyword} must be a list of at least one schema")
        if keyword == "allOf" and len(options) > 1:
            raise self._refusal("allOf of more than one schema is not supported")
        beside = {key: value for key, value in schema.items() if key != keyword and key in KEYWORDS and key != "nullable"}
        options = [option for option in options if option is not False]
        rules = [self._rule_of(self._both(beside, option), depth + 1, root) for option in options]
        if not rules:
            raise self._refusal(f"nothing satisfies the schemas of {keyword}")
        return self._define(" | ".join(rules), [{rule} for rule in rules])

    def _both(self, one: Mapping, other: object) -> object:
        if not one or not isinstance(other, Mapping):
            return one if one and other is True else other
        if "$ref" in other:
            self._note(f"{', '.join(sorted(one))[:60]} beside $ref is not enforced")
            return other
        both = {**one, **other}
        if isinstance(one.get("properties"), Mapping) and isinstance(other.get("properties"), Mapping):
            both["properties"] = {**one["properties"], **other["properties"]}
        if isinstance(one.get("required"), list) and isinstance(other.get("required"), list):
            both["required"] = [*one["required"], *other["required"]]
        return both

    def _reference(self, pointer: object) -> str:
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise self._refusal(f"$ref {str(pointer)[:60]!r} is not within the schema")
        if pointer not in self._refs:
            self._resolved(pointer)
            self._refs[pointer] = self._define("")
            self._waiting.append(pointer)
        return self._refs[pointer]

    def _resolved(self, pointer: str) -> object:
        at = self._root
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(at, Mapping) and part in at:
                at = at[part]
            elif isinstance(at, list) and part.isdecimal() and int(part) < len(at):
                at = at[int(part)]
            else:
                raise self._refusal(f"$ref {pointer[:60]!r} leads nowhere")
        return at

    def _any_value(self) -> str:
        """Any value, down to a depth: deeper than that there are no brackets."""
        if self._any is None:
            plain = [self._typed(type_, {}, 0) for type_ in ("string", "number", "boolean", "null")]
            rule = self._define(" | ".join(plain))
            for _ in range(ANY_DEPTH):
                rule = self._define(f'{" | ".join(plain)} | {self._map(rule)} | "[" ({rule} ("," {rule})*)? "]"')
            self._any = rule
        return self._any

    def _constant(self, value: object) -> str:
        """A fixed value."""
        if isinstance(value, str):
            return f"{self._quote} {_literal(value)} {self._quote}" if value else f"{self._quote} {self._quote}"
        if isinstance(value, Mapping):
            pairs = [f"{self._key(str(key))} {self._constant(item)}" for key, item in value.items()]
            return " ".join(['"{"', ' "," '.join(pairs), '"}"'])
        if isinstance(value, list | tuple):
            return " ".join(['"["', ' "," '.join(map(self._constant, value)), '"]"'])
        return _literal(json.dumps(value))

    def _key(self, key: str) -> str:
        """A key with its colon: between quote tokens if it could not be read back otherwise."""
        if BARE_KEY.fullmatch(key):
            return _literal(key + ":")
        return f'{self._constant(key)} ":"'

    def _or_null(self, schema: Mapping, rule: str) -> str:
        return self._define(f'{rule} | "null"') if schema.get("nullable") is True else rule

    def _define(self, body: str, needs: Sequence[set[str]] = (), name: str | None = None) -> str:
        """A rule; `needs`: see above, nothing if there are no alternatives."""
        self._n_chars += len(body)
        if len(self._rules) >= MAX_RULES or self._n_chars > MAX_CHARS:
            raise self._refusal(f"the schemas of all tools together need more than {MAX_RULES} rules or {MAX_CHARS} characters of them")
        name = f"r{len(self._rules)}" if name is None else name
        self._rules[name], self._needs[name] = body, list(needs) or [set()]
        return name

    def _once(self, name: str, body: str, *terminals: str) -> str:
        if name not in self._rules:
            self._define(body, name=name)
            for terminal in terminals:
                self._rules |= [terminal.split(": ", 1)]
        return name

    def _check_finite(self):
        """Refuses rules that need themselves: the model would write for ever."""
        missing, users, ready = [], {}, []          # of every alternative: how many rules it needs that are not known to be finite
        for name, alternatives in self._needs.items():
            for needs in alternatives:
                for need in needs:
                    users.setdefault(need, []).append(len(missing))
                missing.append([name, len(needs)])
                ready += [] if needs else [name]
        ready = list(dict.fromkeys(ready))          # a rule must be counted once
        finite = set(ready)
        while ready:
            for i in users.get(ready.pop(), ()):
                missing[i][1] -= 1
                if not missing[i][1] and missing[i][0] not in finite:
                    finite.add(missing[i][0])
                    ready.append(missing[i][0])
        if len(finite) < len(self._needs):
            raise ValueError("nothing finite satisfies the schema of a tool: it needs itself")

    def _note(self, note: str):
        note = f"tool {self._tool}: {note}"
        if note not in self.notes and len(self.notes) < 100:
            self.notes.append(note)

    def _refusal(self, why: str) -> ValueError:
        return ValueError(f"tool {self._tool}: {why}")


def _functions(tools: object) -> dict[str, Mapping]:
    if not isinstance(tools, Sequence) or isinstance(tools, str) or not tools or len(tools) > MAX_TOOLS:
        raise ValueError(f"tools must be a list of 1 to {MAX_TOOLS} tools")
    functions = {}
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"tool {i} must have a 'function' with a 'name' of up to 128 letters, digits, _ and -, not {str(tool)[:60]!r}")
        if name in functions:
            raise ValueError(f"two tools have the name {name[:60]!r}")
        functions[name] = function
    return functions


def _literal(text: str) -> str:
    return json.dumps(text)
