"""Conversations on disk: JSON that people can read and edit.

    {"format": "refimpl chat 1", "model": name, "system": text or null, "messages": [{"role": "user" or "assistant", "content": text}, ...]}

A content with pictures or sounds is a list of parts, in order:

    {"type": "text", "text": ...}    {"type": "image", "path": ..., "tokens": 280}    {"type": "audio" or "video", "path": ...}

    <data root>/sessions/NAME.json      conversations of `refimpl chat --session NAME`
    <data root>/history                 lines typed at its prompt

The data root is `REFIMPL_DATA_DIR`, or else the user's data folder of the operating system (on Linux ~/.local/share/refimpl). Files are
readable by their owner only, and are written beside their name and then moved, so that a crash leaves the old one or the new one.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from refimpl.cli.app import Failure, replacing
from refimpl.media.parts import Audio, Image, Video
from refimpl.media.patches import BUDGETS, TOKENS
from refimpl.text.prompt import Part

FORMAT = "refimpl chat 1"
NAME = re.compile(r"\w[\w.-]{0,63}")


class Transcript(NamedTuple):
    """A conversation. The first message may be the system's."""

    model: str
    messages: list[dict[str, object]]


def data_root() -> Path:
    """The folder for conversations and history; it need not exist."""
    from platformdirs import user_data_path

    base = os.environ.get("REFIMPL_DATA_DIR")
    return Path(base) if base else user_data_path("refimpl")


def session_path(name: str) -> Path:
    """The file of a session. Raises Failure for a name that could lead elsewhere."""
    if not NAME.fullmatch(name):
        raise Failure(f"{name!r} cannot name a session: letters, digits, - _ and . after the first, 64 at most")
    return data_root() / "sessions" / f"{name}.json"


def sessions() -> list[Path]:
    """The files of all sessions, the latest first."""
    try:
        found = [path for path in (data_root() / "sessions").iterdir() if path.suffix == ".json" and NAME.fullmatch(path.stem)]
        return sorted(found, key=lambda path: -path.stat().st_mtime)
    except OSError:
        return []


def read(path: Path) -> Transcript:
    """Raises Failure for a file of another form, OSError where it cannot be read."""
    try:
        data = json.loads(path.read_bytes())
    except UnicodeDecodeError as e:
        raise Failure(f"{path}: not a saved conversation: at byte {e.start}: not UTF-8 text") from None
    except json.JSONDecodeError as e:
        raise Failure(f"{path}: not a saved conversation: line {e.lineno}, column {e.colno}: {e.msg}") from None
    except RecursionError:
        raise Failure(f"{path}: not a saved conversation: nested too deeply") from None
    if problem := _problem(data):
        raise Failure(f"{path}: not a saved conversation: {problem}")
    system = [] if data.get("system") is None else [{"role": "system", "content": data["system"]}]
    model = data.get("model")
    return Transcript(model if isinstance(model, str) else "", [*system, *({"role": message["role"], "content": _opened(message["content"])}
                                                                           for message in data["messages"])])


def write(path: Path, model: str, messages: Sequence[Mapping[str, str]]):
    """Writes a conversation, for its owner only, in place of what is there. Raises OSError and then leaves what is there."""
    system = next((message["content"] for message in messages if message["role"] == "system"), None)
    rest = [{"role": message["role"], "content": _written(message["content"])} for message in messages if message["role"] != "system"]
    text = json.dumps({"format": FORMAT, "model": model, "system": system, "messages": rest}, indent=2, ensure_ascii=False)
    with replacing(path) as temporary, open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def alone(path: Path | None) -> Iterator[None]:
    """Keeps a session from being gone on with twice at once. Raises Failure where another process has it."""
    from filelock import FileLock, Timeout

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):         # a folder without locks, or that cannot be written
            try:
                if path is not None:
                    stack.enter_context(FileLock(own_folder(path.parent) / f".{path.stem}.lock", timeout=0, mode=0o600))
            except Timeout:
                raise Failure(f"{path.stem} is open in another refimpl chat") from None
        yield


def own_folder(path: Path) -> Path:
    """Makes a folder for the user alone, if it is not there. Raises OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _problem(data: object) -> str:
    """What keeps `data` from being a conversation; empty if nothing does."""
    if not isinstance(data, dict) or not isinstance(data.get("format"), str):
        return f'expected {{"format": "{FORMAT}", ...}}'
    if data["format"] != FORMAT:
        return f"its format is {data['format'][:40]!r}, expected {FORMAT!r}"
    if not (data.get("system") is None or _is_text(data["system"])):
        return "system is not a text"
    if not isinstance(data.get("messages"), list):
        return "messages is not a list"
    for i, message in enumerate(data["messages"], 1):
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            return f'message {i}: expected {{"role": "user" or "assistant", "content": text}}'
        content = message.get("content")
        if not _is_text(content) and not (isinstance(content, list) and all(map(_is_part, content))):
            return f"message {i}: content is neither a text nor a list of parts"
    return ""


def _is_part(part: object) -> bool:
    """Text, a picture, a sound or a video, as they are written."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return _is_text(part.get("path")) and part.get("tokens", TOKENS) in BUDGETS
    return kind == "text" and _is_text(part.get("text")) or kind in ("audio", "video") and _is_text(part.get("path"))


def _opened(content: str | list[dict]) -> str | list[Part]:
    """A content as sessions have it. Pictures, sounds and videos are opened when they are needed."""
    make = {"text": lambda part: part["text"], "image": lambda part: Image(Path(part["path"]), part.get("tokens", TOKENS)),
            "audio": lambda part: Audio(Path(part["path"])), "video": lambda part: Video(Path(part["path"]))}
    return content if isinstance(content, str) else [make[part["type"]](part) for part in content]


def _written(content: str | list[Part]) -> str | list[dict[str, object]]:
    """A content as plain JSON."""
    def plain(part: Part) -> dict[str, object]:
        if isinstance(part, Image):
            return {"type": "image", "path": str(Path(part.source).absolute()), "tokens": part.tokens}
        if isinstance(part, Audio | Video):
            return {"type": "audio" if isinstance(part, Audio) else "video", "path": str(Path(part.source).absolute())}
        return {"type": "text", "text": part}
    return content if isinstance(content, str) else [plain(part) for part in content]


def _is_text(value: object) -> bool:
    """A string that UTF-8 can hold: JSON can spell others."""
    return isinstance(value, str) and not any(0xD800 <= ord(c) < 0xE000 for c in value)
