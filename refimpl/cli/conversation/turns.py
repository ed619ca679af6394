"""The turns of a conversation: questions answered on standard output, what is said about them, and the transcript kept up to date."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from refimpl.cli.app import bar, errors, write
from refimpl.cli.conversation import transcript
from refimpl.cli.run import show_drafting
from refimpl.decode.generate import PromptDone, Text
from refimpl.decode.request import Done, Stats
from refimpl.decode.session import Session
from refimpl.media.patches import TOKENS
from refimpl.model.cache import ContextFull
from refimpl.text.chat import ChatError
from refimpl.text.prompt import Media
from refimpl.text.thoughts import ThoughtSplitter

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HARMLESS = {c: "\N{REPLACEMENT CHARACTER}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
"""A model may write what a terminal would obey."""


class Conversation:
    """A session as the command line shows it.

    session    the messages, and what the model has read
    unsent     a message that was not sent after all: its prompt was not read to the end
    files      (name, text, picture, sound or video) of the files that go along with the next message
    n_tokens   that a picture may take
    path       where the conversation is kept, None if nowhere
    stats      of the latest answer, None before the first
    """

    def __init__(self, session: Session, options: dict[str, object], path: Path | None = None, verbose: bool = False,
                 n_tokens: int = TOKENS):
        """`options`: those of `Session.stream`."""
        self.session, self.options, self.path, self.verbose, self.n_tokens = session, options, path, verbose, n_tokens
        self.unsent, self.files, self.stats = "", [], None
        self._more_seed = self._n_notes = 0

    @property
    def context(self) -> int:
        """How many tokens it may have."""
        largest = self.session.model.config.n_ctx
        return min(self.session.n_ctx or largest, largest)

    @property
    def instruction(self) -> str | None:
        """What the system says before the first message."""
        first = self.session.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    @property
    def spoken(self) -> list[dict[str, str]]:
        """The messages without the instruction."""
        return self.session.messages[self.instruction is not None:]

    def instruct(self, text: str | None):
        """Sets the instruction, or removes it."""
        self.session.messages = ([] if text is None else [{"role": "system", "content": text}]) + self.spoken

    def ask(self, text: str) -> Stats | None:
        """Sends a message, prints the answer, and keeps the conversation. None if it was stopped before the prompt was read, else what it
        took. Raises what `generate` does; the message is `unsent` then.
        """
        self.unsent, self._more_seed = text, 0
        stats = self._answer(self.session.events(with_files(self.files, text), **self._options()))
        if stats is not None:
            self.unsent, self.files = "", []
        return stats

    def again(self) -> Stats | None:
        """Answers the last message once more, with other random numbers. Raises ValueError where there is none, and as `ask`."""
        self._more_seed += 1
        return self._answer(self.session.regenerate(**self._options()))

    @contextlib.contextmanager
    def reading_ahead(self):
        """While the block runs, which waits for the user, another thread reads what the next prompt begins with."""
        stop = threading.Event()

        def read():
            with contextlib.suppress(ChatError, ContextFull, MemoryError, ValueError, OSError):         # the next message meets it again
                self.session.read_ahead(stop.is_set)
        thread = threading.Thread(target=read, name="refimpl-ahead", daemon=True)
        if self.stats is not None:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            if thread.ident is not None:
                thread.join()

    def save(self):
        """Writes the transcript of a session that has a name. Where that cannot be done, says so."""
        if self.path is None:
            return
        try:
            transcript.own_folder(self.path.parent)
            transcript.write(self.path, self.session.model.name, self.session.messages)
        except OSError as e:
            errors.print(f"note: the conversation is not on disk: {self.path}: {e.strerror}")

    def ways_out(self) -> str:
        """What helps where the context is full, after a semicolon; empty where nothing does."""
        largest, ways = self.session.model.config.n_ctx, []
        if sys.stdin.isatty():
            ways.append("/drop forgets the oldest question and answer, /undo the latest, /clear all" if self.spoken else
                        "shorten the message")
            if self.files:
                ways.append("/file - leaves the files out")
        if self.context < largest:
            ways.append(f"-c {min(2 * self.context, largest)} at the start gives more")
        return "".join(f"; {way}" for way in ways)

    def _options(self) -> dict[str, object]:
        return self.options | {"seed": self.options["seed"] + self._more_seed, "progress": bar}

    def _answer(self, events: Iterator[PromptDone | Text | Done]) -> Stats | None:
        stats, shown = None, Shown()
        try:
            for event in events:
                if isinstance(event, PromptDone):
                    stats = event.stats
                elif isinstance(event, Text):
                    shown.push(event.text)
            shown.finish()
        except KeyboardInterrupt:
            if stats is None:
                errors.print()
                return None
            stats.stop = "interrupted"
        finally:
            events.close()
            if stats is not None:
                self.stats = stats
                self.save()
        write("\n")
        self._comment(stats)
        return stats

    def _comment(self, stats: Stats):
        """What there is to say about an answer."""
        left = self.context - stats.n_prompt - stats.n_generated
        if stats.stop == "limit":
            errors.print(f"stopped at {stats.n_generated} tokens (-n)")
        if stats.stop == "context":
            errors.print(f"the answer is cut off: the context of {self.context} tokens is full{self.ways_out()}")
        elif left < max(self.context // 10, min(256, self.context // 4)):
            errors.print(f"note: {left} of {self.context} tokens of context are left{self.ways_out()}")
        for note in self.session.notes[self._n_notes:]:
            errors.print(f"note: {note}")
        self._n_notes = len(self.session.notes)
        if self.verbose:
            errors.print(figures(stats), style="dim")
            show_drafting(stats)


class Shown:
    """Writes an answer on standard output as it comes; on a terminal also the thoughts, dimmed."""

    def __init__(self):
        self._splitter, self._terminal = ThoughtSplitter(), sys.stdout.isatty()
        self._dims = self._terminal and os.environ.get("TERM") != "dumb"
        self._thought = False           # a thought was last

    def push(self, chunk: str):
        """Writes what is certain with this chunk."""
        for thought, text in self._splitter.push(chunk):
            self._write(thought, text)

    def finish(self):
        """Writes the rest."""
        for thought, text in self._splitter.finish():
            self._write(thought, text)

    def _write(self, thought: bool, text: str):
        text = text.translate(HARMLESS) if self._terminal else text
        if thought:
            if self._terminal:
                write(f"{DIM}{text}{PLAIN}" if self._dims else text)
        else:
            if self._thought:
                text = text.lstrip()
                if not text:
                    return
                text = "\n\n" * self._terminal + text
            write(text)
        self._thought = thought


def figures(stats: Stats) -> str:
    """What an answer took, in one line."""
    return (f"reused {stats.reused} tokens, read {stats.n_prompt - stats.reused} ({stats.prompt_per_second:.1f}/s), "
            f"wrote {stats.n_generated} ({stats.decode_per_second:.1f}/s)" + (f"; {stats.why}" if stats.why else ""))


def with_files(files: list[tuple[str, str | Media]], text: str) -> str | list[str | Media]:
    """A message after the files it is about: pictures, sounds and videos, then texts, each between fences longer than those in it."""
    seen, parts = [content for _, content in files if not isinstance(content, str)], []
    for name, content in files:
        if not isinstance(content, str):
            continue
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))
        parts.append(f"{name}:\n{fence}\n{content.rstrip()}\n{fence}")
    message = "\n\n".join([*parts, text] if text else parts)
    return [*seen, message] if seen else message


def text_of(content: str | list[str | Media]) -> str:
    """The text of a message."""
    return content if isinstance(content, str) else "".join(part for part in content if isinstance(part, str))


def seen_in(content: str | list[str | Media]) -> list[tuple[str, Media]]:
    """(name, picture, sound or video) of all in a message."""
    return [] if isinstance(content, str) else [(part.name, part) for part in content if not isinstance(part, str)]
