"""Pictures, sounds and videos on the command line: their options, and the projector that they need."""

from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.app import Failure, bar, errors
from refimpl.extras import MissingExtra
from refimpl.media.mel import n_raw_tokens
from refimpl.media.parts import Audio, Image, Video
from refimpl.media.patches import BUDGETS
from refimpl.media.source import MediaError
from refimpl.text.prompt import Media

Mmproj = Annotated[str | None, typer.Option("--mmproj", "-mm", metavar="FILE", show_default=False, help="the model's projector, for "
                                            "pictures and sounds: GGUF file, directory or hf:...; none: without one (default: the one that "
                                            "lies beside it where one is needed; the built-in model's)")]
MmprojQ8 = Annotated[bool, typer.Option("--mmproj-q8", help="round the projector's matrices to Q8_0: half the memory of BF16; with random "
                                        "weights soft tokens differ by 2 percent")]
Images = Annotated[list[Path] | None, typer.Option("--image", metavar="FILE", show_default=False, help="a picture before the prompt; "
                                                   "may be given several times")]
Sounds = Annotated[list[Path] | None, typer.Option("--audio", metavar="FILE", show_default=False, help="a sound before the prompt (WAV, "
                                                   "FLAC, OGG, MP3); may be given several times")]
Videos = Annotated[list[Path] | None, typer.Option("--video", metavar="FILE", show_default=False, help="32 pictures of a video, without "
                                                   "its sound, before the prompt (MP4, MOV, MKV, WebM, AVI; needs PyAV); may be given "
                                                   "several times")]
ImageTokens = Annotated[int, typer.Option("--image-tokens", metavar="N", help="tokens a picture may take: "
                                          f"{', '.join(map(str, BUDGETS))}; more show smaller things")]


MARKERS = 8             # tokens around a picture or a sound, with the time before a frame of a video


def opened(images: list[Path] | None, sounds: list[Path] | None, videos: list[Path] | None, n_tokens: int) -> list[Media]:
    """The pictures, then the sounds, then the videos, opened before the model is loaded. Raises Failure for what is none."""
    parts = [*(Image(path, n_tokens) for path in images or ()), *map(Audio, sounds or ()), *map(Video, videos or ())]
    try:
        for part in parts:
            part.stills() if isinstance(part, Video) else part.digest
    except (MediaError, MissingExtra) as e:
        raise Failure(str(e)) from None
    return parts


def n_tokens_of(parts: list[Media]) -> int:
    """How many tokens they take in a prompt of a Gemma 4 at most, each by its own size or length."""
    total = 0
    for part in parts:
        if isinstance(part, Audio):
            total += n_raw_tokens(len(part.samples_N)) + MARKERS
        else:
            total += sum(picture.n_tokens() + MARKERS for picture in (part.stills() if isinstance(part, Video) else [part]))
    return total


def refuse_useless_q8(q8: bool, mmproj: str | None, asked: str | None, needed: bool):
    """Raises where --mmproj-q8 is given and no projector is going to be loaded. Arguments as in `projector_of`."""
    if q8 and (mmproj == "none" or mmproj is None and not needed and asked is not None):
        raise typer.BadParameter("--mmproj-q8 rounds a projector, and none is loaded; name it with --mmproj FILE")


def projector_of(m, path: Path | None, asked: str | None, mmproj: str | None, needed: bool, q8: bool = False):
    """The projector that was asked for, or, where one is `needed`, that lies beside the model or in its repository; otherwise None, and one
    that lies there is mentioned. The built-in model has its own. `asked`: the model as it was named, `path`: where it is. Raises Failure.
    """
    import refimpl
    from refimpl.loading import hub
    from refimpl.loading.projector import projectors_beside

    if mmproj == "none":
        return None
    if mmproj is None and not needed and path is not None:
        if not path.is_dir() and (found := projectors_beside(path)):
            errors.print(f"note: {found[0]} looks like this model's projector; --mmproj {found[0]} shows it pictures and sounds")
        return None
    if mmproj is None:
        found = projectors_beside(path)
        if not found and asked is not None and hub.is_remote(asked):
            found = [hub.projector_of(asked)]
        if not found:
            raise Failure(f"{m.file.path}: pictures and sounds need the model's projector, and there is none beside it; give it with "
                          "--mmproj")
        if len(found) > 1:
            raise Failure(f"{m.file.path}: there are several projectors beside it ({', '.join(file.name for file in found)}); choose one "
                          "with --mmproj")
        mmproj = str(found[0])
        if path is not None:
            errors.print(f"note: --mmproj {mmproj}")
    projector = refimpl.load_projector(mmproj, m, weights="Q8_0" if q8 else "stored", progress=bar)
    for note in projector.notes:
        errors.print(f"note: {note}")
    return projector
