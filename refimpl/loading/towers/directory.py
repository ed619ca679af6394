"""Opens projectors: GGUF files, and Hugging Face directories under the names of such files."""

import os

from refimpl.formats.checkpoint import CheckpointError, open_checkpoint
from refimpl.formats.gguf import open_gguf
from refimpl.formats.source import TensorSource
from refimpl.loading.open import OTHERS, RenamedCheckpoint, Source
from refimpl.loading.towers.names import adapted, gguf_name
from refimpl.loading.towers.settings import projector_metadata


def open_projector(path: str | os.PathLike) -> TensorSource:
    """Opens a projector: a GGUF file, or the parts of a model's Hugging Face directory that see and hear.

    Raises GGUFError for anything else.
    """
    return open_projector_directory(path) if os.path.isdir(path) else open_gguf(path)


def open_projector_directory(path: str | os.PathLike) -> RenamedCheckpoint:
    """The parts of a Hugging Face directory that see and hear. Raises CheckpointError, naming file and key or tensor."""
    ignored: dict[str, str] = {}
    checkpoint = open_checkpoint(path, lambda name: _sees_or_hears(name, ignored))
    metadata = projector_metadata(checkpoint.config, checkpoint.path / "config.json")
    sources: dict[str, Source] = {}
    for theirs in checkpoint.tensors:
        try:
            ours = gguf_name(theirs)
        except KeyError:
            raise CheckpointError(checkpoint.path, None, f"tensor {theirs!r} is not one of a Gemma 4 projector") from None
        if ours in sources:
            raise CheckpointError(checkpoint.path, None, f"tensor {ours} is there twice, again as {theirs!r}")
        sources[ours] = adapted(checkpoint, theirs, ours)
    return RenamedCheckpoint(checkpoint, {"general.name": checkpoint.path.resolve().name} | metadata, sources, ignored)


def _sees_or_hears(name: str, ignored: dict[str, str]) -> bool:
    """Does the tensor belong to these parts? Adds the others to `ignored`."""
    ours = name.removeprefix("model.").split(".")[0] in OTHERS
    if not ours:
        ignored[name] = "belongs to the text model"
    return ours
