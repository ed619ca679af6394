"""Opens models: GGUF files, and Hugging Face directories under the names of GGUF files, so that everything after is the same for both."""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refimpl.formats.checkpoint import Checkpoint, CheckpointError, open_checkpoint, read_json
from refimpl.formats.gguf import TensorInfo, open_gguf
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import dequantize
from refimpl.formats.source import TensorSource
from refimpl.loading.config_json import is_drafter, is_tied, metadata_of
from refimpl.loading.hf_names import gguf_name
from refimpl.loading.tokenizer_json import has_vocabulary, vocabulary_metadata

ROPE = "rope_freqs.weight"
LANGUAGE = ("model.language_model.", "language_model.model.", "language_model.", "model.")
OTHERS = {"vision_tower": "sees", "embed_vision": "sees", "vision_embedder": "sees", "multi_modal_projector": "sees",
          "audio_tower": "hears", "embed_audio": "hears"}
EXPERT = re.compile(r"layers\.(\d+)\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Source:
    """A tensor under its GGUF name, and what returns its bytes."""

    info: TensorInfo
    raw: Callable[[], np.ndarray]


class RenamedCheckpoint:
    """A Hugging Face directory as a TensorSource: its tensors and settings under the names of a GGUF file.

    `ignored` maps the names of tensors that are left out to the reason; `checkpoint` is the directory itself.
    """

    format = "Hugging Face directory"

    def __init__(self, checkpoint: Checkpoint, metadata: Mapping[str, object], sources: Mapping[str, Source], ignored: Mapping[str, str]):
        self.path, self.metadata, self.checkpoint, self.ignored = checkpoint.path, metadata, checkpoint, dict(ignored)
        self._sources = dict(sources)
        self.tensors = {name: source.info for name, source in sources.items()}
        self.n_bytes = sum(info.n_bytes for info in self.tensors.values())
        self.facts = {"safetensors_files": checkpoint.n_files, "file_bytes": checkpoint.n_bytes, "ignored": self.ignored}

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor: a view of the file; a new array for packed matrices and for experts that are stored one by one."""
        return self._sources[name].raw()

    def files(self) -> list[Path]:
        """The safetensors files."""
        return self.checkpoint.files()

    def release_all(self) -> None:
        """Releases the pages of the safetensors files."""
        self.checkpoint.release_all()


def open_model(path: str | os.PathLike) -> TensorSource:
    """Opens a model or drafter: a GGUF file or a Hugging Face directory. Raises GGUFError for anything else."""
    return open_directory(path) if os.path.isdir(path) else open_gguf(path)


def open_directory(path: str | os.PathLike) -> RenamedCheckpoint:
    """Opens the Hugging Face directory of a model or drafter. Raises CheckpointError, naming file and key or tensor, for anything else."""
    ignored: dict[str, str] = {}
    checkpoint = open_checkpoint(path, lambda name: not _is_of_others(name, ignored))
    config, place = checkpoint.config, checkpoint.path / "config.json"
    drafter = is_drafter(config, place)
    metadata, rope = metadata_of(config, place)
    if not drafter or has_vocabulary(checkpoint.path):        # a drafter may use its target's
        metadata |= vocabulary_metadata(checkpoint.path, config)
    divisors = rope.astype("<f4").view(np.uint8)
    sources = {ROPE: Source(TensorInfo(ROPE, "F32", rope.shape, divisors.nbytes, 0, 0), lambda: divisors)}
    experts: dict[str, dict[int, str]] = {}
    for theirs in checkpoint.tensors:
        name = next((theirs.removeprefix(prefix) for prefix in LANGUAGE if theirs.startswith(prefix)), theirs)
        if match := EXPERT.fullmatch(name):
            experts.setdefault(f"blk.{match[1]}.ffn_{match[3]}_exps.weight", {})[int(match[2])] = theirs
        elif name == "lm_head.weight" and is_tied(config):
            ignored[theirs] = "the head is the embedding (tie_word_embeddings)"
        else:
            ours = _ours(name, theirs, checkpoint, drafter)
            if ours in sources:
                raise CheckpointError(checkpoint.path, None, f"tensor {ours} is there twice, again as {theirs!r}")
            sources[ours] = _as_it_is(checkpoint, theirs, ours)
    for ours, members in experts.items():
        sources[ours] = _stacked(checkpoint, ours, members)
    return RenamedCheckpoint(checkpoint, {"general.name": checkpoint.path.resolve().name} | metadata, sources, ignored)


def open_drafter(path: str | os.PathLike) -> TensorSource:
    """As open_model; raises CheckpointError for a directory that is not a drafter's."""
    if os.path.isdir(path):
        place = Path(path) / "config.json"
        config = read_json(place)
        if not is_drafter(config, place):
            raise CheckpointError(place, None, f"model_type is {config['model_type']!r}, expected a drafter's, which ends in assistant")
    return open_model(path)


def _is_of_others(name: str, ignored: dict[str, str]) -> bool:
    """Does the tensor belong to the image or audio part? Adds it to `ignored` with that reason."""
    part = name.removeprefix("model.").split(".")[0]
    if part in OTHERS:
        ignored[name] = f"belongs to the part that {OTHERS[part]}; --mmproj loads it"
    return part in OTHERS


def _ours(name: str, theirs: str, checkpoint: Checkpoint, drafter: bool) -> str:
    if name == "lm_head.weight":
        return "output.weight"
    try:
        return gguf_name(name)
    except KeyError:
        kind = "drafter" if drafter else "model"
        raise CheckpointError(checkpoint.path, None, f"tensor {theirs!r} is not one of a Gemma 4 {kind}") from None


def _as_it_is(checkpoint: Checkpoint, theirs: str, ours: str) -> Source:
    return Source(replace(checkpoint.tensors[theirs], name=ours), lambda: checkpoint.raw(theirs))


def _stacked(checkpoint: Checkpoint, ours: str, members: dict[int, str]) -> Source:
    """The matrices of a layer's experts, one tensor each in the directory, as one of shape (E, O, D)."""
    names = [members[e] for e in sorted(members)]
    shapes, types = ({getattr(checkpoint.tensors[name], what) for name in names} for what in ("shape", "type"))
    if sorted(members) != list(range(len(members))) or len(shapes) > 1 or len(types) > 1 and not types <= {"Q4_0", "F32"}:
        raise CheckpointError(checkpoint.path, None, f"the experts of {ours} are not numbered from 0 to {len(members) - 1}, or differ in "
                              "shape or type")
    block, (shape,) = "F32" if "F32" in types else types.pop(), shapes
    n_bytes = len(names) * math.prod(shape[:-1]) * BLOCKS[block].row_bytes(shape[-1])
    info = TensorInfo(ours, block, (len(names), *shape), n_bytes, checkpoint.tensors[names[0]].offset, 0)

    def one(name: str) -> np.ndarray:
        same = checkpoint.tensors[name].type == block
        return checkpoint.raw(name) if same else dequantize(checkpoint.raw(name), "Q4_0").view(np.uint8)

    return Source(info, lambda: np.stack([one(name) for name in names]))
