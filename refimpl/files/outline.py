"""A file that is not there, by its outline: names, types and shapes of its tensors, as the published files have them. No bytes of weights.

What can be said of a model before it is downloaded is said of its outline: the functions that read a file's header take one.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from refimpl.files.synth import (
    config_of,
    drafter_metadata,
    drafter_tensors,
    model_tensors,
    recipe_type,
)
from refimpl.files.synth_projector import projector_metadata, projector_tensors, projector_type
from refimpl.formats.gguf import TensorInfo
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.loading.hf_names import gguf_metadata

N_MERGES = 514_906          # of Gemma's tokenizer


class Outline:
    """A TensorSource (formats/source.py) without a file. Vectors are ones; a matrix cannot be read."""

    format, facts = "outline", {}

    def __init__(self, name: str, metadata: dict[str, object], tensors: Iterable[tuple[str, str, tuple[int, ...]]]):
        """`tensors`: (name, type, shape) of each, shapes in NumPy's order."""
        self.path, self.metadata = Path(name), metadata
        self.tensors = {tensor: TensorInfo(tensor, block, shape, math.prod(shape[:-1]) * BLOCKS[block].row_bytes(shape[-1]), 0, 0)
                        for tensor, block, shape in tensors}
        self.n_bytes = sum(info.n_bytes for info in self.tensors.values())

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a vector: ones in float32, or 0, 1, 2, ... in int32. Raises ValueError for a matrix."""
        info = self.tensors[name]
        if len(info.shape) != 1:
            raise ValueError(f"{self.path}: {name} is in a file that is not there")
        return (np.arange(info.shape[0], dtype=np.int32) if info.type == "I32" else np.ones(info.shape, np.float32)).view(np.uint8)

    def files(self) -> list[Path]:
        """None."""
        return []

    def release_all(self):
        """Nothing."""


def model_outline(name: str, recipe: str, n_layer: int | None = None) -> Outline:
    """A model of the shape `name` with the types of `recipe` (files/synth.py). Raises ValueError for an unknown name."""
    config = config_of(name, n_layer)
    n_layer = len(config["layer_types"])
    return Outline(name, gguf_metadata(config), ((tensor, recipe_type(recipe, tensor, shape, n_layer), shape)
                                                 for tensor, shape in model_tensors(config)))


def drafter_outline(name: str) -> Outline:
    """The drafter of the model `name` as Google published it: matrices in BF16."""
    return Outline(f"{name}-assistant", drafter_metadata(name), (
        (tensor, kind if kind in ("F32", "I32") else "BF16", shape) for tensor, shape in drafter_tensors(name)
        for kind in [recipe_type("google-q4_0", tensor, shape, 4)]))


def projector_outline(name: str) -> Outline:
    """The projector of the model `name` as Google published it: matrices in BF16."""
    return Outline(f"{name}-mmproj", projector_metadata(name), ((tensor, projector_type("bf16", tensor, shape), shape)
                                                                for tensor, shape in projector_tensors(name)))
