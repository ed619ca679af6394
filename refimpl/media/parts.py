"""Parts of a prompt that are no text. They are opened when they are first looked at, and once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from refimpl.media import video
from refimpl.media.images import open_image
from refimpl.media.patches import PATCH, POOL, TOKENS, check_budget, pixels, size_for
from refimpl.media.sounds import open_sound
from refimpl.media.source import Source, name_of

if TYPE_CHECKING:
    import PIL.Image

LONGEST = 3600          # seconds of sound; a projector may take less


@dataclass(frozen=True, eq=False)
class Image:
    """A picture: a path, the bytes of a file, a Pillow image, or uint8 (height, width, 3).

    `tokens` is its budget: 70, 140, 280, 560 or 1120. More of them show smaller things, and take longer. Once opened its pixels stay in
    memory, three bytes each, for as long as it lives. Raises MediaError (a ValueError), for a budget at once, otherwise when it is opened.
    """

    source: Source | PIL.Image.Image | np.ndarray
    tokens: int = TOKENS

    def __post_init__(self):
        check_budget(self.tokens)

    @property
    def name(self) -> str:
        """What messages call it."""
        return name_of(self.source, "a picture")

    @cached_property
    def rgb_HWC(self) -> np.ndarray:
        """The pixels as they are in the file, upright: uint8 (H, W, 3), read-only."""
        return open_image(self.source, self.name)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the pixels, their size and the budget: pictures with the same one are the same to a model."""
        height, width, _ = self.rgb_HWC.shape
        return _digest(f"picture {height} {width} {self.tokens}", self.rgb_HWC)

    def scaled(self, patch: int = PATCH, pool: int = POOL) -> np.ndarray:
        """The pixels in the size for its budget, for soft tokens of `pool` x `pool` patches of `patch` x `patch` pixels."""
        return pixels(self.rgb_HWC, self.tokens, patch, pool)

    def size(self, patch: int = PATCH, pool: int = POOL) -> tuple[int, int]:
        """(height, width) of `scaled`."""
        return size_for(*self.rgb_HWC.shape[:2], self.tokens, patch, pool)

    def n_tokens(self, patch: int = PATCH, pool: int = POOL) -> int:
        """How many soft tokens it becomes."""
        height, width = self.size(patch, pool)
        return height * width // (patch * pool) ** 2


@dataclass(frozen=True, eq=False)
class Still(Image):
    """A frame of a video, in the size that the model takes. `stamp`: when it is shown, as the model reads it ("01:05")."""

    stamp: str = "00:00"

    @cached_property
    def digest(self) -> str:
        """As Image has it, of pixels that are not scaled any more."""
        height, width, _ = self.rgb_HWC.shape
        return _digest(f"still {height} {width}", self.rgb_HWC)

    def scaled(self, patch: int = PATCH, pool: int = POOL) -> np.ndarray:
        """Its pixels as they are."""
        return self.rgb_HWC

    def size(self, patch: int = PATCH, pool: int = POOL) -> tuple[int, int]:
        """(height, width) of its pixels as they are."""
        height, width, _ = self.rgb_HWC.shape
        return height, width


@dataclass(frozen=True, eq=False)
class Video:
    """A video without its sound: a path, or the bytes of a file. To the model it is pictures with a time before each.

    `frames` pictures are taken of it, evenly spaced, each of at most `tokens` tokens: 32 of 70 are what transformers' Gemma4VideoProcessor
    takes. They stay in memory once they are read, each in the size that the model takes. Needs PyAV (the extra `video`).
    Raises MediaError (a ValueError), for a budget at once, otherwise when it is opened; MissingExtra without PyAV.
    """

    source: Source
    tokens: int = video.TOKENS
    frames: int = video.FRAMES
    _read: dict[int, tuple[Still, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        check_budget(self.tokens)

    @property
    def name(self) -> str:
        """What messages call it."""
        return name_of(self.source, "a video")

    def stills(self, patch: int = PATCH, pool: int = POOL) -> tuple[Still, ...]:
        """Its frames, for soft tokens of `pool` x `pool` patches of `patch` x `patch` pixels."""
        side = patch * pool
        if side not in self._read:
            self._read[side] = tuple(Still(pixels(frame.rgb_HWC, self.tokens, patch, pool), self.tokens, frame.stamp)
                                     for frame in video.open_video(self.source, self.name, self.frames))
        return self._read[side]


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound: a path, the bytes of a file, or (samples (N,) or (N, channels), rate in Hz).

    One of more than `seconds` is refused. E2B and E4B hear 30 s at most, and say so; the 12B has no limit but its context, at 25 tokens a
    second.
    Raises MediaError (a ValueError) when it is opened.
    """

    source: Source | tuple[np.ndarray, int]
    seconds: float = LONGEST

    @property
    def name(self) -> str:
        """What messages call it."""
        return name_of(self.source, "a sound")

    @cached_property
    def samples_N(self) -> np.ndarray:
        """The sound with one channel at 16 kHz: float32 (N,), read-only."""
        return open_sound(self.source, self.name, self.seconds)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the samples at 16 kHz: sounds with the same one are the same to a model."""
        return _digest(f"sound {len(self.samples_N)}", self.samples_N)


def _digest(head: str, array: np.ndarray) -> str:
    digest = hashlib.sha256(head.encode() + b"\0")
    digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
