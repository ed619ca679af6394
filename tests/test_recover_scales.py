"""Weights that lie on a grid are found there again, and all others are rounded no worse than by the usual rule."""

import numpy as np
import pytest

from refimpl.files.recover_scales import quantize_q4_0_on_grid, recover_grid
from refimpl.formats.quants.blocks import BLOCKS, fields_of
from refimpl.formats.quants.codecs import dequantize, quantize
from refimpl.formats.quants.floats import dequantize_bf16, quantize_bf16

F32 = np.float32
N = 3000


def as_bf16(x):
    return dequantize_bf16(quantize_bf16(np.ascontiguousarray(x, F32)))


def as_f16(x):
    return x.astype(np.float16).astype(F32)


STORED = {"F32": (lambda x: x, 2.0 ** -24), "F16": (as_f16, 2.0 ** -11), "BF16": (as_bf16, 2.0 ** -8)}
CODES = {"with -8": (-8, 7), "without": (-7, 7), "with +8": (-7, 8), "3 bits": (-4, 3), "2 bits": (-2, 1), "ternary": (-1, 1)}


def random_grids(rng, low, high, scale):
    """Random blocks d * q with codes low .. high, half of them normal (the outer codes rare), half uniform."""
    normal = np.clip(np.rint(rng.normal(0, (high - low) / 6, (N, 32))), low, high)
    q = np.where(rng.random((N, 1)) < 0.5, normal, rng.integers(low, high + 1, (N, 32))).astype(F32)
    d = scale(np.exp(rng.uniform(-8, 2, (N, 1))).astype(F32))
    return d, q


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("scale", [as_f16, as_bf16], ids=["float16 scales", "bfloat16 scales"])
def test_every_code_of_a_random_grid_is_recovered(codes, stored, scale):
    rng = np.random.default_rng(1)
    d, q = random_grids(rng, *CODES[codes], scale)
    store, unit = STORED[stored]
    x = store(d * q)
    found = recover_grid(x)
    assert found.exact.all()
    # The scale found is a whole multiple of the true one (coarser, where the codes have a common divisor): codes follow from it.
    multiple = np.rint(found.d.astype(F32) / d[:, 0])
    assert (multiple != 0)[np.any(q, axis=1)].all()
    assert np.array_equal(found.q * multiple[:, None], q), "code errors"
    again = dequantize(quantize_q4_0_on_grid(x), "Q4_0")
    assert np.array_equal(store(again), x), "other numbers would be stored"
    assert (np.abs(again - d * q) <= 2 * unit * np.abs(d * q)).all()
    if stored != "BF16":
        assert np.array_equal(again, d * q), "a format that holds the products loses nothing"
    elif scale is as_bf16:
        assert np.mean(again == d * q) > 0.999, "of the scales that explain the numbers, the one with as few digits as W4A16's"


def test_the_usual_rule_loses_what_the_grid_keeps():
    """Codes -7 .. 7: the rule puts the largest on -8 and all others between codes."""
    rng = np.random.default_rng(2)
    d, q = random_grids(rng, -7, 7, as_bf16)
    x = as_bf16(d * q)
    careful, naive = (dequantize(raw, "Q4_0") for raw in (quantize_q4_0_on_grid(x), quantize(x, "Q4_0")))
    size = np.sqrt(np.mean(x ** 2))
    assert np.sqrt(np.mean((naive - x) ** 2)) > 0.05 * size
    assert np.sqrt(np.mean((careful - x) ** 2)) < 0.003 * size


def test_the_coarsest_grid_is_taken():
    x = np.zeros((3, 32), F32)
    x[0, :4] = 0.5, -0.5, 1, 0              # 1, -1, 2: not 4, -4, 8
    x[1, 5] = -3                            # a single weight
    found = recover_grid(x)
    assert found.q[0, :4].tolist() == [1, -1, 2, 0] and found.d[0] == 0.5
    assert abs(found.q[1, 5]) == 1 and found.restored()[1, 5] == -3
    assert found.exact.all() and not found.q[2].any() and found.d[2] == 0


def test_codes_of_8_on_both_sides_are_no_grid_of_q4_0():
    x = np.full((1, 32), 7, F32)
    x[0, :2] = 8, -8
    found = recover_grid(x)
    assert not found.exact[0] and np.abs(found.restored() - x).max() <= 1


def test_scales_that_float16_does_not_hold_are_found_to_its_rounding():
    rng = np.random.default_rng(3)
    d, q = random_grids(rng, -8, 7, lambda x: x)
    found = recover_grid(as_bf16(d * q))
    assert found.exact.all()
    assert np.abs(found.restored() - d * q).max() <= (np.abs(d * q) * (2.0 ** -8 + 2.0 ** -11)).max()


@pytest.mark.parametrize("spread", [3e-6, 1e-3, 1.0])       # the first: float16 holds scales to half a percent only
def test_ordinary_weights_are_on_no_grid_and_never_worse_off(spread):
    rng = np.random.default_rng(4)
    for x in (rng.normal(0, spread, (N, 32)), rng.standard_t(2, (N, 32)) * spread, rng.uniform(-spread, spread, (N, 32)),
              np.sign(rng.normal(size=(N, 32))) * spread + rng.normal(0, spread / 10, (N, 32))):
        x = x.astype(F32)
        x[:5, 7] = -np.abs(x[:5]).max(axis=1)
        x[:5, 9] = -x[:5, 7]                                # the largest twice, once with either sign
        x[5] = np.resize([8, -8, *[7.9] * 12, 1, 2, -3], 32) * F32(spread)
        found = recover_grid(x)
        error = np.sum((found.restored() - x) ** 2, axis=1)
        rule = np.sum((dequantize(quantize(x, "Q4_0"), "Q4_0") - x) ** 2, axis=1)
        assert found.exact.mean() < 0.001
        assert (error <= rule * (1 + 1e-5)).all() and error.sum() < 0.97 * rule.sum()


def test_bytes_are_q4_0_of_any_shape():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(3, 5, 96)).astype(F32)
    raw = quantize_q4_0_on_grid(x)
    assert raw.shape == (3, 5, 54) and raw.dtype == np.uint8
    found = recover_grid(x.reshape(-1, 32))
    assert np.array_equal(dequantize(raw, "Q4_0").reshape(-1, 32), found.restored())
    assert np.array_equal(fields_of(raw, BLOCKS["Q4_0"])["d"].reshape(-1), found.d)
    big = rng.normal(size=(20000, 64)).astype(F32)          # more than one chunk
    assert np.array_equal(quantize_q4_0_on_grid(big)[12345], quantize_q4_0_on_grid(big[12345]))
    assert quantize_q4_0_on_grid(np.zeros((0, 64), F32)).shape == (0, 36)


def test_numbers_at_the_edges():
    tiny = np.full((2, 32), 1e-12, F32)                     # float16 has no such scale: zeros, as by the usual rule
    assert not recover_grid(tiny).restored().any() and not recover_grid(tiny).exact.any()
    assert recover_grid(np.full((1, 32), -0.0, F32)).exact[0]
    small = (np.arange(32) % 8 * F32(3e-7)).reshape(1, 32).astype(F32)
    assert np.isfinite(recover_grid(small).restored()).all()
    for bad in (np.nan, np.inf, -np.inf, 3e38):
        x = np.ones((1, 32), F32)
        x[0, 3] = bad
        with pytest.raises(ValueError, match="cannot quantize"):
            quantize_q4_0_on_grid(x)
    with pytest.raises(ValueError, match="whole number of blocks"):
        quantize_q4_0_on_grid(np.ones((1, 33), F32))


# ---- refimpl inspect --grid

@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file with a matrix on a grid without code -8 (bfloat16), an ordinary one (float16), a big one on Q4_0's own grid (float32)."""
    from refimpl.formats.gguf_writer import write_gguf

    rng = np.random.default_rng(6)
    d, q = random_grids(rng, -7, 7, as_bf16)
    on, off = (d * q).reshape(-1, 96), rng.normal(size=(40, 64)).astype(F32)
    own = dequantize(quantize(rng.normal(size=(3, 6000, 128)).astype(F32), "Q4_0"), "Q4_0")
    path = tmp_path_factory.mktemp("grid") / "released.gguf"
    write_gguf(path, {"general.architecture": "gemma4"}, [
        ("blk.0.attn_q.weight", "BF16", quantize_bf16(on)), ("blk.1.attn_q.weight", "F16", off.astype(np.float16)),
        ("blk.1.ffn_up_exps.weight", "F32", own), ("blk.1.attn_norm.weight", "F32", np.ones(64, F32)),
        ("blk.1.attn_k.weight", "Q4_0", quantize(off, "Q4_0")), ("odd.weight", "F32", np.ones((2, 33), F32))])
    return path


def test_grid_of_a_file(released):
    from refimpl.cli.show.inspect import grid_text
    from refimpl.files.qat_grid import SAMPLE, describe_grid

    found = describe_grid(released)
    on, off, own = found["tensors"]
    assert [t["name"] for t in found["tensors"]] == ["blk.0.attn_q.weight", "blk.1.attn_q.weight", "blk.1.ffn_up_exps.weight"]
    assert on["on_grid"] == 1 and on["grid_rms"] < 0.002 and on["rule_rms"] > 0.05 and on["moved_by_rule"] > 0.5
    assert off["on_grid"] == 0 and 0.05 < off["grid_rms"] < off["rule_rms"] < 0.12
    assert own["on_grid"] == 1 and own["grid_rms"] == own["rule_rms"] == own["moved_by_rule"] == 0
    assert own["rows"] == 18000 and own["rows_sampled"] == SAMPLE // 128
    both = found["roles"]["attn_q"]
    assert both["rows_sampled"] == 1000 + 40 and both["on_grid"] == pytest.approx(3000 / 3080)
    assert found["all"]["rows_sampled"] == 1000 + 40 + SAMPLE // 128
    assert "of 18000" in grid_text(found) and "attn_q " in grid_text(found)


def test_grid_on_the_command_line(released, tmp_path, capsys):
    import json

    from refimpl.cli import app
    from refimpl.formats.gguf_writer import write_gguf

    app(["inspect", "--grid", "-m", str(released)], standalone_mode=False)
    assert "all together" in capsys.readouterr().out
    app(["inspect", "--grid", "--json", "-m", str(released)], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["tensors"][0]["on_grid"] == 1
    write_gguf(tmp_path / "q.gguf", {"general.architecture": "gemma4"}, [("a.weight", "Q4_0", quantize(np.ones((2, 64), F32), "Q4_0"))])
    with pytest.raises(ValueError, match="no float matrix.*only Q4_0; give a file in F32"):
        app(["inspect", "--grid", "-m", str(tmp_path / "q.gguf")], standalone_mode=False)
    with pytest.raises(Exception, match="--grid needs a file of float weights"):
        app(["inspect", "--grid"], standalone_mode=False)


def test_grid_names_the_tensor_that_holds_nan(tmp_path):
    from refimpl.files.qat_grid import describe_grid
    from refimpl.formats.gguf_writer import write_gguf

    x = np.ones((2, 32), F32)
    x[1, 4] = np.nan
    write_gguf(tmp_path / "nan.gguf", {"general.architecture": "gemma4"}, [("a.weight", "F32", x)])
    with pytest.raises(ValueError, match="tensor a.weight: cannot quantize"):
        describe_grid(tmp_path / "nan.gguf")
