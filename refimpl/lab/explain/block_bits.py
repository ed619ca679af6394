"""Which weight, scale or minimum every bit of a block belongs to, for the two types that notebooks take apart."""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS


def bit_owners(type_name: str) -> list[list[str]]:
    """For each byte of a block, what bits 7 .. 0 belong to: "d", "dmin", "s3" (scale of a sub-block), "m3" (its minimum), "q17" (weight).

    For Q4_0 and Q4_K; see the diagrams in their modules. Raises ValueError for other types.
    """
    if type_name == "Q4_0":
        return _whole("d", 2) + [_nibbles(j + 16, j) for j in range(16)]
    if type_name == "Q4_K":
        scales = [[f"{k}{i + 4}"] * 2 + [f"{k}{i}"] * 6 for k in "sm" for i in range(4)]
        scales += [[f"m{i + 4}"] * 4 + [f"s{i + 4}"] * 4 for i in range(4)]
        return _whole("d", 2) + _whole("dmin", 2) + scales + [_nibbles(64 * g + j + 32, 64 * g + j) for g in range(4) for j in range(32)]
    raise ValueError(f"the bits of {type_name} are not written down here; those of Q4_0 and Q4_K are")


def _whole(name: str, n_bytes: int) -> list[list[str]]:
    return [[name] * 8 for _ in range(n_bytes)]


def _nibbles(high: int, low: int) -> list[str]:
    return [f"q{high}"] * 4 + [f"q{low}"] * 4


def bits_of_block(raw: np.ndarray) -> np.ndarray:
    """uint8 (n_bytes,) -> its bits, 7 .. 0 of each byte, uint8 (n_bytes, 8)."""
    return np.unpackbits(raw[:, None], axis=1)


def number_of(raw: np.ndarray, type_name: str, owner: str) -> int:
    """The unsigned integer that the bits of `owner` make in one block. The float16 scales of more than a byte are not read this way.

    In Q4_K the upper two bits of s4 .. m7 stand before the lower four.
    """
    if raw.shape != (BLOCKS[type_name].n_bytes,):
        raise ValueError(f"{type_name}: expected one block of {BLOCKS[type_name].n_bytes} bytes, got shape {raw.shape}")
    bits, value = bits_of_block(raw), 0
    for b, owners in enumerate(bit_owners(type_name)):
        for bit, own in zip(bits[b], owners):
            if own == owner:
                value = 2 * value + int(bit)
    return value
