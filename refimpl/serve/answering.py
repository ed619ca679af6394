"""From the engine's events to the parts of answers: text, thoughts, calls, ends. What each API makes of them is in api/."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from refimpl.decode.request import Done, Failed, Reading, Stats, Token
from refimpl.loading.memory import MemoryRefusal
from refimpl.model.cache import ContextFull
from refimpl.serve.asking import Want
from refimpl.serve.errors import ApiError, explained, log
from refimpl.serve.parts import End, Part, Progress, Reader
from refimpl.serve.settings import Site
from refimpl.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from refimpl.serve.engine import Answer


class Answers:
    """All answers to a request: `async for i, part in answers`. `close` must be called at the end, and cancels what is still running."""

    def __init__(self, site: Site, want: Want):
        self._site, self._want, self._started = site, want, time.monotonic()
        self._answers: list[Answer] = []
        self.n_prompt = sum(len(prompt.ids) for prompt in want.prompts)

    @classmethod
    async def begin(cls, site: Site, want: Want) -> Answers:
        """Queues all of them, or none. Raises what `Engine.submit` raises."""
        answers = cls(site, want)
        try:
            for request in await want.requests(site.settings.drafts):
                answers._answers.append(await site.engine.submit(request))
        except BaseException:
            answers.close()
            raise
        return answers

    def __len__(self) -> int:
        return len(self._answers)

    def close(self):
        """Nobody wants them any more."""
        for answer in self._answers:
            answer.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Part]]:
        parts = [self._parts(answer) for answer in self._answers]
        waiting = {asyncio.ensure_future(anext(each, None)): i for i, each in enumerate(parts)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=waiting.get):
                    i = waiting.pop(task)
                    if (part := task.result()) is not None:
                        waiting[asyncio.ensure_future(anext(parts[i], None))] = i
                        yield i, part
        finally:
            for task in waiting:
                if not task.cancel() and not task.cancelled():
                    task.exception()            # of another answer, which is not the one that is told: asyncio would log it
            self.close()

    async def _parts(self, answer: Answer) -> AsyncIterator[Part]:
        reader, reading, stats, n = Reader(self._site.tokenizer, self._want), Reading(0, 0, 0), Stats(), 0
        try:
            async for event in answer:
                if isinstance(event, Reading) and not n:
                    reading = event
                    yield Progress(event, time.monotonic() - self._started)
                elif isinstance(event, Token) and not reader.ended:
                    n += 1
                    if n == 1:
                        self._site.metrics.to_first.observe(time.monotonic() - self._started)
                    if said := reader.push(event):
                        yield said
                    if reader.ended:                # before the model's own end
                        answer.cancel()
                elif isinstance(event, Done):
                    stats = event.stats
                    if said := reader.finish():
                        yield said
                    yield End(reader.why(stats.stop), reader.stopped_by, n, stats)
                elif isinstance(event, Failed):
                    raise _failure(event.error)
        finally:
            self._site.metrics.ended(reading, stats, n)


async def streamed(answers: Answers, events: AsyncIterator[bytes], failed: Callable[[ApiError], bytes]) -> AsyncIterator[bytes]:
    """`events`, which are made of `answers`; an error ends them with `failed`. However they end, nothing is left running."""
    try:
        async with contextlib.aclosing(events):
            async for chunk in events:
                yield chunk
    except Exception as error:
        yield failed(explained(error))
    finally:
        answers.close()


def timings(end: End) -> dict[str, object]:
    """llama-server's `timings`."""
    stats, n_read = end.stats, end.stats.n_prompt - end.stats.reused
    prompt_ms, ms = stats.prompt_seconds * 1000, stats.decode_seconds * 1000
    drafts = {} if stats.draft is None else {"draft_n": stats.draft.n_proposed, "draft_n_accepted": stats.draft.n_accepted}
    return {"cache_n": stats.reused, "prompt_n": n_read, "prompt_ms": prompt_ms, "prompt_per_token_ms": prompt_ms / max(1, n_read),
            "prompt_per_second": stats.prompt_per_second, "predicted_n": end.n_generated, "predicted_ms": ms,
            "predicted_per_token_ms": ms / max(1, end.n_generated), "predicted_per_second": stats.decode_per_second, **drafts}


def spelled(tokenizer: Tokenizer, i: int) -> tuple[str, list[int]]:
    """The text and the bytes of one token; the text of a part of a character is U+FFFD."""
    text, name = tokenizer.decode([i], special=True), tokenizer.token(i)
    if text != name and (match := re.fullmatch("<0x([0-9A-F]{2})>", name)):
        return text, [int(match[1], 16)]
    return text, list(text.encode())


def _failure(error: Exception) -> Exception:
    if isinstance(error, ContextFull | MemoryRefusal):
        return error
    log.error("an answer failed", exc_info=error)
    return ApiError(500, f"the answer failed: {' '.join(str(error).split())[:300]}", code="internal_error")
