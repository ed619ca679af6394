"""A conversation that is never read twice: its messages, and what the model has read of it.

Each turn renders all messages anew, so that nothing has to be said about what may be edited, taken back or forked: what the new prompt has
in common with anything that was read (prefixes.py) is not read again. Every answer has the bits of a run from the beginning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy

from refimpl.decode.drafter import Drafter, check_target
from refimpl.decode.generate import Output, PromptDone, Text, events
from refimpl.decode.prefixes import Prefixes, n_common
from refimpl.decode.request import Done, Stats
from refimpl.decode.snapshots import Snapshots
from refimpl.host import available
from refimpl.loading.model import Model
from refimpl.model.blocks import BLOCK
from refimpl.progress import silent
from refimpl.text.chat import split_thought
from refimpl.text.prompt import Encoded, Part, Projector, encode_messages

CACHE_DISK = 10 * 10**9
SHARE = 4           # of the memory that is free after loading, a quarter is for what has been read
DEFAULTS = {"max_new_tokens": -1, "temperature": None, "top_k": None, "top_p": None, "min_p": None, "seed": 0, "draft_max": "auto",
            "draft_min_p": 0.0, "progress": silent}


class Session:
    """A conversation with a model.

    messages  {"role": "system", "user" or "assistant", "content": text or parts} each, in order. Edit them as you like.
    stats     of the latest answer (`Stats` in generate.py): `stats.reused` says how many tokens of the prompt were not read, `stats.why`
              why not more
    """

    def __init__(self, model: Model, *, system: str | None = None, drafter: Drafter | None = None, n_ctx: int | None = None,
                 projector: Projector | None = None, thinking: bool = False, cache_ram: int | None = None,
                 cache_dir: str | os.PathLike | None = None, cache_disk: int = CACHE_DISK):
        """`system`: an instruction before the conversation. `drafter`, `n_ctx` and `projector` as in `generate`. `thinking`: lets the
        model think first. `cache_ram`: bytes for what has been read, by default a quarter of the memory that is free. `cache_dir`: a
        folder in which it is kept as well, so that it is known after a restart and to other sessions, `cache_disk` bytes at most; by
        default nothing is.

        Raises ChatError for a model without a chat template, ValueError for a drafter of another model.
        """
        if drafter is not None:
            check_target(drafter, model)
        self.model, self.drafter, self.n_ctx, self.projector, self.thinking = model, drafter, n_ctx, projector, thinking
        snapshots = None if cache_dir is None else Snapshots(cache_dir, model, cache_disk)
        self.prefixes = Prefixes(model, available() // SHARE if cache_ram is None else cache_ram, snapshots)
        self.messages: list[dict[str, object]] = [] if system is None else [{"role": "system", "content": system}]
        self.stats = Stats()
        self.prompt([{"role": "user", "content": "?"}])        # a template that cannot be used is found before the first question

    def stream(self, text: str | list[Part], **options) -> Iterator[str]:
        """Sends a message, text or parts, and yields the answer in chunks. `options` are those of `generate`: max_new_tokens,
        temperature, ..., progress.

        The answer is added to `messages` when it ends, or what there is of it when the caller stops. Of a message whose prompt was not
        read to its end there is no trace in `messages`; what was read of it is not read again.
        """
        for event in self.events(text, **options):
            if isinstance(event, Text) and event.text:
                yield event.text

    def chat(self, text: str | list[Part], **options) -> Output:
        """Sends a message and returns the answer. `options` as in `stream`. The text includes the model's thoughts."""
        seen = [event for event in self.events(text, **options) if isinstance(event, Text)]
        return Output([i for event in seen for i in event.ids], "".join(event.text for event in seen), self.stats)

    def events(self, text: str | list[Part], **options) -> Iterator[PromptDone | Text | Done]:
        """As `stream`, in events (generate.py)."""
        return self._answer([*self.messages, {"role": "user", "content": text}], options)

    def regenerate(self, **options) -> Iterator[PromptDone | Text | Done]:
        """Answers the last message of the user anew, in events. Raises ValueError where there is none."""
        return self._answer(self.messages[:self._last_question() + 1], options)

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say about what is kept on the disk, in lines."""
        return tuple(self.prefixes.snapshots.notes) if self.prefixes.snapshots else ()

    def read_ahead(self, stop: Callable[[], bool] = lambda: False):
        """Reads what the next prompt is certain to begin with: the latest answer, as the template shows it later (Gemma's own puts an
        empty thought before an answer that is being written, and none before earlier ones). Changes no answer; for the time in which the
        user types. Ends early, a few tokens later, when `stop()` is true. Raises what `generate` does.
        """
        prompt, other = (self.prompt([*self.messages, {"role": "user", "content": text}]) for text in ("a", "b"))
        ids = prompt.ids[:n_common(prompt.ids, other.ids)]
        n_ctx = self.model.config.n_ctx if self.n_ctx is None else self.n_ctx
        if not ids or len(ids) >= n_ctx:
            return
        cache = self.prefixes.find([*ids, ids[0]], n_ctx).cache
        try:
            while cache.length < len(ids) and not stop():
                end = prompt.soft.cut(ids, cache.length, min(cache.length + BLOCK, len(ids)))
                self.model.prefill(ids[cache.length:end], cache, soft=prompt.soft)
        finally:
            self.prefixes.keep(ids, cache)

    def undo(self) -> str | list[Part]:
        """Takes the last message of the user and what follows it back, and returns its content. Raises ValueError where there is none."""
        last = self._last_question()
        text, self.messages = self.messages[last]["content"], self.messages[:last]
        return text

    def fork(self) -> Session:
        """A second conversation with the same beginning. What either reads both know."""
        other = copy(self)
        other.messages, other.stats = [dict(message) for message in self.messages], Stats()
        return other

    def prompt(self, messages: Sequence[Mapping[str, object]]) -> Encoded:
        """The prompt for these messages, by the model's chat template. Raises ChatError; ValueError for what cannot be opened."""
        template = self.model.file.metadata.get("tokenizer.chat_template")
        return encode_messages(self.model.tokenizer, template, list(messages), self.projector, thinking=self.thinking)

    def _last_question(self) -> int:
        found = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not found:
            raise ValueError("there is no message to take back")
        return found[-1]

    def _answer(self, messages: list[dict[str, str]], options: Mapping[str, object]) -> Iterator[PromptDone | Text | Done]:
        """Answers `messages`, which become those of the session once the prompt has been read."""
        run = events(self.model, self.prompt(messages), n_ctx=self.n_ctx, drafter=self.drafter, prefixes=self.prefixes,
                     special=False, **(DEFAULTS | options))
        chunks = []
        try:
            for event in run:
                if isinstance(event, PromptDone):
                    self.messages, self.stats = messages, event.stats
                elif isinstance(event, Text):
                    chunks.append(event.text)
                yield event
        finally:
            run.close()
            if self.messages is messages:
                self.messages = [*messages, {"role": "assistant", "content": split_thought("".join(chunks))[1]}]


def _session(model: Model, **options) -> Session:
    """A conversation with the model. `options` are those of `Session`: system, drafter, n_ctx, ..."""
    return Session(model, **options)


Model.session = _session            # from here, because imports run downwards: the class knows nothing of what is built on it
