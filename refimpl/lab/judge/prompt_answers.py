"""The probabilities of a prompt's own tokens, which some engines give in the same answer: hundreds of positions for one request.

    vLLM, and what follows it   choices[0].prompt_logprobs: [null, {"123": {logprob, rank, decoded_token}, ...}, ...], asked for with
                                prompt_logprobs; the token of the prompt is among them, whatever its rank
    OpenAI's older completions  choices[0].logprobs as for an answer, but with the prompt before it, asked for with echo; its first token
                                has null for a probability
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from refimpl.lab.judge.answers import Listed, Step, first_choice, mapping, most_first, named, steps_of
from refimpl.lab.judge.http import EndpointError

PARTS = ("tokens", "token_logprobs", "top_logprobs")


def prompt_steps(body: object, ids: Sequence[int], n_top: int, where: str) -> tuple[Step, ...]:
    """A step for each of `ids` but the first, from an answer that was asked for prompt_logprobs. Raises EndpointError."""
    listed = first_choice(mapping(body, where).get("choices"), where).get("prompt_logprobs")
    if not isinstance(listed, list) or len(listed) != len(ids):
        raise EndpointError(f"{where}: no prompt_logprobs, or not one for each token")
    return tuple(_step(i, mapping(entry, where), n_top, where) for i, entry in zip(ids[1:], listed[1:]))


def _step(i: int, entry: Mapping[str, object], n_top: int, where: str) -> Step:
    top = []
    for key, value in entry.items():
        value = mapping(value, where)
        rank = value.get("rank")
        if not key.isdigit() or not isinstance(rank, int):
            raise EndpointError(f"{where}: prompt_logprobs in a form that is not known: {str(entry)[:80]!r}")
        if rank <= n_top:
            top.append(named(f"token_id:{key}", value.get("logprob"), where))
    if str(i) not in entry:
        raise EndpointError(f"{where}: prompt_logprobs of other tokens than were asked for")
    return Step(Listed(b"", float("nan"), i), most_first(top))


def without_echo(body: object, ids: Sequence[int], n_top: int, where: str) -> tuple[dict[str, object], tuple[Step, ...]]:
    """(the answer without the prompt, a step for each of `ids` but the first) of an answer that was asked for with echo. Raises
    EndpointError where the prompt is not in front of it.
    """
    body = dict(mapping(body, where))
    choice = dict(first_choice(body.get("choices"), where))
    logprobs = choice.get("logprobs")
    parts = [logprobs.get(part) if isinstance(logprobs, Mapping) else None for part in PARTS]
    if not all(isinstance(part, list) and len(part) > len(ids) for part in parts) or parts[1][0] is not None:
        raise EndpointError(f"{where}: an echo without the probabilities of the prompt")
    prompt, answer = ({name: part[some] for name, part in zip(PARTS, parts)} for some in (slice(1, len(ids)), slice(len(ids), None)))
    body["choices"] = [choice | {"logprobs": answer}]
    return body, tuple(Step(Listed(b"", float("nan"), i), step.top) for i, step in zip(ids[1:], steps_of(prompt, where, n_top)))
