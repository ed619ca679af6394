"""From a prompt to its continuation: `generate` returns it, `stream` yields it, `events` also says what is being done.

`plain`, one token after the other, is what speculative decoding (speculative.py) must agree with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np

from refimpl.decode.draft_length import AutoDraftLength, DraftLength, draft_length_of
from refimpl.decode.drafter import Drafter, check_target
from refimpl.decode.prefixes import Nothing, Prefixes
from refimpl.decode.request import Done, Request, Stats, Token
from refimpl.decode.run import Run, check_prompt, step
from refimpl.decode.sampling import Sampler, Sampling
from refimpl.decode.speculative import Round
from refimpl.loading.memory import MemoryRefusal
from refimpl.loading.model import CHUNK, Model
from refimpl.model.cache import Cache
from refimpl.progress import Progress, silent
from refimpl.text.prompt import Encoded, Projector, Prompt

if TYPE_CHECKING:
    from refimpl.decode.session import Session


@dataclass(frozen=True)
class Output:
    """The new ids (without an end-of-generation id), their text, and what the run took."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    stats: Stats = field(default_factory=Stats)


@dataclass(frozen=True)
class PromptDone:
    """The model has read the prompt, `ids`. `stats` is the run's and goes on being updated."""

    ids: list[int]
    stats: Stats


@dataclass(frozen=True)
class Text:
    """New tokens, and the chunk of text they complete (may be empty, while a character is incomplete). `round`: the round of drafting that
    begins with them.
    """

    text: str
    ids: list[int]
    round: Round | None = None  # noqa: A003


def generate(model: Model, prompt: Prompt, *, max_new_tokens: int = 128, temperature: float | None = None, top_k: int | None = None,
             top_p: float | None = None, min_p: float | None = None, seed: int = 0, n_ctx: int | None = None, special: bool = False,
             drafter: Drafter | None = None, draft_max: int | str = "auto", draft_min_p: float = 0.0,
             session: Session | None = None, projector: Projector | None = None, progress: Progress = silent) -> Output:
    """Continues `prompt`: text, token ids, parts (["What is ", Image("cat.png"), "?"]), or messages ([{"role": "user", "content": text or
    parts}]), for which the file needs a chat template. Pictures and sounds need the model's `projector` (`load_projector`).

    Stops at an end-of-generation token, after `max_new_tokens` (-1: no limit), or at the end of a context of `n_ctx` tokens (None: the
    model's own). `temperature` (0 is greedy), `top_k` (0 is off), `top_p` (1 is off) and `min_p` (0 is off) are the model's own settings
    where None: those in the file, else Gemma's 1.0, 64, 0.95, 0. Same `seed`, same text. `special=True`: control tokens in a text prompt
    count as such, and those in the answer are shown.

    A `drafter` (`load_drafter`) makes it faster and changes no token, whatever the temperature. `draft_max` tokens are drafted at a time
    (1 to 8, or "auto": as many as pay); a draft ends before a token that the drafter gives a probability below `draft_min_p`.
    With a `session` (decode/session.py) what the prompt has in common with what was read in it is not read again, which changes no bit
    either; its messages stay as they are.
    `progress` shows how far the prompt is (refimpl/progress.py).

    Raises ContextFull if the prompt alone does not fit, MemoryRefusal if there is no memory for prompt and new tokens, ChatError for
    messages that cannot be rendered, ValueError for an argument out of its range, or a picture or a sound that cannot be opened.
    """
    ids, chunks = [], []
    for event in events(model, model.encoded(prompt, projector, special), max_new_tokens=max_new_tokens, temperature=temperature,
                        top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, n_ctx=n_ctx, special=special, drafter=drafter,
                        draft_max=draft_max, draft_min_p=draft_min_p, prefixes=_prefixes(model, session), progress=progress):
        if isinstance(event, Text):
            ids += event.ids
            chunks.append(event.text)
    return Output(ids, "".join(chunks), event.stats)


def stream(model: Model, prompt: Prompt, *, max_new_tokens: int = 128, temperature: float | None = None, top_k: int | None = None,
           top_p: float | None = None, min_p: float | None = None, seed: int = 0, n_ctx: int | None = None, special: bool = False,
           drafter: Drafter | None = None, draft_max: int | str = "auto", draft_min_p: float = 0.0,
           session: Session | None = None, projector: Projector | None = None, progress: Progress = silent) -> Iterator[str]:
    """Continues `prompt` and yields the text in chunks, as it is made. Arguments and errors are those of `generate`."""
    for event in events(model, model.encoded(prompt, projector, special), max_new_tokens=max_new_tokens, temperature=temperature,
                        top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, n_ctx=n_ctx, special=special, drafter=drafter,
                        draft_max=draft_max, draft_min_p=draft_min_p, prefixes=_prefixes(model, session), progress=progress):
        if isinstance(event, Text) and event.text:
            yield event.text


def events(model: Model, prompt: Encoded, *, max_new_tokens: int, temperature: float | None, top_k: int | None, top_p: float | None,
           min_p: float | None, seed: int, n_ctx: int | None, special: bool, drafter: Drafter | None, draft_max: int | str,
           draft_min_p: float, prefixes: Nothing | Prefixes, progress: Progress) -> Iterator[PromptDone | Text | Done]:
    """The same in events: PromptDone, a Text for every new token, Done. Arguments and errors are those of `generate`.

    However it ends, `prefixes` remember what has been read and written until then.
    """
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < -1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 0 or more, or -1 for no limit")
    if n_ctx is not None and (not isinstance(n_ctx, Integral) or n_ctx < 1):
        raise ValueError(f"n_ctx is {n_ctx}, expected 1 or more, or None for the model's own")
    if not 0 <= draft_min_p < 1:
        raise ValueError(f"draft_min_p={draft_min_p!r}: expected at least 0 and below 1")
    if drafter is not None:
        check_target(drafter, model)
    draft_length = draft_length_of(draft_max, AutoDraftLength() if drafter is None else drafter.auto)
    sampling = Sampling.from_metadata(model.file.metadata, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    ids = prompt.ids
    n_ctx = model.config.n_ctx if n_ctx is None else n_ctx
    check_prompt(model, ids, n_ctx, prompt.soft)
    make_room(model, prefixes, min(n_ctx, len(ids) + max(0, max_new_tokens)))
    run = Run(model, Request(ids, sampling, max_new_tokens, soft=prompt.soft), n_ctx, prefixes, drafter, draft_min_p)
    decoder = model.tokenizer.stream(special=special)
    try:
        with progress("prompt", len(ids) - run.cache.length) as advance:
            first = []
            while run.reading and not run.stats.stop:
                before = run.cache.length
                [first] = _step(model, run, draft_length)
                advance(run.cache.length - before)
        yield PromptDone(list(ids), run.stats)
        yield from (Text(decoder.push(token.id), [token.id]) for token in first)
        while not run.stats.stop:
            [tokens] = _step(model, run, draft_length)
            yield from (Text(decoder.push(token.id), [token.id], token.round) for token in tokens)
        if rest := decoder.finish():
            yield Text(rest, [])
        yield Done(run.stats)
    finally:
        run.close("gone")


def _step(model: Model, run: Run, draft_length: DraftLength) -> list[list[Token]]:
    made = step(model, [run], [CHUNK], draft_length)
    if run.error is not None:
        raise run.error
    return made


def make_room(model: Model, prefixes: Nothing | Prefixes, n_ctx: int):
    """Makes sure of memory for the keys and values of `n_ctx` tokens, if need be with that of what is remembered. Raises MemoryRefusal."""
    try:
        model.refuse_unless_it_fits(n_ctx)
    except MemoryRefusal:
        prefixes.forget()
        model.refuse_unless_it_fits(n_ctx)


def _prefixes(model: Model, session: Session | None) -> Nothing | Prefixes:
    if session is None:
        return Nothing(model)
    if session.model is not model:
        raise ValueError("this session is one with another model")
    return session.prefixes


def plain(model: Model, cache: Cache, sampler: Sampler, state_D: np.ndarray) -> Iterator[int]:
    """Yields one chosen id after the other. `state_D` is the final normed state of the last token in the cache."""
    while True:
        new = sampler.pick(model.head(state_D[None])[0])
        yield new
        state_D = model.forward(np.array([new]), cache)[-1]
        cache.advance(1)
