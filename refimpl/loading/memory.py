"""Will it fit? How much memory a model needs, and one clear line where there is not enough.

Counts memory that stays taken: matrices as the kernels hold them, keys and values, activations. Does not count pages of the mapped file,
which the system drops when it needs memory: those of tables of which rows are looked up (the embedding of an untied model, the per-layer
inputs), of matrices while they are rearranged, and of those that are mapped in their rearranged form (prepared.py).
"""

import bisect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass

import numpy as np

from refimpl.formats.matrix import Matrix, StoredMatrix
from refimpl.media.mel import MAX_SAMPLES, n_frames
from refimpl.media.patches import BUDGETS
from refimpl.model.cache import cache_bytes
from refimpl.model.config import Config, MoeFfn
from refimpl.model.towers.config import POOL, CellConfig, ConformerConfig, ProjectorConfig, SoundFrameConfig, VisionConfig
from refimpl.model.towers.parts import CHUNK
from refimpl.model.weights import PerLayerEmbedding, Weights

COMPILER_BYTES = 200 << 20          # what Numba and LLVM take when they compile the kernels
CONTEXT_STEP = 1024                 # tokens


class MemoryRefusal(ValueError):
    """The model or its context does not fit in memory. One line: what is needed, what there is, what helps."""


@dataclass(frozen=True)
class Need:
    """Bytes that a model takes: weights, keys and values of a context of `n_ctx` tokens, buffers of a computation.

    `held_as_float32`: type -> names of the tensors that take more than in the file because they are held as float32.
    """

    weights: int
    cache: int
    buffers: int
    n_ctx: int
    held_as_float32: Mapping[str, list[str]]

    @property
    def without_context(self) -> int:
        """All but the keys and values."""
        return self.weights + self.buffers

    @property
    def total(self) -> int:
        """Everything, with the context full."""
        return self.weights + self.cache + self.buffers


def needed(weights: Weights, config: Config, n_ctx: int, max_rows: int, kv_type: np.dtype,
           held: Callable[[Matrix | StoredMatrix], int], mapped: Collection[str] = ()) -> Need:
    """What a model takes with a context of `n_ctx` tokens, `max_rows` of them in a call; its `weights` need not have been read.

    Keys and values are of `kv_type`; `held` gives the bytes of a matrix in the backend's own layout (`Backend.held`); those named in
    `mapped` take no memory. A cache that grows has less than `cache` until its context is full, and, while it grows, one layer twice.
    """
    n_bytes, held_as_float32 = weight_bytes(weights, held, tables_of(weights), mapped)
    return Need(n_bytes, cache_bytes(config, n_ctx, max_rows, kv_type), buffer_bytes(config, max_rows), n_ctx, held_as_float32)


def weight_bytes(weights: object, held: Callable[[Matrix | StoredMatrix], int],
                 tables: Collection[Matrix | StoredMatrix] = (), mapped: Collection[str] = ()) -> tuple[int, dict[str, list[str]]]:
    """(bytes of all vectors and matrices but `tables` and those named in `mapped`, type -> names of matrices larger than in the file)."""
    total, larger = 0, defaultdict(list)
    for part in parts_of(weights):
        if isinstance(part, np.ndarray):
            total += part.nbytes
        elif not any(part is table for table in tables):
            n_bytes = held(part)
            total += n_bytes if not mapped or part.name not in mapped else 0
            if n_bytes > part.n_bytes:
                larger[part.type].append(part.name)
    return total, dict(larger)


def about_float32(held_as_float32: Mapping[str, list[str]], path) -> str:
    """Why these tensors (`Need.held_as_float32`) are held as float32, and what helps, in one line."""
    parts = [f"{kind} ({len(names)} tensor{'s' if len(names) > 1 else ''}, first {names[0]})" for kind, names in held_as_float32.items()]
    return (f"there are no kernels for {', '.join(parts)}: held as float32, 4 bytes a weight, and multiplied in exact arithmetic; "
            f"`refimpl convert {path} --type Q4_K` writes a file without them, smaller in memory and faster")


def parts_of(weights: object) -> Iterator[Matrix | StoredMatrix | np.ndarray]:
    """Every matrix and vector of a model or drafter, each once even where it has two roles (a tied head, values that are keys)."""
    def walk(value):
        if isinstance(value, Matrix | StoredMatrix | np.ndarray):
            yield value
        elif isinstance(value, tuple):
            for part in value:
                yield from walk(part)
        elif is_dataclass(value):
            for part in fields(value):
                yield from walk(getattr(value, part.name))
    return iter({id(part): part for part in walk(weights)}.values())


def products_of(weights: object) -> list[StoredMatrix]:
    """The matrices that have not been read and that something is multiplied with."""
    tables = tables_of(weights) if isinstance(weights, Weights) else ()
    return [part for part in parts_of(weights) if isinstance(part, StoredMatrix) and not any(part is table for table in tables)]


def tables_of(weights: Weights) -> list[Matrix]:
    """The matrices of which only rows are looked up, one a token."""
    tables = [weights.per_layer.table_VLP] if isinstance(weights.per_layer, PerLayerEmbedding) else []
    return tables if weights.head_VD is weights.embedding_VD else [*tables, weights.embedding_VD]


def buffer_bytes(config: Config, max_rows: int) -> int:
    """The buffers of a call of `max_rows` rows (float32 states, queries, hidden values, a row of logits) and the compiler, estimated."""
    width = 8 * config.n_embd + 3 * config.n_layer * config.n_ple
    width += max(3 * layer.n_head * layer.head_dim + 4 * layer.n_kv * layer.head_dim for layer in config.layers)
    width += max(3 * layer.ffn.n_ff for layer in config.layers)
    width += max((layer.ffn.n_used * (3 * layer.ffn.n_ff_expert + config.n_embd) for layer in config.layers
                  if isinstance(layer.ffn, MoeFfn)), default=0)
    return 4 * max_rows * width + 5 * 4 * config.n_vocab + COMPILER_BYTES


def tower_bytes(config: ProjectorConfig) -> int:
    """The buffers of the largest picture (1,120 tokens) or sound (30 s) of a projector, float32, estimated; one of them is computed at a
    time. The pixels of a picture as it is in its file come on top, three bytes each.
    """
    floats, n_tokens, vision, audio = 0, max(BUDGETS), config.vision, config.audio
    if isinstance(vision, VisionConfig):        # queries, keys, values, norms, sums; patches twice; a chunk of the widest part
        width = 8 * max(vision.n_embd, vision.n_head * vision.head_dim) + 2 * 3 * vision.side ** 2
        floats = POOL ** 2 * n_tokens * width + 3 * CHUNK * vision.n_ff
    elif isinstance(vision, CellConfig):
        floats = n_tokens * (4 * 3 * vision.side ** 2 + 6 * vision.n_embd)
    if isinstance(audio, ConformerConfig):      # what the first convolution makes, three times: it is the largest
        convolved = n_frames(MAX_SAMPLES) * audio.n_mel * audio.channels[0] // 4
        width = 8 * audio.n_embd + 3 * audio.n_ff
        floats = max(floats, 3 * convolved, n_frames(MAX_SAMPLES) // 4 * width)
    elif isinstance(audio, SoundFrameConfig):
        floats = max(floats, MAX_SAMPLES // audio.n_samples * (3 * audio.n_samples + 2 * audio.n_out))
    return 4 * floats


def refuse_unless_it_fits(need: Need, have: int, path):
    """Raises MemoryRefusal when `need` is more than the `have` bytes that are free."""
    if need.total <= have:
        return
    helps = "the weights alone are too much: a smaller file helps"
    if need.without_context <= have:
        helps = "a smaller context (-c) helps"
    elif need.held_as_float32:
        helps = about_float32(need.held_as_float32, path)
    raise MemoryRefusal(f"{path}: needs {_gb(need.total)} (weights {_gb(need.weights)}, {_gb(need.cache)} for a context of {need.n_ctx} "
                        f"tokens, {_gb(need.buffers)} to compute in), this machine has {_gb(have)} free; {helps}")


def refuse_context_unless_it_fits(config: Config, n_ctx: int, max_rows: int, kv_type: np.dtype, have: int, path):
    """Raises MemoryRefusal when the keys and values of `n_ctx` tokens take more than the `have` bytes that are free."""
    if (need := cache_bytes(config, n_ctx, max_rows, kv_type)) > have:
        raise MemoryRefusal(f"{path}: a context of {n_ctx} tokens needs {_gb(need)}, this machine has {_gb(have)} free; "
                            "a smaller context (-c) or fewer new tokens (-n) help")


def longest_context(config: Config, n_bytes: int, kv_type: np.dtype, max_rows: int) -> int:
    """The longest context, the model's own or a multiple of CONTEXT_STEP tokens, whose keys and values take at most `n_bytes`; 0: none."""
    if cache_bytes(config, config.n_ctx, max_rows, kv_type) <= n_bytes:
        return config.n_ctx
    steps = range(1, config.n_ctx // CONTEXT_STEP + 1)
    return CONTEXT_STEP * bisect.bisect_right(steps, n_bytes, key=lambda n: cache_bytes(config, CONTEXT_STEP * n, max_rows, kv_type))


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
