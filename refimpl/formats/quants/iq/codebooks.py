"""What the IQ types share: codebooks, sign bits, and how weights come from both.

    index --codebook--> 8 (or 4) magnitudes     |
    sign byte, bit j: the sign of weight j      |-->  w = step * magnitude * sign
    step = d * a small integer / a power of 2   |

A codebook lists the vectors that a few neighbouring weights may have together: of the 3**8 vectors of 8 magnitudes out of 3 values, IQ2_XXS
knows 256, so that an index takes 8 bits where 8 * log2(3) = 12.7 would be needed. Which ones are listed was found by their author from the
weights of real models; nothing derives them. They are 9 kB of constants, and the gguf package, on which this one depends, holds them packed
with 2 or 4 bits a magnitude: taken from there at the first use, not typed again. The files by ggml in tests/files are the second witness.

Source: iq2xxs_grid ... iq3s_grid and ksigns_iq2xs (ggml-common.h).
"""

from functools import cache

import numpy as np

from refimpl.formats.quants.blocks import rows_of, unpack


@cache
def codebook(type_name: str, values: tuple[int, ...]) -> np.ndarray:
    """The vectors of one type, float32 (n, 8) or (n, 4), read-only. `values` are what its entries can be, in rising order."""
    from gguf import quants  # here, so that an import of refimpl stays light

    packed = getattr(quants, type_name)
    stored = np.frombuffer(bytes.fromhex(packed.grid_hex.decode("ascii")), np.uint8)
    number = unpack(stored, n_bits=2 if len(values) <= 4 else 4, group=1)
    vectors = np.array(values, np.float32)[number].reshape(packed.grid_shape)
    vectors.flags.writeable = False
    return vectors


def with_parity(index: np.ndarray) -> np.ndarray:
    """Seven stored sign bits as all eight, uint8: the number of minus signs is even, so the eighth is the parity of the others."""
    seven = index.astype(np.uint8)
    return seven | ((np.bitwise_count(seven) & np.uint8(1)) << np.uint8(7))


def signed_steps(step: np.ndarray, magnitudes: np.ndarray, sign_bytes: np.ndarray) -> np.ndarray:
    """Weights of float32 `step` (*lead, n_blocks, G) for G equal parts of a block: -> float32 (*lead, n_blocks * 256).

    magnitudes: float32 (*lead, n_blocks, n, 8 or 4), 256 a block; sign_bytes: uint8 (*lead, n_blocks, 32), bit j for weight j of 8.
    """
    sign = np.float32(1) - np.float32(2) * unpack(sign_bytes, n_bits=1, group=1).astype(np.float32)
    values = magnitudes.reshape(sign.shape) * sign
    parts = values.reshape(*step.shape, values.shape[-1] // step.shape[-1])
    return rows_of((step[..., None] * parts).reshape(values.shape))


def bits_of(words: np.ndarray, first: tuple[int, ...], n_bits: int) -> np.ndarray:
    """Cut fields of `n_bits` out of words at the bits in `first`: unsigned (...) -> the same type (..., len(first))."""
    kind = words.dtype.type
    return (words[..., None] >> np.array(first, words.dtype)) & kind(2**n_bits - 1)
