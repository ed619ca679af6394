"""W4A16: weights of 4 bits as compressed-tensors packs them (`pack-quantized`), and the Q4_0 blocks that hold the same numbers.

    weight_packed   I32 (O, D / 8)     word j of a row: weights 8j to 8j + 7, the first in the lowest 4 bits
    weight_scale    BF16 (O, D / 32)   one scale for 32 weights of a row (F16 and F32 occur)
    weight_shape    I64 (2)            O, D

Formula: w = scale * (nibble - 8). That is Q4_0's, d for scale, so the codes stay what they are and only move. Of the 16 bytes of a group:

                  byte        0        1              8         9
    packed    low nibble     w[0]     w[2]    ..    w[16]     w[18]
              high nibble    w[1]     w[3]    ..    w[17]     w[19]
    Q4_0      low nibble     w[0]     w[1]    ..    w[8]      w[9]
              high nibble    w[16]    w[17]   ..    w[24]     w[25]

d is a half. A BF16 has 8 significant bits, so from 2^-17 to 65280 it is a half exactly, below that only if its last bits are 0.

Source: PackedQuantizationCompressor (compressed-tensors 0.20).
"""

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, bytes_of

GROUP, PER_WORD = 32, 8


SCHEME = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "actorder": None}


def other_scheme(scheme: object) -> str:
    """What is not W4A16 in the `quantization_config` of a config.json, in words; nothing ("") where all of it is."""
    method = scheme.get("quant_method") if isinstance(scheme, dict) else scheme
    if method != "compressed-tensors":
        return repr(method)
    if scheme.get("format") != "pack-quantized":
        return f"compressed-tensors {scheme.get('format')!r}"
    groups = scheme.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return "compressed-tensors without config_groups"
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            return "compressed-tensors without a description of the weights"
        for key, expected in SCHEME.items():
            if (found := weights.get(key, "int" if key == "type" else None)) != expected:
                return f"{key} {found!r}"
        if group.get("input_activations") or group.get("output_activations"):
            return "quantized activations"
    return ""


def groups_of(packed: np.ndarray) -> np.ndarray:
    """Bytes of `weight_packed`, uint8 (O, D / 2) -> (O, B, 16): those of each group of 32 weights. A view."""
    return packed.reshape(len(packed), -1, GROUP // 2)


def misfits(packed: np.ndarray, scale_OB: np.ndarray) -> np.ndarray:
    """Which groups no block of Q4_0 can hold exactly, bool (O, B): the scale is no half, and the weights are not all 0."""
    inexact_OB = ~_is_half(scale_OB)
    inexact_OB[inexact_OB] = (groups_of(packed)[inexact_OB] != 0x88).any(axis=-1)
    return inexact_OB


def to_q4_0(packed: np.ndarray, scale_OB: np.ndarray) -> np.ndarray:
    """uint8 (O, D / 2), float32 (O, B) -> blocks of Q4_0, uint8 (O, 18 * B). Exact but for `misfits`."""
    bytes_OB = groups_of(packed)
    first, second = bytes_OB[..., :8], bytes_OB[..., 8:]
    qs = np.empty_like(bytes_OB)
    qs[..., 0::2] = (first & np.uint8(0x0F)) | (second << np.uint8(4))
    qs[..., 1::2] = (first >> np.uint8(4)) | (second & np.uint8(0xF0))
    with np.errstate(over="ignore"):
        d = np.where(_is_half(scale_OB), scale_OB, 0).astype(np.float16)        # 0 for groups of zeros
    return bytes_of(BLOCKS["Q4_0"], d=d, qs=qs)


def to_float32(packed: np.ndarray, scale_OB: np.ndarray) -> np.ndarray:
    """uint8 (O, D / 2), float32 (O, B) -> the weights, float32 (O, D). Exact for a BF16 scale."""
    nibbles = np.stack([packed & np.uint8(0x0F), packed >> np.uint8(4)], axis=-1).reshape(*scale_OB.shape, GROUP)
    with np.errstate(over="ignore"):
        return ((nibbles.astype(np.float32) - np.float32(8)) * scale_OB[..., None]).reshape(len(packed), -1)


def _is_half(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32) == x
