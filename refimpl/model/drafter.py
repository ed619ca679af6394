"""The forward pass of a drafter: a small model that proposes the target's next tokens (MTP, multi-token prediction).

It has no keys and values of its own: its queries attend to those of the target's last sliding and last full layer. The input of a step is
the concatenation of

    the target's embedding of a token, times sqrt(C)          the token at position N - 1, which the target has not run yet
    a state of width C                                        the target's final normed state of position N - 2

projected to the drafter's width D. Four layers and a norm give the state z, and z gives the logits of position N and, projected back to
width C, the state for the next step, whose token is the one just proposed. The position of the query and the visible keys stay the same
for all steps, since the target has run no further.

transformers: Gemma4AssistantForCausalLM. There the cache may still hold keys of rejected draft tokens; here, as in llama.cpp, a drafter
sees exactly the committed positions, 0 to N - 2.

C in array names is the target's width, Z the number of centroids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.formats.gguf import GGUFError
from refimpl.formats.matrix import Matrix, StoredMatrix
from refimpl.formats.source import TensorSource
from refimpl.model import rotation
from refimpl.model.backend import Backend, Prepared
from refimpl.model.cache import Cache
from refimpl.model.config import AttentionType
from refimpl.model.drafter_config import DrafterConfig
from refimpl.model.gemma4 import Step, run_layer
from refimpl.model.tap import Tap, no_tap
from refimpl.model.weights import LayerWeights, Taker, layer_weights, rope_frequencies_of

CENTROIDS, ORDERING = "masked_embd_centroids.weight", "masked_embd_ordering"
HEADS = ("dense", "centroid")


@dataclass(frozen=True)
class DenseHead:
    """Logits of all tokens of the vocabulary, or of its first ones: the earliest merges, which tend to be the most frequent."""

    table_VD: Prepared


@dataclass(frozen=True)
class CentroidHead:
    """The vocabulary in Z groups, each with a centroid: logits of the tokens in the `n_top` groups with the highest-scoring centroids.

    `token_ZV`: the ids of each group, int64 (Z, V / Z). `table_ZVD`: their rows, group by group.
    """

    centroid_ZD: Prepared
    token_ZV: np.ndarray
    table_ZVD: Prepared
    n_top: int


@dataclass(frozen=True)
class DrafterWeights:
    """All weights of a drafter. `ignored` maps tensor name -> reason."""

    pre_projection_DC: Prepared
    post_projection_CD: Prepared
    layers: tuple[LayerWeights, ...]
    norm_D: np.ndarray
    head: DenseHead | CentroidHead
    rope_frequency_R: dict[AttentionType, np.ndarray]
    ignored: dict[str, str]


def drafter_weights_from_gguf(file: TensorSource, config: DrafterConfig, head: str | int) -> DrafterWeights:
    """Collects the weights of a drafter, as `weights_from_gguf` does; `head` is one of HEADS, or the rows of a dense one."""
    take, trunk, ignored = Taker(file), config.trunk, {}
    weights = DrafterWeights(
        pre_projection_DC=take.matrix("nextn.pre_projection.weight", trunk.n_embd, 2 * config.n_target),
        post_projection_CD=take.matrix("nextn.post_projection.weight", config.n_target, trunk.n_embd),
        layers=tuple(layer_weights(take, trunk, spec, ignored) for spec in trunk.layers),
        norm_D=take.vector("output_norm.weight", trunk.n_embd),
        head=_centroid_head(take, config) if head == "centroid" else _dense_head(take, config, trunk.n_vocab if head == "dense" else head),
        rope_frequency_R=rope_frequencies_of(take, trunk),
        ignored=ignored)
    for name in (CENTROIDS, ORDERING, "rope_freqs.weight"):
        take.ignore(name, "the dense head does not need it" if name != "rope_freqs.weight" else "no layer has full attention", ignored)
    take.finish("a Gemma 4 drafter")
    return weights


def _dense_head(take: Taker, config: DrafterConfig, n_token: int) -> DenseHead:
    table = take.matrix("token_embd.weight", config.trunk.n_vocab, config.trunk.n_embd)
    return DenseHead(table.rows(0, n_token, table.name))


def _centroid_head(take: Taker, config: DrafterConfig) -> CentroidHead:
    file, trunk = take.file, config.trunk
    info = file.tensors.get(CENTROIDS)
    if info is None or ORDERING not in file.tensors:
        raise GGUFError(file.path, None, f"this file has no centroid head (tensors {CENTROIDS} and {ORDERING}); use the dense one")
    n_centroid = info.shape[0]
    if trunk.n_vocab % n_centroid or config.n_top > n_centroid:
        raise GGUFError(file.path, info.offset, f"{n_centroid} centroids for {trunk.n_vocab} tokens, {config.n_top} of them looked into: "
                        "they do not divide the vocabulary")
    token_V = take.integers(ORDERING, trunk.n_vocab)
    if not np.array_equal(np.sort(token_V), np.arange(trunk.n_vocab)):
        raise GGUFError(file.path, file.tensors[ORDERING].offset, f"{ORDERING} does not name every token once")
    table = take.matrix("token_embd.weight", trunk.n_vocab, trunk.n_embd)
    token_ZV = token_V.reshape(n_centroid, -1)
    grouped = StoredMatrix(table.name, table.type, (*token_ZV.shape, trunk.n_embd), lambda: Matrix(table.read().raw[token_ZV], table.type))
    return CentroidHead(take.matrix(CENTROIDS, n_centroid, trunk.n_embd), token_ZV, grouped, config.n_top)


Angles = dict[AttentionType, tuple[np.ndarray, np.ndarray]]


def angles_at(weights: DrafterWeights, pos: int) -> Angles:
    """Cosines and sines of the query's rotation at `pos`, the same for all steps of a round."""
    return {attention: rotation.angles_at(np.array([pos]), frequency_R) for attention, frequency_R in weights.rope_frequency_R.items()}


def draft_step(config: DrafterConfig, weights: DrafterWeights, backend: Backend, embedding_C: np.ndarray, state_C: np.ndarray,
               angles: Angles, cache: Cache, tap: Tap = no_tap) -> tuple[np.ndarray, np.ndarray]:
    """One step: (the normed state z (D,), the state for the next step (C,)).

    `embedding_C` is the target's, scaled; `state_C` the target's final normed state, or the one of the previous step. The cache is the
    target's and is only read; its `length` is the position of the query.
    """
    pos_T = np.array([cache.length])
    parts = [(slice(0, 1), cache)]
    before_T = dict.fromkeys(AttentionType, pos_T)          # keys end before the query's own position
    step = Step(parts, pos_T, before_T, angles, backend, config.trunk.norm_eps, tap)
    input_TC = tap("inp_xh", np.concatenate([embedding_C, state_C])[None])
    x_TD = tap("pre_proj", backend.matmul(input_TC, weights.pre_projection_DC))
    for layer in weights.layers:
        x_TD = run_layer(layer, x_TD, None, step)
    z_TD = tap("result_norm", backend.rms_norm(x_TD, weights.norm_D, step.eps))
    state_TC = tap("h_nextn", backend.matmul(z_TD, weights.post_projection_CD))
    return z_TD[0], state_TC[0]


def candidates(weights: DrafterWeights, backend: Backend, z_D: np.ndarray) -> tuple[Sequence[int], np.ndarray]:
    """(ids, logits) of the tokens that the head covers: all, the first ones, or those of the best groups (transformers:
    Gemma4AssistantMaskedEmbedder). No soft cap.
    """
    head = weights.head
    if isinstance(head, DenseHead):
        logit_V = backend.matmul(z_D[None], head.table_VD)[0]
        return range(len(logit_V)), logit_V
    score_Z = backend.matmul(z_D[None], head.centroid_ZD)[0]
    best_X = np.argsort(-score_Z, kind="stable")[:head.n_top]
    logit_XV = backend.matmul_chosen(z_D[None], best_X[None], head.table_ZVD)[0]
    return head.token_ZV[best_X].ravel(), logit_XV.ravel()


def spread(config: DrafterConfig, id_K: Sequence[int], logit_K: np.ndarray) -> np.ndarray:
    """Logits of the whole vocabulary, float32 (V,): 1 below the smallest candidate's for tokens that are no candidates."""
    logit_V = np.full(config.trunk.n_vocab, logit_K.min() - 1, np.float32)
    logit_V[np.asarray(id_K)] = logit_K
    return logit_V
