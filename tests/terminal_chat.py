"""`refimpl chat` on a terminal of its own, for tests; run as a program, the same with a model that answers by a script.

What the scripted model does depends on the last message: "slow prompt" is read for a minute, "slow answer" written for one, "pause" for a
second; "think" is answered after a thought, "escape" with what a terminal would obey, anything else with its length.
"""

import json
import os
import re
import sys
import time

import pexpect

import refimpl
from refimpl.formats.gguf import open_gguf
from refimpl.formats.gguf_writer import PLAIN_TYPES, write_gguf
from refimpl.loading.model import BUILT_IN
from refimpl.text.chat import CHANNEL_END, THOUGHT
from refimpl.text.templates import GEMMA4_TEMPLATE

READY = r"\x1b\[\?2004h(\x1b\[\?1l)?\x1b\[\?25l\x1b\[0m\x1b\[\?7l"           # how a new prompt is drawn
UP, LEFT, CTRL_C, CTRL_D, ALT_ENTER = "\x1b[A", "\x1b[D", "\x03", "\x04", "\x1b\r"


def with_template(path):
    """The built-in model with a chat template."""
    with open_gguf(BUILT_IN) as file:
        tensors = [(name, info.type, file.raw(name).view(PLAIN_TYPES.get(info.type, "uint8"))) for name, info in file.tensors.items()]
        metadata = {key: plain(value) for key, value in file.metadata.items()}
        write_gguf(path, metadata | {"tokenizer.chat_template": GEMMA4_TEMPLATE}, tensors)
    return path


def plain(value):
    """A value of a file's metadata as the writer takes it."""
    return value.tolist() if type(value).__name__ == "StringArray" else value


class Chat:
    """A running `refimpl chat`."""

    def __init__(self, *arguments, data, scripted: bool = False, env: dict | None = None):
        """`data`: the folder for sessions and history."""
        program = [__file__] if scripted else ["-m", "refimpl"]
        self.terminal = pexpect.spawn(
            sys.executable, [*program, "chat", *map(str, arguments), "--cache-dir", "none"], encoding="utf-8", timeout=60,
            dimensions=(24, 100),
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "REFIMPL_DATA_DIR": str(data), **(env or {})})
        self.terminal.delaybeforesend = None
        self.ready()

    def ready(self) -> str:
        """What was shown until the next prompt."""
        self.terminal.expect(READY)
        return self.terminal.before

    def keys(self, keys: str):
        """Sends keys as they are."""
        self.terminal.send(keys)

    def shows(self, text: str):
        """Waits until this is shown."""
        self.terminal.expect_exact(text)

    def say(self, line: str) -> str:
        """Types a line, and returns what is shown until the next prompt."""
        self.keys(line + "\r")
        return self.ready()

    def paste(self, text: str):
        """Pastes into the line."""
        self.keys(f"\x1b[200~{text}\x1b[201~")

    def end(self, keys: str = "/exit\r") -> int:
        """Leaves, and returns the exit status."""
        self.keys(keys)
        self.terminal.expect(pexpect.EOF)
        self.terminal.close()
        return self.terminal.exitstatus


def spoken(data, session: str = "s") -> list[str]:
    """The messages of a session on disk."""
    return [message["content"] for message in json.loads((data / "sessions" / f"{session}.json").read_text())["messages"]]


def scripted_events(model, prompt, **options):
    """In place of `events`: no model is run."""
    from refimpl.decode.generate import PromptDone, Text
    from refimpl.decode.request import Done, Stats

    ids = prompt.ids
    message = model.tokenizer.decode(ids, special=True).split("<|turn>user\n")[-1].split("<turn|>")[0]
    if message.startswith("too long"):
        raise refimpl.ContextFull("the prompt has 9 tokens, the context holds 8")
    if message.startswith("slow prompt"):
        print("READING", file=sys.stderr, flush=True)
        time.sleep(60)
    stats = Stats(n_prompt=len(ids))
    yield PromptDone(ids, stats)
    if message in ("slow answer", "pause"):
        yield Text("WRITING", [])
        time.sleep(1 if message == "pause" else 60)
    if message == "escape":
        yield Text("a\x1b[31mb\tc\x9bd\n", [])
    elif message.startswith("think"):
        for chunk in re.findall("..?.?", f"{THOUGHT}thought\nlet me see\n{CHANNEL_END}so it is", re.DOTALL):
            yield Text(chunk, [])
    else:
        yield Text(f"seed {options['seed']}, {len(message)} characters", [])
    stats.stop = "end"
    yield Done(stats)


if __name__ == "__main__":
    import refimpl.cli
    import refimpl.decode.session

    refimpl.decode.session.events = scripted_events
    refimpl.cli.main()
