"""Every intrinsic: the compiled body against its NumPy reference, bit for bit, on every instruction set here."""

from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
from exact import rounded_once
from numba import njit, types

from refimpl.kernels.machine import intrinsics, isa, narrow
from refimpl.kernels.machine.intrinsics import address, at
from refimpl.kernels.machine.isa import INTRINSICS, F32x8, F32x16, I32x8, I32x16, Pointer, U8x32, U8x64

simd = ModuleType("simd")             # both modules as one
vars(simd).update(vars(intrinsics) | vars(narrow))
EDGES = {
    U8x64: [np.full(64, b, np.uint8) for b in (0, 1, 15, 16, 127, 128, 129, 240, 255)],
    I32x16: [np.full(16, i, np.int32) for i in (0, 1, -1, 2**31 - 1, -2**31, 16_777_217, -33_554_435)],
    F32x16: [np.full(16, f, np.float32) for f in (0.0, -0.0, 1.0, -1.5, 1e-45, 1.17e-38, 3.4e38, np.inf, -np.inf, np.nan, 1 + 2**-23)],
}
STORE = {U8x64: "store_u8", I32x16: "store_i32", F32x16: "store_f32", U8x32: "store_u8", I32x8: "store_i32", F32x8: "store_f32"}
LOAD = {U8x64: "load_u8", F32x16: "load_f32"}
NARROW_LOAD = {U8x64: "load_u8_narrow", F32x16: "load_f16_narrow"}
INTEGERS = {"shift": range(8), "mask": (1, 3, 15, 255), "j": range(4), "group": range(8), "n": range(17),
            "first": np.array([0x0706050403020100, -0x7E0102F304F5F607, -1]),
            "last": np.array([0x0F0E0D0C0B0A0908, -2**63, 2**63 - 1, 0x1122334455667788])}
DOMAIN = {      # what an intrinsic does not promise to take is left out
    "dot4_i16": lambda total, weights, activations: (total, np.minimum(weights, 128), activations),
    "dot4_i16_signed": lambda total, weights, activations: (total, weights, np.where(activations == 128, 129, activations)),
    "round_to_i32": lambda v: (np.clip(np.nan_to_num(v), -2.0**22, 2.0**22),),
    "power_of_two": lambda n: (n % 256 - 127,),
    "look_up": lambda v, first, last: (v % 16, first, last),
}
SPLAT = {types.int32: "splat_i32", types.float32: "splat_f32"}


@njit
def load_i32(pointer):
    """Loads int32 lanes by adding the four bytes up: there is no intrinsic for it, kernels never need one."""
    total = simd.splat_i32(np.int32(0))
    for k in (24, 16, 8, 0):
        total = simd.add_i32(simd.mul_i32(total, simd.splat_i32(np.int32(256))), simd.load_u8_as_i32(at(pointer, 16 * (k // 8))))
    return total


@njit
def load_i32_narrow(pointer):
    """The same for 8 lanes."""
    total = simd.splat_i32_narrow(np.int32(0))
    for k in (24, 16, 8, 0):
        byte = simd.load_u8_as_i32_narrow(at(pointer, k))
        total = simd.add_i32(simd.mul_i32(total, simd.splat_i32_narrow(np.int32(256))), byte)
    return total


def planes(v: np.ndarray) -> np.ndarray:
    """int32 lanes as four planes of bytes, which `load_i32` reads."""
    return np.ascontiguousarray(v.view(np.uint8).reshape(-1, 4).T)


def arguments(name: str, intrinsic, rng):
    """Values for an intrinsic's parameters: random ones, then edges."""
    names = intrinsic.reference.__code__.co_varnames[:len(intrinsic.parameters)]
    for trial in range(120):
        values = []
        for i, (kind, arg) in enumerate(zip(intrinsic.parameters, names)):
            if kind in EDGES and trial >= 60:
                value = EDGES[kind][(trial * (i + 1) + i) % len(EDGES[kind])]
            elif kind is U8x64:
                value = rng.integers(0, 256, 64, dtype=np.uint8)
            elif kind is I32x16:
                value = rng.integers(-2**31, 2**31, 16).astype(np.int32)
            elif kind is F32x16:
                value = (rng.standard_normal(16) * 2.0 ** rng.integers(-60, 60, 16)).astype(np.float32)
            elif kind is isa.Address:
                value = rng.integers(0, 256, 80, dtype=np.uint8) if trial < 60 else np.full(80, (0, 127, 128, 255)[trial % 4], np.uint8)
            elif kind is types.intp:
                value = INTEGERS[arg][trial % len(INTEGERS[arg])] if arg in INTEGERS else int(rng.integers(0, 9))
            elif kind is types.int32:
                value = np.int32(rng.integers(-2**31, 2**31))
            else:
                value = np.float32(rng.standard_normal())
            values.append(value)
        if name in DOMAIN:
            values = [new.astype(old.dtype) for new, old in zip(DOMAIN[name](*values), values)]
        yield values


def compiled(name: str, intrinsic, width: str = ""):
    """A compiled function that takes arrays and numbers, applies the intrinsic and stores its result (if it has one)."""
    takes, body = [], []
    for i, kind in enumerate(intrinsic.parameters):
        takes.append(f"a{i}")
        if kind is I32x16:
            body.append(f"v{i} = load_i32{width}(address(a{i}))")
        elif kind in LOAD:
            body.append(f"v{i} = simd.{LOAD[kind] if not width else NARROW_LOAD[kind]}(address(a{i}))")
        else:
            body.append(f"v{i} = address(a{i})" if kind is isa.Address else f"v{i} = a{i}")
    call = f"simd.{name}({', '.join(f'v{i}' for i in range(len(takes)))})"
    if intrinsic.result in SPLAT:
        call = f"simd.{SPLAT[intrinsic.result]}({call})"
    store = {types.int32: "store_i32", types.float32: "store_f32", **STORE}.get(intrinsic.result)
    body.append(f"simd.{store}(address(out), {call})" if store else call)
    scope = {"simd": simd, "address": address, "load_i32": load_i32, "load_i32_narrow": load_i32_narrow}
    exec(f"def f({', '.join([*takes, 'out'])}):\n    " + "\n    ".join(body), scope)
    return njit(scope["f"])


PLAIN = [name for name, intrinsic in INTRINSICS.items() if intrinsic.result in STORE or intrinsic.result in SPLAT]
WRITERS = [name for name, intrinsic in INTRINSICS.items() if intrinsic.result is types.void and name != "prefetch"]


@pytest.mark.parametrize("name", PLAIN)
def test_compiled_intrinsic_has_the_bits_of_its_reference(name):
    intrinsic, rng = INTRINSICS[name], np.random.default_rng(0)
    function = compiled(name, intrinsic)
    for values in arguments(name, intrinsic, rng):
        out = np.zeros(64, np.uint8)
        function(*(planes(v) if kind is I32x16 else v for kind, v in zip(intrinsic.parameters, values)), out)
        with np.errstate(all="ignore"):
            want = intrinsic.reference(*(Pointer(v, 0) if kind is isa.Address else v for kind, v in zip(intrinsic.parameters, values)))
            want = np.full(16, want) if intrinsic.result in SPLAT else want
        assert_same(out, want, values)


def assert_same(out, want, values):
    """The bytes in `out` are those of `want`; any NaN is as good as another."""
    got = out[:want.nbytes].view(want.dtype)
    same = got.view(np.uint8) == want.view(np.uint8)
    nan = np.repeat(np.isnan(want), 4) if want.dtype == np.float32 else False
    assert (same | nan).all() and (want.dtype != np.float32 or (np.isnan(got) == np.isnan(want)).all()), (values, want, got)


@pytest.mark.parametrize("name", [name for name in PLAIN if INTRINSICS[name].narrow])
def test_narrow_vectors_are_half_of_wide_ones(name):
    intrinsic, rng = INTRINSICS[name], np.random.default_rng(0)
    function, vectors = compiled(name, intrinsic, "_narrow"), (U8x64, I32x16, F32x16)
    for values in arguments(name, intrinsic, rng):
        values = [v[:len(v) // 2] if kind in vectors else v for kind, v in zip(intrinsic.parameters, values)]
        with np.errstate(all="ignore"):
            values = [v.astype(np.float16) if kind is F32x16 else v for kind, v in zip(intrinsic.parameters, values)]
            out = np.zeros(64, np.uint8)
            function(*(planes(v) if kind is I32x16 else v.view(np.uint16) if kind is F32x16 else v
                       for kind, v in zip(intrinsic.parameters, values)), out)
            want = intrinsic.reference(*(Pointer(v, 0) if kind is isa.Address else v.astype(np.float32) if kind is F32x16 else v
                                         for kind, v in zip(intrinsic.parameters, values)))
        assert want.nbytes == 32 and not out[32:].any()
        assert_same(out, want, values)


@pytest.mark.parametrize("name", WRITERS)
def test_compiled_intrinsic_writes_what_its_reference_writes(name):
    intrinsic, rng = INTRINSICS[name], np.random.default_rng(0)
    function = compiled(name, intrinsic)
    for values in arguments(name, intrinsic, rng):
        slow = [v.copy() if kind is isa.Address else v for kind, v in zip(intrinsic.parameters, values)]
        intrinsic.reference(*(Pointer(v, 0) if kind is isa.Address else v for kind, v in zip(intrinsic.parameters, slow)))
        function(*(planes(v) if kind is I32x16 else v for kind, v in zip(intrinsic.parameters, values)), np.zeros(1))
        assert np.array_equal(values[0], slow[0]), (name, values[1:])


def test_half_precision_of_every_half_and_all_around():
    """Every float16, the middle between every two, and one step of float32 to either side of it."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (halves[:-1] + halves[1:]) / np.float32(2)
    values = np.concatenate([halves, middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(0))])
    values = np.resize(np.concatenate([values, -values]), (len(values) // 8 + 1) * 16).reshape(-1, 16)
    rounded = compiled("round_f16", INTRINSICS["round_f16"])
    for v in values:
        out = np.zeros(16, np.float32)
        rounded(v, out)
        assert np.array_equal(out.view(np.uint32), v.astype(np.float16).astype(np.float32).view(np.uint32))


def test_every_exponent_of_e8m0():
    load, every = compiled("load_e8m0", INTRINSICS["load_e8m0"]), np.arange(256, dtype=np.uint8)
    for e in every.reshape(16, 16):
        out = np.zeros(16, np.float32)
        load(np.resize(e, 64), out)
        assert out.tolist() == [2.0 ** (int(i) - 128) for i in e]


def test_every_intrinsic_is_tested():
    apart = {"at", "prefetch", "take"}           # used by every other test; does nothing; test_pieces.py
    assert set(INTRINSICS) == set(PLAIN) | set(WRITERS) | apart
    for intrinsic in INTRINSICS.values():
        own = {"portable", "avx2", "avx512"}            # the others of x86 and Arm may do with what they inherit
        assert "every" in intrinsic.bodies or own <= set(intrinsic.bodies), intrinsic.reference.__name__


def rows16(tile, n_blocks, x, step, out):
    """A small kernel: 16 rows of unsigned bytes against int8 activations, both as compiled code and as plain Python."""
    total = simd.splat_f32(np.float32(0))
    for b in range(n_blocks):
        dots = simd.splat_i32(np.int32(0))
        for g in (0, 256):
            w0, w1, w2, w3 = (simd.load_u8(at(tile, b * 544 + 32 + g)), simd.load_u8(at(tile, b * 544 + 96 + g)),
                              simd.load_u8(at(tile, b * 544 + 160 + g)), simd.load_u8(at(tile, b * 544 + 224 + g)))
            dots = simd.dot16(dots, w0, w1, w2, w3, at(x, b * 32 + g // 16))
        scale = simd.mul_f32(simd.load_f16(at(tile, b * 544)), simd.splat_f32(step[b]))
        total = simd.fma(scale, simd.to_f32(dots), total)
    simd.store_f32(out, total)


def test_kernel_runs_as_plain_python_and_compiled():
    rng, n_blocks = np.random.default_rng(1), 5
    inner = njit(rows16)

    @njit
    def run(tile, x, step, out):
        inner(address(tile), step.size, address(x), step, address(out))

    tile = rng.integers(0, 256, (n_blocks, 544), dtype=np.uint8)
    tile[:, :32] = rng.uniform(0.001, 0.1, (n_blocks, 16)).astype(np.float16).view(np.uint8)
    x, step = rng.integers(-127, 128, 32 * n_blocks).astype(np.int8), rng.uniform(0.01, 0.1, n_blocks).astype(np.float32)
    fast, slow = np.zeros(16, np.float32), np.zeros(16, np.float32)
    run(tile, x, step, fast)
    rows16(address(tile), n_blocks, address(x), step, address(slow))
    assert np.array_equal(fast.view(np.uint32), slow.view(np.uint32))
    weights = tile[:, 32:].reshape(n_blocks, 8, 16, 4).transpose(2, 0, 1, 3).reshape(16, n_blocks, 32)
    scale = tile[:, :32].copy().view(np.float16).astype(np.float64)
    exact = np.einsum("rbj,bj,br,b->r", *(v.astype(np.float64) for v in (weights, x.reshape(n_blocks, 32), scale, step)))
    assert np.abs(fast - exact).max() < 1e-5 * np.abs(exact).max()


def test_plain_python_checks_every_access():
    short = np.zeros(60, np.uint8)
    for use in (lambda p: simd.load_u8(p), lambda p: simd.load_f32(p), lambda p: simd.store_f32(p, np.zeros(16, np.float32)),
                lambda p: simd.load_u8(at(p, -1))):
        with pytest.raises(IndexError):
            use(address(short))


def test_fused_multiply_add_rounds_once():
    rng = np.random.default_rng(2)
    for _ in range(300):
        a, b, c = ((rng.standard_normal(16) * 2.0 ** rng.integers(-12, 12, 16)).astype(np.float32) for _ in range(3))
        if rng.random() < 0.5:
            c = (-a * b).astype(np.float32)         # cancellation: all that is left is the product's rounding error
        got = simd.fma(a, b, c)
        for x, y, z, r in zip(a, b, c, got):
            assert r == rounded_once(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))


def test_fused_multiply_add_in_numpy_and_compiled_where_rounding_twice_would_show():
    """Products that lie exactly halfway between two float32, and a summand far below that decides; and results among the denormals."""
    fused = compiled("fma", INTRINSICS["fma"])
    x = np.float32(1 + 2**-12)              # x * x = 1 + 2^-11 + 2^-24, half a step above a float32
    for sign in (1, -1):
        for tiny in (2.0**-60, -(2.0**-60), 0.0, 2.0**-140):
            a, b, c = np.full(16, sign * x, np.float32), np.full(16, x), np.full(16, tiny, np.float32)
            out = np.zeros(16, np.float32)
            fused(a, b, c, out)
            up = (tiny > 0) == (sign > 0) and tiny != 0
            want = np.float32(sign * (1 + 2**-11 + (2**-23 if up else 0)))
            assert (simd.fma(a, b, c) == want).all() and (out == want).all(), (sign, tiny)
    a, b, c = (np.full(16, v, np.float32) for v in (2**-75 * (1 + 2**-20), 2**-75 * (1 - 2**-20), 2**-127 + 2**-149))
    fused(a, b, c, out)
    assert np.array_equal(out, c) and np.array_equal(simd.fma(a, b, c), c)       # half a step less 2^-190, above an odd number of steps
    rng = np.random.default_rng(3)
    for _ in range(200):
        a, b = (np.ldexp(rng.standard_normal(16), -70).astype(np.float32) for _ in range(2))
        c = np.ldexp(rng.standard_normal(16), -148).astype(np.float32)
        out = np.zeros(16, np.float32)
        fused(a, b, c, out)
        assert np.array_equal(out.view(np.uint32), simd.fma(a, b, c).view(np.uint32))


def test_choice_of_instruction_set():
    full = dict.fromkeys(("avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx2", "fma", "f16c"), True)
    for features, best in ((full, "avx512"), (full | {"avx512vnni": False}, "avx2"), ({}, "portable"),
                           (full | {"avx512vl": False, "avxvnni": True}, "avxvnni"), ({"dotprod": True, "i8mm": True}, "portable")):
        assert isa.best_isa(features, isa.X86) == best
    for features, best in (({}, "neon"), ({"dotprod": True, "i8mm": False}, "dotprod"), ({"dotprod": True, "i8mm": True}, "i8mm"),
                           ({"i8mm": True}, "neon"), (full, "neon")):
        assert isa.best_isa(features, isa.ARM) == best


@pytest.mark.parametrize("sets,wanted,best,chosen", [
    (isa.X86, None, "avx2", "avx2"), (isa.X86, "", "avx2", "avx2"), (isa.X86, "portable", "avx512", "portable"),
    (isa.ARM, None, "i8mm", "i8mm"), (isa.ARM, "neon", "i8mm", "neon"), (isa.ARM, "portable", "neon", "portable")])
def test_a_lower_instruction_set_can_be_forced(sets, wanted, best, chosen):
    assert isa.chosen_isa(wanted, best, sets) == chosen


@pytest.mark.parametrize("sets,wanted,best,said", [
    (isa.X86, "sse", "avx512", "expected one of avx512, avxvnni, avx2, portable"),
    (isa.X86, "avx512", "avx2", "this machine has avx2 at most"),
    (isa.X86, "i8mm", "avx512", "for other processors; this one may have avx512, avxvnni, avx2, portable"),
    (isa.ARM, "sve", "i8mm", "expected one of i8mm, dotprod, neon, portable"),
    (isa.ARM, "i8mm", "dotprod", "this machine has dotprod at most"),
    (isa.ARM, "avx2", "neon", "for other processors; this one may have i8mm, dotprod, neon, portable")])
def test_an_instruction_set_that_the_machine_lacks_is_refused(sets, wanted, best, said):
    with pytest.raises(ValueError, match=f"^REFIMPL_ISA={wanted}: {said}$"):
        isa.chosen_isa(wanted, best, sets)
