"""Reading a drafter: open, check against its target, count memory, prepare weights. And finding one beside a model."""

import os
import re
from itertools import zip_longest
from pathlib import Path

from refimpl.formats.gguf import GGUFError
from refimpl.formats.source import TensorSource
from refimpl.host import available
from refimpl.loading.hub import built_in_with, local
from refimpl.loading.memory import MemoryRefusal, products_of, weight_bytes
from refimpl.loading.model import Model, with_progress
from refimpl.loading.open import open_drafter
from refimpl.loading.prepared import InMemory, preparer
from refimpl.model.config import warn_of_unknown_keys
from refimpl.model.drafter import CENTROIDS, HEADS, DrafterWeights, drafter_weights_from_gguf
from refimpl.model.drafter_config import DrafterConfig, drafter_config_from_gguf
from refimpl.model.weights import prepare_matrices, vocabulary_size
from refimpl.progress import Progress, silent


def read_drafter(path: str | os.PathLike | None, target: Model, head: str | int | None,
                 progress: Progress = silent) -> tuple[TensorSource, DrafterConfig, DrafterWeights]:
    """The file, configuration and weights of a drafter, prepared for the target's backend. Arguments and errors as in `load_drafter`."""
    n_vocab = target.config.n_vocab
    if head is not None and head not in HEADS and (type(head) is not int or not 1 <= head <= n_vocab):
        raise ValueError(f"head={head!r}: expected {', '.join(map(repr, HEADS))} or a number of tokens from 1 to {n_vocab}")
    file = open_drafter(local(built_in_with(target.file.path) if path in (None, "built-in") else path, "drafter"))
    config = drafter_config_from_gguf(file.metadata, vocabulary_size(file), target.config, file.path)
    _check_vocabulary(file, target)
    warn_of_unknown_keys(file.metadata, file.path)
    head = ("centroid" if CENTROIDS in file.tensors else "dense") if head is None else head
    weights = drafter_weights_from_gguf(file, config, head)
    kernels = target.backend.name == "kernels"
    preparing = InMemory(target.backend.prepare)
    if kernels:
        preparing = preparer(file, products_of(weights), target.backend.prepare, target.backend.held, target.cache_disk)
        preparing.fit(lambda mapped: weight_bytes(weights, target.backend.held, mapped=mapped)[0], available())
    n_bytes, _ = weight_bytes(weights, target.backend.held, mapped=preparing.mapped)
    if kernels and n_bytes > available():
        raise MemoryRefusal(f"{file.path}: the drafter needs {n_bytes / 1e9:.2f} GB beside its target, this machine has "
                            f"{available() / 1e9:.2f} GB free; without a drafter the text is the same")
    with target.backend.running(), progress("MB of the drafter", file.n_bytes, 10**6) as advance:
        weights = prepare_matrices(weights, with_progress(preparing.prepare, file, advance))
    preparing.finish()
    return file, config, weights


def _check_vocabulary(file: TensorSource, target: Model):
    """Raises GGUFError unless the drafter's tokens, where the file has any, are the target's."""
    ours, theirs = (f.metadata.get("tokenizer.ggml.tokens") for f in (file, target.file))
    if ours is None or theirs is None:
        return
    for i, (a, b) in enumerate(zip_longest(ours, theirs)):
        if a != b:
            raise GGUFError(file.path, None, f"token {i} is {a!r}, the target's is {b!r}: this drafter belongs to another model")


def drafters_beside(path: Path) -> list[Path]:
    """GGUF files in the model's folder that have its name, apart from the weight type, plus "mtp" or "assistant"."""
    def parts(file: Path) -> set[str]:
        name = re.sub(r"(?i)[-_.](iq|q)\d\w*|[-_.](bf16|f16|f32)(?=[-_.]|$)", "", file.stem)
        return {part.lower() for part in re.split(r"[-_. ]+", name) if part}
    marks = {"mtp", "assistant"}
    return sorted(file for file in path.parent.glob("*.gguf")
                  if parts(file) & marks and parts(file) - marks and parts(file) - marks <= parts(path))
