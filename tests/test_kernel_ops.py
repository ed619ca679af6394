"""The small kernels: their elementary functions against float64, their results against the formulas, their bits against themselves."""

import numba
import numpy as np
import pytest
from kernel_cases import WIDTHS, angles, normal, ops_cases

from refimpl.kernels import ops
from refimpl.kernels.cores import threads
from refimpl.kernels.machine.intrinsics import address, at, load_f32, store_f32
from refimpl.kernels.machine.vecmath import exp16, gelu16, tanh16
from refimpl.reference import ops as reference

HALF_STEP = 2.0**-24            # relative rounding error of one float32 operation


def everywhere(function):
    """The compiled function, on arrays of any length (made up to whole vectors)."""

    @numba.njit
    def run(x, out):
        source, to = address(x), address(out)
        for i in range(x.size // 16):
            store_f32(at(to, 64 * i), function(load_f32(at(source, 64 * i))))

    def on_array(x):
        padded = np.append(x, np.zeros(-len(x) % 16, np.float32))
        out = np.empty_like(padded)
        run(padded, out)
        return out[:len(x)]
    return on_array


exp, tanh, gelu = everywhere(exp16), everywhere(tanh16), everywhere(gelu16)


def floats(low: float, high: float, n: int = 2_000_000) -> np.ndarray:
    """About n float32 from low to high (both > 0), evenly over their bit patterns."""
    first, last = (int(np.float32(v).view(np.uint32)) for v in (low, high))
    return np.arange(first, last, max(1, (last - first) // n), dtype=np.uint32).view(np.float32)


def worst_ulp(got: np.ndarray, want: np.ndarray) -> float:
    """Largest error in units of the last place of the float32 nearest to what it should be."""
    return float((np.abs(got - want) / np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)).max())


def gelu64(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-2 * (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


# ---- elementary functions

def test_exp_is_within_one_step_or_hardly_more():
    for x in (floats(1e-30, 88.3), -floats(1e-30, 87.3), -floats(87.3, 87.6)):
        assert worst_ulp(exp(x), np.exp(x.astype(np.float64))) < 1.02


def test_exp_at_its_edges():
    x = np.array([0.0, -0.0, 1e-45, -1e-45, -87.7, -88, -1e30, -np.inf, 88.4, 88.73, 1e30, np.inf, np.nan], np.float32)
    want = np.array([1, 1, 1, 1, 0, 0, 0, 0, np.inf, np.inf, np.inf, np.inf, np.nan], np.float32)
    assert np.array_equal(exp(x), want, equal_nan=True)
    assert 0 < exp(np.array([-87.6], np.float32))[0] < 2.0**-126


def test_tanh_is_within_one_and_a_half_steps_and_odd():
    x = np.concatenate([floats(1e-38, 20), floats(0.6, 0.65)])
    assert worst_ulp(tanh(x), np.tanh(x.astype(np.float64))) < 1.4
    assert np.array_equal(tanh(-x), -tanh(x))
    edges = np.array([0.0, -0.0, 20, -20, np.inf, -np.inf, np.nan], np.float32)
    assert np.array_equal(tanh(edges).view(np.uint32)[:6], np.array([0.0, -0.0, 1, -1, 1, -1], np.float32).view(np.uint32))
    assert np.isnan(tanh(edges)[6])


def test_gelu():
    positive, negative = floats(1e-30, 1e4), -floats(1e-30, 12)
    assert worst_ulp(gelu(positive), gelu64(positive.astype(np.float64))) < 2.0
    error = np.abs(gelu(negative) - gelu64(negative.astype(np.float64)))
    assert (error / np.abs(negative)).max() < 8e-8
    near = negative[negative > -1]
    assert worst_ulp(gelu(near), gelu64(near.astype(np.float64))) < 2.6
    edges = np.array([0.0, 20, 3e38, np.inf, -20, -3e38, -np.inf, np.nan], np.float32)
    assert np.array_equal(gelu(edges), np.array([0, 20, 3e38, np.inf, 0, 0, 0, np.nan], np.float32), equal_nan=True)


@pytest.mark.parametrize("function, compiled", [(exp16, exp), (tanh16, tanh), (gelu16, gelu)])
def test_elementary_functions_in_plain_python(function, compiled):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(16 * 40) * 2.0 ** rng.integers(-20, 8, 16 * 40), [0.0, -0.0, np.inf, -np.inf] * 4])
    x = x.astype(np.float32)
    with np.errstate(all="ignore"):
        slow = np.concatenate([function(v) for v in x.reshape(-1, 16)])
    assert np.array_equal(compiled(x).view(np.uint32), slow.view(np.uint32))


# ---- the functions between the matrix products

@pytest.mark.parametrize("width", WIDTHS)
def test_norms_against_float64(width):
    rng = np.random.default_rng(2)
    x, weight = normal(rng, 50, width, scale=10), normal(rng, width)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + 1e-6)
    assert (np.abs(ops.rms_normalise(x, 1e-6) / want - 1)).max() < 4 * HALF_STEP
    assert (np.abs(ops.rms_norm(x, weight, 1e-6) / (want * weight) - 1)).max() < 5 * HALF_STEP


def test_the_weight_is_multiplied_last():
    rng = np.random.default_rng(5)
    x, weight = normal(rng, 20, 301), normal(rng, 301)
    assert np.array_equal(ops.rms_norm(x, weight, 1e-6), ops.rms_normalise(x, 1e-6) * weight)


def test_norm_of_nothing_but_zeros_and_of_tiny_numbers():
    """The small number under the root counts, and only there."""
    assert np.array_equal(ops.rms_normalise(np.zeros((2, 20), np.float32), 1e-6), np.zeros((2, 20), np.float32))
    tiny = np.full((1, 20), 1e-4, np.float32)
    assert np.allclose(ops.rms_normalise(tiny, 1e-6), 1e-4 / np.sqrt(1e-8 + 1e-6), rtol=1e-6, atol=0)


def test_gated_and_softcap_against_float64():
    rng = np.random.default_rng(3)
    gate, up, x = normal(rng, 200, 501, scale=3), normal(rng, 200, 501), normal(rng, 100_001, scale=40)
    error = np.abs(ops.gated(gate, up) - gelu64(gate.astype(np.float64)) * up)
    assert (error / np.abs(gate * up)).max() < 3 * HALF_STEP
    assert (np.abs(ops.softcap(x, 30.0) / (30 * np.tanh(x.astype(np.float64) / 30)) - 1)).max() < 4 * HALF_STEP


def test_layer_norm_silu_and_glu_against_float64():
    rng = np.random.default_rng(7)
    x, weight, bias = normal(rng, 50, 301, scale=10) + np.float32(30), normal(rng, 301), normal(rng, 301)
    gate = normal(rng, 40, 1002, scale=30)
    wide = x.astype(np.float64)
    want = (wide - wide.mean(axis=-1, keepdims=True)) / np.sqrt(wide.var(axis=-1, keepdims=True) + 1e-5) * weight + bias
    assert np.abs(ops.layer_norm(x, weight, bias, 1e-5) - want).max() < 4e-6 * np.abs(want).max()
    exact = gate / (1 + np.exp(-gate.astype(np.float64)))
    assert np.abs(ops.silu(gate) - exact).max() < 3e-6 and (np.abs(ops.silu(gate) - exact) <= 4 * HALF_STEP * np.abs(exact) + 1e-30).all()
    assert np.array_equal(ops.glu(np.concatenate([gate, gate], axis=-1)), ops.silu(gate))


def test_rotation_has_the_bits_of_the_reference():
    for name, function, arguments in ops_cases():
        if function is ops.rotate:
            assert np.array_equal(function(*arguments), reference.rotate(*arguments)), name


@pytest.mark.parametrize("name", ["rms_norm", "rms_normalise", "layer_norm", "gated", "silu", "glu", "softcap", "rotate"])
def test_near_to_the_twin(name):
    for case, function, arguments in ops_cases():
        if function is getattr(ops, name):
            want = getattr(reference, name)(*arguments)
            got = function(*arguments)
            assert got.shape == want.shape and got.dtype == np.float32
            assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max(), case


def test_rows_one_by_one_are_the_rows_together():
    for name, function, arguments in ops_cases():
        x = arguments[0]
        if x.ndim < 2:
            continue
        cut = [[a[t:t + 1] if isinstance(a, np.ndarray) and a.ndim > 1 else a for a in arguments] for t in range(len(x))]
        assert np.array_equal(np.concatenate([function(*a) for a in cut]), function(*arguments)), name


def test_kernels_in_plain_python(monkeypatch):
    compiled = {name: function(*arguments) for name, function, arguments in ops_cases() if "many" not in name and "2816" not in name}
    for name in ("norm_rows", "layer_norm_rows", "gated_numbers", "sigmoid_numbers", "capped_numbers", "rotate_heads"):
        monkeypatch.setattr(ops, name, getattr(ops, name).py_func)
    for name, function, arguments in ops_cases():
        if name in compiled:
            assert np.array_equal(function(*arguments), compiled[name]), name
    monkeypatch.setattr(threads, "MANY", 1)             # the loop over threads as well
    for name, function, arguments in ops_cases():
        if name.endswith((" 17", " 34")):
            assert np.array_equal(function(*arguments), compiled[name]), name


def test_arrays_in_any_order_and_empty_ones():
    rng = np.random.default_rng(4)
    x, weight = normal(rng, 12, 40), normal(rng, 40)
    for y in (x[::2], x.T.copy().T, x[:, ::2]):
        w = weight[:y.shape[1]]
        assert np.array_equal(ops.rms_norm(y, w, 1e-6), ops.rms_norm(y.copy(), w.copy(), 1e-6))
        assert np.array_equal(ops.gated(y, y), ops.gated(y.copy(), y.copy()))
    cos, sin = angles(rng, 3, 8)
    heads = normal(rng, 16, 3, 2).T.transpose(1, 0, 2).copy().transpose(1, 0, 2)[:1].reshape(1, 3, 16).transpose(1, 0, 2)
    assert np.array_equal(ops.rotate(heads, cos, sin), ops.rotate(heads.copy(), cos, sin))
    assert np.array_equal(ops.rms_norm(x[:, ::2], weight[::2], 1e-6), ops.rms_norm(x[:, ::2].copy(), weight[::2].copy(), 1e-6))
    nothing = np.empty((0, 40), np.float32)
    assert ops.rms_norm(nothing, weight, 1e-6).shape == ops.gated(nothing, nothing).shape == ops.softcap(nothing, 3.0).shape == (0, 40)
    assert ops.rotate(np.empty((0, 2, 4), np.float32), *(np.empty((0, 2), np.float32),) * 2).shape == (0, 2, 4)


def test_wrong_arguments_are_refused():
    x, w = np.zeros((3, 8), np.float32), np.zeros(8, np.float32)
    heads, angle = np.zeros((3, 2, 8), np.float32), np.zeros((3, 4), np.float32)
    wrong = [
        (ops.rms_norm, (x.astype(np.float64), w, 1e-6)), (ops.rms_norm, (x, w.astype(np.float16), 1e-6)), (ops.rms_norm, (x, w[:7], 1e-6)),
        (ops.rms_norm, (x, x, 1e-6)), (ops.rms_norm, (np.float32(1).reshape(()), w, 1e-6)),
        (ops.rms_normalise, (x.astype(np.float16), 1e-6)), (ops.rms_normalise, (np.zeros((), np.float32), 1e-6)),
        (ops.gated, (x, x[:2])), (ops.gated, (x, x.astype(np.float64))), (ops.gated, (x.astype(np.int32), x)),
        (ops.softcap, (x.astype(np.float64), 30.0)),
        (ops.layer_norm, (x, w, w[:7], 1e-5)), (ops.layer_norm, (x, w.astype(np.float64), w, 1e-5)), (ops.layer_norm, (x, x, x, 1e-5)),
        (ops.silu, (x.astype(np.float16),)), (ops.glu, (x[:, :7],)), (ops.glu, (x.astype(np.float64),)),
        (ops.rotate, (heads, angle[:2], angle[:2])), (ops.rotate, (heads, angle, angle[:, :3])), (ops.rotate, (heads[0], angle, angle)),
        (ops.rotate, (heads[:, :, :7], angle[:, :3], angle[:, :3])), (ops.rotate, (heads, angle.astype(np.float64), angle)),
    ]
    for function, arguments in wrong:
        with pytest.raises(ValueError, match="expected float32 arrays"):
            function(*arguments)
