"""From a prompt to its continuation. `plain`, one token after the other, is the oracle for everything faster (speculative.py)."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from refimpl.decode.draft_length import AutoDepth, depth_of
from refimpl.decode.drafter import Drafter, check_target
from refimpl.decode.sampling import Sampler, Sampling
from refimpl.decode.speculative import DraftStats, speculative
from refimpl.loading.model import Model
from refimpl.model.cache import Cache, ContextFull


@dataclass
class Stats:
    """What a run took. `stop` is why it ended: "end" (an end-of-generation token), "limit", "context" or "interrupted".

    `draft` has the figures of drafting, None where there was no drafter.
    """

    n_prompt: int = 0
    n_generated: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    stop: str = ""
    draft: DraftStats | None = None

    @property
    def prompt_per_second(self) -> float:
        """Prompt tokens per second."""
        return self.n_prompt / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_per_second(self) -> float:
        """New tokens per second. The first one comes out of the prompt and is not counted."""
        return max(self.n_generated - 1, 0) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Output:
    """The new ids (an end-of-generation id is not among them), their text, and the figures of the run."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    stats: Stats = field(default_factory=Stats)


def generate(model: Model, ids: Sequence[int], **options) -> Output:
    """Continues `ids`. Takes the options of `stream`. Ctrl-C ends it early and keeps what was said."""
    output = Output()
    try:
        for _ in stream(model, ids, output=output, **options):
            pass
    except KeyboardInterrupt:
        output.stats.stop = "interrupted"
    return output


def stream(model: Model, ids: Sequence[int], *, max_new_tokens: int = 64, temperature: float = 0.0, top_k: int = 0,
           top_p: float = 1.0, min_p: float = 0.0, seed: int = 0, n_ctx: int | None = None, special: bool = False,
           drafter: Drafter | None = None, draft_max: int | str = "auto", draft_min_p: float = 0.0,
           output: Output | None = None, progress: Callable[[int], None] = lambda n: None) -> Iterator[str]:
    """Continues `ids` and yields pieces of text as they are decided (a piece may be empty while a character is incomplete).

    Stops at any end-of-generation token, after `max_new_tokens`, or at the end of a context of `n_ctx` (the model's own when None).
    `temperature` 0 takes the likeliest token. `special=True` shows control tokens in the text. `output` is filled in on the way;
    `progress(n)` is told of prompt tokens done.

    A `drafter` (see `load_drafter`) makes it faster and changes nothing else: not a token, whatever the temperature. `draft_max` tokens
    are drafted at a time, "auto" finds out how many pay; a draft ends early ahead of a token the drafter gives less than `draft_min_p`.

    Raises ContextFull when the prompt alone does not fit, MemoryRefusal when there is no memory for prompt and new tokens, ValueError
    for an option out of its range.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 0 or more")
    if not 0 <= draft_min_p < 1:
        raise ValueError(f"draft_min_p={draft_min_p!r}: expected at least 0 and below 1")
    if drafter is not None:
        check_target(drafter, model)
    depth = depth_of(draft_max, AutoDepth() if drafter is None else drafter.auto)
    sampler = Sampler(Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed),
                      suppress=model.tokenizer.suppress)
    ids = model.checked(ids)
    cache = model.new_cache(n_ctx)
    if len(ids) > cache.n_ctx:
        raise ContextFull(f"the prompt has {len(ids)} tokens, the context holds {cache.n_ctx}")
    model.refuse_unless_it_fits(min(cache.n_ctx, len(ids) + max_new_tokens))
    output = Output() if output is None else output
    stats, text = output.stats, model.tokenizer.stream(special=special)
    began = time.perf_counter()
    state_D = model.prefill(ids, cache, advance=progress)[-1]
    stats.n_prompt, stats.prompt_seconds = len(ids), time.perf_counter() - began
    if drafter is None:
        chosen = plain(model, cache, sampler, state_D)
    else:
        stats.draft = DraftStats()
        chosen = speculative(model, drafter, cache, sampler, state_D, max_new_tokens, depth, draft_min_p, stats.draft,
                             end=model.tokenizer.end_of_generation)
    began = time.perf_counter()
    while not stats.stop:
        if len(output.ids) == max_new_tokens:
            stats.stop = "limit"
            break
        new = next(chosen)
        if new in model.tokenizer.end_of_generation:
            stats.stop = "end"
            break
        output.ids.append(new)
        piece = text.push(new)
        output.text += piece
        stats.n_generated, stats.decode_seconds = len(output.ids), time.perf_counter() - began
        yield piece
        if len(ids) + len(output.ids) - 1 == cache.n_ctx:        # the newest token has no place any more
            stats.stop = "context"
    rest = text.finish()
    output.text += rest
    if rest:
        yield rest


def plain(model: Model, cache: Cache, sampler: Sampler, state_D: np.ndarray) -> Iterator[int]:
    """Yields one chosen id after the other. `state_D` is the state behind the last token in the cache."""
    while True:
        new = sampler.pick(model.head(state_D[None])[0])
        yield new
        state_D = model.forward(np.array([new]), cache)[-1]
        cache.advance(1)
