"""Sound files become samples: one channel, 16 kHz.

soundfile (libsndfile) reads WAV, FLAC, OGG (Vorbis, Opus) and MP3; M4A, AAC and WebM, and the sound of a video, need the extra `video`.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO

import numpy as np

from refimpl.media.source import MediaError, Source, container_of, opened
from refimpl.media.video import sound_track

RATE = 16_000                                       # samples a second that Gemma 4 takes
SECONDS = 30                                        # E2B and E4B: 750 tokens
MIN_RATE, MAX_RATE = 1_000, 768_000                 # of a file
MAX_CHANNELS = 32
MAX_BYTES = 4_000_000_000                           # of a file; read block by block, no further than the limit in seconds
LOUDEST = 2.0**31                                   # integers that were not scaled pass; float32 does not overflow in a spectrum
BLOCK = 65_536                                      # samples that are read at a time
WAV_UNKNOWN = 0x7FFF_0000                           # programs that write to a pipe leave about this or more as the length
OGG_HEAD, OGG_PAGE = 27, 65_307                     # bytes: of a page's head without its table; of a page at most


def open_sound(source: Source | tuple[np.ndarray, int], what: str, seconds: float) -> np.ndarray:
    """A path, the bytes of a file, or (samples (N,) or (N, channels), rate) -> float32 (N,) at 16 kHz, read-only. Errors call it `what`.

    Channels are averaged, and another rate is changed by soxr's "HQ" to ceil(N * 16000 / rate) samples: as librosa does it for
    transformers' `load_audio`. Samples are floats around -1 to 1, or int16.
    Raises MediaError for what is no sound, is empty, cut, or longer than `seconds`, by its header and before it is decoded. Not seen:
    that an OGG file was cut between two pages; and an MP3 file of variable rate that does not say its length is read as far as libsndfile
    guesses.
    """
    if isinstance(source, tuple):
        mono_N, rate = _of_arrays(source, what, seconds)
    else:
        with opened(source, what, MAX_BYTES) as file:
            mono_N, rate = _of_file(file, what, seconds)
    if not np.abs(mono_N).max() <= LOUDEST:         # so written that NaN is caught
        raise MediaError(what, "a sample is no number, or beyond all measure; expected samples of about -1 to 1")
    samples_N = mono_N if rate == RATE else _resample(mono_N, rate)
    samples_N.flags.writeable = False
    return samples_N


def check_sound(n_samples: float, rate: int, n_channels: int, what: str, seconds: float) -> None:
    """Raises MediaError for a sound with these figures in its header: empty, of a senseless rate, or longer than `seconds`."""
    if n_channels < 1 or n_channels > MAX_CHANNELS:
        raise MediaError(what, f"has {n_channels} channels, expected 1 to {MAX_CHANNELS}; mix them down first")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise MediaError(what, f"has {rate:,} samples a second, expected {MIN_RATE:,} to {MAX_RATE:,}; save it again, with 16,000")
    if n_samples < 1:
        raise MediaError(what, "has no samples; there is nothing in it")
    if not n_samples <= seconds * rate:
        raise MediaError(what, f"lasts at least {n_samples / rate:,.2f} s, expected at most {seconds:g}; cut it, as in "
                         f"`ffmpeg -i FILE -ss 0 -t {seconds:g} part.wav`")


def _of_arrays(source: tuple[np.ndarray, int], what: str, seconds: float) -> tuple[np.ndarray, int]:
    samples, rate = source
    if not isinstance(samples, np.ndarray) or samples.ndim not in (1, 2) or samples.dtype not in (np.int16, np.float32, np.float64):
        found = f"{samples.dtype} {samples.shape}" if isinstance(samples, np.ndarray) else type(samples).__name__
        raise MediaError(what, f"expected an array (samples,) or (samples, channels) of float32, float64 or int16, found {found}")
    if not isinstance(rate, (int, np.integer)):
        raise MediaError(what, f"has the rate {rate!r}, expected a whole number of samples a second")
    check_sound(len(samples), rate, math.prod(samples.shape[1:]), what, seconds)
    with np.errstate(over="ignore"):                             # what is beyond float32 becomes infinite, and is refused
        floats = samples / np.float32(32768) if samples.dtype == np.int16 else samples.astype(np.float32)       # a copy either way
    return floats if floats.ndim == 1 else floats.mean(axis=1), int(rate)


def _of_file(file: BinaryIO, what: str, seconds: float) -> tuple[np.ndarray, int]:
    kind, check = container_of(file), partial(check_sound, what=what, seconds=seconds)
    if kind in ("wav", "flac", "ogg", "mp3"):
        blocks = _decode(file, kind, what, check)
    elif kind:
        blocks = sound_track(file, kind, what, check)
    else:
        raise MediaError(what, "is no sound that this version reads (WAV, FLAC, OGG, MP3, M4A, AAC, WebM); convert it to WAV")
    found, n_samples, rate = [], 0, RATE
    with contextlib.closing(blocks):
        for mono_N, rate in blocks:
            n_samples += len(mono_N)
            check(n_samples, rate, 1)                            # there may be more than the header says
            found.append(mono_N)
    check(n_samples, rate, 1)
    return np.concatenate(found), rate


def _decode(file: BinaryIO, kind: str, what: str, check: Callable[[int, int, int], None]) -> Iterator[tuple[np.ndarray, int]]:
    """The sound in blocks, its channels averaged, each with the rate."""
    import soundfile

    n_bytes = file.seek(0, os.SEEK_END)
    if kind == "wav" and _wav_is_cut(file, n_bytes) or kind == "ogg" and _ogg_is_cut(file, n_bytes):
        raise MediaError(what, "is cut: bytes are missing at its end; download or save it again")
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as sound:
            check(sound.frames, sound.samplerate, sound.channels)
            while len(block := sound.read(BLOCK, dtype="float32", always_2d=True)):
                yield block.mean(axis=1), sound.samplerate
            if sound.tell() < sound.frames:
                raise MediaError(what, f"is cut: it has {sound.tell():,} of {sound.frames:,} samples; download it again, or convert it to "
                                 "WAV")
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        reason = getattr(error, "error_string", error)           # without the address of a file in memory
        raise MediaError(what, f"cannot be decoded as {kind.upper()} ({reason}); download or save it again") from None


def _wav_is_cut(file: BinaryIO, n_bytes: int) -> bool:
    """Are there fewer bytes than the file's first chunk says? libsndfile would take what is there."""
    file.seek(4)
    said = int.from_bytes(file.read(4), "little")
    return n_bytes < said + 8 and said < WAV_UNKNOWN


def _ogg_is_cut(file: BinaryIO, n_bytes: int) -> bool:
    """Does the last page go on behind the end?

        "OggS" | version u8 | flags u8 | position u64 | stream u32 | number u32 | checksum u32 | n u8 | n lengths u8 | bytes, their sum
    """
    file.seek(max(0, n_bytes - OGG_PAGE))
    tail = file.read()
    page = tail[tail.rfind(b"OggS"):]
    lengths = page[OGG_HEAD:OGG_HEAD + page[OGG_HEAD - 1]] if len(page) >= OGG_HEAD else b""
    return len(page) < OGG_HEAD or len(page) < OGG_HEAD + page[OGG_HEAD - 1] + sum(lengths)


def _resample(mono_N: np.ndarray, rate: int) -> np.ndarray:
    import soxr

    n_samples = -(-len(mono_N) * RATE // rate)
    samples_N = np.zeros(n_samples, np.float32)
    found_N = soxr.resample(mono_N, rate, RATE, quality="HQ")[:n_samples]
    samples_N[:len(found_N)] = found_N                           # soxr rounds the length, and may give one sample less
    return samples_N
