"""The grids that quantization-aware training rounds to: exactly the numbers a file will hold.

A grid encodes weights as codes (small integers and scales) and decodes them; `round` does both. Training computes with the rounded weights
and applies the gradient to the unrounded ones, as if rounding were the identity: the straight-through estimator (Bengio et al. 2013,
arXiv:1308.3432, section 4). The codes themselves are exported; nothing is rounded a second time.

The scale is recomputed from the weights in every step. Learned step size quantization (Esser et al. 2020, arXiv:1902.08153) trains it.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Codes(NamedTuple):
    """What is stored: codes q, int8 (n_blocks, ..., 32), and the scales of the grid."""

    q: torch.Tensor
    scales: tuple[torch.Tensor, ...]


class Grid:
    """`encode`: weights of any shape -> Codes; `decode`: Codes -> float32 weights in blocks."""

    name: str

    def round(self, w: torch.Tensor) -> torch.Tensor:
        """The weights as decoded from the file."""
        return self.decode(self.encode(w)).reshape(w.shape)


@dataclass(frozen=True)
class SignedMaximum(Grid):
    """Codes -half .. half-1 in blocks of 32 along the row, scale = signed largest / -half in float16.

    half = 8 is Q4_0; 4 and 2 are 3 and 2 bits, whose codes are some of Q4_0's, so a Q4_0 file holds them exactly.
    """

    name: str
    half: int

    def encode(self, w: torch.Tensor) -> Codes:
        """As ggml's quantize_row_q4_0_ref: the float32 scale chooses the code, the float16 one is stored."""
        blocks = w.reshape(-1, 32)
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        d = largest / -self.half
        inverse = torch.where(d == 0, torch.zeros_like(d), 1 / d)
        q = (blocks * inverse + (self.half + 0.5)).trunc_().clamp_(0, 2 * self.half - 1)
        return Codes((q - self.half).to(torch.int8), (d.half(),))

    def decode(self, codes: Codes) -> torch.Tensor:
        """w = d * q."""
        return codes.q.float() * codes.scales[0].float()


@dataclass(frozen=True)
class Symmetric(Grid):
    """W4A16 checkpoints (compressed-tensors, symmetric, groups of 32): codes -8 .. 7, scale = largest magnitude / 7.5 in bfloat16.

    The product is rounded to bfloat16, as the compressed-tensors package and the kernels that read such files do.
    """

    name: str

    def encode(self, w: torch.Tensor) -> Codes:
        """compressed-tensors' calculate_qparams (memoryless_minmax) for 4 symmetric bits; the stored scale chooses the code."""
        blocks = w.reshape(-1, 32)
        scale = (blocks.abs().amax(1, keepdim=True) / 7.5).bfloat16()
        wide = scale.float()
        q = torch.where(wide == 0, torch.zeros_like(blocks), blocks / wide).round_().clamp_(-8, 7)
        return Codes(q.to(torch.int8), (scale,))

    def decode(self, codes: Codes) -> torch.Tensor:
        """w = bfloat16(scale * q)."""
        return (codes.q.bfloat16() * codes.scales[0]).float()


@dataclass(frozen=True)
class Affine(Grid):
    """Q4_K: w = (d * s) * q - (dmin * m), q in 0 .. 15, s and m of 6 bits for each 32 weights, d and dmin in float16 for each 256.

    The rows of the tiny models are 32, 128 and 256 wide, so superblocks run along the flattened matrix: a grid for measuring, which no
    file of these shapes can hold. Lowest to highest weight in 15 steps, a faster rule than the search of formats/quants/k/q4_k.py.
    """

    name: str

    def encode(self, w: torch.Tensor) -> Codes:
        """Scales first, from the float ones' maximum, then the nearest code under the stored scales."""
        x = w.reshape(-1, 8, 32)
        low = x.amin(2).clamp_(max=0)
        scale, minimum = (x.amax(2) - low).clamp_(min=0) / 15, -low
        d, s = _six_bits(scale)
        dmin, m = _six_bits(minimum)
        step, offset = _steps(d, s), _steps(dmin, m)
        q = torch.where(step == 0, torch.zeros_like(x), (x + offset) / step).round_().clamp_(0, 15)
        return Codes(q.to(torch.int8), (d, s, dmin, m))

    def decode(self, codes: Codes) -> torch.Tensor:
        """w = (d * s) * q - (dmin * m), in float32 in this order."""
        d, s, dmin, m = codes.scales
        return _steps(d, s) * codes.q.float() - _steps(dmin, m)


def _six_bits(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 8) numbers >= 0 -> a float16 unit (n, 1) and multiples 0 .. 63 of it (n, 8)."""
    unit = (values.amax(1, keepdim=True) / 63).half()
    wide = unit.float()
    return unit, torch.where(wide == 0, torch.zeros_like(values), values / wide).round_().clamp_(0, 63).to(torch.uint8)


def _steps(unit: torch.Tensor, multiple: torch.Tensor) -> torch.Tensor:
    return (unit.float() * multiple.float())[..., None]


Q4_0, THREE_BITS, TWO_BITS = SignedMaximum("q4_0", 8), SignedMaximum("3-bit", 4), SignedMaximum("2-bit", 2)
W4A16, Q4_K = Symmetric("w4a16"), Affine("q4_k")
GRIDS: dict[str, Grid] = {grid.name: grid for grid in (Q4_0, THREE_BITS, TWO_BITS, W4A16, Q4_K)}


@contextmanager
def on_grid(parameters: Iterable[torch.nn.Parameter], grid: Grid):
    """Inside, the parameters are rounded to the grid; afterwards they are as before, bit for bit.

    Gradients computed inside are applied to the unrounded weights: the straight-through estimator.
    """
    parameters = list(parameters)
    latent = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.data.copy_(grid.round(p.data))
    try:
        yield
    finally:
        for p, before in zip(parameters, latent):
            p.data.copy_(before)
