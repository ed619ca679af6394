"""Exports a quantization-aware training without loss: codes and scales are written as they are, and nothing is quantized again.

Rounding numbers that are already on a grid is not safe: their scale would be computed again, from rounded numbers.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from refimpl.formats.quants.blocks import BLOCKS, bytes_of, pack
from refimpl.loading.hf_names import gguf_name, gguf_tensors
from refimpl.tiny.training.grids import SignedMaximum, Symmetric
from refimpl.tiny.training.optimiser import is_quantized


def q4_0_bytes(w: torch.Tensor, grid: SignedMaximum) -> np.ndarray:
    """Unrounded weights (*lead, D) -> uint8 (*lead, D // 32 * 18): Q4_0 blocks of the grid's codes, also of its 3 and 2 bits."""
    q, (d,) = grid.encode(w)
    shape = (*w.shape[:-1], w.shape[-1] // 32)
    codes = (q.numpy() + np.int8(8)).astype(np.uint8).reshape(*shape, 32)
    return bytes_of(BLOCKS["Q4_0"], d=d.numpy().reshape(shape), qs=pack(codes, n_bits=4, group=16))


def q4_0_tensors(config: Mapping[str, object], state: Mapping[str, torch.Tensor],
                 grid: SignedMaximum) -> Iterable[tuple[str, str, np.ndarray]]:
    """The tensors of a GGUF file, for `write_gguf`: matrices as Q4_0, everything else in float32. `state` holds the unrounded weights."""
    others = {name: w.numpy() for name, w in state.items() if not is_quantized(name)}
    yield from gguf_tensors(config, others, lambda name, shape: "F32")
    for name, w in state.items():
        if is_quantized(name):
            yield gguf_name(name), "Q4_0", q4_0_bytes(w, grid)


def w4a16_tensors(name: str, w: torch.Tensor, grid: Symmetric) -> dict[str, torch.Tensor]:
    """A matrix (rows, cols) in compressed-tensors' pack-quantized format: `weight_packed` int32 (rows, cols / 8), `weight_scale`
    bfloat16 (rows, cols / 32), `weight_shape` int64 (2,). Column 8j + k is in bits 4k .. 4k + 3 of word j, as code + 8.
    """
    n_rows, n_cols = w.shape
    q, (scale,) = grid.encode(w)
    nibbles = (q.numpy().reshape(n_rows, n_cols // 8, 8).astype(np.int64) + 8).astype(np.uint32)
    packed = np.bitwise_or.reduce(nibbles << np.arange(0, 32, 4, dtype=np.uint32), axis=2).view(np.int32)
    return {f"{name}_packed": torch.from_numpy(packed), f"{name}_scale": scale.reshape(n_rows, n_cols // 32),
            f"{name}_shape": torch.tensor([n_rows, n_cols], dtype=torch.int64)}
