"""Pixels become patches: a picture is stretched to fill its budget of tokens, and cut into squares.

    budget 280       512 x 512 -> 768 x 768, 256 tokens       1920 x 1080 -> 1056 x 576, 264       1 x 100,000 -> 48 x 13,440, 280

Source: transformers' Gemma4ImageProcessorPil (to the bit) and Gemma4UnifiedImageProcessor, which scales with torchvision: up to 2 grey
levels away from Pillow's bicubic.
"""

import math

import numpy as np

from refimpl.media.images import check_size
from refimpl.media.source import MediaError

BUDGETS = (70, 140, 280, 560, 1120)                 # tokens a picture; a frame of a video has 70
TOKENS = 280
PATCH, POOL = 16, 3                                 # side of a patch; the tower pools POOL x POOL patches to a token


def check_budget(tokens: int) -> None:
    """Raises MediaError for a number of tokens that is no budget."""
    if tokens not in BUDGETS:
        raise MediaError(f"a budget of {tokens} tokens a picture", f"no Gemma 4 was trained with it; choose {', '.join(map(str, BUDGETS))}")


def size_for(height: int, width: int, tokens: int, patch: int = PATCH, pool: int = POOL) -> tuple[int, int]:
    """(height, width) in pixels that a picture is scaled to: about its shape, both sides multiples of patch * pool, at most `tokens` cells.

    Small pictures grow: the budget is filled. The sides are rounded down one by one, in float64, so the shape is kept only roughly; a side
    that would vanish becomes one cell, and the other as many as the sides' ratio and the budget allow.
    transformers: `get_aspect_ratio_preserving_size`. Its errors cannot occur: both sides vanish only with a budget below one.
    """
    check_budget(tokens)
    check_size(height, width, "a picture")
    side = patch * pool
    factor = math.sqrt(tokens * side**2 / (height * width))
    rows, columns = math.floor(factor * height / side), math.floor(factor * width / side)
    if rows == 0:
        rows, columns = 1, min(math.floor(width / height), tokens)
    elif columns == 0:
        rows, columns = min(math.floor(height / width), tokens), 1
    return rows * side, columns * side


def n_tokens(height: int, width: int, tokens: int, patch: int = PATCH, pool: int = POOL) -> int:
    """How many tokens a picture of this size becomes, of a budget of `tokens`."""
    height, width = size_for(height, width, tokens, patch, pool)
    return height * width // (patch * pool) ** 2


def pixels(rgb_HWC: np.ndarray, tokens: int, patch: int = PATCH, pool: int = POOL) -> np.ndarray:
    """The picture in the size for its budget: uint8 (H, W, 3) -> uint8 (H', W', 3). Pillow's bicubic, which averages where it shrinks."""
    height, width = size_for(*rgb_HWC.shape[:2], tokens, patch, pool)
    if (height, width) == rgb_HWC.shape[:2]:
        return rgb_HWC
    import PIL.Image

    return np.array(PIL.Image.fromarray(rgb_HWC).resize((width, height), PIL.Image.Resampling.BICUBIC))


def patches(rgb_HWC: np.ndarray, side: int = PATCH) -> tuple[np.ndarray, np.ndarray]:
    """(patches float32 (T, side * side * 3) from 0 to 1, positions int64 (T, 2)) of a scaled picture, row by row.

    Within a patch the order is row, column, colour; a position is (x, y), counted in patches. The 12B takes whole cells, side 48:
    the same numbers as transformers' `patches_merge` of 3 x 3 patches. transformers pads to the budget with zeros at (-1, -1), which no
    result depends on; here there is no padding.
    """
    rows, columns = rgb_HWC.shape[0] // side, rgb_HWC.shape[1] // side
    if rgb_HWC.shape != (rows * side, columns * side, 3) or rgb_HWC.dtype != np.uint8:
        raise ValueError(f"expected uint8 with sides that are multiples of {side}, found {rgb_HWC.dtype} {rgb_HWC.shape}; scale it first")
    cut = rgb_HWC.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(rows * columns, side * side * 3)
    y, x = np.divmod(np.arange(rows * columns), columns)
    return cut.astype(np.float32) / np.float32(255), np.stack([x, y], axis=-1)
