"""A drafter ready to use, and what it proposes."""

import os
import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from refimpl.decode.draft_length import AutoDepth
from refimpl.formats.gguf import GGUFError
from refimpl.formats.source import TensorSource
from refimpl.host import available
from refimpl.loading.hub import local
from refimpl.loading.memory import MemoryRefusal, weight_bytes
from refimpl.loading.model import BUILT_IN, Model, with_progress
from refimpl.loading.open import open_drafter
from refimpl.model import drafter as network
from refimpl.model.cache import Cache
from refimpl.model.config import warn_of_unknown_keys
from refimpl.model.drafter import HEADS, DrafterWeights, drafter_weights_from_gguf
from refimpl.model.drafter_config import DrafterConfig, drafter_config_from_gguf
from refimpl.model.gemma4 import embed
from refimpl.model.tap import Look, no_tap, prefixed, tap_of
from refimpl.model.weights import prepare_matrices, vocabulary_size
from refimpl.progress import Progress, silent

BUILT_IN_DRAFTER = BUILT_IN.with_name("drafter.gguf")
N_COMPARED = 10         # the largest logits among which the probability of a proposal is taken, as in llama.cpp


class Drafter:
    """A drafter for one target, on the target's backend. `load_drafter` makes one. `auto` is what it has learnt of the pace of both."""

    def __init__(self, file: TensorSource, config: DrafterConfig, weights: DrafterWeights, target: Model):
        self.file, self.config, self.weights, self.target = file, config, weights, target
        self.auto = AutoDepth()

    def draft(self, token: int, state_C: np.ndarray, cache: Cache, n: int, min_p: float = 0.0, tap: Look = no_tap) -> list[int]:
        """Up to `n` ids that may follow `token`, the most probable one at each step.

        `token` is the latest one, which the target has not run; `state_C` the target's final normed state before it; the cache holds
        everything before it. Stops before a token whose probability (among the 10 largest, as in llama.cpp) is below `min_p`.
        `tap` sees the values of step j under names that begin with "draft{j}.".
        """
        proposed, backend = [], self.target.backend
        with backend.running():
            angles = network.angles_at(self.weights, cache.length)
            while len(proposed) < n:
                embedding_C = embed(self.target.config, self.target.weights, np.array([token]))[0]
                step_tap = tap_of(prefixed(tap, f"draft{len(proposed)}."))
                z_D, state_C = network.draft_step(self.config, self.weights, backend, embedding_C, state_C, angles, cache, step_tap)
                id_K, logit_K = network.candidates(self.weights, backend, z_D)
                if step_tap is not no_tap:
                    step_tap("result_output", network.spread(self.config, id_K, logit_K)[None])
                best = int(np.argmax(logit_K))
                if min_p > 0 and _probability(logit_K) < min_p:
                    break
                token = int(id_K[best])
                proposed.append(token)
        return proposed


def _probability(logit_K: np.ndarray) -> float:
    """Of the likeliest token, among the N_COMPARED likeliest."""
    top = np.partition(logit_K, -N_COMPARED)[-N_COMPARED:] if len(logit_K) > N_COMPARED else logit_K
    return 1.0 / float(np.exp(top.astype(np.float64) - top.max()).sum())


def load_drafter(path: str | os.PathLike | None, target: Model, *, head: str | int | None = None,
                 progress: Progress = silent) -> Drafter:
    """Loads the drafter of `target` from a GGUF file (`gemma4-assistant`) or a Hugging Face directory, downloaded first if `path` is
    `hf:owner/name` (loading/hub.py); without a path, that of the built-in model.

    `head`: "dense", a product with every row of the vocabulary; "centroid", with the tokens of the best groups only, for files that have
    them (E2B and E4B); a number, with that many tokens at the start of the vocabulary, the earliest merges, which tend to be the
    commonest: quicker, and the others are never proposed; None, "centroid" where it is there. `progress`: refimpl/progress.py.

    Raises GGUFError, with one clear line, for a file that is no drafter or belongs to another target, HubError for one that cannot be
    downloaded, MemoryRefusal where there is no room, ValueError for other arguments.
    """
    n_vocab = target.config.n_vocab
    if head is not None and head not in HEADS and (type(head) is not int or not 1 <= head <= n_vocab):
        raise ValueError(f"head={head!r}: expected {', '.join(map(repr, HEADS))} or a number of tokens from 1 to {n_vocab}")
    file = open_drafter(BUILT_IN_DRAFTER if path is None else local(path, drafter=True))
    config = drafter_config_from_gguf(file.metadata, vocabulary_size(file), target.config, file.path)
    _check_vocabulary(file, target)
    warn_of_unknown_keys(file.metadata, file.path)
    head = ("centroid" if network.CENTROIDS in file.tensors else "dense") if head is None else head
    weights = drafter_weights_from_gguf(file, config, head)
    n_bytes, _ = weight_bytes(weights, target.backend.held)
    if target.backend.name == "kernels" and n_bytes > available():
        raise MemoryRefusal(f"{file.path}: the drafter needs {n_bytes / 1e9:.2f} GB beside its target, this machine has "
                            f"{available() / 1e9:.2f} GB free; without a drafter the text is the same")
    with target.backend.running(), progress("MB of the drafter", file.n_bytes, 10**6) as advance:
        weights = prepare_matrices(weights, with_progress(target.backend.prepare, file, advance))
    return Drafter(file, config, weights, target)


def beside(path: Path) -> list[Path]:
    """GGUF files in the model's folder that are named like it, with "mtp" or "assistant" in the name (and perhaps another type)."""
    def words(file: Path) -> set[str]:
        name = re.sub(r"(?i)[-_.](iq|q)\d\w*|[-_.](bf16|f16|f32)(?=[-_.]|$)", "", file.stem)
        return {word.lower() for word in re.split(r"[-_. ]+", name) if word}
    marks = {"mtp", "assistant"}
    return sorted(file for file in path.parent.glob("*.gguf")
                  if words(file) & marks and words(file) - marks and words(file) - marks <= words(path))


def _check_vocabulary(file: TensorSource, target: Model):
    """The drafter's pieces, where the file has any, must be the target's."""
    ours, theirs = (f.metadata.get("tokenizer.ggml.tokens") for f in (file, target.file))
    if ours is None or theirs is None:
        return
    for i, (a, b) in enumerate(zip_longest(ours, theirs)):
        if a != b:
            raise GGUFError(file.path, None, f"token {i} is {a!r}, the target's is {b!r}: this drafter belongs to another model")


def propose(model: Model, drafter: Drafter, ids: Sequence[int], k: int) -> list[int]:
    """The `k` ids that the drafter proposes after `ids`, whose last one the target has not run; from a fresh cache. For testers.

    Raises ValueError for fewer than two ids, a k that is no positive number, or a drafter of another model.
    """
    ids_T = model.checked(ids)
    if len(ids_T) < 2:
        raise ValueError("expected at least two ids: the drafter starts from the target's state before the last one")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r}: expected 1 or more")
    check_target(drafter, model)
    cache = model.new_cache()
    state_C = model.prefill(ids_T[:-1], cache)[-1]
    return drafter.draft(int(ids_T[-1]), state_C, cache, k)


def check_target(drafter: Drafter, model: Model):
    """Raises ValueError unless the drafter was loaded for this very model: it runs on its backend and reads its keys and values."""
    if getattr(drafter, "target", None) is not model:
        raise ValueError("this drafter was loaded for another model: load_drafter(path, target=model)")
