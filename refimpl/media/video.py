"""Videos, and sounds in their containers, by PyAV (FFmpeg): MP4, MOV, M4A, AAC, Matroska, WebM, AVI. Needs the extra `video`.

FFmpeg is told the container, by how the file begins: one that is left to guess also opens playlists, which name other files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from refimpl.extras import require
from refimpl.media.images import check_size
from refimpl.media.source import MediaError, Source, container_of, opened

if TYPE_CHECKING:
    import av

FRAMES = 32
TOKENS = 70                                         # the budget of a frame
MAX_BYTES = 4_000_000_000
MAX_SECONDS = 3600                                  # all of it is decoded
CONTAINERS = {"mp4": "mp4", "matroska": "matroska", "avi": "avi", "aac": "aac"}         # FFmpeg's names


class Frame(NamedTuple):
    """A picture of a video: uint8 (H, W, 3), when it is shown in seconds, and the same as the model reads it ("01:05")."""

    rgb_HWC: np.ndarray
    seconds: float
    stamp: str


def open_video(source: Source, what: str, frames: int = FRAMES) -> Iterator[Frame]:
    """Evenly spaced frames of a video, the first one first; all of them if it has fewer than `frames`. Errors call it `what`.

    As transformers' `sample_frames` chooses them, which refuses short videos: number i * total // frames. Times are numbers divided by the
    average frame rate. One frame is in memory at a time. The sound is left out (`open_sound` takes it).
    Raises MediaError, with the first frame, for what is no video, is cut, has frames of more than 100 megapixels, or lasts an hour.
    """
    if frames < 1:
        raise MediaError(what, f"{frames} frames are wanted of it, expected at least 1")
    with _container(source, what) as container:
        stream = _first(container.streams.video, what, "pictures")
        check_size(stream.height, stream.width, what)
        rate = float(stream.average_rate or 0)
        total = stream.frames or _count(container, stream)
        if not total or not rate:
            raise MediaError(what, f"has {total} frames at {rate:g} a second; convert it to MP4")
        if total > MAX_SECONDS * rate:
            raise MediaError(what, f"lasts {total / rate:,.0f} s, expected at most {MAX_SECONDS:,}; cut it first")
        n_wanted = min(frames, total)
        wanted = [i * total // n_wanted for i in range(n_wanted)]
        stream.thread_type = "AUTO"
        n_found = 0
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                n_found += 1
                yield Frame(frame.to_ndarray(format="rgb24"), i / rate, stamp(i / rate))
            if i == wanted[-1]:
                return
        raise MediaError(what, f"is cut: {n_found} of {n_wanted} frames are there; download or save it again")


def stamp(seconds: float) -> str:
    """Minutes and seconds, both with two digits: 65.9 -> "01:05"."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def sound_track(file: BinaryIO, kind: str, what: str, check: Callable[[float, int, int], None]) -> Iterator[tuple[np.ndarray, int]]:
    """The first sound track of a container in blocks, its channels averaged: (float32 (N,), rate). `check(samples, rate, channels)` sees
    what the header says, before anything is decoded.
    """
    with _opened(file, kind, what) as container:
        stream = _first(container.streams.audio, what, "sound")
        known = stream.duration and kind != "aac"               # of bare AAC FFmpeg guesses it
        check(max(1, float(stream.duration * stream.time_base) * stream.rate) if known else 1, stream.rate, stream.channels)
        to_floats = require("av", "video").AudioResampler(format="fltp")
        for frame in container.decode(stream):
            for block in to_floats.resample(frame):
                yield block.to_ndarray().mean(axis=0), block.sample_rate


@contextlib.contextmanager
def _container(source: Source, what: str) -> Iterator[av.container.InputContainer]:
    with opened(source, what, MAX_BYTES) as file:
        kind = container_of(file)
        if kind not in CONTAINERS:
            raise MediaError(what, "is no video that this version reads (MP4, MOV, Matroska, WebM, AVI); convert it to MP4")
        with _opened(file, kind, what) as container:
            yield container


@contextlib.contextmanager
def _opened(file: BinaryIO, kind: str, what: str) -> Iterator[av.container.InputContainer]:
    """The container, and FFmpeg's errors in the `with` block as MediaError."""
    av = require("av", "video")
    try:
        with av.open(file, format=CONTAINERS[kind]) as container:
            yield container
    except MediaError:
        raise
    except (av.FFmpegError, OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(what, f"cannot be decoded as {kind} ({reason}); download it again, or convert it to MP4") from None


def _first(streams: Sequence[av.stream.Stream], what: str, kind: str) -> av.stream.Stream:
    if not streams or streams[0].codec_context is None:         # FFmpeg does not know the codec
        raise MediaError(what, f"has no {kind} in it that can be decoded; convert it to MP4")
    return streams[0]


def _count(container: av.container.InputContainer, stream: av.video.VideoStream) -> int:
    """Frames of a file whose header does not say: packets with something in them."""
    total = sum(1 for packet in container.demux(stream) if packet.size)
    container.seek(0)
    return total
