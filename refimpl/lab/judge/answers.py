"""What an endpoint's answer says about its probabilities, in the forms that engines have, read without trust.

    OpenAI's completions        choices[0].logprobs: {tokens, token_logprobs, top_logprobs: [{text: logprob}, ...]}
    OpenAI's chat               choices[0].logprobs.content: [{token, bytes, logprob, top_logprobs: [{token, bytes, logprob}, ...]}, ...];
                                llama-server's completions too, and with the "id" of every token
    vLLM                        "token_id:123" as a token's text, where that was asked for (return_tokens_as_token_ids)
    ollama's /api/generate      logprobs: [{token, bytes, logprob, top_logprobs: [...]}, ...]
    llama-server's /completion  completion_probabilities: [{id, bytes, logprob, top_logprobs: [...]}, ...]; tokens: all ids of the answer

llama-server lists no token after which the text ends inside of a character (process_token in its server-context.cpp): the next token
that it lists has the bytes of those before it as well. Only /completion says which they were.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from refimpl.lab.judge.http import EndpointError

ROUNDED = 1e-3          # by which a log-probability may be above 0, and those of one position add up to more than 1
NOWHERE = -1e3          # a log-probability below: what engines write for "not at all"


@dataclass(frozen=True)
class Listed:
    """A token with its log-probability, in nats. `id` is None where the endpoint gives a text only; `bytes`: of that text."""

    bytes: bytes                # noqa: A003
    logprob: float
    id: int | None = None       # noqa: A003


@dataclass(frozen=True)
class Step:
    """A token of the answer: the chosen one, and the most probable ones, the most probable first; none where they are not listed."""

    chosen: Listed
    top: tuple[Listed, ...]


@dataclass(frozen=True)
class Answer:
    """An answer: text, tokens with probabilities (none where the endpoint gives none), tokens of the prompt that it counted and reused.
    `n_missing`: tokens that were counted and are not among `steps`. `prompt`: the tokens of the prompt from its second on, where they were
    asked for (prompt_answers.py).
    """

    text: str
    steps: tuple[Step, ...]
    n_prompt: int | None
    n_cached: int | None
    n_missing: int = 0
    prompt: tuple[Step, ...] = ()

    @property
    def other(self) -> Listed | None:
        """A token that is listed as chosen and does not stand in the text, which a thought's, a control token and parts of characters need
        not; None where there is none.
        """
        return next((step.chosen for step in self.steps if self.text and (name := _visible(step.chosen)) and name not in self.text), None)

    @property
    def n_top(self) -> int:
        """How many probabilities it has at every position that has any."""
        return min((len(step.top) for step in self.steps if step.top), default=0)


def _visible(token: Listed) -> str:
    """What a text has of a token for certain."""
    name = token.bytes.decode(errors="replace").replace("\u2581", " ").strip()
    return "" if "\ufffd" in name or re.fullmatch(r"<.*>|token_id:\d+", name) else name


def answer_of(body: object, where: str, n_top: int) -> Answer:
    """Reads a whole answer of /v1/completions or /v1/chat/completions. `n_top`: how many probabilities were asked for; vLLM adds that of
    the chosen token. Raises EndpointError where it is none.
    """
    choice = first_choice(mapping(body, where).get("choices"), where)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, Mapping) else choice.get("text")
    if isinstance(message, Mapping) and (text is None or any(map(message.get, ("reasoning_content", "reasoning", "tool_calls")))):
        text = ""                           # a part of what was written, or nothing of it
    if not isinstance(text, str):
        raise EndpointError(f"{where}: the answer has no text: {str(choice)[:80]!r}")
    usage = body.get("usage") if isinstance(body.get("usage"), Mapping) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    steps = steps_of(choice.get("logprobs"), where, n_top)
    return Answer(text, steps, count_of(usage.get("prompt_tokens")), count_of(cached),
                  _missing(steps, usage.get("completion_tokens"), choice.get("finish_reason")))


def generated_of(body: object, where: str) -> Answer:
    """Reads an answer of ollama's /api/generate. Raises EndpointError."""
    body = mapping(body, where)
    if not isinstance(body.get("response"), str):
        raise EndpointError(f"{where}: the answer has no response: {str(body)[:80]!r}")
    steps = steps_of(body.get("logprobs"), where)
    return Answer(body["response"], steps, count_of(body.get("prompt_eval_count")), None,
                  _missing(steps, body.get("eval_count"), body.get("done_reason")))


def native_of(body: object, where: str) -> Answer:
    """Reads an answer of llama-server's /completion, asked for with return_tokens. Raises EndpointError."""
    body = mapping(body, where)
    ids, text = body.get("tokens"), body.get("content")
    if not isinstance(text, str) or not isinstance(ids, list) or not all(count_of(i) is not None for i in ids):
        raise EndpointError(f"{where}: the answer has no content, or no tokens: {str(body)[:80]!r}")
    timings = body.get("timings") if isinstance(body.get("timings"), Mapping) else {}
    steps = in_place(ids, steps_of(body.get("completion_probabilities"), where), where)
    return Answer(text, steps, count_of(body.get("tokens_evaluated")), count_of(timings.get("cache_n")))


def in_place(ids: Sequence[int], listed: Sequence[Step], where: str) -> tuple[Step, ...]:
    """A step for each of `ids`, with the probabilities of `listed`, in which some of them are missing. Where a listed one may stand in
    several places it is left out. Raises EndpointError where the ids of `listed` are not among `ids`, in this order.
    """
    chosen = [step.chosen.id for step in listed]
    first = _places(ids, chosen)
    last = [len(ids) - 1 - at for at in reversed(_places(ids[::-1], chosen[::-1]))]
    if len(first) < len(chosen):
        raise EndpointError(f"{where}: the tokens that have probabilities are not those of the answer")
    steps = [Step(Listed(b"", math.nan, i), ()) for i in ids]
    for at, other, step in zip(first, last, listed):
        if at == other:
            steps[at] = replace(step, chosen=replace(step.chosen, bytes=b""))
    return tuple(steps)


def _places(ids: Sequence[int], chosen: Sequence[int | None]) -> list[int]:
    """The first place in `ids` of each of `chosen` behind the one before it; fewer where there is none."""
    found = []
    for i in chosen:
        try:
            found.append(ids.index(i, found[-1] + 1 if found else 0))
        except ValueError:
            break
    return found


def _missing(steps: Sequence[Step], counted: object, ending: object) -> int:
    """How many of the tokens that are counted have no step. The end that a model writes need not be listed."""
    return max(0, (count_of(counted) or 0) - len(steps) - (ending != "length")) if steps else 0


def steps_of(logprobs: object, where: str, n_top: int | None = None) -> tuple[Step, ...]:
    """The tokens of any of the forms above, at most `n_top` of the most probable at each; () where there are none. Raises EndpointError for
    what is no probability.
    """
    if logprobs is None:
        return ()
    if isinstance(logprobs, Mapping) and "content" in logprobs:
        logprobs = logprobs["content"] or []
    if isinstance(logprobs, list):
        steps = [_step(mapping(entry, where), where) for entry in logprobs]
    else:
        steps = _older(mapping(logprobs, where), where)
    steps = [replace(step, top=step.top[:n_top]) for step in steps]
    for n, step in enumerate(steps):
        if (mass := sum(math.exp(token.logprob) for token in step.top)) > 1 + ROUNDED:
            raise EndpointError(f"{where}: the probabilities at token {n} of the answer add up to {mass:.4g}: they are none")
    return tuple(steps)


def _step(entry: Mapping[str, object], where: str) -> Step:
    listed = entry.get("top_logprobs")
    top = [_listed(mapping(each, where), where) for each in listed] if isinstance(listed, list) else []
    return Step(_listed(entry, where), most_first(top))


def _older(logprobs: Mapping[str, object], where: str) -> list[Step]:
    tokens, chosen, tops = (logprobs.get(key) for key in ("tokens", "token_logprobs", "top_logprobs"))
    if not isinstance(tokens, list) or not isinstance(chosen, list) or len(tokens) != len(chosen):
        raise EndpointError(f"{where}: logprobs in a form that is not known: {str(logprobs)[:80]!r}")
    tops = tops if isinstance(tops, list) and len(tops) == len(tokens) else [None] * len(tokens)
    steps = []
    for token, logprob, top in zip(tokens, chosen, tops):
        listed = [named(text, value, where) for text, value in top.items()] if isinstance(top, Mapping) else []
        steps.append(Step(named(token, logprob, where), most_first(listed)))
    return steps


def most_first(top: Sequence[Listed]) -> tuple[Listed, ...]:
    """The most probable first, without what an engine writes for "not at all"."""
    return tuple(sorted((token for token in top if token.logprob > NOWHERE), key=lambda token: -token.logprob))


def _listed(entry: Mapping[str, object], where: str) -> Listed:
    raw, i = entry.get("bytes"), entry.get("id")
    found = named(entry.get("token"), entry.get("logprob"), where)
    if isinstance(raw, list) and all(isinstance(b, int) and 0 <= b < 256 for b in raw):
        found = Listed(bytes(raw), found.logprob, found.id)
    return Listed(found.bytes, found.logprob, i) if isinstance(i, int) and not isinstance(i, bool) else found


def named(token: object, logprob: object, where: str) -> Listed:
    """A token by its text."""
    if not isinstance(token, str):
        raise EndpointError(f"{where}: a token without a text: {str(token)[:40]!r}")
    if not isinstance(logprob, int | float) or isinstance(logprob, bool) or math.isnan(logprob) or logprob > ROUNDED:
        raise EndpointError(f"{where}: {logprob!r:.40} is no log-probability (token {token[:40]!r})")
    match = re.fullmatch(r"token_id:(\d{1,9})", token)
    return Listed(token.encode(errors="replace"), min(float(logprob), 0.0), int(match[1]) if match else None)


def mapping(value: object, where: str) -> Mapping[str, object]:
    """An object of JSON. Raises EndpointError."""
    if not isinstance(value, Mapping):
        raise EndpointError(f"{where}: an object was expected, not {str(value)[:60]!r}")
    return value


def first_choice(choices: object, where: str) -> Mapping[str, object]:
    """The first of an answer's choices. Raises EndpointError."""
    if not isinstance(choices, list) or not choices:
        raise EndpointError(f"{where}: the answer has no choices: {str(choices)[:60]!r}")
    return mapping(choices[0], where)


def count_of(value: object) -> int | None:
    """A number of tokens, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
