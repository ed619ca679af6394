"""Sounds become the frames that transformers makes of them, and bad files one line."""

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma4AudioFeatureExtractor
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import Gemma4UnifiedAudioFeatureExtractor

from refimpl.media import sounds
from refimpl.media.mel import mel_filters, mel_frames, n_frames, n_raw_tokens, n_tokens, raw_frames
from refimpl.media.parts import Audio
from refimpl.media.sounds import open_sound
from refimpl.media.source import MediaError

EXTRACTOR, UNIFIED = Gemma4AudioFeatureExtractor(), Gemma4UnifiedAudioFeatureExtractor()
RNG = np.random.default_rng(0)


def tone(n_samples, rate=16_000, hertz=440.0):
    return np.sin(2 * np.pi * hertz / rate * np.arange(n_samples)).astype(np.float32)


SIGNALS = {"noise": lambda n: RNG.normal(0, 0.1, n), "tone": tone, "silence": np.zeros, "full": np.ones, "loud": lambda n: 30_000 * tone(n),
           "click": lambda n: np.arange(n) == n // 2, "square": lambda n: np.sign(tone(n, hertz=99)), "faint": lambda n: 1e-5 * tone(n)}


# ---- against transformers

def check_mel(samples_N):
    expected = EXTRACTOR([samples_N], return_tensors="np")
    expected_FM = expected["input_features"][0][expected["input_features_mask"][0]]
    found_FM = mel_frames(samples_N)
    assert found_FM.dtype == np.float32 and found_FM.shape == expected_FM.shape == (n_frames(len(samples_N)), 128)
    assert np.abs(found_FM - expected_FM).max() <= 1e-6
    mask = expected["input_features_mask"][0]
    for _ in range(2):                                           # Gemma4Processor.replace_audio_token
        mask = mask[::2]
    assert n_tokens(len(samples_N)) == mask.sum()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(SIGNALS)), st.integers(161, 20_000) | st.integers(1, 100).map(lambda n: 160 * n + 1) | st.integers(
    2, 100).map(lambda n: 160 * n))
def test_mel_frames_are_those_of_transformers(name, n_samples):
    check_mel(SIGNALS[name](n_samples).astype(np.float32))


def test_thirty_seconds():
    check_mel(SIGNALS["noise"](480_000).astype(np.float32))
    assert [n_tokens(n) for n in (0, 160, 161, 8_000, 16_000, 480_000)] == [0, 0, 1, 13, 25, 750]


def test_the_filters_are_those_of_transformers():
    assert np.array_equal(mel_filters(), EXTRACTOR.mel_filters) and not mel_filters()[:, 0].any()


@pytest.mark.parametrize("n_samples", [1, 639, 640, 641, 16_000, 500_001])
def test_raw_frames_are_those_of_transformers(n_samples):
    samples_N = SIGNALS["noise"](n_samples).astype(np.float32)
    expected = UNIFIED(samples_N, return_tensors="np")["input_features"][0]
    assert np.array_equal(raw_frames(samples_N), expected) and raw_frames(samples_N).dtype == np.float32
    assert n_raw_tokens(n_samples) == len(expected)


@pytest.mark.parametrize("n_samples, line", [(0, "has 0 samples at 16 kHz, expected at least 161"), (160, "has 160 samples"),
                                             (480_001, "lasts 30.00 s, expected at most 30; cut it")])
def test_mel_frames_have_limits(n_samples, line):
    with pytest.raises(MediaError, match=f"^it: {line}"):
        mel_frames(np.zeros(n_samples, np.float32), "it")


# ---- what is opened

def written(samples, rate, container, subtype):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("container, subtype, error", [
    ("WAV", "PCM_U8", 2**-7), ("WAV", "PCM_16", 2**-15), ("WAV", "PCM_24", 2**-23), ("WAV", "FLOAT", 0), ("WAV", "DOUBLE", 0),
    ("WAV", "ULAW", 0.02), ("WAVEX", "PCM_16", 2**-15), ("RF64", "PCM_16", 2**-15), ("FLAC", "PCM_16", 2**-15), ("FLAC", "PCM_24", 2**-23),
    ("OGG", "VORBIS", 0.1), ("OGG", "OPUS", 0.1), ("MP3", "MPEG_LAYER_III", 0.1)])
@pytest.mark.parametrize("n_channels", [1, 2])
def test_files_hold_what_was_written(tmp_path, container, subtype, error, n_channels):
    """Channels are averaged: the second one is the first, turned down."""
    samples = 0.5 * np.stack([tone(8_000), 0.5 * tone(8_000)], axis=1)[:, :n_channels]
    path = tmp_path / "it.txt"
    path.write_bytes(written(samples, 16_000, container, subtype))
    found = open_sound(path, "it", 1)
    assert found.dtype == np.float32 and found.shape == (8_000,)
    inside = slice(1000, -1000) if error == 0.1 else slice(None)         # a codec that loses something does so at the ends
    assert np.abs(found - samples.mean(axis=1))[inside].max() <= 1.001 * error
    assert np.array_equal(open_sound(path.read_bytes(), "it", 1), found)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1_000, 8_000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 192_000]), st.integers(1, 5_000))
def test_other_rates_become_16_khz(rate, n_samples):
    """The length that librosa gives it, the samples of soxr; and a tone is the same tone."""
    samples = 0.5 * tone(n_samples, rate, 300)
    found = open_sound((samples, rate), "it", 10)
    expected = soxr.resample(samples, rate, 16_000, quality="HQ")
    assert len(found) == -(-n_samples * 16_000 // rate) and len(found) - len(expected) in (0, 1)
    assert np.array_equal(found[:len(expected)], expected)
    end = 100 * max(1, 16_000 // rate)                           # the filter sees zeros behind both ends
    middle = slice(end, -end)
    assert not len(found[middle]) or np.abs(found - 0.5 * tone(len(found), 16_000, 300))[middle].max() < 1e-3


def test_int16_and_two_channels():
    samples = RNG.integers(-2**15, 2**15, (700, 2), dtype=np.int16)
    floats = (samples / 2.0**15).astype(np.float32)
    expected = open_sound(written(floats, 16_000, "WAV", "FLOAT"), "it", 1)
    assert np.array_equal(open_sound((samples, 16_000), "it", 1), expected)
    assert np.array_equal(open_sound((floats.astype(np.float64), np.int64(16_000)), "it", 1), expected)


def spoken(path, container=None, codec="aac", rate=44_100, picture=False):
    """A second of a tone with one channel louder than the other, as M4A and the like."""
    stereo = np.stack([0.5 * tone(rate, rate), 0.25 * tone(rate, rate)])
    with av.open(path, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.layout = "stereo"
        film = output.add_stream("mjpeg", rate=10) if picture else None
        if film:
            film.width, film.height, film.pix_fmt = 64, 48, "yuvj420p"
            for _ in range(30):
                output.mux(film.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        for i in range(0, rate, 1024):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(stereo[:, i:i + 1024]), format="fltp", layout="stereo")
            frame.rate, frame.pts = rate, i
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return Path(path).read_bytes()


@pytest.mark.parametrize("name, container, picture", [("it.m4a", "ipod", False), ("it.aac", "adts", False), ("it.mkv", None, True),
                                                      ("it.mp4", None, True)])
def test_sounds_in_other_containers(tmp_path, name, container, picture):
    found = open_sound(spoken(tmp_path / name, container, picture=picture), "it", 2)
    assert 15_900 < len(found) < 17_500                          # an AAC file may begin and end with some silence
    wave = np.exp(2j * np.pi * 440 / 16_000 * np.arange(8_000))           # 220 whole turns
    middle = found[4_000:12_000]
    turned = 2 * np.mean(middle * wave.conj()) * wave
    assert abs(abs(turned[0]) - 0.375) < 0.01 and np.abs(middle - turned.real).max() < 0.02


def test_digests_tell_sounds_apart(tmp_path):
    samples = tone(1_000)
    path = tmp_path / "it.wav"
    path.write_bytes(written(samples, 16_000, "WAV", "FLOAT"))
    assert Audio(path).digest == Audio((samples, 16_000)).digest == Audio((samples.astype(np.float64), 16_000), 5).digest
    assert len({Audio((x, 16_000)).digest for x in (samples, -samples, samples[:-1], np.zeros(1_000), np.zeros(999))}) == 5


def test_what_was_opened_stays():
    source = tone(1_000)
    part = Audio((source, 16_000))
    digest, source[:] = part.digest, 9
    assert part.samples_N.max() <= 1 and part.samples_N is part.samples_N and part.digest == digest
    with pytest.raises(ValueError, match="read-only"):
        part.samples_N[0] = 1


# ---- what is not

def wav(rate, n_channels, data, bits=16, said=None, kind=1):
    """A WAV file with any header."""
    said = len(data) if said is None else said
    return (b"RIFF" + struct.pack("<I", min(36 + said, 2**32 - 1)) + b"WAVEfmt " + struct.pack(
        "<IHHIIHH", 16, kind, n_channels, rate, rate * n_channels * bits // 8 % 2**32, n_channels * bits // 8, bits)
        + b"data" + struct.pack("<I", said) + data)


NOISE = RNG.normal(0, 0.1, (16_000, 2)).astype(np.float32)
FLAC, OGG, MP3 = (written(NOISE, 16_000, *kind) for kind in (("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")))
BAD = [
    (b"", "is empty"),
    (b"Hello, I am a sound.", "is no sound that this version reads .*convert it to WAV"),
    (b"RIFF\x24\0\0\0WAVE and nothing else, but long enough", "cannot be decoded as WAV"),
    (wav(16_000, 1, bytes(100))[:40], "is cut"),
    (wav(16_000, 1, bytes(100))[:-2], "is cut: bytes are missing at its end; download or save it again"),
    (FLAC[:len(FLAC) // 2], "cannot be decoded as FLAC .*sync"),
    (OGG[:len(OGG) // 2], "is cut"),
    (b"OggS" + bytes(100), "cannot be decoded as OGG"),
    (MP3[:len(MP3) // 2], "is cut: it has .* of 16,000 samples"),
    (b"\xff\xfb" + bytes(100), "cannot be decoded as MP3"),
    (wav(16_000, 0, bytes(100)), "cannot be decoded as WAV .Channel count is zero"),
    (wav(16_000, 33, bytes(66)), "has 33 channels, expected 1 to 32"),
    (wav(16_000, 1, b""), "has no samples"),
    (wav(0, 1, bytes(100)), "cannot be decoded as WAV"),
    (wav(999, 1, bytes(100)), "has 999 samples a second, expected 1,000 to 768,000"),
    (wav(768_001, 1, bytes(100)), "has 768,001 samples a second"),
    (wav(16_000, 1, np.float32([0, np.nan]).tobytes(), 32, kind=3), "a sample is no number"),
    (wav(16_000, 1, np.float32([np.inf, -np.inf]).tobytes(), 32, kind=3), "a sample is no number"),
    (wav(8_000, 1, np.float32([0, 1e30]).tobytes(), 32, kind=3), "a sample is no number, or beyond all measure"),
    (wav(16_000, 1, bytes(2 * 480_001)), "lasts at least 30.00 s, expected at most 30; cut it, as in `ffmpeg -i FILE -ss 0 -t 30 "),
    (b"\0\0\0\x18ftypM4A " + bytes(200), "cannot be decoded as mp4"),
    ((np.zeros(0, np.float32), 16_000), "has no samples"),
    ((np.zeros((5, 0), np.float32), 16_000), "has 0 channels"),
    ((np.zeros((5, 1, 1), np.float32), 16_000), r"expected an array .* found float32 \(5, 1, 1\)"),
    ((np.zeros(5, np.int32), 16_000), "found int32"),
    (([0.0, 1.0], 16_000), "found list"),
    ((np.zeros(5), 16_000.5), "has the rate 16000.5, expected a whole number"),
    ((np.zeros(5), 0), "has 0 samples a second"),
    ((np.full(5, 1e300), 16_000), "a sample is no number"),
    ((np.zeros(480_001), 16_000), "lasts at least 30.00 s"),
    (3.5, "expected a path or bytes, found float"),
    ("no/such/file.wav", "^no/such/file.wav: cannot be opened"),
    (Path("."), "is a folder"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("source, line", BAD, ids=[line[:40] for _, line in BAD])
def test_bad_sounds_are_one_line(source, line):
    with pytest.raises(MediaError, match=line) as caught:
        Audio(source, seconds=30).samples_N  # noqa: B018
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250 and "object at" not in str(caught.value)


def test_the_picture_may_last_longer_than_the_sound(tmp_path):
    spoken(tmp_path / "it.mp4", picture=True)
    assert len(open_sound(tmp_path / "it.mp4", "it", 1.1)) > 15_900
    with pytest.raises(MediaError, match="^it: lasts at least 1.0. s, expected at most 0.5"):
        open_sound(tmp_path / "it.mp4", "it", 0.5)


def test_a_film_without_sound(tmp_path):
    with av.open(tmp_path / "it.mp4", "w") as output:
        stream = output.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode())
    with pytest.raises(MediaError, match="^it: has no sound in it"):
        open_sound(tmp_path / "it.mp4", "it", 30)


@pytest.mark.parametrize("container, subtype", [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS")])
def test_long_sounds_are_refused_by_the_header(tmp_path, container, subtype, monkeypatch):
    """Nothing is decoded. The WAV file of 172 MB has holes, the FLAC file is one of two seconds that says it has three hours."""
    path, n_samples = tmp_path / "it", 3 * 3600 * 8_000
    if container == "WAV":
        path.write_bytes(wav(8_000, 1, b"", said=2 * n_samples))
        with path.open("r+b") as file:
            file.truncate(44 + 2 * n_samples)
    else:
        content = bytearray(written(np.zeros(480_000 if container != "FLAC" else 16_000, np.float32), 8_000, container, subtype))
        if container == "FLAC":
            content[22:26] = struct.pack(">I", n_samples)        # the lower 32 of the 36 bits for it
        path.write_bytes(content)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **options: pytest.fail("decoded before it was measured"))
    with pytest.raises(MediaError, match=r"lasts at least (10,800|60)\.00 s, expected at most 30"):
        open_sound(path, "it", 30)


def test_a_header_that_promises_less_than_comes(monkeypatch):
    """Decoding stops at the limit, too: here the header is believed to say one sample."""
    monkeypatch.setattr(soundfile.SoundFile, "frames", 1)
    monkeypatch.setattr(soundfile.SoundFile, "_check_frames", lambda self, frames, fill_value: frames)
    monkeypatch.setattr(sounds, "BLOCK", 3_000)
    with pytest.raises(MediaError, match="lasts at least 0.56 s, expected at most 0.5"):            # 9,000 of 16,000 samples
        open_sound(written(NOISE, 16_000, "WAV", "FLOAT"), "it", 0.5)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([wav(16_000, 2, NOISE[:1000].tobytes(), 32, kind=3), FLAC, OGG]), st.data())
def test_damaged_files_open_or_are_refused(content, data):
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 100) | st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, 2 * len(content))):]
    try:
        assert len(open_sound(bytes(content), "it", 30)) <= 480_000
    except MediaError as error:
        assert str(error).startswith("it: ") and "\n" not in str(error)


def test_a_length_that_was_not_known_is_no_cut():
    """Programs that write to a pipe leave 0xFFFFFFFF as the length."""
    assert len(open_sound(wav(16_000, 1, bytes(100), said=2**32 - 1), "it", 30)) == 50
    assert sounds.WAV_UNKNOWN < 0x7FFFFFFF
