"""Attention over keys and values in blocks, with a softmax that holds at most 64 scores of a query at a time.

A query goes through its positions in chunks of 64 that begin at multiples of 64. It keeps the largest score so far, the sum of its weights
and the weighted sum of values; when a chunk brings a larger score, both sums are scaled down (Milakov & Gimelshein 2018,
arXiv:1805.02867). Every 512 positions (a span) it starts anew, and at the end the spans are merged in order. All of that depends only on
the query's own range of positions. So threads may divide the spans of one query or the queries of a prompt, and queries may share what
they load: the bits stay the same.

A score is a sum in 16 lanes, products fused in order, then across lanes, neighbours first. A sum of weights has 16 lanes as well, position
modulo 16. Values are added in the order of positions.

GROUP queries are computed together, and with them GROUP keys, or GROUP columns of values: a tuple has a number for each of these, and a
tuple of tuples for each query and each of these.
"""

from typing import NamedTuple

import numpy as np
from numba import prange

from refimpl.kernels.cores.threads import current
from refimpl.kernels.machine.intrinsics import (
    add_f32,
    add_pairs,
    address,
    at,
    fma,
    largest_f32,
    load_f32,
    max_f32,
    mul_f32,
    prefetch,
    splat_f32,
    splat_from,
    store_f32,
    store_f32_part,
    sub_f32,
    sum_f32,
)
from refimpl.kernels.machine.isa import ISA, LANES, Pointer
from refimpl.kernels.machine.jit import inline, kernel, out_of_line, per_row
from refimpl.kernels.machine.unpack import FORMATS, WeightFormat, load_floats
from refimpl.kernels.machine.vecmath import exp16

CHUNK, SPAN = 64, 512
GROUP = 4 if ISA == "avx512" else 2         # GROUP * GROUP sums stay in registers: AVX-512 has twice as many, twice as long
EACH = tuple(range(GROUP))
QUERIES = 32                                # about as many share what is loaded of the cache
ROOM_BYTES = 4 << 20                        # for the states of the rows that are computed together
LARGEST, WEIGHT, VALUES = 0, 64, 128        # a state, in bytes: largest score and sum of weights in 16 lanes, sums of values (H)
PART_BYTES = 64 * LANES // GROUP            # of a query: 16 vectors of products, summed by GROUPs of keys, of which 16 scores are made
BUFFER = 8 * CHUNK                          # float32 that a thread needs: weights of GROUP queries, and parts of their scores
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
    weights: Pointer            # of GROUP queries, 64 each; scores at first
    parts: Pointer


class Chunk(NamedTuple):
    """The GROUP queries that are computed over 64 positions: offsets in bytes, and the range of the 64 that each query sees."""

    query_G: np.ndarray
    state_G: np.ndarray
    low_G: np.ndarray
    high_G: np.ndarray
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
        attend_rows(FORMATS["exact"]["F16" if kept.dtype == HALF else "F32"], np.ascontiguousarray(q_TNH), kept.origin, kept.offset_B,
                    kept.k_offset, kept.v_offset, n_kv, first_T, end_T, rows, wave, heads, state, np.empty((n, BUFFER), FLOAT), out_TNH, n)
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
    return at(w.q, chunk.query_G[min(i, last)])


@per_row
def state_address(w, chunk, i, last):
    """Where the state of query i begins, or of query `last`."""
    return at(w.state, chunk.state_G[min(i, last)])


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
    """The first of 16 columns, `first` + 16 i, or else the last that there are."""
    return min(first + LANES * i, end - LANES)


@per_row
def load(kv, pointer, i):
    """Numbers i..i+15 of a key or value."""
    return load_floats(kv, at(pointer, i * (kv.n_bytes // LANES)))


@per_row
def load_query(pointer, i):
    """Numbers i..i+15 of a query."""
    return load_f32(at(pointer, 4 * i))


@per_row
def load_weight(pointer, j):
    """The weight of position j, in every lane."""
    return splat_from(at(pointer, 4 * j))


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
def load_sum(state, column):
    """The sums of values in 16 columns."""
    return load_f32(at(state, VALUES + 4 * column))


@per_row(shared=("columns",))
def load_sums(state, columns):
    """The sums of values of a query."""
    return load_sum(state, columns)


@inline
def _sum_of_2(v):
    return add_pairs(v[0], v[1])


@inline
def _sum_of_4(v):
    return add_pairs(add_pairs(v[0], v[1]), add_pairs(v[2], v[3]))


@inline
def _sum_of_8(v):
    return add_pairs(_sum_of_4(v[:4]), _sum_of_4(v[4:]))


SUM_OF = {2: _sum_of_2, 4: _sum_of_4, 8: _sum_of_8}         # neighbours first, as a tree
_sum_of_keys, _sum_of_parts, PARTS = SUM_OF[GROUP], SUM_OF[LANES // GROUP], tuple(range(0, LANES * LANES // GROUP, LANES))


@per_row
def sum_of_keys(v):
    """A query's products with GROUP keys: 16 / GROUP partial sums for each key."""
    return _sum_of_keys(v)


# ---- GROUP queries and a chunk: scores

@inline
def _position_bytes(w):
    """From the key, or value, of a head at one position to the next position's."""
    return w.n_kv * w.head_dim * (w.kv.n_bytes // LANES)


@inline
def _scores(w, chunk, n, first, j, ahead, step):
    """Scores of n queries (at most GROUP) for positions j..j+15 of the chunk, to `weights`; its keys begin at `first`. Meanwhile prefetches
    keys `ahead` bytes further on, `step` bytes for 16 columns.
    """
    queries = query_address(w, chunk, EACH, n - 1)
    for g in range(0, LANES, GROUP):
        keys, place = key_address(w, first, plus(EACH, j + g)), ahead
        totals = repeat(EACH, repeat(EACH, splat_f32(ZERO)))
        for c in range(0, w.head_dim, LANES):
            key = load(w.kv, keys, c)
            for i in range(GROUP):
                prefetch(at(keys[i], place))
            place += step
            totals = add_products(load_query(queries, c), key, totals)
        sums = sum_of_keys(totals)
        for i in range(GROUP):
            store_f32(at(w.parts, PART_BYTES * i + 64 * (g // GROUP)), sums[i])
    for i in range(GROUP):
        store_f32(at(w.weights, 4 * (CHUNK * i + j)), _sum_of_parts(load_query(at(w.parts, PART_BYTES * i), PARTS)))


# ---- weights

@inline
def _blank(scores, first, end):
    for j in range(first, end, LANES):
        store_f32_part(at(scores, 4 * j), splat_f32(NEVER), min(LANES, end - j))


@inline
def _weights(w, chunk, i):
    """Turns query i's scores for the chunk into weights, 0 where it sees nothing, and updates its state to the new largest score."""
    scores, state = at(w.weights, 4 * CHUNK * i), at(w.state, chunk.state_G[i])
    _blank(scores, 0, chunk.low_G[i])
    _blank(scores, chunk.high_G[i], CHUNK)
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

@inline
def _values(w, chunk, values, first, last, low, high, ahead, step):
    """Adds weight times value for positions low..high-1 of the chunk to the sums of queries `first` to `last`, at most GROUP. Its values
    begin at `values`.

    16 * GROUP columns at a time. Where there are fewer queries or columns, the last is computed again: the same numbers go to the same
    place.
    """
    states, weights = state_address(w, chunk, plus(EACH, first), last), weight_address(w, plus(EACH, first), last)
    for c in range(0, w.head_dim, LANES * GROUP):
        columns = column(c, EACH, w.head_dim)
        totals = load_sums(states, columns)
        for j in range(low, high):
            value = at(w.cache, values + _position_bytes(w) * j)
            for i in range(0, GROUP, 2):
                prefetch(at(value, ahead + i * step))
            totals = add_products(load_weight(weights, j), load(w.kv, value, columns), totals)
        ahead += GROUP * step
        for i in range(GROUP):
            for k in range(GROUP):
                store_f32(at(states[i], VALUES + 4 * columns[k]), totals[i][k])


@inline
def _chunk(w, chunk, n, keys, values, ahead, step):
    """Adds a chunk, whose keys and values begin `keys` and `values` bytes from `w.cache`, to the states of its n queries."""
    low, high, all_low, all_high = CHUNK, 0, 0, CHUNK               # what any of them sees, and what all of them see
    for i in range(n):
        low, high = min(low, chunk.low_G[i]), max(high, chunk.high_G[i])
        all_low, all_high = max(all_low, chunk.low_G[i]), min(all_high, chunk.high_G[i])
    for j in range(low // LANES * LANES, high, LANES):
        _scores(w, chunk, n, keys, j, ahead, step)
    for i in range(n):
        if chunk.low_G[i] < chunk.high_G[i]:
            _weights(w, chunk, i)
    # positions in order: before those that all queries see, each query alone; then all together; then each alone
    all_high = max(all_low, all_high)
    for i in range(n):
        _set_turn(chunk, i, i, i, chunk.low_G[i], min(all_low, chunk.high_G[i]))
        _set_turn(chunk, n + 1 + i, i, i, max(all_high, chunk.low_G[i]), chunk.high_G[i])
    _set_turn(chunk, n, 0, n - 1, all_low, all_high)
    for turn in range(2 * n + 1):
        first, last, low, high = chunk.turn_X4[turn, 0], chunk.turn_X4[turn, 1], chunk.turn_X4[turn, 2], chunk.turn_X4[turn, 3]
        if low < high:
            _values(w, chunk, values, first, last, low, high, ahead, step)


@inline
def _set_turn(chunk, turn, first, last, low, high):
    chunk.turn_X4[turn, 0], chunk.turn_X4[turn, 1], chunk.turn_X4[turn, 2], chunk.turn_X4[turn, 3] = first, last, low, high


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
    n_groups = (n_queries + GROUP - 1) // GROUP
    for begin in range(first // CHUNK * CHUNK, end, CHUNK):
        block, more = w.block_B[begin // CHUNK], begin + CHUNK < end + follows
        following = w.block_B[begin // CHUNK + 1] - block if more else np.int64(0)
        for kv in range(kv0, kv1):
            for i in range(0, n_queries, GROUP):
                n = min(GROUP, n_queries - i)
                for j in range(n):
                    t, head = t0 + (i + j) // group, kv * group + (i + j) % group
                    low, high = max(0, w.first_T[t] - begin), min(CHUNK, w.end_T[t] - begin)
                    chunk.low_G[j], chunk.high_G[j] = (low, high) if low < high else (CHUNK, 0)
                    chunk.query_G[j] = 4 * w.head_dim * (t * w.n_head + head)
                    chunk.state_G[j] = _state_offset(w, t, head, first // SPAN)
                # while computing, each group of queries prefetches its share of the next chunk's columns: half as fast without
                ahead = following + i // GROUP * head_bytes // n_groups if more else 0
                _chunk(w, chunk, n, block + w.k_offset + kv * head_bytes, block + w.v_offset + kv * head_bytes, ahead,
                       LANES * number_bytes // n_groups if more else 0)


@out_of_line
def _spans_of_thread(w, t0, t1, rows, heads, thread, n):
    """Computes a thread's share of the spans of rows t0..t1-1. They are divided in order, by how many positions they have."""
    chunk = Chunk(np.empty(GROUP, np.int64), np.empty(GROUP, np.int64), np.empty(GROUP, np.int64), np.empty(GROUP, np.int64),
                  np.empty((2 * GROUP + 1, 4), np.int64))
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
                     at(weights, 16 * CHUNK))
            if step % 2 == 0:
                _spans_of_thread(w, t0, t1, rows, heads, thread, n)
            else:
                for i in range(thread * (t1 - t0) * n_head // n, (thread + 1) * (t1 - t0) * n_head // n):
                    _merge_spans(w, t0 + i // n_head, i % n_head, at(out, 4 * head_dim * (t0 * n_head + i)))
