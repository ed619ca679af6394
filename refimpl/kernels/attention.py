"""Attention over a cache of slots, with a softmax that holds at most 64 scores of a query at a time.

The twin of reference/attention.py. A query goes through its positions in chunks of 64 that begin at multiples of 64. It keeps the largest
score so far, the sum of its weights and the weighted sum of values; when a chunk brings a larger score, both sums are scaled down to it
(Milakov & Gimelshein 2018, arXiv:1805.02867). Every 512 positions (a span) it starts anew, and the spans are merged in order at the end.
All of that depends on the query's own range of positions and on nothing else. So threads may share out the spans of one query or the
queries of a prompt, and queries may share what they load: the bits stay the same.

A score is a sum in 16 lanes, products fused in order, and then of the lanes, neighbours first. A sum of weights has 16 lanes as well,
position modulo 16. Values are added in the order of positions.
"""

from typing import NamedTuple

import numpy as np
from numba import prange, types
from numba.extending import overload, register_jitable

from refimpl.kernels.machine.intrinsics import (
    add_f32,
    add_pairs,
    address,
    at,
    fma,
    largest_f32,
    load_f16,
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
from refimpl.kernels.machine.jit import INLINE, inline, kernel
from refimpl.kernels.machine.threads import current
from refimpl.kernels.machine.vecmath import exp16

CHUNK, SPAN = 64, 512
GROUP = 4 if ISA == "avx512" else 2         # queries whose sums stay in registers together: AVX-512 has twice as many, twice as long
QUERIES = 32                                # about as many share what is loaded of the cache
ROOM_BYTES = 4 << 20                        # for the states of the rows that are computed together
LARGEST, WEIGHT, VALUES = 0, 64, 128        # a state, in bytes: largest score and sum of weights in 16 lanes, sums of values (H)
BUFFER = 8 * CHUNK                          # float32 that a thread needs: weights of four queries, and the parts that scores are made of
SLOT, LOW, HIGH, AT_QUERY, AT_STATE, AHEAD, STEP, NOTES = 0, 64, 68, 72, 76, 80, 81, 88
FLOAT, HALF, INT64 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.int64)
FAR = 2 ** 62                               # beyond all positions
ZERO, ONE, NOTHING = np.float32(0), np.float32(1), np.float32(-np.inf)


class Work(NamedTuple):
    """What a thread needs to know: addresses in the call's arrays, sizes, and its own memory."""

    q: Pointer
    k: Pointer
    v: Pointer
    like: np.float32            # some number of the cache, for its type; float16 comes as uint16, as Numba does not know it
    size: int                   # its bytes
    first_T: np.ndarray
    end_T: np.ndarray
    n_slots: int
    n_kv: int
    n_head: int
    head_dim: int
    state: Pointer
    first_row: int              # of those whose states are kept at the moment
    n_spans: int                # states that there is room for, for each head of a row
    weights: Pointer            # of four queries, 64 each
    parts: Pointer              # that scores are summed from
    note: np.ndarray            # int64 (threads, NOTES). In bytes: slots of a chunk's positions, queries, states, what to read ahead
    thread: int


def attend(q_TNH: np.ndarray, k_SKH: np.ndarray, v_SKH: np.ndarray, first_T: np.ndarray, end_T: np.ndarray) -> np.ndarray:
    """Grouped-query attention, float32 (T, N, H). Query head n = k * G + g reads key/value head k; scores are not divided by sqrt(H).

    Keys and values are slots, float32 or float16: position p lies in slot p % S. Row t sees positions first_T[t]..end_T[t]-1, at least
    one and at most S. Raises ValueError for anything else, and where H is not a multiple of 16.
    """
    n_tok, n_head, head_dim = q_TNH.shape if q_TNH.ndim == 3 else (0, 0, 0)
    n_slots, n_kv, width = k_SKH.shape if k_SKH.ndim == 3 else (0, 0, 0)
    if q_TNH.ndim != 3 or not n_slots or q_TNH.dtype != FLOAT or k_SKH.shape != v_SKH.shape or k_SKH.dtype != v_SKH.dtype:
        raise ValueError(f"expected float32 queries (T, N, H), keys and values (S, K, H), got {q_TNH.dtype} {q_TNH.shape}, "
                         f"{k_SKH.dtype} {k_SKH.shape}, {v_SKH.dtype} {v_SKH.shape}")
    half = k_SKH.dtype == HALF
    if not (half or k_SKH.dtype == FLOAT) or not (k_SKH.flags.c_contiguous and v_SKH.flags.c_contiguous):
        raise ValueError(f"expected contiguous keys and values in float16 or float32, got {k_SKH.dtype}, strides {k_SKH.strides}")
    if not width or width % LANES or width != head_dim or not n_kv or not n_head or n_head % n_kv:
        raise ValueError(f"{n_head} query heads of {head_dim} do not fit {n_kv} key heads of {width}, or {width} is no multiple of {LANES}")
    if first_T.dtype != INT64 or end_T.dtype != INT64 or first_T.shape != (n_tok,) or end_T.shape != (n_tok,):
        raise ValueError(f"expected {n_tok} positions in int64 twice, got {first_T.dtype} {first_T.shape}, {end_T.dtype} {end_T.shape}")
    first_T, end_T, n = np.ascontiguousarray(first_T), np.ascontiguousarray(end_T), current()
    bad, rows, wave, heads, n_spans = plan(first_T, end_T, n_slots, n_head, n_kv, head_dim, n)
    if bad < n_tok:
        raise ValueError(f"row {bad} is to see positions {first_T[bad]} to {end_T[bad]}: expected 1 to {n_slots} of them, from 0 on")
    out_TNH = np.empty(q_TNH.shape, FLOAT)
    if n_tok:
        keys, values = (k_SKH.view(np.uint16), v_SKH.view(np.uint16)) if half else (k_SKH, v_SKH)
        # room is made here, because in a kernel it is given back after the last use of the array, and an address of it does not count
        state = np.empty((wave, n_head, n_spans, VALUES // 4 + head_dim), FLOAT)
        attend_rows(np.ascontiguousarray(q_TNH), keys, values, first_T, end_T, rows, wave, heads, state, np.empty((n, BUFFER), FLOAT),
                    np.empty((n, NOTES), INT64), out_TNH, n)
    return out_TNH


@kernel()
def plan(first_T, end_T, n_slots, n_head, n_kv, head_dim, n):
    """(first row whose range is none, or T; rows, wave and heads of `attend_rows`; spans of the row that has most)."""
    n_tok, low, high, n_spans = first_T.size, FAR, 0, 1
    for t in range(n_tok):
        first, end = first_T[t], end_T[t]
        if first < 0 or end <= first or end > FAR or end - first > n_slots:
            return t, 0, 0, 0, 0
        low, high, n_spans = min(low, first), max(high, end), max(n_spans, (end - 1) // SPAN - first // SPAN + 1)
    rows = max(1, QUERIES * n_kv // n_head) if high - low <= n_slots else 1        # so far apart, there would be nothing to share
    row_bytes = n_head * n_spans * (VALUES + 4 * head_dim)
    wave = min(n_tok, rows * max(1, ROOM_BYTES // (rows * row_bytes)))
    # read once, the cache is read fastest from front to back, all heads of a position together; a prompt comes back to it from the nearer
    # caches, where one head is enough to hold
    heads = n_kv if n_tok <= rows else 1
    while heads % 2 == 0 and n_spans * (n_kv // heads) < 3 * n:
        heads //= 2
    return n_tok, rows, wave, heads, n_spans


# ---- few queries and a chunk: scores

def _load_numbers(pointer, like):
    """16 numbers of the cache, as float32."""
    return load_f16(pointer) if like.dtype == np.uint16 else load_f32(pointer)


@overload(_load_numbers, jit_options=INLINE)
def _load(pointer, like):
    if like is types.uint16:
        return lambda pointer, like: load_f16(pointer)
    return lambda pointer, like: load_f32(pointer)


@inline
def _query(w, i):
    return at(w.q, w.note[w.thread, AT_QUERY + i])


@inline
def _key(w, j):
    return at(w.k, w.note[w.thread, SLOT + j])


@inline
def _value(w, j):
    return at(w.v, w.note[w.thread, SLOT + j])


@inline
def _state(w, i):
    return at(w.state, w.note[w.thread, AT_STATE + i])


@inline
def _parts_2(w, q0, q1, k0, k1, out):
    """Two queries times two keys: 8 parts of each score, first those of q0 at `out`. Meanwhile reads ahead in the keys."""
    a00 = a01 = a10 = a11 = splat_f32(ZERO)
    ahead, step = w.note[w.thread, AHEAD], w.note[w.thread, STEP]
    for d in range(w.head_dim // LANES):
        key0, key1 = _load_numbers(at(k0, LANES * w.size * d), w.like), _load_numbers(at(k1, LANES * w.size * d), w.like)
        prefetch(at(k0, ahead))
        prefetch(at(k1, ahead))
        ahead += step
        query = load_f32(at(q0, 64 * d))
        a00, a01 = fma(query, key0, a00), fma(query, key1, a01)
        query = load_f32(at(q1, 64 * d))
        a10, a11 = fma(query, key0, a10), fma(query, key1, a11)
    store_f32(out, add_pairs(a00, a01))
    store_f32(at(out, 512), add_pairs(a10, a11))


@inline
def _parts_4(w, q0, q1, q2, q3, k0, k1, k2, k3, out):
    """The same for four queries and four keys: 4 parts of each score."""
    a00 = a01 = a02 = a03 = a10 = a11 = a12 = a13 = splat_f32(ZERO)
    a20 = a21 = a22 = a23 = a30 = a31 = a32 = a33 = splat_f32(ZERO)
    ahead, step = w.note[w.thread, AHEAD], w.note[w.thread, STEP]
    for d in range(w.head_dim // LANES):
        key0, key1 = _load_numbers(at(k0, LANES * w.size * d), w.like), _load_numbers(at(k1, LANES * w.size * d), w.like)
        key2, key3 = _load_numbers(at(k2, LANES * w.size * d), w.like), _load_numbers(at(k3, LANES * w.size * d), w.like)
        prefetch(at(k0, ahead))
        prefetch(at(k1, ahead))
        prefetch(at(k2, ahead))
        prefetch(at(k3, ahead))
        ahead += step
        query = load_f32(at(q0, 64 * d))
        a00, a01, a02, a03 = fma(query, key0, a00), fma(query, key1, a01), fma(query, key2, a02), fma(query, key3, a03)
        query = load_f32(at(q1, 64 * d))
        a10, a11, a12, a13 = fma(query, key0, a10), fma(query, key1, a11), fma(query, key2, a12), fma(query, key3, a13)
        query = load_f32(at(q2, 64 * d))
        a20, a21, a22, a23 = fma(query, key0, a20), fma(query, key1, a21), fma(query, key2, a22), fma(query, key3, a23)
        query = load_f32(at(q3, 64 * d))
        a30, a31, a32, a33 = fma(query, key0, a30), fma(query, key1, a31), fma(query, key2, a32), fma(query, key3, a33)
    store_f32(out, add_pairs(add_pairs(a00, a01), add_pairs(a02, a03)))
    store_f32(at(out, 256), add_pairs(add_pairs(a10, a11), add_pairs(a12, a13)))
    store_f32(at(out, 512), add_pairs(add_pairs(a20, a21), add_pairs(a22, a23)))
    store_f32(at(out, 768), add_pairs(add_pairs(a30, a31), add_pairs(a32, a33)))


@inline
def _sum_of_4(p):
    return add_pairs(add_pairs(load_f32(p), load_f32(at(p, 64))), add_pairs(load_f32(at(p, 128)), load_f32(at(p, 192))))


@inline
def _scores_2(w, n, j):
    """Scores of n queries (1 or 2) for positions j..j+15 of the chunk, to `weights`."""
    q0, q1 = _query(w, 0), _query(w, n - 1)
    for g in range(0, LANES, 2):
        _parts_2(w, q0, q1, _key(w, j + g), _key(w, j + g + 1), at(w.parts, 32 * g))
    for i in range(2):
        store_f32(at(w.weights, 256 * i + 4 * j), add_pairs(_sum_of_4(at(w.parts, 512 * i)), _sum_of_4(at(w.parts, 512 * i + 256))))


@inline
def _scores_4(w, n, j):
    """Scores of n queries (1 to 4)."""
    q0, q1, q2, q3 = _query(w, 0), _query(w, min(1, n - 1)), _query(w, min(2, n - 1)), _query(w, n - 1)
    for g in range(0, LANES, 4):
        _parts_4(w, q0, q1, q2, q3, _key(w, j + g), _key(w, j + g + 1), _key(w, j + g + 2), _key(w, j + g + 3), at(w.parts, 16 * g))
    for i in range(4):
        store_f32(at(w.weights, 256 * i + 4 * j), _sum_of_4(at(w.parts, 256 * i)))


# ---- weights

@inline
def _blank(scores, first, end):
    for j in range(first, end, LANES):
        store_f32_part(at(scores, 4 * j), splat_f32(NOTHING), min(LANES, end - j))


@inline
def _weights(w, i):
    """Makes weights of query i's scores for the chunk, 0 where it sees nothing, and brings its state to the new largest score."""
    scores, state = at(w.weights, 256 * i), _state(w, i)
    _blank(scores, 0, w.note[w.thread, LOW + i])
    _blank(scores, w.note[w.thread, HIGH + i], CHUNK)
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
def _values_2(w, first, last, low, high):
    """Adds weight times value for positions low..high-1 of the chunk to the sums of queries `first` to `last` (at most 2).

    32 columns at a time. A single query is computed twice, and so are 16 last columns: the same numbers go to the same place twice.
    """
    state0, state1, weight0, weight1 = _state(w, first), _state(w, last), at(w.weights, 256 * first), at(w.weights, 256 * last)
    ahead, step = w.note[w.thread, AHEAD], w.note[w.thread, STEP]
    for c in range(0, w.head_dim, 2 * LANES):
        d = min(c + LANES, w.head_dim - LANES)
        sum0, sum1 = at(state0, VALUES + 4 * c), at(state1, VALUES + 4 * c)
        a00, a01, a10, a11 = load_f32(sum0), load_f32(at(sum0, 4 * (d - c))), load_f32(sum1), load_f32(at(sum1, 4 * (d - c)))
        for j in range(low, high):
            value = _value(w, j)
            value0, value1 = _load_numbers(at(value, w.size * c), w.like), _load_numbers(at(value, w.size * d), w.like)
            prefetch(at(value, ahead))
            w0, w1 = splat_from(at(weight0, 4 * j)), splat_from(at(weight1, 4 * j))
            a00, a01, a10, a11 = fma(w0, value0, a00), fma(w0, value1, a01), fma(w1, value0, a10), fma(w1, value1, a11)
        ahead += 2 * step
        store_f32(sum0, a00)
        store_f32(at(sum0, 4 * (d - c)), a01)
        store_f32(sum1, a10)
        store_f32(at(sum1, 4 * (d - c)), a11)


@inline
def _values_4(w, first, last, low, high):
    """The same for at most 4 queries, 64 columns at a time."""
    i1, i2 = min(first + 1, last), min(first + 2, last)
    state0, state1, state2, state3 = _state(w, first), _state(w, i1), _state(w, i2), _state(w, last)
    weight0, weight1 = at(w.weights, 256 * first), at(w.weights, 256 * i1)
    weight2, weight3 = at(w.weights, 256 * i2), at(w.weights, 256 * last)
    ahead, step = w.note[w.thread, AHEAD], w.note[w.thread, STEP]
    for c in range(0, w.head_dim, 4 * LANES):
        end = w.head_dim - LANES
        d, e, f = min(c + LANES, end), min(c + 2 * LANES, end), min(c + 3 * LANES, end)
        a00, a01, a02, a03 = _sums(state0, c), _sums(state0, d), _sums(state0, e), _sums(state0, f)
        a10, a11, a12, a13 = _sums(state1, c), _sums(state1, d), _sums(state1, e), _sums(state1, f)
        a20, a21, a22, a23 = _sums(state2, c), _sums(state2, d), _sums(state2, e), _sums(state2, f)
        a30, a31, a32, a33 = _sums(state3, c), _sums(state3, d), _sums(state3, e), _sums(state3, f)
        for j in range(low, high):
            value = _value(w, j)
            value0, value1 = _load_numbers(at(value, w.size * c), w.like), _load_numbers(at(value, w.size * d), w.like)
            value2, value3 = _load_numbers(at(value, w.size * e), w.like), _load_numbers(at(value, w.size * f), w.like)
            prefetch(at(value, ahead))
            prefetch(at(value, ahead + 2 * step))
            x = splat_from(at(weight0, 4 * j))
            a00, a01, a02, a03 = fma(x, value0, a00), fma(x, value1, a01), fma(x, value2, a02), fma(x, value3, a03)
            x = splat_from(at(weight1, 4 * j))
            a10, a11, a12, a13 = fma(x, value0, a10), fma(x, value1, a11), fma(x, value2, a12), fma(x, value3, a13)
            x = splat_from(at(weight2, 4 * j))
            a20, a21, a22, a23 = fma(x, value0, a20), fma(x, value1, a21), fma(x, value2, a22), fma(x, value3, a23)
            x = splat_from(at(weight3, 4 * j))
            a30, a31, a32, a33 = fma(x, value0, a30), fma(x, value1, a31), fma(x, value2, a32), fma(x, value3, a33)
        ahead += 4 * step
        _keep(state0, c, d, e, f, a00, a01, a02, a03)
        _keep(state1, c, d, e, f, a10, a11, a12, a13)
        _keep(state2, c, d, e, f, a20, a21, a22, a23)
        _keep(state3, c, d, e, f, a30, a31, a32, a33)


@inline
def _sums(state, column):
    return load_f32(at(state, VALUES + 4 * column))


@inline
def _keep(state, c, d, e, f, at_c, at_d, at_e, at_f):
    store_f32(at(state, VALUES + 4 * c), at_c)
    store_f32(at(state, VALUES + 4 * d), at_d)
    store_f32(at(state, VALUES + 4 * e), at_e)
    store_f32(at(state, VALUES + 4 * f), at_f)


_scores, _values = (_scores_4, _values_4) if GROUP == 4 else (_scores_2, _values_2)


@inline
def _chunk(w, n):
    """A chunk of the n queries in the notes."""
    note, thread = w.note, w.thread
    low, high, all_low, all_high = CHUNK, 0, 0, CHUNK               # what any of them sees, and what all of them see
    for i in range(n):
        low, high = min(low, note[thread, LOW + i]), max(high, note[thread, HIGH + i])
        all_low, all_high = max(all_low, note[thread, LOW + i]), min(all_high, note[thread, HIGH + i])
    for j in range(low // LANES * LANES, high, LANES):
        _scores(w, n, j)
    for i in range(n):
        if note[thread, LOW + i] < note[thread, HIGH + i]:
            _weights(w, i)
    # each for itself before the positions that all of them see, then all together, then each for itself again
    all_high = max(all_low, all_high)
    for piece in range(2 * n + 1):
        i = piece % (n + 1)
        if piece < n:
            first, last, begin, end = i, i, note[thread, LOW + i], min(all_low, note[thread, HIGH + i])
        elif piece == n:
            first, last, begin, end = 0, n - 1, all_low, all_high
        else:
            first, last, begin, end = i, i, max(all_high, note[thread, LOW + i]), note[thread, HIGH + i]
        if begin < end:
            _values(w, first, last, begin, end)


# ---- from there to the whole

@inline
def _state_bytes(w):
    return VALUES + 4 * w.head_dim


@inline
def _place_of_state(w, t, head, span):
    """In bytes. A row's spans are counted from the one in which its range begins."""
    return _state_bytes(w) * (((t - w.first_row) * w.n_head + head) * w.n_spans + span - w.first_T[t] // SPAN)


@inline
def _seen(w, t0, t1):
    """The positions that rows t0..t1-1 see between them: (first, end)."""
    low, high = FAR, 0
    for t in range(t0, t1):
        low, high = min(low, w.first_T[t]), max(high, w.end_T[t])
    return low, high


@inline
def _span(w, t0, t1, kv0, kv1, first, end, follows):
    """Positions first..end-1, all in one span, for the queries of rows t0..t1-1 and key/value heads kv0..kv1-1.

    `follows`: how many positions come after them, worth reading ahead.
    """
    note, thread, group, head_bytes = w.note, w.thread, w.n_head // w.n_kv, w.size * w.head_dim
    for t in range(t0, t1):
        if w.first_T[t] < end and first < w.end_T[t]:
            for head in range(kv0 * group, kv1 * group):
                state = at(w.state, _place_of_state(w, t, head, first // SPAN))
                store_f32(at(state, LARGEST), splat_f32(NOTHING))
                for place in range(WEIGHT, _state_bytes(w), 64):
                    store_f32(at(state, place), splat_f32(ZERO))
    n_queries = (t1 - t0) * group
    n_groups = (n_queries + GROUP - 1) // GROUP
    for begin in range(first // CHUNK * CHUNK, end, CHUNK):
        more = begin + CHUNK < end + follows
        for kv in range(kv0, kv1):
            slot = begin % w.n_slots
            for j in range(CHUNK):
                note[thread, SLOT + j] = (slot * w.n_kv + kv) * head_bytes
                slot = slot + 1 if slot + 1 < w.n_slots else 0
            for i in range(0, n_queries, GROUP):
                n = min(GROUP, n_queries - i)
                for j in range(n):
                    t, head = t0 + (i + j) // group, kv * group + (i + j) % group
                    low, high = max(0, w.first_T[t] - begin), min(CHUNK, w.end_T[t] - begin)
                    seen = low < high
                    note[thread, LOW + j], note[thread, HIGH + j] = low if seen else CHUNK, high if seen else 0
                    note[thread, AT_QUERY + j] = 4 * w.head_dim * (t * w.n_head + head)
                    note[thread, AT_STATE + j] = _place_of_state(w, t, head, first // SPAN)
                # while they compute, the groups fetch the next chunk, each its share of the columns: half as fast without
                note[thread, AHEAD] = CHUNK * w.n_kv * head_bytes + i // GROUP * head_bytes // n_groups if more else 0
                note[thread, STEP] = LANES * w.size // n_groups if more else 0
                _chunk(w, n)


@register_jitable(error_model="numpy")
def _spans_of_thread(w, t0, t1, rows, heads, n):
    """Does one of n shares of the spans of rows t0..t1-1. They are shared out in order, and by how many positions they have."""
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
                if (2 * done + end - first) * n // (2 * total) == w.thread:
                    _span(w, t, min(t + rows, t1), kv, kv + heads, first, end, high - end)
                done += end - first


@register_jitable(error_model="numpy")
def _merge_spans(w, t, head, out):
    """The spans of a query, in order, and from them the weighted mean."""
    state = at(w.state, _place_of_state(w, t, head, w.first_T[t] // SPAN))
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
def attend_rows(q_TNH, k_SKH, v_SKH, first_T, end_T, rows, wave, heads, state, buffer_NB, note_NX, out_TNH, n):
    """`attend` on n threads. `wave` rows are computed at a time; `rows` of them and `heads` key/value heads make up a piece of work."""
    n_tok, n_head, head_dim = q_TNH.shape
    n_slots, n_kv, _ = k_SKH.shape
    q, k, v, out = address(q_TNH), address(k_SKH), address(v_SKH), address(out_TNH)
    states, buffers, like, size, n_spans = address(state), address(buffer_NB), k_SKH[0, 0, 0], k_SKH.itemsize, state.shape[2]
    # every other step merges what the one before has left (one parallel loop for both compiles in less time)
    for step in range(2 * ((n_tok + wave - 1) // wave)):
        t0 = step // 2 * wave
        t1 = min(t0 + wave, n_tok)
        for part in prange(n):
            thread = np.int64(part)         # prange counts without a sign
            w = Work(q, k, v, like, size, first_T, end_T, n_slots, n_kv, n_head, head_dim, states, t0, n_spans,
                     at(buffers, 4 * BUFFER * thread), at(buffers, 4 * BUFFER * thread + 16 * CHUNK), note_NX, thread)
            if step % 2 == 0:
                _spans_of_thread(w, t0, t1, rows, heads, n)
            else:
                for i in range(thread * (t1 - t0) * n_head // n, (thread + 1) * (t1 - t0) * n_head // n):
                    _merge_spans(w, t0 + i // n_head, i % n_head, at(out, 4 * head_dim * (t0 * n_head + i)))
