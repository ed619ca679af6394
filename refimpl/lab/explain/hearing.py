"""What happens between a sound and the text model: a tune, its spectrogram, what a token of it can have heard."""

from collections.abc import Sequence

import numpy as np

from refimpl.lab.explain.show import BLUE, figure, picture
from refimpl.media.mel import HOP, RATE, SUBSAMPLING
from refimpl.model.towers.config import BAND


def tune(notes: Sequence[float], seconds: float, n_harmonics: int = 4) -> np.ndarray:
    """Notes of so many Hz one after the other, each with weaker and weaker overtones and a soft start and end: float32 (N,) at 16 kHz."""
    t_N = np.arange(int(seconds * RATE)) / RATE
    swell_N = np.minimum(1, np.minimum(t_N, seconds - t_N) / 0.02)
    tones = [sum(np.sin(2 * np.pi * k * hertz * t_N) / k**1.5 for k in range(1, n_harmonics + 1)) for hertz in notes]
    return (0.3 * np.concatenate([swell_N * tone for tone in tones])).astype(np.float32)


def band(n_rows: int) -> np.ndarray:
    """Which rows a row of the conformer sees in one layer: bool (T, T), the latest BAND, its own included."""
    pos_T = np.arange(n_rows)
    return (pos_T <= pos_T[:, None]) & (pos_T > pos_T[:, None] - BAND)


def reach_ms(n_layer: int, n_taps: int) -> tuple[float, float]:
    """How far back, in ms, a soft token can have heard: (in one layer, in all). Attention reaches BAND - 1 rows back, the convolution in
    time one less than its taps; a row is 40 ms, the first two convolutions add a little.
    """
    row = SUBSAMPLING * HOP / RATE * 1000
    reach = BAND - 1 + n_taps - 1
    return reach * row, n_layer * reach * row


# ---- pictures

def sound_picture(samples_N: np.ndarray, frames_FM: np.ndarray, n_shown: int):
    """The waveform above, the mel frames below; thin lines cut the first `n_shown` tokens."""
    fig, (top, below) = figure(9, 4.4, 2, 1, sharex=True, height_ratios=(1, 2))
    top.plot(np.arange(len(samples_N)) / RATE, samples_N, color=BLUE, lw=0.3)
    top.set(ylabel="samples")
    seconds = len(frames_FM) * HOP / RATE
    image = below.imshow(frames_FM.T, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, frames_FM.shape[1]),
                         interpolation="nearest")
    for i in range(n_shown + 1):
        below.axvline(i * SUBSAMPLING * HOP / RATE, color="white", lw=0.5)
    below.set(xlabel="seconds", ylabel="mel filter", xlim=(0, seconds))
    fig.colorbar(image, ax=below, label="logarithm")
    return picture(fig, "A tune as a waveform and as a log mel spectrogram.")


def code_picture(code_SD: np.ndarray):
    """What the keys of distances are made of: sines, then cosines, of 0 to BAND - 1."""
    fig, axes = figure(8, 2.2)
    image = axes.imshow(code_SD, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set(xlabel="sines, then cosines", ylabel="rows back")
    fig.colorbar(image, ax=axes)
    return picture(fig, "The code of the distances 0 to 11.")
