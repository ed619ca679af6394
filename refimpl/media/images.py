"""Picture files become pixels.

Pillow decodes. Its `Image.open` warns of large pictures, by a limit that is the same for the whole process; here the header's size is
compared with limits of our own, before anything is decoded.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from refimpl.media.source import MediaError, Source, opened

if TYPE_CHECKING:
    import PIL.Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")         # not all that Pillow reads: EPS would start Ghostscript
MAX_BYTES = 400_000_000                             # of a file: somewhat more than the largest picture in three bytes a pixel
MAX_PIXELS = 100_000_000
STRIP = 1 << 20                                     # pixels that are converted at a time, so that a large picture is in memory only twice
MAX_SIDE = 1_000_000                                # scaling takes 32 bytes for each pixel of a side


def open_image(source: Source | PIL.Image.Image | np.ndarray, what: str) -> np.ndarray:
    """A path, the bytes of a file, a Pillow image or uint8 (H, W, 3) -> uint8 (H, W, 3), read-only. Errors call it `what`.

    Turned upright as EXIF says; what is transparent shows white; then Pillow's `convert("RGB")`, which cuts 16-bit grey at 255 instead of
    scaling it. Of an animation the first frame is taken. As transformers' Gemma4ImageProcessorPil does with a Pillow image (of a path its
    `load_image` drops the alpha channel, so that what lies under it shows).
    Raises MediaError for what is no picture, is cut, or has more than 100 megapixels; these last are not decoded at all. The largest
    ones take 0.8 GB of memory for a moment.
    """
    import PIL.Image

    if isinstance(source, np.ndarray):
        return _of_array(source, what)
    if isinstance(source, PIL.Image.Image):
        return _decode(source, what)
    with opened(source, what, MAX_BYTES) as file:
        return _decode(_recognise(file, what), what)


def check_size(height: int, width: int, what: str) -> None:
    """Raises MediaError for a picture without pixels, or with more than can be taken."""
    if min(height, width) < 1:
        raise MediaError(what, f"has {width} x {height} pixels; there is nothing in it")
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
        raise MediaError(what, f"has {width:,} x {height:,} pixels, expected at most {MAX_PIXELS:,} in all and {MAX_SIDE:,} a side; "
                         "scale it down first")


def _of_array(pixels: np.ndarray, what: str) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise MediaError(what, f"expected an array of uint8 (height, width, 3), found {pixels.dtype} {pixels.shape}; a Pillow image takes "
                         "any other kind of pixels")
    check_size(*pixels.shape[:2], what)
    return _read_only(pixels.copy())


def _recognise(file: BinaryIO, what: str) -> PIL.Image.Image:
    """The picture of the first format that knows how the file begins. Only the header has been read."""
    import PIL.Image

    PIL.Image.init()
    head = file.read(16)
    for name in FORMATS:
        factory, accept = PIL.Image.OPEN.get(name, (None, lambda head: False))         # AVIF is not in every Pillow
        if accept(head) is True:
            file.seek(0)
            try:
                return factory(file, "")
            except Exception as error:              # Pillow's readers raise whatever goes wrong in them, SyntaxError too
                raise _broken(what, name, error) from None
    raise MediaError(what, f"is no picture that this version reads ({', '.join(FORMATS)}); convert it to PNG")


def _decode(image: PIL.Image.Image, what: str) -> np.ndarray:
    import PIL.ImageOps

    kind = image.format or f"a Pillow image in mode {image.mode}"
    check_size(image.height, image.width, what)
    try:
        image = PIL.ImageOps.exif_transpose(image)
        rgb_HWC = np.empty((image.height, image.width, 3), np.uint8)
        rows = max(1, STRIP // image.width)
        for y in range(0, image.height, rows):
            strip = image.crop((0, y, image.width, min(y + rows, image.height)))
            rgb_HWC[y:y + rows] = _on_white(strip).convert("RGB")
    except Exception as error:
        raise _broken(what, kind, error) from None
    return _read_only(rgb_HWC)


def _on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture on white, if any of it may be transparent."""
    import PIL.Image

    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


def _broken(what: str, name: str, error: Exception) -> MediaError:
    return MediaError(what, f"cannot be decoded as {name} ({str(error) or type(error).__name__}); download or save it again")


def _read_only(rgb_HWC: np.ndarray) -> np.ndarray:
    rgb_HWC.flags.writeable = False
    return rgb_HWC


def data_url(rgb_HWC: np.ndarray) -> str:
    """A picture, uint8 (H, W, 3), as PNG, which loses nothing, in a URL."""
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(rgb_HWC).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
