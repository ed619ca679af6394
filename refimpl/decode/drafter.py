"""A drafter ready to use, and what it proposes."""

import os
from collections.abc import Sequence

import numpy as np

from refimpl.decode.draft_length import AutoDraftLength
from refimpl.formats.source import TensorSource
from refimpl.loading.drafter import read_drafter
from refimpl.loading.model import Model
from refimpl.model import drafter as network
from refimpl.model.cache import Cache
from refimpl.model.drafter import DrafterWeights
from refimpl.model.drafter_config import DrafterConfig
from refimpl.model.gemma4 import embed
from refimpl.model.tap import Look, no_tap, prefixed, tap_of
from refimpl.progress import Progress, silent

N_COMPARED = 10         # the probability of a draft token is taken among that many largest logits, as in llama.cpp


class Drafter:
    """A drafter for one target, on the target's backend. `load_drafter` makes one. `auto` has the timings and acceptance seen so far."""

    def __init__(self, file: TensorSource, config: DrafterConfig, weights: DrafterWeights, target: Model):
        self.file, self.config, self.weights, self.target = file, config, weights, target
        self.auto = AutoDraftLength()

    def __repr__(self) -> str:
        head = self.weights.head
        kind = "dense head" if isinstance(head, network.DenseHead) else f"centroid head, {head.n_top} of {len(head.token_ZV)} groups"
        return f"<Drafter of {self.target.name}: {self.config.trunk.n_layer} layers, width {self.config.trunk.n_embd}, {kind}>"

    def draft(self, token: int, state_C: np.ndarray, cache: Cache, n: int, min_p: float = 0.0, tap: Look = no_tap) -> list[int]:
        """Up to `n` ids that may follow `token`, the most probable one at each step.

        `token` is the latest one, which the target has not run; `state_C` the target's final normed state before it; the cache holds
        everything before it. Stops before a token whose probability (among the 10 largest, as in llama.cpp) is below `min_p`.
        `tap` sees the values of step j under names that begin with "draft{j}.".
        """
        proposed, backend = [], self.target.backend
        with backend.running(1):
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
    """The probability of the top-1 token among the N_COMPARED most probable."""
    top = np.partition(logit_K, -N_COMPARED)[-N_COMPARED:] if len(logit_K) > N_COMPARED else logit_K
    return 1.0 / float(np.exp(top.astype(np.float64) - top.max()).sum())


def load_drafter(path: str | os.PathLike | None, target: Model, *, head: str | int | None = None,
                 progress: Progress = silent) -> Drafter:
    """Loads the drafter of `target` from a GGUF file (`gemma4-assistant`) or a Hugging Face directory, downloaded first if `path` is
    `hf:owner/name` (loading/hub.py); without a path, or with "built-in", that of the built-in model that `target` is.

    `head`: "dense", logits of every token; "centroid", logits of the tokens in the best groups only, for files that have groups (E2B and
    E4B); a number, logits of that many tokens at the start of the vocabulary (the earliest merges, which tend to be the most frequent):
    faster, and the other tokens are never proposed; None, "centroid" where the file has it. `progress`: refimpl/progress.py.

    Raises GGUFError, with one clear line, for a file that is no drafter or belongs to another target, HubError for one that cannot be
    downloaded, MemoryRefusal where there is no room, ValueError for other arguments.
    """
    return Drafter(*read_drafter(path, target, head, progress), target)


def propose(model: Model, drafter: Drafter, ids: Sequence[int], k: int) -> list[int]:
    """The `k` ids that the drafter proposes after `ids`, whose last one the target has not run; from an empty cache. For testers.

    Raises ValueError for fewer than two ids, a k below 1, or a drafter of another model.
    """
    if len(ids) < 2:
        raise ValueError("expected at least two ids: the drafter starts from the target's state before the last one")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r}: expected 1 or more")
    check_target(drafter, model)
    [last], cache = model.checked(ids[-1:]), model.new_cache()
    state_C = model.prefill(ids[:-1], cache)[-1]
    return drafter.draft(int(last), state_C, cache, k)


def check_target(drafter: Drafter, model: Model):
    """Raises ValueError unless the drafter was loaded for this very model: it runs on its backend and reads its keys and values."""
    if getattr(drafter, "target", None) is not model:
        raise ValueError("this drafter was loaded for another model: load_drafter(path, target=model)")
