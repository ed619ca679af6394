"""Pictures and sounds on the command line: their options, and the projector that they need."""

from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.app import Failure, bar, errors
from refimpl.media.parts import Audio, Image
from refimpl.media.patches import BUDGETS
from refimpl.media.source import MediaError

Mmproj = Annotated[str | None, typer.Option("--mmproj", "-mm", metavar="FILE", show_default=False, help="the model's projector, for "
                                            "pictures and sounds: GGUF file, directory or hf:... (default: the one that lies beside it)")]
MmprojQ8 = Annotated[bool, typer.Option("--mmproj-q8", help="round the projector's matrices to Q8_0: half the memory of BF16; with random "
                                        "weights soft tokens differ by 2 percent")]
Images = Annotated[list[Path] | None, typer.Option("--image", metavar="FILE", show_default=False, help="a picture before the prompt; "
                                                   "may be given several times")]
Sounds = Annotated[list[Path] | None, typer.Option("--audio", metavar="FILE", show_default=False, help="a sound before the prompt (WAV, "
                                                   "FLAC, OGG, MP3); may be given several times")]
ImageTokens = Annotated[int, typer.Option("--image-tokens", metavar="N", help="tokens a picture may take: "
                                          f"{', '.join(map(str, BUDGETS))}; more show smaller things")]


def opened(images: list[Path] | None, sounds: list[Path] | None, n_tokens: int) -> list[Image | Audio]:
    """The pictures, then the sounds, opened. Raises Failure for what is none."""
    try:
        parts = [*(Image(path, n_tokens) for path in images or ()), *(Audio(path) for path in sounds or ())]
        return [part for part in parts if part.digest]          # a digest is one of what was opened: before the model is loaded
    except MediaError as e:
        raise Failure(str(e)) from None


def projector_of(m, path: Path | None, asked: str | None, mmproj: str | None, needed: bool, q8: bool = False):
    """The projector that was asked for, or, where one is `needed`, that lies beside the model or in its repository; otherwise None, and one
    that lies there is mentioned. `asked`: the model as it was named, `path`: where it is. Raises Failure.
    """
    import refimpl
    from refimpl.loading import hub
    from refimpl.loading.projector import projectors_beside

    if mmproj == "none":
        return None
    if mmproj is None and not needed:
        if path is not None and not path.is_dir() and (found := projectors_beside(path)):
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
        errors.print(f"note: --mmproj {mmproj}")
    projector = refimpl.load_projector(mmproj, m, weights="Q8_0" if q8 else "stored", progress=bar)
    for note in projector.notes:
        errors.print(f"note: {note}")
    return projector
