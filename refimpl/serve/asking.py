"""What is asked for, whatever the API: the fields that several of them share, and what becomes of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec
from anyio.to_thread import run_sync

from refimpl.decode import grammar
from refimpl.decode.constraint import FREE, Constraint, ThinkingBudget
from refimpl.decode.request import Request
from refimpl.decode.sampling import Sampling
from refimpl.serve.errors import bad
from refimpl.serve.settings import MAX_CHOICES, Site
from refimpl.text.chat import CHANNEL_END, THOUGHT, ChatError
from refimpl.text.prompt import Encoded, encode_messages
from refimpl.text.stops import StopStrings

MAX_MESSAGES, MAX_TOOLS, MAX_STOPS, MAX_STOP_CHARS, MAX_BIASES, MAX_TOP = 10_000, 512, 64, 1000, 1024, 20
SEED_HEADER, NOTES_HEADER = "x-refimpl-seed", "x-refimpl-notes"
EFFORTS = "none", "minimal", "low", "medium", "high", "xhigh", "max"


class SamplingFields(msgspec.Struct, kw_only=True):
    """How tokens are chosen; None: as the model's file says, else by `Sampling`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


class OpenSamplingFields(SamplingFields, kw_only=True):
    """More of that, in the APIs whose clients pass on whatever they are given (`extra_body`)."""

    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    grammar: str | None = None
    regex: str | None = None


class TemplateOptions(msgspec.Struct):
    """`chat_template_kwargs`, as llama-server and vLLM have it."""

    enable_thinking: bool | None = None


class Effort(msgspec.Struct):
    """`reasoning`, as the Responses API has it."""

    effort: str | None = None


@dataclass
class Want:
    """A request, with all that the scheduler and the answer's reader need of it.

    constraint      makes one for each answer
    raw             the answer is text as it is: no thoughts, no calls
    """

    prompts: list[Encoded]
    sampling: Sampling
    seed: int
    n: int = 1
    max_new_tokens: int = -1
    stops: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    n_top: int = -1
    constraint: Callable[[], Constraint] = field(default=lambda: FREE)
    raw: bool = False
    notes: Sequence[str] = ()

    @property
    def headers(self) -> dict[str, str]:
        """What the client is told about it: the seed of the first answer (the next ones have the numbers after it), and notes."""
        notes = "; ".join(self.notes).encode("ascii", "replace").decode()[:1000]
        return {SEED_HEADER: str(self.seed), **({NOTES_HEADER: " ".join(notes.split())} if notes else {})}

    async def requests(self, drafts: Sequence[str]) -> list[Request]:
        """For the engine, one for each answer: n for the first prompt, n for the next."""
        made = []
        for i, prompt in enumerate(prompt for prompt in self.prompts for _ in range(self.n)):
            constraint = await run_sync(self.constraint)
            sampling = replace(self.sampling, seed=self.seed + i)
            made.append(Request(prompt.ids, sampling, self.max_new_tokens, constraint, self.n_top, drafts, prompt.soft))
        return made


def sampling_of(site: Site, fields: SamplingFields) -> Sampling:
    """Raises ApiError or ValueError for a value out of its range."""
    chosen = {name: getattr(fields, name) for name in ("temperature", "top_p", "top_k")}
    if chosen["top_k"] == -1:               # vLLM's way to say: off
        chosen["top_k"] = 0
    if isinstance(fields, OpenSamplingFields):
        chosen |= {name: getattr(fields, name) for name in ("min_p", "presence_penalty", "frequency_penalty")}
        chosen["logit_bias"] = _biases(site, fields.logit_bias or {}) or None
    try:
        return Sampling.from_metadata(site.engine.model.file.metadata, **chosen)
    except ValueError as error:
        raise bad(str(error).split()[0], str(error)) from None


def shared(site: Site, fields: OpenSamplingFields, n: int | None, n_prompts: int = 1) -> dict[str, object]:
    """Fields of a Want that OpenAI's APIs share. Raises ApiError."""
    n = 1 if n is None else n
    if n < 1 or n * n_prompts > MAX_CHOICES:
        raise bad("n", f"n must be at least 1, and at most {MAX_CHOICES} answers are given to one request")
    stops = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    return {"sampling": sampling_of(site, fields), "seed": seed_of(fields.seed), "n": n, "stops": checked_stops(stops, "stop"),
            "stop_ids": frozenset(checked_ids(site, fields.stop_token_ids or [], "stop_token_ids"))}


def seed_of(seed: int | None) -> int:
    """The seed, or a random one. Raises ApiError."""
    if seed is not None and not 0 <= seed < 1 << 63:
        raise bad("seed", "seed must be at least 0 and below 2**63")
    return secrets.randbits(31) if seed is None else seed


def limit_of(value: int | None, name: str, default: int = -1) -> int:
    """A number of new tokens; -1: until the text or the context ends. Raises ApiError."""
    if value is not None and value < -1:
        raise bad(name, f"{name} must be at least 0, or -1 for no limit")
    return default if value is None else value


def checked_stops(stops: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Stop strings. Raises ApiError."""
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise bad(name, f"{name}: at most {MAX_STOPS} strings of at most {MAX_STOP_CHARS} characters are accepted")
    try:
        StopStrings(stops)
    except ValueError as error:
        raise bad(name, f"{name}: {error}") from None
    return stops


def thinking_of(effort: str | None, options: TemplateOptions | None = None, name: str = "reasoning_effort") -> bool:
    """Is the model to think? Raises ApiError."""
    if effort is not None and effort not in EFFORTS:
        raise bad(name, f"{name} must be one of {', '.join(EFFORTS)} (none and minimal: no thoughts, all others: thoughts)")
    if options is not None and options.enable_thinking is not None:
        return options.enable_thinking
    return effort not in (None, "none", "minimal")


async def encoded(site: Site, messages: list[dict], tools: list[dict], thinking: bool) -> Encoded:
    """The prompt. Raises ApiError or ChatError. In a thread, as a template and pictures may take their time. The model knows no role
    developer, which is OpenAI's newer name for system.
    """
    if len(messages) > MAX_MESSAGES:
        raise bad("messages", f"messages: at most {MAX_MESSAGES} are accepted, not {len(messages)}")
    known = [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]
    in_order = [part for message in known for part in _text_then_calls(message)]
    try:
        return await run_sync(lambda: encode_messages(site.tokenizer, site.template, in_order, site.projector, thinking=thinking,
                                                      tools=tools or None))
    except ChatError:
        raise
    except ValueError as error:                 # a picture or a sound that cannot be taken
        raise bad("messages", f"messages: {error}") from None


def _text_then_calls(message: dict) -> list[dict]:
    """An answer with both as two: Google's templates write what was said before a call behind its response, and end the turn there, so that
    the model would be asked outside of a turn.
    """
    if message["role"] != "assistant" or not message.get("tool_calls") or not message["content"].strip():
        return [message]
    return [{"role": message["role"], "content": message["content"]}, {**message, "content": ""}]


async def constraint_of(site: Site, *, thinking: bool, tools: list[dict], choice: str = "auto", parallel: bool = True,
                        format_: Mapping | None = None, lark: str | None = None, regex: str | None = None, budget: int = -1,
                        ) -> tuple[Callable[[], Constraint], Sequence[str]]:
    """What makes the constraints of a request, and notes on what they do not enforce.

    `choice`: "auto", "required", "none" or a tool's name; `format_`: {"type": "text" | "json_object"} or {"type": "json_schema", "schema":
    ...}; `budget`: tokens of thoughts at most, -1 for no limit. Raises ApiError: not a schema, not a grammar, two of them at once.
    """
    t = site.tokenizer
    kind = (format_ or {}).get("type", "text")
    asked: dict[str, Callable[[], grammar.Grammar]] = {}
    if tools and choice != "none":
        asked["tools"] = lambda: grammar.tool_calls(t, tools, choice, parallel=parallel, thinking=thinking)
    if kind == "json_object":
        asked["response_format"] = lambda: grammar.json_object(t, thinking=thinking)
    elif kind == "json_schema":
        asked["response_format"] = lambda: grammar.json_schema(t, format_["schema"], thinking=thinking)
    elif kind != "text":
        raise bad("response_format", f"response_format: the type must be text, json_object or json_schema, not {kind!r:.60}")
    if lark is not None:
        parse = grammar.gbnf if "::=" in lark else grammar.lark         # llama.cpp's clients write GBNF; Lark has no such sign
        asked["grammar"] = lambda: parse(t, lark, thinking=thinking)
    if regex is not None:
        asked["regex"] = lambda: grammar.regex(t, regex, thinking=thinking)
    if len(asked) > 1:
        raise bad(list(asked)[1], f"{' and '.join(asked)} cannot be had together; leave one out")
    if not asked:
        return (lambda: _within(site, budget, FREE)), ()
    [(name, make)] = asked.items()
    try:
        first = await run_sync(make)
    except ValueError as error:
        raise bad(name, f"{name}: {' '.join(str(error).split())[:400]}") from None
    made = [first]
    return (lambda: _within(site, budget, made.pop() if made else make())), first.notes


def _within(site: Site, budget: int, constraint: Constraint) -> Constraint:
    begin, end = (site.tokenizer.id_of(marker) for marker in (THOUGHT, CHANNEL_END))
    return constraint if budget < 0 or None in (begin, end) else ThinkingBudget(constraint, budget, begin, end)


class Tool(msgspec.Struct):
    """A tool in OpenAI's chat form."""

    type: Literal["function"]  # noqa: A003
    function: dict[str, object]


def chosen_tool(choice: object, tools: list[dict]) -> str:
    """`tool_choice` as `constraint_of` takes it. OpenAI's two forms of a named tool are understood. Raises ApiError."""
    if len(tools) > MAX_TOOLS:
        raise bad("tools", f"tools: at most {MAX_TOOLS} are accepted, not {len(tools)}")
    if choice is None:
        return "auto"
    names = [tool["function"].get("name") for tool in tools]
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        choice = (choice.get("function") or choice) if isinstance(choice.get("function"), Mapping | None) else {}
        if choice.get("name") in names:
            return choice["name"]
        raise bad("tool_choice", f"tool_choice: there is no tool {choice.get('name')!r:.60} among the tools")
    if choice not in ("none", "auto", "required"):
        raise bad("tool_choice", 'tool_choice must be none, auto, required or {"type": "function", "function": {"name": ...}}')
    if choice == "required" and not tools:
        raise bad("tool_choice", "tool_choice is required, but there are no tools")
    return choice


def _biases(site: Site, biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_BIASES:
        raise bad("logit_bias", f"logit_bias: at most {MAX_BIASES} tokens are accepted, not {len(biases)}")
    pairs = []
    for name, value in biases.items():
        if not name.isdecimal() or int(name[:20]) >= site.tokenizer.n_vocab:
            raise bad("logit_bias", f"logit_bias: {name!r:.40} is not a token id (0 to {site.tokenizer.n_vocab - 1})")
        if not -100 <= value <= 100:
            raise bad("logit_bias", f"logit_bias of {name} must be from -100 to 100, not {value}")
        pairs.append((int(name), value))
    return tuple(pairs)


def checked_ids(site: Site, ids: Sequence[int], name: str) -> list[int]:
    """Ids of tokens. Raises ApiError."""
    for i in ids:
        if not 0 <= i < site.tokenizer.n_vocab:
            raise bad(name, f"{name}: {i} is not a token id (0 to {site.tokenizer.n_vocab - 1})")
    return list(ids)
