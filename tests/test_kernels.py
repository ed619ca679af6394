"""Every kernel beside its twin in the reference, compiled and as plain Python, in one table; and the same bits however a call is cut up."""

import contextlib
import importlib
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from kernel_cases import INTEGER, TYPES, causal, in_blocks, matrix, often, rows, same

from refimpl.formats.matrix import Matrix
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.kernels.machine import intrinsics as simd
from refimpl.kernels.machine import jit
from refimpl.kernels.machine.intrinsics import address
from refimpl.kernels.machine.tiles import tiled, units
from refimpl.kernels.machine.unpack import FORMATS, codes
from refimpl.kernels.matmul_chosen import matmul_chosen

HERE, PAIRS = Path(jit.__file__).parent.parent, ("matmul", "attention", "moe", "matmul_chosen", "ops", "activations", "tower_attention")
NO_TWIN = {         # functions of the reference that have none, and why
    "ops.gelu": "only inside `gated`", "ops.softmax": "only inside `attend` and `route`", "ops.fma": "an intrinsic",
    "ops.rope_frequencies": "once per model", "ops.rope_angles": "once per call", "matmul.integer_parts": "the reference's own unpacking",
    "attention.attend_one": "part of `attend`",
    "activations.quantize_activations": "part of the products, whose bits are those of the reference",
}


def twins(name: str):
    return (importlib.import_module(f"refimpl.{part}.{name}") for part in ("kernels", "reference"))


def functions(module) -> dict:
    """Public functions that a module defines and Python calls: not those that are parts of kernels."""
    return {name: f for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__
            and not name.startswith("_") and f not in jit.PARTS}


@contextlib.contextmanager
def as_plain_python(called: set):
    """Every kernel replaced by its Python source, whose calls are noted. Numbers overflow there as silently as in machine code."""
    kept, modules = [], [importlib.import_module(f"refimpl.kernels.{name}") for name in (*PAIRS, "machine.tiles")]
    for name, dispatcher in jit.KERNELS.items():
        def plain(*args, name=name, source=dispatcher.py_func):
            called.add(name)
            return source(*args)
        for module in modules:
            for attribute, value in list(vars(module).items()):
                if value is dispatcher:
                    kept.append((module, attribute, value))
                    setattr(module, attribute, plain)
    try:
        with np.errstate(over="ignore"):
            yield
    finally:
        for module, attribute, value in kept:
            setattr(module, attribute, value)


# ---- the table: for every twin, arguments of both sides and what their results must have in common

def product_case(name: str, block: str, n_tok: int, n_out: int, width: int):
    ours, theirs = (getattr(module, name) for module in twins("matmul"))
    w, x = matrix(block, n_out, width), rows(n_tok, width)
    if name == "matmul_q8" and block in INTEGER:
        bound = 0
    else:
        bound = width * np.finfo(np.float32).eps * np.einsum("TD,OD->TO", np.abs(x).astype(np.float64), np.abs(w.float32()))
    return ours, (x, tiled(w, 1)), theirs, (x, w), bound


def experts_case(arithmetic: str, block: str, down: str, n_tok: int, width: int = 256, n_hidden: int = 64, n_expert: int = 6):
    """Expert 1 gets nobody; with an odd seed all tokens go to experts 0 and 2."""
    kernels, reference = twins("moe")
    rng = np.random.default_rng(n_tok)
    id_TX = np.stack([rng.permutation([0, 2, 3, 4, 5])[:2] if n_tok % 2 == 0 else np.array([0, 2]) for _ in range(n_tok)] or
                     [np.zeros(2, np.int64)])[:n_tok].astype(np.int64)
    weight_TX, x = rng.uniform(0.1, 1, (n_tok, 2)).astype(np.float32), rows(n_tok, width)
    gate, up, back = (matrix(t, n_expert, *shape, seed=i) for i, (t, shape) in enumerate(
        ((block, (n_hidden, width)), (block, (n_hidden, width)), (down, (width, n_hidden)))))
    return (kernels.run_experts, (arithmetic, x, id_TX, weight_TX, *(tiled(m, 1) for m in (gate, up, back))),
            reference.run_experts, (arithmetic, x, id_TX, weight_TX, gate, up, back), 2e-5)


def chosen_case(arithmetic: str, block: str, n_tok: int, n_out: int = 20, width: int = 256, n_expert: int = 5):
    """Products with 3 of 5 matrices for each row; one of them twice."""
    kernels, reference = twins("matmul_chosen")
    id_TX = np.tile([4, 0, 4], (n_tok, 1)).astype(np.int64) if n_tok else np.empty((0, 3), np.int64)
    w, x = matrix(block, n_expert, n_out, width), rows(n_tok, width)
    bound = 0 if arithmetic == "q8" and block in INTEGER else 1e-5
    return kernels.matmul_chosen, (arithmetic, x, id_TX, tiled(w, 1)), reference.matmul_chosen, (arithmetic, x, id_TX, w), bound


def route_case(n_tok: int, n_expert: int, n_used: int):
    kernels, reference = twins("moe")
    logit = np.round(rows(n_tok, n_expert), 1)              # rounded, so that there are ties
    scale = np.random.default_rng(0).uniform(0.5, 1.5, n_expert).astype(np.float32)
    return kernels.route, (logit, n_used, scale), reference.route, (logit, n_used, scale), 1e-6


def attend_case(n_tok: int, n_head: int, n_kv: int, dim: int, n_keys: int, pos: int, window: int, dtype=np.float32):
    kernels, reference = twins("attention")
    rng = np.random.default_rng(2)
    q = rows(n_tok, n_head * dim).reshape(n_tok, n_head, dim)
    k, v = (rng.standard_normal((n_keys, n_kv, dim)).astype(dtype) for _ in range(2))
    first, end = causal(n_tok, pos, window)
    args = q, in_blocks(k, v, first, end), first, end
    return kernels.attend, args, reference.attend, args, 2e-5


def ops_case(name: str, *args):
    kernels, reference = twins("ops")
    return getattr(kernels, name), args, getattr(reference, name), args, 3e-6


def heads(n_tok: int, n_head: int, dim: int, *, seed: int = 0):
    return rows(n_tok, n_head * dim, seed).reshape(n_tok, n_head, dim)


def all_case(n_tok: int, n_head: int, dim: int):
    kernels, reference = twins("tower_attention")
    args = heads(n_tok, n_head, dim), heads(n_tok, n_head, dim, seed=1), heads(n_tok, n_head, dim, seed=2)
    return kernels.attend_all, args, reference.attend_all, args, 2e-5


def band_case(n_tok: int, n_head: int, dim: int, n_keys: int):
    kernels, reference = twins("tower_attention")
    args = (*(heads(n_tok, n_head, dim, seed=seed) for seed in (0, 1, 2)), heads(n_keys, n_head, dim, seed=3), 3.0)
    return kernels.attend_band, args, reference.attend_band, args, 1e-5


X3 = rows(6, 33).reshape(2, 3, 33)
TABLE = {
    **{f"{name} {block} {n_tok}x{n_out}x{width}": (product_case, name, block, n_tok, n_out, width)
       for name in ("matmul", "matmul_q8") for block in TYPES
       for n_tok, n_out, width in ((1, 1, 256), (5, 40, 512), (0, 16, 256), (6, 16, 256))},
    **{f"matmul_q8 {block} {n_tok} rows": (product_case, "matmul_q8", block, n_tok, 20, 64)       # unpacked to int16 from 8 rows on
       for block in ("Q8_0", "IQ4_NL") for n_tok in (7, 8, 9, 10, 11)},
    "matmul_q8 Q8_0 600 rows": (product_case, "matmul_q8", "Q8_0", 600, 5, 32),
    "matmul F32 odd width": (product_case, "matmul", "F32", 3, 5, 7),
    "matmul_q8 F16 odd width": (product_case, "matmul_q8", "F16", 5, 17, 1),
    "matmul_q8 Q4_0 one block": (product_case, "matmul_q8", "Q4_0", 2, 3, 32),
    **{f"run_experts {name} {block} {down} {n_tok} tokens": (experts_case, name, block, down, n_tok)
       for name, block, down in (("q8", "Q4_0", "Q4_0"), ("q8", "Q4_K", "Q8_0"), ("q8", "Q2_K", "MXFP4"), ("exact", "Q4_0", "Q4_0"))
       for n_tok in (0, 1, 7, 8)},
    **{f"matmul_chosen {name} {block} {n_tok} rows": (chosen_case, name, block, n_tok)
       for name, block in (("q8", "Q4_0"), ("exact", "Q6_K"), ("q8", "F32")) for n_tok in (0, 1, 3)},
    "route": (route_case, 5, 16, 3), "route all": (route_case, 1, 4, 4), "route one of one": (route_case, 2, 1, 1),
    "route 8 of 128": (route_case, 9, 128, 8), "route more than 16": (route_case, 2, 40, 20), "route nothing": (route_case, 0, 4, 2),
    "attend window": (attend_case, 3, 4, 2, 16, 40, 100, 17), "attend one": (attend_case, 1, 2, 1, 32, 8, 3, 4),
    "attend full": (attend_case, 9, 4, 1, 16, 200, 150, 10**6), "attend half": (attend_case, 5, 2, 2, 16, 90, 130, 64, np.float16),
    "rms_norm": (ops_case, "rms_norm", X3, rows(1, 33)[0], 1e-6),
    "rms_norm of one": (ops_case, "rms_norm", X3[..., :1].copy(), X3[0, 0, :1].copy(), 1e-6),
    "rms_normalise": (ops_case, "rms_normalise", X3, 1e-6), "gated": (ops_case, "gated", 5 * X3, X3[::-1].copy()),
    "rotate": (ops_case, "rotate", rows(6, 32).reshape(2, 3, 32), rows(2, 16), rows(2, 16, seed=5)),
    "softcap": (ops_case, "softcap", 40 * rows(3, 50), 30.0),
    "layer_norm": (ops_case, "layer_norm", X3 + np.float32(2), rows(1, 33)[0], rows(1, 33, seed=3)[0], 1e-5),
    "silu": (ops_case, "silu", 40 * X3), "glu": (ops_case, "glu", 40 * rows(5, 34)),
    "limit": (ops_case, "limit", 40 * X3, -7.3, 11.1),
    "attend_all": (all_case, 70, 2, 24), "attend_all one": (all_case, 1, 1, 16),
    "attend_band": (band_case, 9, 2, 24, 5), "attend_band one": (band_case, 1, 1, 16, 12),
    "attend_band whole vector": (band_case, 40, 3, 7, 16),
}


def close(got, want, bound):
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want))):
        assert a.shape == b.shape and a.dtype == b.dtype
        limit = bound if isinstance(bound, np.ndarray) or a.dtype != np.float32 else bound * max(np.abs(b).max(initial=0), 1e-30)
        assert (np.abs(a.astype(np.float64) - b) <= limit).all(), np.abs(a.astype(np.float64) - b).max()


@pytest.mark.parametrize("case", often(TABLE))
def test_kernel_and_twin(case):
    make, *arguments = TABLE[case]
    ours, our_args, theirs, their_args, bound = make(*arguments)
    close(ours(*our_args), theirs(*their_args), bound)


@pytest.fixture(params=["plain Python", pytest.param("compiled", marks=pytest.mark.exhaustive)])
def of_rare_types(request):
    """Kernels for types that are not compiled in every run."""
    with as_plain_python(set()) if request.param == "plain Python" else contextlib.nullcontext():
        yield


@pytest.mark.usefixtures("of_rare_types")
@pytest.mark.parametrize("block", ["Q2_K", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"])
def test_random_bytes_are_the_weights_that_the_reference_sees(block):
    """Scales, minimums and codes that no quantizer writes. Exact arithmetic on unit vectors gives the weights themselves, bit for bit."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (40, 2 * BLOCKS[block].n_bytes), dtype=np.uint8)
    records = raw.view(BLOCKS[block].dtype)
    for name, kind, _ in BLOCKS[block].fields:       # finite scales, all exponents of E8M0
        if kind == "<f2":
            records[name] = rng.uniform(-2, 2, records.shape).astype(np.float16)
    if block == "MXFP4":
        records["e"] = np.concatenate([[0, 1, 2, 254, 255], rng.integers(0, 256, records.size - 5)]).reshape(records.shape)
    w, kernels = Matrix(raw, block), next(twins("matmul"))
    columns = rng.permutation(w.shape[1])[:24]
    x = np.zeros((24, w.shape[1]), np.float32)
    x[np.arange(24), columns] = 1
    want = w.float32()[:, columns].T
    finite = np.isfinite(w.float32()).all(axis=1)                  # infinity times the zeros beside it is NaN
    got = kernels.matmul(x, tiled(w, 1))
    assert finite.sum() > 30 and np.array_equal(got[:, finite], want[:, finite])
    if block != "MXFP4":
        x = rows(5, w.shape[1])
        assert same(kernels.matmul_q8(x, tiled(w, 1)), next(t for t in twins("matmul") if t is not kernels).matmul_q8(x, w))


@pytest.mark.parametrize("block", INTEGER)
def test_no_code_is_larger_than_the_format_says(block):
    """On AVX2 products are added up in 16 bits where codes are small enough for that."""
    fmt = FORMATS["q8"][block]
    tile = np.random.default_rng(0).integers(0, 256, fmt.n_bytes, dtype=np.uint8)
    found = [codes(fmt, address(tile), s, g) for s in range(fmt.n_sub) for g in range(fmt.per_sub // 4)]
    assert max(q.max() for q in found) == fmt.max_code
    assert not fmt.zero_in_pairs or 4 * fmt.run == fmt.per_sub          # the start is that of a whole sub-block
    for code, value in itertools.product((0, fmt.max_code), (-127, 127)):
        start = -fmt.zero_point * value * fmt.per_sub // 2 if fmt.zero_in_pairs else 0
        total, x = np.full(32, start, np.int16).view(np.int32), np.full(4, value, np.int8)
        for _ in range(fmt.run):
            total = (simd.dot4_i16 if fmt.max_code <= 128 else simd.dot4_i16_signed)(total, np.full(64, code, np.uint8), address(x))
        assert (total.view(np.int16) == start + fmt.run * 2 * value * (code - 128 * (fmt.max_code > 128))).all()


@pytest.mark.usefixtures("of_rare_types")
def test_every_exponent_in_8_bits():
    """MXFP4, all 256 exponents, with activations that neither vanish nor overflow."""
    records = np.random.default_rng(0).integers(0, 256, (256, 17), dtype=np.uint8)
    records[:, 0] = np.arange(256)
    kernels, reference = twins("matmul")
    for part, scale in ((records[:128], np.float32(1e5)), (records[128:], np.float32(1e-3))):
        w, x = Matrix(part, "MXFP4"), rows(3, 32) * scale
        got = kernels.matmul_q8(x, tiled(w, 1))
        with np.errstate(over="ignore"):                # of the sums that Q8_1 wants
            want = reference.matmul_q8(x, w)
        assert same(got, want) and np.isfinite(got).all() and (got != 0).all()


SMALL = (*(f"{name} {block} {size}" for name in ("matmul", "matmul_q8") for block in TYPES for size in ("1x1x256", "6x16x256")),
         "matmul_q8 Q4_0 one block", "matmul_q8 Q8_0 9 rows", "matmul_q8 IQ4_NL 9 rows", "matmul_q8 F16 odd width", "matmul F32 odd width",
         "run_experts q8 Q4_0 Q4_0 1 tokens", "run_experts q8 Q4_K Q8_0 1 tokens", "run_experts q8 Q2_K MXFP4 1 tokens",
         "run_experts exact Q4_0 Q4_0 1 tokens", "matmul_chosen q8 Q4_0 1 rows", "matmul_chosen exact Q6_K 1 rows",
         "route", "route more than 16", "attend window", "attend half", "attend full", "rms_norm", "rms_norm of one",
         "rms_normalise", "gated", "rotate", "softcap",
         "layer_norm", "silu", "glu", "limit", "attend_all one", "attend_band", "attend_band one")


def test_as_plain_python_beside_its_twin():
    """All types, and no kernel is left out. Plain Python checks every access against the array that it points into."""
    called = set()
    with as_plain_python(called):
        for case in SMALL:
            make, *arguments = TABLE[case]
            ours, our_args, theirs, their_args, bound = make(*arguments)
            try:
                close(ours(*our_args), theirs(*their_args), bound)
            except Exception as e:
                e.add_note(case)
                raise
    missing = {name for name, kernel in jit.KERNELS.items() if kernel.py_func.__module__.startswith("refimpl.kernels.")} - called
    assert not missing, f"no case of the table reaches {missing}"


@pytest.mark.parametrize("case", often(SMALL))
def test_compiled_and_as_plain_python(case):
    make, *arguments = TABLE[case]
    ours, our_args, *_ = make(*arguments)
    compiled = ours(*our_args)
    with as_plain_python(set()):
        ours, our_args, *_ = make(*arguments)
        plain = ours(*our_args)
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (compiled, plain))):
        assert same(a, b)


def test_every_kernel_has_its_twin():
    """The same files, and in them the same functions with the same parameters, every one of them in the table."""
    files = {folder: {path.stem for path in folder.glob("*.py")} for folder in (HERE, HERE.parent / "reference")}
    assert files[HERE] == files[HERE.parent / "reference"] - {"angles"} == {"__init__", *PAIRS}          # `ops.rope_angles` needs these
    for name in PAIRS:
        kernels, reference = (functions(module) for module in twins(name))
        without = {function for function in reference if f"{name}.{function}" in NO_TWIN}
        assert set(kernels) == set(reference) - without, name
        for function, kernel in kernels.items():
            ours, theirs = (list(inspect.signature(f).parameters) for f in (kernel, reference[function]))
            assert ours == theirs, f"{name}.{function}"
            assert any(key.split()[0] == function for key in TABLE), f"{name}.{function} is not in the table"
    assert set(NO_TWIN) <= {f"{name}.{function}" for name in PAIRS for function in functions(list(twins(name))[1])}


# ---- the same bits however the work is cut up

@pytest.mark.parametrize("case", often(f"{name} {block}" for name in ("matmul", "matmul_q8") for block in TYPES))
def test_any_rows_and_threads_give_the_same_bits(case):
    name, block = case.split()
    function = getattr(next(twins("matmul")), name)
    w, x = tiled(matrix(block, 75, 512), 2), rows(70, 512)
    whole = function(x, w)
    for step in (1, 2, 3, 5, 7, 64):
        assert same(np.concatenate([function(x[i:i + step], w) for i in range(0, 70, step)]), whole)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        assert same(function(x, w), whole)
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("case", often(["run_experts Q4_0 Q4_0", "run_experts Q4_K Q8_0"]))
def test_experts_in_any_rows_and_threads(case):
    _, block, back = case.split()
    moe = next(twins("moe"))
    rng = np.random.default_rng(0)
    gate, up, down = (tiled(matrix(name, 12, *shape, seed=i), 2)
                      for i, (name, shape) in enumerate(((block, (288, 256)), (block, (288, 256)), (back, (256, 288)))))
    x, id_TX = rows(40, 256), np.stack([rng.permutation(12)[:4] for _ in range(40)])
    weight = rng.uniform(0.1, 1, (40, 4)).astype(np.float32)
    run = lambda part: moe.run_experts("q8", x[part], id_TX[part], weight[part], gate, up, down)        # noqa: E731
    whole = run(slice(None))
    for step in (1, 7):
        assert same(np.concatenate([run(slice(i, i + step)) for i in range(0, 40, step)]), whole)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        assert same(run(slice(None)), whole)
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("ids", [np.array([[0, 5]]), np.array([[-1, 0]]), np.array([0, 1]), np.array([[0, 1]], np.int32),
                                 np.zeros((2, 1), int)])
def test_ids_of_chosen_matrices_are_checked(ids):
    with pytest.raises(ValueError, match="ids"):
        matmul_chosen("exact", rows(1, 256), ids, tiled(matrix("Q4_0", 5, 20, 256), 1))


def test_threads_have_room_of_their_own():
    """Work for long enough that threads run at the same time, several times: shared room would show."""
    matmul, moe = (importlib.import_module(f"refimpl.kernels.{name}") for name in ("matmul", "moe"))
    x, w = rows(64, 512), tiled(matrix("Q4_0", 1600, 512), 2)
    gate, up, down = (tiled(matrix("Q4_0", 2, *shape, seed=i), 2) for i, shape in enumerate(((800, 512), (800, 512), (512, 800))))
    id_TX, weight = np.tile([0, 1], (64, 1)), np.full((64, 2), 0.5, np.float32)

    def results():
        return np.concatenate([product(x, w).ravel() for product in (matmul.matmul, matmul.matmul_q8)]
                              + [moe.run_experts(arithmetic, x, id_TX, weight, gate, up, down).ravel() for arithmetic in FORMATS])
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        want = results()
    finally:
        numba.set_num_threads(before)
    assert all(same(results(), want) for _ in range(5))


# ---- tiles

@pytest.mark.parametrize("block", TYPES)
@pytest.mark.parametrize("n_rows", [1, 16, 40])
def test_tiles_hold_the_same_bytes(block, n_rows):
    size = BLOCKS[block].n_bytes
    raw = np.random.default_rng(0).integers(0, 256, (2, n_rows, 3 * size), dtype=np.uint8)
    got = tiled(Matrix(raw, block), 2)
    padded = np.zeros((2, -(-n_rows // 16) * 16, 3, size), np.uint8)
    padded[:, :n_rows] = raw.reshape(2, n_rows, 3, size)
    by_tile = padded.reshape(2, -1, 16, 3, size).swapaxes(2, 3)
    want = np.concatenate([by_tile[..., offset:offset + n].reshape(*by_tile.shape[:3], -1) for offset, n in units(BLOCKS[block])], axis=-1)
    assert np.array_equal(got.raw, want.reshape(got.raw.shape)) and got.n_bytes == padded.size


def test_arguments_are_checked_before_compiled_code_sees_them():
    matmul, moe = (importlib.import_module(f"refimpl.kernels.{name}") for name in ("matmul", "moe"))
    w, experts = tiled(matrix("Q4_0", 16, 64), 1), tiled(matrix("Q4_0", 4, 64, 64), 1)
    x, ids, weight = rows(2, 64), np.zeros((2, 2), np.int64), np.ones((2, 2), np.float32)
    for bad in (rows(2, 32), rows(2, 64).astype(np.float64), rows(2, 64)[0]):
        with pytest.raises(ValueError, match="expected float32 rows of 64"):
            matmul.matmul_q8(bad, w)
    with pytest.raises(ValueError, match="cannot dequantize I8"):
        tiled(Matrix(np.zeros((16, 84), np.uint8), "I8"), 1)
    with pytest.raises(ValueError, match="one matrix"):
        matmul.matmul(x, experts)
    for bad in (np.full((2, 2), 4), np.full((2, 2), -1)):
        with pytest.raises(ValueError, match="ids must be 0 to 3"):
            moe.run_experts("exact", x, bad, weight, experts, experts, experts)
    with pytest.raises(ValueError, match="do not fit together"):
        moe.run_experts("exact", x, ids, weight, experts, experts, tiled(matrix("Q4_0", 4, 32, 64), 1))
    with pytest.raises(ValueError, match="of 2 tokens"):
        moe.run_experts("exact", x, ids[:1], weight[:1], experts, experts, experts)
    with pytest.raises(ValueError, match="1 to 4 experts"):
        moe.route(rows(1, 4), 5, np.ones(4, np.float32))


@pytest.mark.exhaustive
@pytest.mark.parametrize("cases", [
    "(matmul_q8 and Q4_0 and one and block) or (F32 and odd) or route or gated or rotate or softcap or half or norm or lu or band",
    "block or odd or tokens and Q4_0 and not Q4_K or attend or 5x40x512 and Q6_K"])
def test_array_accesses_stay_in_bounds(cases):
    """Part of the table again in a process where Numba checks every index. (In every run plain Python does, above, and addresses too.)"""
    command = [sys.executable, "-m", "pytest", __file__, *"-q -n 0 -p no:cacheprovider".split(),
               "-m", "", "-k", f"test_kernel_and_twin and ({cases})"]
    checked = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_OPT": "0"}        # not optimized: a third less time, the same accesses
    done = subprocess.run(command, env=checked, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout[-3000:]
