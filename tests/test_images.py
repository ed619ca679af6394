"""Pictures and videos become the numbers that transformers makes of them, and bad files one line."""

import ast
import importlib.util
import io
import math
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import pytest
import torch
from films import write_film
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma4ImageProcessorPil
from transformers.image_utils import load_image
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size
from transformers.video_utils import load_video

from refimpl.media import images, video
from refimpl.media.images import open_image
from refimpl.media.parts import Image, Video
from refimpl.media.patches import BUDGETS, n_tokens, patches, pixels, size_for
from refimpl.media.source import MediaError
from refimpl.media.video import open_video

PROCESSOR = Gemma4ImageProcessorPil()
MODES = {"1": "PNG", "L": "PNG", "LA": "PNG", "P": "PNG", "RGB": "PNG", "RGBA": "PNG", "I;16": "PNG", "CMYK": "TIFF", "F": "TIFF",
         "YCbCr": "JPEG"}
TRANSPARENT = {"P": bytes(range(0, 256, 2)), "L": 7, "I;16": 7, "RGB": (1, 2, 3)}
RNG = np.random.default_rng(0)


def picture(mode, height, width, seed=0):
    n_bytes = len(PIL.Image.new(mode, (width, height)).tobytes())
    data = np.random.default_rng(seed).integers(0, 256, n_bytes, dtype=np.uint8)
    if mode == "F":
        data = np.linspace(-50, 300, height * width, dtype=np.float32)
    image = PIL.Image.frombytes(mode, (width, height), data.tobytes())
    if mode == "P":
        image.putpalette(np.random.default_rng(seed + 1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    return image


def saved(image, name, **options):
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


# ---- against transformers

@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(MODES)), st.integers(1, 300), st.integers(1, 300), st.sampled_from([70, 70, 70, 140, 280]), st.integers(1, 8),
       st.booleans(), st.sampled_from([1, 5_000, images.STRIP]))
def test_patches_are_those_of_transformers(mode, height, width, tokens, orientation, transparent, strip):
    image, options = picture(mode, height, width), {"exif": PIL.Image.Exif()}
    options["exif"][0x112] = orientation
    if transparent and mode in TRANSPARENT:
        options["transparency"] = TRANSPARENT[mode]
    data = saved(image, MODES[mode], **options)
    expected = PROCESSOR(images=PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))), max_soft_tokens=tokens, return_tensors="np")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(images, "STRIP", strip)
        rgb_HWC = open_image(data, "it")
    values_TZ, positions = patches(pixels(rgb_HWC, tokens))
    n = len(values_TZ)
    assert values_TZ.dtype == np.float32 and positions.dtype == np.int64
    assert np.array_equal(values_TZ, expected["pixel_values"][0, :n])
    assert np.array_equal(positions, expected["image_position_ids"][0, :n]) and (expected["image_position_ids"][0, n:] == -1).all()
    assert n == 9 * expected["num_soft_tokens_per_image"][0] == 9 * n_tokens(*rgb_HWC.shape[:2], tokens)


@pytest.mark.parametrize("tokens", BUDGETS)
def test_every_budget(tokens):
    rgb_HWC = RNG.integers(0, 256, (480, 641, 3), dtype=np.uint8)
    expected = PROCESSOR(images=rgb_HWC, max_soft_tokens=tokens, return_tensors="np")
    values_TZ, positions = patches(pixels(open_image(rgb_HWC, "it"), tokens))
    assert np.array_equal(values_TZ, expected["pixel_values"][0, :len(values_TZ)])
    assert np.array_equal(positions, expected["image_position_ids"][0, :len(values_TZ)])


side = st.one_of(st.integers(1, 5000), st.integers(1, 100), st.integers(1, 1000).map(lambda n: n * 48), st.just(100_000))


@settings(max_examples=400, deadline=None)
@given(side, side, st.sampled_from(BUDGETS), st.sampled_from([(16, 3), (4, 3), (4, 2)]))
def test_the_size_is_the_one_of_transformers(height, width, tokens, geometry):
    if height * width <= images.MAX_PIXELS:
        patch, pool = geometry
        expected = get_aspect_ratio_preserving_size(height, width, patch, tokens * pool**2, pool)
        assert size_for(height, width, tokens, patch, pool) == expected
        assert n_tokens(height, width, tokens, patch, pool) <= tokens


def merged_by_transformers(values_TZ, positions):
    """`patches_merge` of the 12B's processor. Its module needs torchvision, which that function does not."""
    package = Path(importlib.util.find_spec("transformers").submodule_search_locations[0])
    tree = ast.parse((package / "models/gemma4_unified/image_processing_gemma4_unified.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "patches_merge"]
    names = {"math": math, "torch": torch}
    exec(compile(tree, "patches_merge", "exec"), names)
    cells, places = names["patches_merge"](torch.from_numpy(values_TZ)[None], torch.from_numpy(positions)[None], len(values_TZ) // 9)
    return cells[0].numpy(), places[0].numpy()


@pytest.mark.parametrize("patch, shape", [(16, (300, 200)), (16, (40, 900)), (16, (1, 77)), (4, (50, 50))])
def test_cells_are_what_the_12b_merges(patch, shape):
    rgb_HWC = pixels(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8), 70, patch)
    cells, places = merged_by_transformers(*patches(rgb_HWC, patch))
    values_TZ, positions = patches(rgb_HWC, 3 * patch)
    assert values_TZ.shape[1] == 27 * patch**2
    assert np.array_equal(values_TZ, cells) and np.array_equal(positions, places)


def test_a_line_of_pixels_fills_its_budget():
    assert size_for(1, 100_000, 280) == (48, 13_440) and size_for(100_000, 1, 1120) == (53_760, 48)
    assert pixels(np.zeros((1, 100_000, 3), np.uint8), 70).shape == (48, 3360, 3)


# ---- what is opened

@pytest.mark.parametrize("name, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("TIFF", {
    "compression": "tiff_lzw"}), ("PNG", {"save_all": True, "append_images": [PIL.Image.new("RGB", (7, 5))]}), ("WEBP", {
        "lossless": True, "save_all": True, "append_images": [PIL.Image.new("RGB", (7, 5))]})])
def test_lossless_files_hold_the_same_picture(tmp_path, name, options):
    """Of an animation it is the first frame. The same pixels have the same digest, wherever they come from."""
    image = picture("RGB", 5, 7)
    path = tmp_path / "it.txt"
    path.write_bytes(saved(image, name, **options))
    assert np.array_equal(open_image(path, "it"), np.asarray(image))
    assert {Image(source).digest for source in (str(path), path.read_bytes(), image, np.array(image))} == {Image(path).digest}


def test_first_frames_of_gifs_and_photographs():
    frames = [picture("L", 6, 8, seed) for seed in range(3)]
    assert np.array_equal(open_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), "it")[..., 1], np.asarray(frames[0]))
    for name in ("JPEG", "AVIF", "MPO"):
        data = saved(picture("RGB", 40, 30), name)
        assert np.array_equal(open_image(data, "it"), np.asarray(load_image(PIL.Image.open(io.BytesIO(data)))))


def test_digests_tell_pictures_apart():
    zeros = np.zeros((4, 6, 3), np.uint8)
    assert len({Image(zeros).digest, Image(zeros, 70).digest, Image(zeros.reshape(6, 4, 3)).digest, Image(zeros + 1).digest}) == 4


def test_what_was_opened_stays():
    """An array may be written to later: the pixels that were hashed are a copy, which cannot be written to."""
    source = np.zeros((4, 6, 3), np.uint8)
    part = Image(source)
    digest, part.source[:] = part.digest, 9
    assert part.rgb_HWC.max() == 0 and part.rgb_HWC is part.rgb_HWC and part.digest == digest
    with pytest.raises(ValueError, match="read-only"):
        part.rgb_HWC[0] = 1


# ---- what is not

def png(width, height, body=b""):
    """A PNG file that begins like one of this size."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b""))


WEBP = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0" + (16382).to_bytes(3, "little") * 2
GIF = b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0;"
WHOLE = saved(picture("RGB", 50, 60), "PNG")
BAD = [
    (b"", "is empty"),
    (b"Hello, I am a picture.", "is no picture that this version reads .PNG, JPEG, .*convert it to PNG"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture"),
    (WHOLE[:20], "cannot be decoded as PNG .*download or save it again"),
    (WHOLE[:300], "cannot be decoded as PNG .*truncated"),
    (WHOLE[:300] + bytes(300) + WHOLE[600:], "cannot be decoded as PNG"),
    (saved(picture("RGB", 50, 60), "JPEG")[:-300], "cannot be decoded as JPEG .*truncated"),
    (saved(picture("RGB", 50, 60), "WEBP")[:-300], "cannot be decoded as WEBP"),
    (png(200_000, 200_000), "has 200,000 x 200,000 pixels, expected at most 100,000,000 in all .*scale it down"),
    (png(10_001, 10_000), "has 10,001 x 10,000 pixels"),
    (png(1_000_001, 1), "has 1,000,001 x 1 pixels"),
    (png(0, 7), "PNG"),
    (WEBP, "16383|WEBP"),
    (GIF, "has 65,535 x 65,535 pixels"),
    (np.zeros((4, 4), np.uint8), r"expected an array of uint8 \(height, width, 3\), found uint8 \(4, 4\)"),
    (np.zeros((4, 4, 3)), "found float64"),
    (np.zeros((0, 4, 3), np.uint8), "has 4 x 0 pixels"),
    (np.broadcast_to(np.uint8(0), (10_001, 10_000, 3)), "has 10,000 x 10,001 pixels"),
    (7, "expected a path or bytes, found int"),
    ("no/such/file.png", "^no/such/file.png: cannot be opened .No such file.*check the path"),
    ("a\0b.png", "is no path"),
    ("x" * 5000, r"^x{100}\.\.\.: cannot be opened"),
    (Path("."), "is a folder"),
    ("/dev/null", "is no regular file"),
]


@pytest.mark.parametrize("source, line", BAD, ids=[line[:40] for _, line in BAD])
def test_bad_pictures_are_one_line(source, line, monkeypatch):
    def load(image):
        assert image.size[0] * image.size[1] <= images.MAX_PIXELS, "decoded before it was measured"
        return decode(image)
    decode = PIL.ImageFile.ImageFile.load
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match=line) as caught:
            Image(source).rgb_HWC  # noqa: B018
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(MediaError, match=f"^{path}: has 400,000,001 bytes, expected at most"):
        open_image(path, str(path))


@pytest.mark.parametrize("make", [lambda: Image("a.png", 100), lambda: size_for(9, 9, 0)])
def test_other_budgets_are_refused(make):
    with pytest.raises(ValueError, match="choose 70, 140, 280, 560, 1120$"):
        make()


@pytest.mark.filterwarnings("ignore::UserWarning")               # Pillow's, of odd tags
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"]), st.data())
def test_damaged_files_open_or_are_refused(name, data):
    content = bytearray(saved(picture("RGB", 20, 30), name))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(100, len(content) - 1)) | st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, 2 * len(content))):]
    try:
        assert open_image(bytes(content), "it").dtype == np.uint8
    except MediaError as error:
        assert str(error).startswith("it: ") and "\n" not in str(error)


# ---- videos

@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """The same 50 frames, 12.5 a second, in every container; the picture i is one grey, 5 i."""
    folder = tmp_path_factory.mktemp("films")
    for name in ("it.mp4", "it.mkv", "it.avi", "it.mov"):
        write_film(folder / name, [np.full((48, 64, 3), 5 * i, np.uint8) for i in range(50)])
    return folder


@pytest.mark.parametrize("name", ["it.mp4", "it.mkv", "it.avi", "it.mov"])
def test_frames_are_those_of_transformers(films, name):
    found = list(open_video(films / name, "it"))
    assert [round(frame.rgb_HWC.mean() / 5) for frame in found] == [i * 50 // 32 for i in range(32)]
    assert [frame.stamp for frame in found][::8] == ["00:00", "00:00", "00:02", "00:02"]
    if name != "it.mkv":                                         # no number of frames in its header: transformers needs one
        expected, facts = load_video(str(films / name), num_frames=32)
        assert np.array_equal([frame.rgb_HWC for frame in found], expected)
        assert [frame.seconds for frame in found] == facts.timestamps


def test_a_short_video_gives_all_its_frames(films):
    assert [frame.seconds for frame in open_video((films / "it.mp4").read_bytes(), "it", 1000)] == [i / 12.5 for i in range(50)]
    assert video.stamp(65.9) == "01:05" and video.stamp(3600) == "60:00"


def test_frames_are_scaled_once_and_told_apart(films):
    """They are kept in the size that the model takes, which is not always one that `pixels` leaves alone."""
    film = Video(films / "it.mp4")
    first, *others = film.stills()
    scaled = Image(next(open_video(films / "it.mp4", "it")).rgb_HWC, 70).scaled()
    assert np.array_equal(first.scaled(), scaled) and first.n_tokens() == scaled.size // (3 * 48 * 48) == n_tokens(48, 64, 70)
    assert film.stills() is film.stills(48, 1) and film.stills(4, 3)[0].rgb_HWC.shape < scaled.shape
    assert len({still.digest for still in film.stills()}) == 32 and Image(scaled, 70).digest != first.digest
    with pytest.raises(ValueError, match="choose 70"):
        Video("a.mp4", 71)


def bad_films(folder):
    whole = (folder / "it.mp4").read_bytes()
    return [(whole[:-400], "cannot be decoded as mp4"), (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "is no video that this version reads"),
            ((folder / "it.avi").read_bytes()[:-2000], "is cut: .* of 32 frames are there|cannot be decoded"), (b"", "is empty"),
            (b"\0\0\0\x18ftypmp42" + bytes(200), "cannot be decoded as mp4|has no pictures"), ("no.mp4", "cannot be opened")]


@pytest.mark.parametrize("i", range(6))
def test_bad_videos_are_one_line(films, i):
    source, line = bad_films(films)[i]
    with pytest.raises(MediaError, match="^it: .*(" + line + ")"):
        list(open_video(source, "it"))


def test_long_and_large_videos_are_refused_by_their_headers(films, monkeypatch):
    monkeypatch.setattr(video, "MAX_SECONDS", 3)
    with pytest.raises(MediaError, match="lasts 4 s, expected at most 3; cut it"):
        list(open_video(films / "it.mp4", "it"))
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(MediaError, match="has 64 x 48 pixels"):
        list(open_video(films / "it.mp4", "it"))


def test_a_missing_package_is_named(films, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match="^av is not installed; pip install .*av"):
        list(open_video(films / "it.mp4", "it"))
