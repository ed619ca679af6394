"""How fast this machine is at the parts of a forward pass, measured in a few seconds, so that predict.py can add up any model from them.

    products    matrix products of each weight type, with 1, 8, 32 and 512 rows of activations: seconds a weight
    attention   for each kind of heads of a model: seconds of a call and of a multiply-add, with 1, 8 and 128 rows
    the rest    norms, activations, rotations, routing, Python: a model's forward pass without products, attention and experts

Products of up to 32 rows read their weights from memory, as a model's do; more rows meet weights in the cache, which makes no difference.
"""

import statistics
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from refimpl.formats.matrix import Matrix
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.host import available
from refimpl.kernels.machine.isa import LANES
from refimpl.kernels.machine.tiles import Tiles
from refimpl.lab.bench.bandwidth import read_bandwidth
from refimpl.lab.bench.kernels_bench import WIDTH, seconds, tiles_of
from refimpl.model import gemma4
from refimpl.model.backend import Backend
from refimpl.model.blocks import layer_of
from refimpl.model.cache import Cache
from refimpl.model.config import Config
from refimpl.model.weights import PerLayerEmbedding, Weights
from refimpl.progress import silent

ROWS = (1, 8, 32, 512)              # of activations
FROM_MEMORY = 32                    # rows up to which weights come from memory
MEMORY_BYTES, PART = 256 << 20, 4   # weights of the product of one row; more rows meet a quarter of them
CACHED_ROWS = 512                   # output rows of the product of most rows
QUERIES = ((1, 64, 8192), (8, 64, 8192), (128, 256, 1024))     # rows of attention, and two numbers of keys that they all see
REST_ROWS = (1, 64)
REPETITIONS = 5
TINY = 16, 64                       # a product that is nothing but the overhead of a call


class Line(NamedTuple):
    """seconds = start + slope * x."""

    start: float
    slope: float

    def at(self, x: float) -> float:
        """Seconds for `x`."""
        return self.start + self.slope * x


class Heads(NamedTuple):
    """What the speed of attention depends on."""

    n_head: int
    n_kv: int
    head_dim: int


@dataclass(frozen=True)
class Rest:
    """Seconds of a model's call without its products, attention and experts: of the layers over the number of rows, and of the head."""

    layers: Line
    head: float


@dataclass(frozen=True)
class Speed:
    """Seconds of the parts of a forward pass.

    product     weight type -> rows -> seconds a weight, of all rows together
    attention   heads -> rows -> a Line over the multiply-adds of one call
    bandwidth   bytes a second of reading alone
    """

    product: Mapping[str, Mapping[int, float]]
    attention: Mapping[Heads, Mapping[int, Line]]
    bandwidth: float

    def of_weights(self, kind: str, n_weights: float, rows: float) -> float:
        """Seconds of a product of `n_weights` weights with `rows` rows: on the straight line between two measured numbers of rows, and
        beyond the largest in proportion to it.
        """
        measured = self.product[kind]
        return n_weights * float(np.interp(rows, list(measured), list(measured.values()))) * max(1.0, rows / max(measured))

    def of_attention(self, heads: Heads, rows: int, multiply_adds: float) -> float:
        """Seconds of a call of `rows` rows: as measured with the nearest lower number of rows."""
        measured = self.attention[heads]
        return measured[max(n for n in measured if n <= rows)].at(multiply_adds)


def mean_of(*speeds: Speed) -> Speed:
    """What lies between measurements of the same parts: of before and after something else."""
    first, mean = speeds[0], statistics.fmean
    product = {kind: {rows: mean(s.product[kind][rows] for s in speeds) for rows in found} for kind, found in first.product.items()}
    attention = {heads: {rows: Line(*map(mean, zip(*(s.attention[heads][rows] for s in speeds)))) for rows in found}
                 for heads, found in first.attention.items()}
    return Speed(product, attention, mean(s.bandwidth for s in speeds))


def heads_of(config: Config) -> set[Heads]:
    """Those of all layers."""
    return {Heads(layer.n_head, layer.n_kv, layer.head_dim) for layer in config.layers}


def measure_speed(types: Collection[str], heads: Collection[Heads], backend: Backend,
                  progress: Callable[..., AbstractContextManager] = silent) -> Speed:
    """Measures what models with these weight types and heads need: medians of REPETITIONS, after a run that may compile."""
    rng = np.random.default_rng(0)
    x_TD = rng.standard_normal((max(ROWS), WIDTH), dtype=np.float32)
    product, attention = {}, {}
    with progress("measuring this machine", len(types) + len(heads)) as advance:
        bandwidth = statistics.median(read_bandwidth(backend.threads, min(MEMORY_BYTES, available() // 4), REPETITIONS))
        for kind in sorted(types):
            product[kind] = _product(kind, x_TD, backend, rng)
            advance(1)
        for each in sorted(heads):
            attention[each] = {rows: _attention(each, rows, few, many, backend, rng) for rows, few, many in QUERIES}
            advance(1)
    return Speed(product, attention, bandwidth)


def _median(backend: Backend, rows: int, function: Callable, *args) -> float:
    with backend.running(rows):
        function(*args)
        return statistics.median(seconds(function, *args) for _ in range(REPETITIONS))


def _product(kind: str, x_TD: np.ndarray, backend: Backend, rng: np.random.Generator) -> dict[int, float]:
    """Rows -> seconds a weight."""
    whole = tiles_of(kind, min(MEMORY_BYTES, available() // 4), rng)
    n_all, found = whole.raw.shape[1], {}
    for rows in ROWS:
        n_tiles = n_all if rows == 1 else max(1, n_all // PART) if rows <= FROM_MEMORY else min(n_all, CACHED_ROWS // LANES)
        part = Tiles(whole.raw[:, :n_tiles], whole.type, (LANES * n_tiles, WIDTH))
        found[rows] = _median(backend, rows, backend.matmul, x_TD[:rows], part) / (part.shape[0] * WIDTH)
    return found


def _attention(heads: Heads, rows: int, few: int, many: int, backend: Backend, rng: np.random.Generator) -> Line:
    """A Line over multiply-adds, through two measurements."""
    q_TNH = rng.standard_normal((rows, heads.n_head, heads.head_dim), dtype=np.float32)
    kept = layer_of(*rng.standard_normal((2, many, heads.n_kv, heads.head_dim), dtype=np.float32).astype(backend.kv_type))
    took = [_median(backend, rows, backend.attend, q_TNH, kept, np.zeros(rows, np.int64), np.full(rows, n)) for n in (few, many)]
    slope = max(0.0, took[1] - took[0]) / (2 * q_TNH.size * (many - few))
    return Line(max(0.0, took[0] - slope * 2 * q_TNH.size * few), slope)


def measure_rest(config: Config, weights: Weights, backend: Backend) -> Rest:
    """The forward pass of a model of which there are only shapes: products are one of nothing, attention and experts give what they are
    given. The embedding's one row is dequantized as often as tokens need it.
    """
    nothing_TD = np.ones((max(REST_ROWS), TINY[1]), np.float32)
    tiny = backend.prepare(Matrix(np.ones(TINY, np.float32).view(np.uint8), "F32"))
    ones: dict[tuple[int, int], np.ndarray] = {}

    def matmul(x_TD: np.ndarray, w_OD) -> np.ndarray:
        shape = len(x_TD), w_OD.shape[0]
        backend.matmul(nothing_TD[:len(x_TD)], tiny)
        if shape not in ones:
            ones[shape] = np.ones(shape, np.float32)
        return ones[shape]

    without = replace(backend, matmul=matmul, attend=lambda q_TNH, *_: q_TNH, run_experts=lambda x_TD, *_: x_TD)
    weights = replace(weights, embedding_VD=_one_row(weights.embedding_VD))
    if isinstance(weights.per_layer, PerLayerEmbedding):
        weights = replace(weights, per_layer=replace(weights.per_layer, table_VLP=_one_row(weights.per_layer.table_VLP)))
    took = []
    for rows in REST_ROWS:
        cache = Cache(config, rows, rows, backend.kv_type)
        took.append(_median(backend, rows, gemma4.forward, config, weights, without, np.zeros(rows, np.int64), [(cache, rows)]))
    slope = max(0.0, took[1] - took[0]) / (REST_ROWS[1] - REST_ROWS[0])
    state_TD = np.ones((1, config.n_embd), np.float32)
    return Rest(Line(took[0] - slope, slope), _median(backend, 1, gemma4.head, config, weights, without, state_TD))


def _one_row(table) -> Matrix:
    """A matrix of one row of zeros in the type of `table`."""
    return Matrix(np.zeros((1, BLOCKS[table.type].row_bytes(table.shape[1])), np.uint8), table.type)
