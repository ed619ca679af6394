"""What is asked for, an answer, and what is said while it is made."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from refimpl.decode.constraint import FREE, Constraint
from refimpl.decode.draft_length import DRAFTER
from refimpl.decode.draft_stats import DraftStats
from refimpl.decode.sampling import Sampling
from refimpl.decode.speculative import Round
from refimpl.model.soft import NO_SOFT, Soft

FORCED, REPEAT = "forced", "repeat"
SOURCES = DRAFTER, FORCED, REPEAT


@dataclass(frozen=True)
class Request:
    """An answer to be written.

    ids             the prompt
    sampling        how a token is chosen (sampling.py)
    max_new_tokens  at most so many; -1: until the text or the context ends
    constraint      what may be written (constraint.py): one of its own for every request, as it moves along
    n_top           with every token come its log probability and the n most probable tokens; -1: neither
    drafts          who may draft tokens, which changes nothing but the time: DRAFTER; FORCED, the constraint; REPEAT, what followed the
                    same tokens before (repeats.py)
    soft            what negative ids of the prompt stand for
    """

    ids: Sequence[int]
    sampling: Sampling
    max_new_tokens: int = -1
    constraint: Constraint = FREE
    n_top: int = -1
    drafts: Collection[str] = (DRAFTER,)
    soft: Soft = NO_SOFT


@dataclass
class Stats:
    """What a run took. `stop` is why it ended: "end" (an end-of-generation token), "limit" (`max_new_tokens`), "context" (it is full) or
    "gone" (who asked does not want it any more).

    `reused` of the `n_prompt` tokens of the prompt were not read, as they had been before; `why` says why not more. `draft` has the
    statistics of drafting, None without a drafter.
    """

    n_prompt: int = 0
    reused: int = 0
    why: str = ""
    n_generated: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    stop: str = ""
    draft: DraftStats | None = None

    @property
    def prompt_per_second(self) -> float:
        """Prompt tokens read per second."""
        return (self.n_prompt - self.reused) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_per_second(self) -> float:
        """New tokens per second. The first one comes out of the prompt and is not counted."""
        return max(self.n_generated - 1, 0) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Reading:
    """So many tokens of the prompt have been read, or were known; all of them when the first Token follows."""

    n_read: int
    n_prompt: int
    reused: int


@dataclass(frozen=True)
class Token:
    """A new token. `logprob`: the natural logarithm of its probability, from the logits as they are, before temperature, penalties and
    constraint; `top`: (id, logprob) of the most probable tokens, the most probable first. Without `n_top` 0.0 and nothing. `round`: the
    round of drafting that it is the first token of.
    """

    id: int
    logprob: float = 0.0
    top: Sequence[tuple[int, float]] = ()
    round: Round | None = None  # noqa: A003


@dataclass(frozen=True)
class Done:
    """The run has ended; `stats.stop` says why."""

    stats: Stats


@dataclass(frozen=True)
class Failed:
    """The run cannot go on: `error` says why."""

    error: Exception


Event = Reading | Token | Done | Failed
