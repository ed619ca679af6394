"""How far away an endpoint may be that computes rightly: our own distance from ourselves, in exact arithmetic and in the endpoint's.

At every position that was asked for we have our logits in exact arithmetic, and those of runs that round as the endpoint says it does
(lab/compare/tolerance.py): in 8-bit arithmetic, every named value moved by float16's roundoff besides, with several seeds; or, for an
engine in float32, bfloat16 or float16, every value moved by that type's roundoff. Keys and values in blocks of 8 or 4 bits are modelled by
writing them so: the tap takes a key after its rotation, or a value, to the block type and back.

What lies between such a run and exact arithmetic is measured as the endpoint is: by the same number of its most probable tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from refimpl.formats.quants.codecs import dequantize, quantize
from refimpl.lab.compare.tolerance import ROUNDOFF, in_q8, perturbing
from refimpl.lab.compare.towers.inputs import TowerInput, with_soft_tokens
from refimpl.loading.model import Model
from refimpl.model.tap import Look, both, no_tap

ARITHMETICS = ("q8", "float32", "bfloat16", "float16")
KV_TYPES = ("f16", "q8_0", "q4_0")
SEEDS = (0,)              # of runs that round; the medians of many positions need no more
BLOCK = 32


def stored_as(kv_type: str) -> Look:
    """A tap that rounds keys and values as a cache of this type does."""
    if kv_type == "f16":
        return no_tap
    block = kv_type.upper()

    def store(name: str, value: np.ndarray):
        if name.startswith(("Kcur_pos-", "Vcur_normed-")) and value.shape[-1] % BLOCK == 0:
            value[...] = dequantize(quantize(value.reshape(-1, value.shape[-1]), block), block).reshape(value.shape)
    return store


class Yardstick:
    """`model`: of exact arithmetic, its weights as in the file (lab.compare.tolerance.judge)."""

    def __init__(self, model: Model, arithmetic: str = "q8", kv_type: str = "f16"):
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic {arithmetic!r}: expected {', '.join(ARITHMETICS)}")
        if kv_type not in KV_TYPES:
            raise ValueError(f"keys and values in {kv_type!r}: expected {', '.join(KV_TYPES)}")
        self.model, self.arithmetic, self.kv_type = model, arithmetic, kv_type
        self._rounding = in_q8(model) if arithmetic == "q8" else model

    def exact(self, ids: Sequence[int], positions: Sequence[int], media: Sequence[TowerInput] = ()) -> np.ndarray:
        """Logits at `positions` of `ids`, float32 (R, V). `media`: pictures, whose tokens are -1, -2, ..."""
        return _rows(self.model, ids, positions, media, no_tap, no_tap)

    def rounded(self, ids: Sequence[int], positions: Sequence[int], media: Sequence[TowerInput] = ()) -> list[np.ndarray]:
        """The same of every run that rounds."""
        if self.arithmetic == "q8":
            media = [replace(part, projector=in_q8(part.projector)) for part in media]
        moving = [perturbing(ROUNDOFF[self.arithmetic], seed) for seed in SEEDS]
        return [_rows(self._rounding, ids, positions, media, both(stored_as(self.kv_type), move), move) for move in moving]


def _rows(model: Model, ids: Sequence[int], positions: Sequence[int], media: Sequence[TowerInput], tap: Look,
          of_towers: Look) -> np.ndarray:
    numbers, soft = with_soft_tokens(ids, media, of_towers)
    return model.head(model.prefill(numbers, model.new_cache(len(numbers)), tap, soft=soft)[list(positions)])
