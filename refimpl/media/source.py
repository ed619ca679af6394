"""Files and bytes from anybody: opened with care, and told apart by how they begin, not by their names."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

Source = str | os.PathLike | bytes
MAX_NAME = 100                                      # characters of a path in a message: what is meant as a path may be anything


class MediaError(ValueError):
    """A picture, sound or video that cannot be used. One line: which, what is wrong with it, what helps."""

    def __init__(self, what: str, problem: object):
        super().__init__(" ".join(f"{what}: {problem}".split()))


def name_of(source: object, kind: str) -> str:
    """How messages call it: by its path, or as "a picture of 1,234 bytes" (`kind` is "a picture")."""
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        return path if len(path) <= MAX_NAME else path[:MAX_NAME] + "..."
    return f"{kind} of {len(source):,} bytes" if isinstance(source, bytes) else kind


@contextlib.contextmanager
def opened(source: Source, what: str, max_bytes: int) -> Iterator[BinaryIO]:
    """A path or bytes as an open file. Raises MediaError, before anything is read, for what is missing, empty, too large or no file."""
    if isinstance(source, bytes):
        file, n_bytes = io.BytesIO(source), len(source)
    elif isinstance(source, (str, os.PathLike)):
        file, n_bytes = _open_path(source, what)
    else:
        raise MediaError(what, f"expected a path or bytes, found {type(source).__name__}")
    with file:
        if n_bytes == 0:
            raise MediaError(what, "is empty; download or save it again")
        if n_bytes > max_bytes:
            raise MediaError(what, f"has {n_bytes:,} bytes, expected at most {max_bytes:,}; shorten or compress it first")
        yield file


def _open_path(source: str | os.PathLike, what: str) -> tuple[BinaryIO, int]:
    path = Path(os.fsdecode(source))
    try:
        if path.is_dir():
            raise MediaError(what, "is a folder; name a file in it")
        if path.exists() and not path.is_file():                # opening a pipe would wait for ever
            raise MediaError(what, "is no regular file; save it as one first")
        file = path.open("rb")
        return file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise MediaError(what, f"cannot be opened ({error.strerror}); check the path") from None
    except ValueError as error:                                 # a path with a zero in it
        raise error if isinstance(error, MediaError) else MediaError(what, f"is no path ({error})") from None


def container_of(file: BinaryIO) -> str:
    """What holds a sound or a video: wav, flac, ogg, mp3, aac, mp4, matroska or avi; "" for anything else. The file is back at its start.

    mp4 is also M4A and MOV, matroska also WebM.
    """
    head = file.read(12)
    file.seek(0)
    if head[:4] in (b"RIFF", b"RF64"):
        return {b"WAVE": "wav", b"AVI ": "avi"}.get(head[8:], "")
    for name, start, mark in (("flac", 0, b"fLaC"), ("ogg", 0, b"OggS"), ("mp3", 0, b"ID3"), ("mp4", 4, b"ftyp"),
                              ("matroska", 0, b"\x1a\x45\xdf\xa3")):
        if head[start:start + len(mark)] == mark:
            return name
    if len(head) > 1 and head[0] == 0xFF:
        if head[1] & 0xF6 == 0xF0:                              # twelve ones, layer 0
            return "aac"
        if head[1] & 0xE0 == 0xE0 and head[1] & 0x06:           # eleven ones, layer 1 to 3
            return "mp3"
    return ""
