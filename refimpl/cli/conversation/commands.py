"""The commands of a conversation: /help and those it lists."""

import difflib
import re
import shlex
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from refimpl.cli.app import Failure, errors, refuse_overwriting
from refimpl.cli.conversation import transcript
from refimpl.cli.conversation.turns import HARMLESS, Conversation, figures, seen_in, text_of
from refimpl.media.parts import Audio, Image, Video
from refimpl.text.prompt import Media, Part

SUFFIXES = {"image": {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}, "audio": {".wav", ".flac", ".ogg", ".mp3"},
            "video": {".mp4", ".mov", ".mkv", ".webm", ".avi"}}


class Leave(Exception):
    """The user wants to end the conversation."""


class Command(NamedTuple):
    """`argument` is empty where there is none, in brackets where it can be left out."""

    argument: str
    about: str
    do: Callable[[Conversation, str], None]


def run_command(conversation: Conversation, name: str, argument: str):
    """Carries out a command. Raises Leave, Failure (one line for the user, unknown commands too), OSError, and as `Conversation.ask`."""
    command = COMMANDS.get(OTHER_NAMES.get(name, name))
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        raise Failure(f"no command /{name}; " + (f"did you mean /{near[0]}?" if near else "/help lists them") + " (//... sends a message)")
    if argument and not command.argument:
        raise Failure(f"/{name} takes nothing after it")
    if not argument and command.argument and not command.argument.startswith("["):
        raise Failure(f"/{name} {command.argument}: {command.about}")
    command.do(conversation, argument)


def show_help(conversation: Conversation, argument: str):
    """/help"""
    lines = [(f"/{name} {command.argument}", command.about) for name, command in COMMANDS.items()]
    width = max(len(usage) for usage, _ in lines)
    errors.print("\n".join(f"{usage:{width}}  {about}" for usage, about in lines))
    errors.print('//text sends "/text"; a PATH with spaces goes in quotes. Enter sends, Alt-Enter begins a new line, a paste is\n'
                 'one message; """ opens a block of lines that a line ending in """ closes. Ctrl-C stops an answer or the\n'
                 "reading of a message, Ctrl-D ends.")


def clear(conversation: Conversation, argument: str):
    """/clear"""
    conversation.session.messages = conversation.session.messages[:-len(conversation.spoken) or None]
    conversation.files = []
    conversation.save()
    errors.print("a new conversation" + ("" if conversation.instruction is None else "; the instruction of /system stays"))


def undo(conversation: Conversation, argument: str):
    """/undo"""
    errors.print(f"forgotten: {_short(text_of(_taken_back(conversation)))}")


def edit(conversation: Conversation, argument: str):
    """/edit"""
    if not conversation.unsent:
        content = _taken_back(conversation)
        conversation.unsent, conversation.files = text_of(content), seen_in(content)


def drop(conversation: Conversation, argument: str):
    """/drop"""
    spoken = conversation.spoken
    if not spoken:
        raise Failure("there is nothing to forget")
    end = next((i for i, message in enumerate(spoken) if i and message["role"] == "user"), len(spoken))
    conversation.session.messages = conversation.session.messages[:-len(spoken)] + spoken[end:]
    conversation.save()
    errors.print(f"forgotten: {_short(text_of(spoken[0]['content']))}")


def regenerate(conversation: Conversation, argument: str):
    """/regen"""
    _question(conversation)
    if conversation.options["temperature"] == 0:
        errors.print("note: at temperature 0 it is the same answer")
    conversation.again()


def system(conversation: Conversation, argument: str):
    """/system"""
    if not argument:
        errors.print((conversation.instruction or "").translate(HARMLESS) or "there is no instruction; /system TEXT gives one")
        return
    conversation.instruct(None if argument == "-" else argument)
    conversation.save()
    errors.print("there is no instruction any more" if argument == "-" else "the instruction holds from the next message on")


def save(conversation: Conversation, argument: str):
    """/save"""
    path = Path(argument).expanduser()
    ours = False
    if path.is_file():
        try:
            ours = bool(transcript.read(path))
        except Failure:
            raise Failure(f"{path} exists and is no saved conversation; choose another name") from None
    refuse_overwriting(path, force=ours)
    transcript.write(path, conversation.session.model.name, conversation.session.messages)
    errors.print(f"saved to {path}")


def load(conversation: Conversation, argument: str):
    """/load"""
    loaded = transcript.read(Path(argument).expanduser())
    conversation.session.messages = loaded.messages
    conversation.save()
    errors.print(resumed(conversation, loaded))


def sessions(conversation: Conversation, argument: str):
    """/sessions"""
    paths = transcript.sessions()
    for path in paths:
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        try:
            about = _count(transcript.read(path).messages)
        except (Failure, OSError):
            about = "cannot be read"
        errors.print(f"{date}  {path.stem}: {about}" + (" (this one)" if path == conversation.path else ""))
    if not paths:
        errors.print("there are none; refimpl chat --session NAME begins one")


def stats(conversation: Conversation, argument: str):
    """/stats"""
    session, latest = conversation.session, conversation.stats
    used = f", of which the latest answer used {latest.n_prompt + latest.n_generated}" if latest else ""
    errors.print(f"{session.model.name}: {_count(conversation.spoken)}, a context of {conversation.context} tokens{used}")
    errors.print(f"what was read takes {session.prefixes.n_bytes / 1e6:.1f} of {session.prefixes.budget / 1e6:.0f} MB (--cache-ram)")
    if latest:
        errors.print(f"latest answer: {figures(latest)}")


def file(conversation: Conversation, argument: str):
    """/file"""
    if argument == "-":
        conversation.files = []
        errors.print("the next message goes without files")
        return
    path, question = _path_and_text(argument)
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as e:
        raise Failure(f"{path}: at byte {e.start}: not UTF-8 text") from None
    conversation.files.append((path.name, text))
    if question:
        conversation.ask(question)
    else:
        errors.print(f"{path.name} ({len(text)} characters) goes along with the next message")


def image(conversation: Conversation, argument: str):
    """/image"""
    _attach(conversation, argument, lambda path: Image(path, conversation.n_tokens))


def audio(conversation: Conversation, argument: str):
    """/audio"""
    _attach(conversation, argument, Audio)


def video(conversation: Conversation, argument: str):
    """/video"""
    _attach(conversation, argument, Video)


def dropped(text: str) -> tuple[str, str] | None:
    """(command, path) where a message is nothing but the path of a picture, a sound or a video, or its file: URL, as a terminal types it
    for a dropped file.
    """
    try:
        [word] = shlex.split(text)
        path = Path(_path_of(word)).expanduser()
    except (ValueError, RuntimeError):          # not one word, an open quote; nobody's home
        return None
    if not path.is_absolute() or not path.is_file():
        return None
    name = next((name for name, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes), None)
    return None if name is None else (name, str(path))


def leave(conversation: Conversation, argument: str):
    """/exit"""
    raise Leave


def resumed(conversation: Conversation, loaded: transcript.Transcript) -> str:
    """What is said where a conversation goes on."""
    other = loaded.model and loaded.model != conversation.session.model.name
    return f"goes on after {_count(conversation.spoken)}" + (f"; until now with {_short(loaded.model)}" if other else "")


COMMANDS = {
    "help": Command("", "shows this list", show_help),
    "clear": Command("", "forgets all messages; /system stays", clear),
    "undo": Command("", "takes your last message and its answer back", undo),
    "drop": Command("", "forgets the oldest message and its answer, which makes room in the context", drop),
    "regen": Command("", "another answer to your last message", regenerate),
    "edit": Command("", "puts your last message, or the one that was not sent, back on the line", edit),
    "system": Command("[TEXT]", "sets the instruction before the conversation; - removes it; alone shows it", system),
    "file": Command("PATH [TEXT]", "sends TEXT with a file; alone: the next message takes the file along; - leaves it out", file),
    "image": Command("PATH [TEXT]", "sends TEXT with a picture; alone: the next message takes it along", image),
    "audio": Command("PATH [TEXT]", "the same with a sound", audio),
    "video": Command("PATH [TEXT]", "the same with a video, without its sound", video),
    "save": Command("FILE", "writes the conversation, as JSON that can be edited", save),
    "load": Command("FILE", "goes on with a saved conversation instead of this one", load),
    "sessions": Command("", "lists the conversations that --session keeps", sessions),
    "stats": Command("", "shows tokens, memory and speed", stats),
    "exit": Command("", "ends, as Ctrl-D does", leave),
}
OTHER_NAMES = {"": "help", "?": "help", "quit": "exit", "bye": "exit"}


# ---- helpers

def _question(conversation: Conversation):
    """Raises Failure where the user has said nothing yet."""
    if not any(message["role"] == "user" for message in conversation.session.messages):
        raise Failure("you have said nothing yet")


def _taken_back(conversation: Conversation) -> str | list[Part]:
    """Takes the last message of the user back and returns its content. Raises Failure where there is none."""
    _question(conversation)
    content = conversation.session.undo()
    conversation.save()
    return content


def _attach(conversation: Conversation, argument: str, kind: Callable[[Path], Media]):
    """A picture, a sound or a video for the next message, or for the one that is given with it."""
    if conversation.session.projector is None:
        raise Failure("this model was loaded without its projector; start with --mmproj FILE to show it pictures and sounds")
    path, question = _path_and_text(argument)
    try:
        part = kind(path)
        take = conversation.session.projector.stills if isinstance(part, Video) else conversation.session.projector.soft_tokens
        take(part)                                              # opens it
    except ValueError as e:
        raise Failure(str(e)) from None
    conversation.files.append((path.name, part))
    if question:
        conversation.ask(question)
    else:
        errors.print(f"{path.name} goes along with the next message")


def _path_of(word: str) -> str:
    """A path as it is, or the one in a file: URL of this machine ("file:///a%20b.png" -> "/a b.png")."""
    url = re.match(r"file:(?://(?:localhost)?)?(?=/)", word)
    return urllib.parse.unquote(word[url.end():]) if url else word


def _count(messages: list[dict[str, str]]) -> str:
    n = len([message for message in messages if message["role"] != "system"])
    return f"{n} message" + "s" * (n != 1)


def _short(text: str) -> str:
    line = " ".join(text.split()).translate(HARMLESS)
    return line if len(line) <= 60 else line[:59] + "…"


def _path_and_text(argument: str) -> tuple[Path, str]:
    """The file of /file, whose name may have spaces in quotes or be the whole argument, and the text after it."""
    if argument[0] in "\"'" and argument[0] in argument[1:]:
        name, _, text = argument[1:].partition(argument[0])
    elif Path(argument).expanduser().is_file():
        name, text = argument, ""
    else:
        name, text = (argument.split(maxsplit=1) + [""])[:2]
    return Path(name).expanduser(), text.strip()
