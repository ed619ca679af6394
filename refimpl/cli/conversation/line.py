"""What is typed: an editable line on the terminal, and what it means."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from refimpl.cli.conversation.transcript import own_folder

QUOTES = '"""'
MAX_HISTORY_BYTES = 4_000_000
COMMAND = re.compile(r"/([\w?-]*)(?:\s+(.*))?", re.DOTALL)


class Line(NamedTuple):
    """A message, or the command `name` and its argument."""

    name: str | None
    text: str


def meaning(typed: str, literal: bool = False) -> Line:
    """What a line asks for. `literal`: it is a message whatever it looks like."""
    text = typed.strip()
    if literal:
        return Line(None, text)
    if text.startswith(QUOTES):
        return Line(None, text[3:].removesuffix(QUOTES).strip("\n"))
    if text.startswith("//"):
        return Line(None, text[1:])
    match = COMMAND.fullmatch(text)             # /usr/bin/x and the like is text
    return Line(match[1], (match[2] or "").strip()) if match else Line(None, text)


def opens_block(typed: str) -> bool:
    """Is this the beginning of a block in triple quotes, whose end is still to come?"""
    text = typed.strip()
    return text.startswith(QUOTES) and not (len(text) >= 6 and text.endswith(QUOTES))


@contextlib.contextmanager
def keys_wait() -> Iterator[None]:
    """What is typed while an answer is written is not shown in the middle of it, but waits for the next prompt, in lines of any length."""
    try:
        import termios
    except ImportError:         # Windows
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    waiting = termios.tcgetattr(keyboard)
    waiting[3] = waiting[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
    termios.tcsetattr(keyboard, termios.TCSANOW, waiting)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


class Terminal:
    """The prompt: history, editing, and pastes that are one message whatever is in them."""

    def __init__(self, history: Path):
        """`history`: the file for what is typed; where it cannot be written, it is kept until the end of the program."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        self._output = create_output(sys.stderr) if sys.stderr.isatty() else create_output(always_prefer_tty=True)
        self._literal = ""              # how a text begins that was pasted or given, and so is no command and no block
        self._prompt = PromptSession("> ", multiline=True, prompt_continuation="  ", enable_suspend=True, output=self._output,
                                     history=_history(history), key_bindings=self._keys())

    def read(self, text: str = "") -> Line:
        """Lets the user edit `text` and returns the result. Raises EOFError on Ctrl-D; on Ctrl-C KeyboardInterrupt, whose argument is what
        stood there.
        """
        self._literal = text[:100]
        typed = self._prompt.prompt(default=text).encode(errors="surrogateescape").decode(errors="replace")
        self._output.enable_bracketed_paste()           # for what is pasted while the answer is written
        self._output.flush()
        return meaning(typed, self._is_literal(typed))

    def close(self):
        """Leaves the terminal as it was."""
        self._output.disable_bracketed_paste()
        self._output.flush()

    def _is_literal(self, typed: str) -> bool:
        return bool(self._literal) and typed.startswith(self._literal)

    def _keys(self):
        from prompt_toolkit.enums import DEFAULT_BUFFER
        from prompt_toolkit.filters import has_focus
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.keys import Keys

        keys, on_the_line = KeyBindings(), has_focus(DEFAULT_BUFFER)

        @keys.add("enter", filter=on_the_line)
        def _(event):
            buffer = event.current_buffer
            if opens_block(buffer.text) and not self._is_literal(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=on_the_line)
        def _(event):
            event.current_buffer.insert_text("\n")

        @keys.add(Keys.BracketedPaste, filter=on_the_line)
        def _(event):
            pasted = event.data.replace("\r\n", "\n").replace("\r", "\n")
            if not event.current_buffer.text and ("\n" in pasted.strip() or pasted.startswith(QUOTES)):
                self._literal = pasted[:100]
            event.current_buffer.insert_text(pasted)

        @keys.add("c-c", filter=on_the_line)
        def _(event):
            event.current_buffer.append_to_history()
            event.app.exit(exception=KeyboardInterrupt(event.current_buffer.text), style="class:aborting")
        return keys


def _history(path: Path):
    """What was typed, kept in a file that its owner alone can read; in memory where that cannot be."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class History(FileHistory):
        """Goes on where the disk is full."""

        def store_string(self, string):
            with contextlib.suppress(OSError):
                super().store_string(string)

    try:
        own_folder(path.parent)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
        if path.stat().st_size > MAX_HISTORY_BYTES:
            os.truncate(path, 0)
    except OSError:
        return InMemoryHistory()
    return History(path)
