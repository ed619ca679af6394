"""Attention over keys and values in blocks, with a softmax that holds at most 64 scores of a query at a time.

A query goes through its positions in chunks of 64 that begin at multiples of 64. It keeps the largest score so far, the sum of its weights
and the weighted sum of values; when a chunk brings a larger score, both sums are scaled down (Milakov & Gimelshein 2018,
arXiv:1805.02867). Every 512 positions (a span) it starts anew, and at the end the spans are merged in order. All of that depends only on
the query's own range of positions. So threads may divide the spans of one query or the queries of a prompt, and queries may share what
they load: the bits stay the same.

A score is a sum in 16 lanes, products fused in order, then across lanes, neighbours first. A sum of weights has 16 lanes as well, position
modulo 16. Values are added in the order of positions.

Some queries are computed together, and with them some keys, or some vectors of columns of values (`Shape`): a tuple has a number for each
of these, and a tuple of tuples for each query and each of these.
"""

from typing import NamedTuple

import numpy as np
from numba import prange

from refimpl.kernels.cores.threads import current
from refimpl.kernels.machine.intrinsics import (
    add_f32,
    add_pairs,
    add_quarters,
    address,
    at,
    fma,
    largest_f32,
    load_f32,
    max_f32,
    mul_f32,
    prefetch,
    splat_f32,
    store_f32,
    store_f32_part,
    sub_f32,
    sum_f32,
)
from refimpl.kernels.machine.isa import ISA, LANES, SMALL_REGISTERS, Pointer
from refimpl.kernels.machine.jit import inline, kernel, out_of_line, per_row
from refimpl.kernels.machine.unpack import ALL, FORMATS, LOWER, WeightFormat, load_activations, load_floats, splat_float, splat_from
from refimpl.kernels.machine.vecmath import exp16


class Shape(NamedTuple):
    """What is computed together: so many queries, and keys or vectors of columns, each numbered. Their sums stay in registers."""

    queries: tuple[int, ...]
    others: tuple[int, ...]


def _shape(n_queries, n_others):
    return Shape(tuple(range(n_queries)), tuple(range(n_others)))


CHUNK, SPAN = 64, 512
# Registers, and how many loads there are for a product, decide: few queries need many keys. With eight queries a key is converted to
# float32 once for all of them, which takes as long as three products where registers have 256 bits.
SMALL, LARGE = {"avx512": (_shape(4, 4), _shape(4, 4)), "portable": (_shape(2, 2), _shape(2, 2)),
                **dict.fromkeys(("avx2", "avxvnni"), (_shape(2, 4), _shape(8, 1))),
                **dict.fromkeys(("neon", "dotprod", "i8mm"), (_shape(2, 4), _shape(4, 2)))}[ISA]
FEW, MANY = len(SMALL.queries), len(LARGE.queries)
WIDTH, PART = (LANES // 2, LOWER) if SMALL_REGISTERS else (LANES, ALL)      # lanes of a vector of products
QUERIES = 32                                # about as many share what is loaded of the cache
ROOM_BYTES = 4 << 20                        # for the states of the rows that are computed together
LARGEST, WEIGHT, VALUES = 0, 64, 128        # a state, in bytes: largest score and sum of weights in 16 lanes, sums of values (H)
PART_BYTES = 64 * LANES                     # of a query: the products with 16 keys, in 16 lanes each, of which 16 scores are made
BUFFER = MANY * (CHUNK + PART_BYTES // 4)   # float32 that a thread needs: weights of MANY queries, and products
FLOAT, HALF, INT64 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.int64)
FAR = 2 ** 62                               # beyond all positions
GONE = -2 ** 63                             # of a block: there is none
ZERO, ONE, NEVER = np.float32(0), np.float32(1), np.float32(-np.inf)


class Work(NamedTuple):
    """The arrays of a call by their addresses, sizes, and a thread's own buffers."""

    q: Pointer
    cache: Pointer
    block_B: np.ndarray         # where each block begins, in bytes from `cache`
    k_offset: int               # where keys and values begin, from the beginning of a block
    v_offset: int
    kv: WeightFormat            # F16 or F32
    first_T: np.ndarray
    end_T: np.ndarray
    n_kv: int
    n_head: int
    head_dim: int
    state: Pointer
    first_row: int              # of those whose states are in memory
    n_spans: int                # states that there is space for, for each head of a row
    weights: Pointer            # of MANY queries, 64 each; scores at first
    parts: Pointer


class Chunk(NamedTuple):
    """The queries, MANY at most, that are computed over 64 positions: offsets in bytes, and the range of the 64 that each query sees."""

    query_Q: np.ndarray
    state_Q: np.ndarray
    low_Q: np.ndarray
    high_Q: np.ndarray
    turn_X4: np.ndarray         # (first query, last query, low, high): positions that these queries add up together


def attend(q_TNH: np.ndarray, kept, first_T: np.ndarray, end_T: np.ndarray) -> np.ndarray:
    """Grouped-query attention, float32 (T, N, H). Query head n = k * G + g reads key/value head k; scores are not divided by sqrt(H).

    `kept` has keys and values in blocks (`LayerCache` in model/blocks.py), float32 or float16. Row t sees positions
    first_T[t]..end_T[t]-1, at least one, for which there are blocks. Raises ValueError for anything else, and where H is not a multiple
    of 16.
    """
    n_tok, n_head, head_dim = q_TNH.shape if q_TNH.ndim == 3 else (0, 0, 0)
    n_positions, n_kv, width = kept.shape
    if q_TNH.ndim != 3 or q_TNH.dtype != FLOAT or kept.dtype not in (HALF, FLOAT) or n_positions != CHUNK:
        raise ValueError(f"expected float32 queries (T, N, H), keys and values in float16 or float32 in blocks of {CHUNK} positions, got "
                         f"{q_TNH.dtype} {q_TNH.shape}, {kept.dtype}, {n_positions} positions")
    if not width or width % LANES or width != head_dim or not n_kv or not n_head or n_head % n_kv:
        raise ValueError(f"{n_head} query heads of {head_dim} do not fit {n_kv} key heads of {width}, or {width} is no multiple of {LANES}")
    if first_T.dtype != INT64 or end_T.dtype != INT64 or first_T.shape != (n_tok,) or end_T.shape != (n_tok,):
        raise ValueError(f"expected {n_tok} positions in int64 twice, got {first_T.dtype} {first_T.shape}, {end_T.dtype} {end_T.shape}")
    first_T, end_T, n = np.ascontiguousarray(first_T), np.ascontiguousarray(end_T), current()
    bad, rows, wave, heads, n_spans = plan(first_T, end_T, kept.offset_B, n_head, n_kv, head_dim, n)
    if bad < n_tok:
        raise ValueError(f"query {bad}: key range [{first_T[bad]}, {end_T[bad]}) must be non-empty, start at 0 or later and have a "
                         "block for every position")
    out_TNH = np.empty(q_TNH.shape, FLOAT)
    if n_tok:
        # allocated here, because a kernel frees an array after its last use, and an address of it does not count as one
        state = np.empty((wave, n_head, n_spans, VALUES // 4 + head_dim), FLOAT)
        kv = FORMATS["exact"]["F16" if kept.dtype == HALF else "F32"].half(PART)
        attend_rows(kv, np.ascontiguousarray(q_TNH), kept.origin, kept.offset_B, kept.k_offset, kept.v_offset, n_kv, first_T, end_T, rows,
                    wave, heads, state, np.empty((n, BUFFER), FLOAT), out_TNH, n)
    return out_TNH


@kernel()
def plan(first_T, end_T, block_B, n_head, n_kv, head_dim, n):
    """(first row with an impossible range, or T; rows, wave and heads of `attend_rows`; spans of the row that has most)."""
    n_tok, n_spans = first_T.size, 1
    for t in range(n_tok):
        first, end = first_T[t], end_T[t]
        if first < 0 or end <= first or end > CHUNK * block_B.size:
            return t, 0, 0, 0, 0
        for block in range(first // CHUNK, (end - 1) // CHUNK + 1):
            if block_B[block] == GONE:
                return t, 0, 0, 0, 0
        n_spans = max(n_spans, (end - 1) // SPAN - first // SPAN + 1)
    rows = max(1, QUERIES * n_kv // n_head)
    row_bytes = n_head * n_spans * (VALUES + 4 * head_dim)
    wave = min(n_tok, rows * max(1, ROOM_BYTES // (rows * row_bytes)))
    # a cache that is read once is read fastest from front to back, all heads of a position together; a prompt reads it again and again from
    # the nearer caches, where one head is enough to hold
    heads = n_kv if n_tok <= rows else 1
    while heads % 2 == 0 and n_spans * (n_kv // heads) < 3 * n:
        heads //= 2
    return n_tok, rows, wave, heads, n_spans


# ---- for every query, key or column of a tuple

@per_row
def query_address(w, chunk, i, last):
    """Where query i begins, or query `last` if there is none."""
    return at(w.q, chunk.query_Q[min(i, last)])


@per_row
def state_address(w, chunk, i, last):
    """Where the state of query i begins, or of query `last`."""
    return at(w.state, chunk.state_Q[min(i, last)])


@per_row
def weight_address(w, i, last):
    """Where the 64 weights of query i begin, or of query `last`."""
    return at(w.weights, 4 * CHUNK * min(i, last))


@per_row
def key_address(w, keys, j):
    """Where the key of position j begins."""
    return at(w.cache, keys + _position_bytes(w) * j)


@per_row
def plus(i, n):
    """i + n."""
    return i + n


@per_row
def column(first, i, end):
    """The first column of vector i, `first` + WIDTH i, or else of the last that there is."""
    return min(first + WIDTH * i, end - WIDTH)


@per_row
def load(kv, pointer, i):
    """A vector of a key or value, from number i on."""
    return load_floats(kv, at(pointer, i * (kv.n_bytes // LANES)))


@per_row
def load_query(kv, pointer, i):
    """A vector of a query, from number i on."""
    return load_activations(kv, at(pointer, 4 * i))


@per_row
def load_weight(kv, pointer, j):
    """The weight of position j, in every lane."""
    return splat_from(kv, at(pointer, 4 * j))


@per_row
def prefetch_key(pointer, n_bytes):
    """Prefetches the key that lies so far on."""
    prefetch(at(pointer, n_bytes))


@per_row
def store_product(pointer, j, total):
    """The products of a query with key j, in some lanes."""
    store_f32(at(pointer, 64 * j), total)


@per_row(shared=("others",))
def store_products(w, i, others, place, totals):
    """The products of query i with these keys, `place` bytes from the beginning of its products."""
    store_product(at(w.parts, PART_BYTES * i + place), others, totals)


@per_row
def load_products(pointer, j):
    """The products of a query with key j, in 16 lanes."""
    return load_f32(at(pointer, 64 * j))


@per_row(shared=("value",))
def repeat(i, value):
    """The same for every i."""
    return value


@per_row
def add_product(a, b, total):
    """a * b + total."""
    return fma(a, b, total)


@per_row(shared=("others",))
def add_products(a, others, totals):
    """Adds a times each of the others."""
    return add_product(a, others, totals)


@per_row
def load_sum(kv, state, column):
    """The sums of values in a vector of columns."""
    return load_activations(kv, at(state, VALUES + 4 * column))


@per_row(shared=("columns",))
def load_sums(kv, state, columns):
    """The sums of values of a query."""
    return load_sum(kv, state, columns)


@per_row
def store_sum(state, column, total):
    """The sums of values in a vector of columns."""
    store_f32(at(state, VALUES + 4 * column), total)


@per_row(shared=("columns",))
def store_sums(state, columns, totals):
    """The sums of values of a query."""
    store_sum(state, columns, totals)


@inline
def _sums_of_4_lanes(a, b, c, d):
    return add_pairs(add_pairs(a, b), add_pairs(c, d))


@inline
def _sums(v):
    """The sums of 16 vectors: neighbours first, as a tree."""
    return add_quarters(_sums_of_4_lanes(v[0], v[1], v[2], v[3]), _sums_of_4_lanes(v[4], v[5], v[6], v[7]),
                        _sums_of_4_lanes(v[8], v[9], v[10], v[11]), _sums_of_4_lanes(v[12], v[13], v[14], v[15]))


KEYS = tuple(range(LANES))


# ---- a few queries and a chunk: scores

@inline
def _position_bytes(w):
    """From the key, or value, of a head at one position to the next position's."""
    return w.n_kv * w.head_dim * (w.kv.n_bytes // LANES)


@out_of_line
def _scores(w, chunk, n, shape, first, j, ahead, step):
    """Scores of n queries (at most those of the shape) for positions j..j+15 of the chunk, to `weights`; its keys begin at `first`.
    Meanwhile prefetches keys `ahead` bytes further on, `step` bytes for 16 columns.
    """
    queries = query_address(w, chunk, shape.queries, n - 1)
    for g in range(0, LANES, len(shape.others)):
        keys, place = key_address(w, first, plus(shape.others, j + g)), ahead
        for lane in range(0, LANES, WIDTH):
            totals = repeat(shape.queries, repeat(shape.others, splat_float(w.kv, ZERO)))
            for c in range(lane, w.head_dim, LANES):
                key = load(w.kv, keys, c)
                prefetch_key(keys, place)
                place += step // (LANES // WIDTH)
                totals = add_products(load_query(w.kv, queries, c), key, totals)
            store_products(w, shape.queries, shape.others, 64 * g + 4 * lane, totals)
    for i in range(n):
        store_f32(at(w.weights, 4 * (CHUNK * i + j)), _sums(load_products(at(w.parts, PART_BYTES * i), KEYS)))


# ---- weights

@inline
def _blank(scores, first, end):
    for j in range(first, end, LANES):
        store_f32_part(at(scores, 4 * j), splat_f32(NEVER), min(LANES, end - j))


@inline
def _weights(w, chunk, i):
    """Turns query i's scores for the chunk into weights, 0 where it sees nothing, and updates its state to the new largest score."""
    scores, state = at(w.weights, 4 * CHUNK * i), at(w.state, chunk.state_Q[i])
    _blank(scores, 0, chunk.low_Q[i])
    _blank(scores, chunk.high_Q[i], CHUNK)
    before = load_f32(at(state, LARGEST))
    largest = before
    for j in range(0, 4 * CHUNK, 64):
        largest = max_f32(largest, load_f32(at(scores, j)))
    largest = splat_f32(largest_f32(largest))
    factor = exp16(sub_f32(before, largest))
    total = mul_f32(load_f32(at(state, WEIGHT)), factor)
    for j in range(0, 4 * CHUNK, 64):
        weight = exp16(sub_f32(load_f32(at(scores, j)), largest))
        store_f32(at(scores, j), weight)
        total = add_f32(total, weight)
    store_f32(at(state, LARGEST), largest)
    store_f32(at(state, WEIGHT), total)
    if largest_f32(factor) != ONE:
        for d in range(w.head_dim // LANES):
            store_f32(at(state, VALUES + 64 * d), mul_f32(load_f32(at(state, VALUES + 64 * d)), factor))


# ---- values

@out_of_line
def _values(w, chunk, shape, values, first, last, low, high, ahead, step):
    """Adds weight times value for positions low..high-1 of the chunk to the sums of queries `first` to `last`, at most those of the shape.
    Its values begin at `values`.

    Where there are fewer queries or columns, the last is computed again: the same numbers go to the same place.
    """
    states = state_address(w, chunk, plus(shape.queries, first), last)
    weights = weight_address(w, plus(shape.queries, first), last)
    n_columns = WIDTH * len(shape.others)
    for c in range(0, w.head_dim, n_columns):
        columns = column(c, shape.others, w.head_dim)
        totals = load_sums(w.kv, states, columns)
        for j in range(low, high):
            value = at(w.cache, values + _position_bytes(w) * j)
            for place in range(0, n_columns, 2 * LANES):
                prefetch(at(value, ahead + place // LANES * step))
            totals = add_products(load_weight(w.kv, weights, j), load(w.kv, value, columns), totals)
        ahead += n_columns * step // LANES
        store_sums(states, columns, totals)


@inline
def _chunk(w, chunk, n, keys, values, ahead, step):
    """Adds a chunk, whose keys and values begin `keys` and `values` bytes from `w.cache`, to the states of its n queries."""
    low, high, all_low, all_high = CHUNK, 0, 0, CHUNK               # what any of them sees, and what all of them see
    for i in range(n):
        low, high = min(low, chunk.low_Q[i]), max(high, chunk.high_Q[i])
        all_low, all_high = max(all_low, chunk.low_Q[i]), min(all_high, chunk.high_Q[i])
    for j in range(low // LANES * LANES, high, LANES):
        if n > FEW:
            _scores(w, chunk, n, LARGE, keys, j, ahead, step)
        else:
            _scores(w, chunk, n, SMALL, keys, j, ahead, step)
    for i in range(n):
        if chunk.low_Q[i] < chunk.high_Q[i]:
            _weights(w, chunk, i)
    # positions in order: before those that all queries see, those with the same sight (heads of a row) alone; then all; then alone again
    all_high, n_turns = max(all_low, all_high), 0
    for after in range(2):
        first = 0
        for i in range(1, n + 1):
            if i == n or chunk.low_Q[i] != chunk.low_Q[first] or chunk.high_Q[i] != chunk.high_Q[first]:
                low = max(all_high, chunk.low_Q[first]) if after else chunk.low_Q[first]
                high = chunk.high_Q[first] if after else min(all_low, chunk.high_Q[first])
                n_turns = _add_turn(chunk, n_turns, first, i - 1, low, high)
                first = i
        if not after:
            n_turns = _add_turn(chunk, n_turns, 0, n - 1, all_low, all_high)
    for turn in range(n_turns):
        first, last, low, high = chunk.turn_X4[turn, 0], chunk.turn_X4[turn, 1], chunk.turn_X4[turn, 2], chunk.turn_X4[turn, 3]
        if last - first < FEW:
            _values(w, chunk, SMALL, values, first, last, low, high, ahead, step)
        else:
            _values(w, chunk, LARGE, values, first, last, low, high, ahead, step)


@inline
def _add_turn(chunk, turn, first, last, low, high):
    """The number of the next turn: that of this one, if it has no positions."""
    chunk.turn_X4[turn, 0], chunk.turn_X4[turn, 1], chunk.turn_X4[turn, 2], chunk.turn_X4[turn, 3] = first, last, low, high
    return turn + 1 if low < high else turn


# ---- spans, rows, threads

@inline
def _state_bytes(w):
    return VALUES + 4 * w.head_dim


@inline
def _state_offset(w, t, head, span):
    """In bytes. A row's spans are counted from the one in which its range begins."""
    return _state_bytes(w) * (((t - w.first_row) * w.n_head + head) * w.n_spans + span - w.first_T[t] // SPAN)


@inline
def _seen(w, t0, t1):
    """The positions that any of rows t0..t1-1 sees: (first, end)."""
    low, high = FAR, 0
    for t in range(t0, t1):
        low, high = min(low, w.first_T[t]), max(high, w.end_T[t])
    return low, high


@inline
def _span(w, chunk, t0, t1, kv0, kv1, first, end, follows):
    """Positions first..end-1, all in one span, for the queries of rows t0..t1-1 and key/value heads kv0..kv1-1.

    `follows`: how many positions come after them, worth prefetching.
    """
    group, number_bytes = w.n_head // w.n_kv, w.kv.n_bytes // LANES
    head_bytes = number_bytes * w.head_dim
    for t in range(t0, t1):
        if w.first_T[t] < end and first < w.end_T[t]:
            for head in range(kv0 * group, kv1 * group):
                state = at(w.state, _state_offset(w, t, head, first // SPAN))
                store_f32(at(state, LARGEST), splat_f32(NEVER))
                for place in range(WEIGHT, _state_bytes(w), 64):
                    store_f32(at(state, place), splat_f32(ZERO))
    n_queries = (t1 - t0) * group
    for begin in range(first // CHUNK * CHUNK, end, CHUNK):
        block, more = w.block_B[begin // CHUNK], begin + CHUNK < end + follows
        following = w.block_B[begin // CHUNK + 1] - block if more else np.int64(0)
        for kv in range(kv0, kv1):
            i = 0
            while i < n_queries:
                n = min(MANY if n_queries - i > 2 * FEW else FEW, n_queries - i)
                for j in range(n):
                    t, head = t0 + (i + j) // group, kv * group + (i + j) % group
                    low, high = max(0, w.first_T[t] - begin), min(CHUNK, w.end_T[t] - begin)
                    chunk.low_Q[j], chunk.high_Q[j] = (low, high) if low < high else (CHUNK, 0)
                    chunk.query_Q[j] = 4 * w.head_dim * (t * w.n_head + head)
                    chunk.state_Q[j] = _state_offset(w, t, head, first // SPAN)
                # while computing, some queries prefetch their share of the next chunk's columns: half as fast without
                ahead = following + i * head_bytes // n_queries if more else 0
                _chunk(w, chunk, n, block + w.k_offset + kv * head_bytes, block + w.v_offset + kv * head_bytes, ahead,
                       LANES * number_bytes * n // n_queries if more else 0)
                i += n


@out_of_line
def _spans_of_thread(w, t0, t1, rows, heads, thread, n):
    """Computes a thread's share of the spans of rows t0..t1-1. They are divided in order, by how many positions they have."""
    chunk = Chunk(np.empty(MANY, np.int64), np.empty(MANY, np.int64), np.empty(MANY, np.int64), np.empty(MANY, np.int64),
                  np.empty((2 * MANY + 2, 4), np.int64))
    total = 0
    for t in range(t0, t1, rows):
        low, high = _seen(w, t, min(t + rows, t1))
        total += (high - low) * (w.n_kv // heads)
    done = 0
    for t in range(t0, t1, rows):
        low, high = _seen(w, t, min(t + rows, t1))
        for kv in range(0, w.n_kv, heads):
            for span in range(low // SPAN, (high - 1) // SPAN + 1):
                first, end = max(low, span * SPAN), min(high, (span + 1) * SPAN)
                if (2 * done + end - first) * n // (2 * total) == thread:         # whose share has the middle of the span
                    _span(w, chunk, t, min(t + rows, t1), kv, kv + heads, first, end, high - end)
                done += end - first


@out_of_line
def _merge_spans(w, t, head, out):
    """Merges the spans of a query, in order, into the weighted mean."""
    state = at(w.state, _state_offset(w, t, head, w.first_T[t] // SPAN))
    largest, total = load_f32(at(state, LARGEST)), load_f32(at(state, WEIGHT))
    for span in range(1, (w.end_T[t] - 1) // SPAN - w.first_T[t] // SPAN + 1):
        other = at(state, _state_bytes(w) * span)
        both = max_f32(largest, load_f32(at(other, LARGEST)))
        mine, its = exp16(sub_f32(largest, both)), exp16(sub_f32(load_f32(at(other, LARGEST)), both))
        largest, total = both, fma(load_f32(at(other, WEIGHT)), its, mul_f32(total, mine))
        for d in range(VALUES, _state_bytes(w), 64):
            store_f32(at(state, d), fma(load_f32(at(other, d)), its, mul_f32(load_f32(at(state, d)), mine)))
    inverse = splat_f32(ONE / sum_f32(total))
    for d in range(w.head_dim // LANES):
        store_f32(at(out, 64 * d), mul_f32(load_f32(at(state, VALUES + 64 * d)), inverse))


@kernel(parallel=True)
def attend_rows(kv, q_TNH, origin, block_B, k_offset, v_offset, n_kv, first_T, end_T, rows, wave, heads, state, buffer_NB, out_TNH, n):
    """`attend` on n threads. `wave` rows are computed at a time; the unit of work is `rows` of them and `heads` key/value heads."""
    n_tok, n_head, head_dim = q_TNH.shape
    q, cache, out = address(q_TNH), address(origin), address(out_TNH)
    states, buffers, n_spans = address(state), address(buffer_NB), state.shape[2]
    # every other step merges what the step before has left (one parallel loop for both compiles in less time)
    for step in range(2 * ((n_tok + wave - 1) // wave)):
        t0 = step // 2 * wave
        t1 = min(t0 + wave, n_tok)
        for part in prange(n):
            thread = np.int64(part)         # prange counts without a sign
            weights = at(buffers, 4 * BUFFER * thread)
            w = Work(q, cache, block_B, k_offset, v_offset, kv, first_T, end_T, n_kv, n_head, head_dim, states, t0, n_spans, weights,
                     at(weights, 4 * CHUNK * MANY))
            if step % 2 == 0:
                _spans_of_thread(w, t0, t1, rows, heads, thread, n)
            else:
                for i in range(thread * (t1 - t0) * n_head // n, (thread + 1) * (t1 - t0) * n_head // n):
                    _merge_spans(w, t0 + i // n_head, i % n_head, at(out, 4 * head_dim * (t0 * n_head + i)))
