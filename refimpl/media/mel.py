"""Samples become frames: a log mel spectrogram for E2B and E4B, the samples themselves for the 12B. Both give a token every 40 ms."""

import numpy as np

from refimpl.media.sounds import RATE, SECONDS
from refimpl.media.source import MediaError

HOP, WINDOW, FFT = 160, 320, 512                    # samples: 10 ms, 20 ms, and the length that zeros fill a window up to
FILTERS = 128
FLOOR = 1e-3                                        # added to every filter's sum, so that silence has a logarithm
MAX_SAMPLES = SECONDS * RATE
SUBSAMPLING = 4                                     # mel frames to a token: two convolutions of stride 2
RAW = 640                                           # samples to a token of the 12B


def n_frames(n_samples: int) -> int:
    """How many mel frames so many samples give: one every 10 ms, none for fewer than 161 samples."""
    return max(0, (n_samples - 1) // HOP)


def n_tokens(n_samples: int) -> int:
    """How many tokens so many samples are to E2B and E4B, 25 a second: 750 for 30 s."""
    return -(-n_frames(n_samples) // SUBSAMPLING)


def n_raw_tokens(n_samples: int) -> int:
    """How many tokens so many samples are to the 12B, 25 a second."""
    return -(-n_samples // RAW)


def mel_frames(samples_N: np.ndarray, what: str = "the sound") -> np.ndarray:
    """Samples at 16 kHz, float32 (N,), -> float32 (F, 128): the natural logarithm of what 128 filters hear, F = (N - 1) // 160.

    Frame f sees the 320 samples before number 160 (f + 1), zeros ahead of the first one, and is there only if that sample is. A periodic
    Hann window, the magnitude (not the power) of its spectrum, triangular filters, then log(x + 0.001). As transformers'
    Gemma4AudioFeatureExtractor without its padding, and like it in float32 up to the magnitudes: in float64 a loud pure tone would leave
    other numbers in the quiet filters, by up to 0.02.
    Raises MediaError for fewer than 161 samples and for more than 30 s, which transformers cuts off silently.
    """
    n = len(samples_N)
    if n_frames(n) == 0:
        raise MediaError(what, f"has {n} samples at 16 kHz, expected at least {HOP + 1} (10 ms); record more of it")
    if n > MAX_SAMPLES:
        raise MediaError(what, f"lasts {n / RATE:,.2f} s, expected at most {SECONDS}; cut it")
    padded_N = np.concatenate([np.zeros(WINDOW - HOP, np.float32), samples_N])
    frames_FN = np.lib.stride_tricks.sliding_window_view(padded_N, WINDOW)[::HOP][:n_frames(n)]
    magnitudes_FB = np.abs(np.fft.rfft(frames_FN * hann(), n=FFT))
    return np.log(magnitudes_FB @ mel_filters() + FLOOR).astype(np.float32)


def raw_frames(samples_N: np.ndarray, size: int = RAW) -> np.ndarray:
    """Samples at 16 kHz, float32 (N,), -> float32 (T, size): cut into pieces of 640, 40 ms, zeros behind the last. What the 12B takes.

    transformers: Gemma4UnifiedAudioFeatureExtractor.
    """
    frames_TN = np.zeros((-(-len(samples_N) // size), size), np.float32)
    frames_TN.reshape(-1)[:len(samples_N)] = samples_N
    return frames_TN


def hann() -> np.ndarray:
    """The window, float32 (320,): half a cosine's swing, 0 at its start and not at its end ("periodic")."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


def mel_filters() -> np.ndarray:
    """The weight of each frequency in each filter, float64 (257, 128): triangles from 0 to 8000 Hz, equally wide in mel (HTK's), of height
    1. The first one falls between two frequencies: it hears nothing.
    """
    highest = 2595 * np.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, highest, FILTERS + 2) / 2595) - 1)
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    hertz_B = np.linspace(0, RATE / 2, FFT // 2 + 1)[:, None]
    return np.maximum(0, np.minimum((hertz_B - left) / (peak - left), (right - hertz_B) / (right - peak)))
