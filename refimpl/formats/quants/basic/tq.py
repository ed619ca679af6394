"""TQ1_0 and TQ2_0: 256 ternary weights, -d, 0 or d; TQ1_0 with five of them in a byte, TQ2_0 with four.

    TQ1_0, 54 bytes (1.6875 bits a weight); the scale comes last       TQ2_0, 66 bytes (2.0625 bits)
    byte 0                 48              52   53                     byte 0                 64   65
         | qs[0] .. qs[47] | qh[0] .. [3]  | d   |                          | qs[0] .. qs[63] | d   |
           5 weights a byte  4 weights a byte                                 4 weights a byte

    A byte of TQ1_0 is a fraction b / 256 in base 3: b * 3 / 256 has the first digit before the point, and what is left in the lower
    8 bits holds the next ones. Digit n of a byte:
    qs[0..31]   weight 32 n + j             n = 0 .. 4, j the byte's number in its group
    qs[32..47]  weight 160 + 16 n + j       n = 0 .. 4
    qh[0..3]    weight 240 + 4 n + j        n = 0 .. 3

    TQ2_0: qs goes in two groups of 32 bytes
    qs[32 g + j], bits  7 6                  5 4                 3 2                 1 0
                      | 128 g + j + 96 | 128 g + j + 64 | 128 g + j + 32 | 128 g + j |

Formula: w = d * (digit - 1). Source: block_tq1_0, block_tq2_0 (ggml-common.h).
"""

import numpy as np

from refimpl.formats.quants.basic.q8_0 import round_half_away
from refimpl.formats.quants.blocks import BLOCKS, blocks_of, bytes_of, fields_of, pack, rows_of, unpack
from refimpl.formats.quants.floats import reciprocal, to_half

GROUPS = (("qs", slice(0, 32), 5), ("qs", slice(32, 48), 5), ("qh", slice(0, 4), 4))    # field, bytes, digits in each


def dequantize_tq1_0(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 54) -> float32 (*lead, n_blocks * 256). Bit-equal to gguf-py, also for bytes no quantizer writes."""
    blocks = fields_of(raw, BLOCKS["TQ1_0"])
    parts = []
    for field, where, n_digits in GROUPS:
        left = blocks[field][..., where].astype(np.uint16)
        for _ in range(n_digits):
            parts.append((left * np.uint16(3)) >> np.uint16(8))
            left = (left * np.uint16(3)) & np.uint16(255)
    return _restore(blocks["d"], np.concatenate(parts, axis=-1))


def dequantize_tq2_0(raw: np.ndarray) -> np.ndarray:
    """uint8 (*lead, n_blocks * 66) -> float32 (*lead, n_blocks * 256). A digit of 3 gives 2 d. Bit-equal to gguf-py."""
    blocks = fields_of(raw, BLOCKS["TQ2_0"])
    return _restore(blocks["d"], unpack(blocks["qs"], n_bits=2, group=32))


def quantize_tq1_0(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 256 * 54). The largest magnitude becomes d; bit-equal to gguf-py."""
    d, digit = _digits(blocks_of(x, BLOCKS["TQ1_0"]))
    fields, first = {"qs": [], "qh": []}, 0
    for field, where, n_digits in GROUPS:
        n = where.stop - where.start
        part = digit[..., first:first + n_digits * n].reshape(*d.shape, n_digits, n).astype(np.uint16)
        value = sum(part[..., k, :] * np.uint16(3**(4 - k)) for k in range(n_digits))
        fields[field].append(((value * np.uint16(256) + np.uint16(242)) // np.uint16(243)).astype(np.uint8))    # b / 256 >= value / 243
        first += n_digits * n
    qs, qh = (np.concatenate(fields[field], axis=-1) for field in ("qs", "qh"))
    return bytes_of(BLOCKS["TQ1_0"], qs=qs, qh=qh, d=to_half(d))


def quantize_tq2_0(x: np.ndarray) -> np.ndarray:
    """float32 (*lead, D) -> uint8 (*lead, D // 256 * 66). The largest magnitude becomes d; bit-equal to gguf-py."""
    d, digit = _digits(blocks_of(x, BLOCKS["TQ2_0"]))
    return bytes_of(BLOCKS["TQ2_0"], qs=pack(digit, n_bits=2, group=32), d=to_half(d))


def _restore(d: np.ndarray, digit: np.ndarray) -> np.ndarray:
    return rows_of(d.astype(np.float32)[..., None] * (digit.astype(np.float32) - np.float32(1)))


def _digits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks (..., 256) -> scale d (...), digits uint8 (..., 256) in 0 .. 2."""
    d = np.abs(x).max(axis=-1, keepdims=True)
    return d[..., 0], (round_half_away(x * reciprocal(d)) + np.float32(1)).astype(np.uint8)
