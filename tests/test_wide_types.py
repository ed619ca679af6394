"""Weights of types without kernels: held as float32 tiles, multiplied exactly, counted, and named. Beside them: the same weights as F32."""

import re
import tracemalloc

import numpy as np
import pytest
from cli import run
from shapes import opened, pattern, prompt, random_drafter, random_model, reference, worst, write_drafter, write_model

import refimpl
from refimpl.cli.show.inspect import as_text
from refimpl.files.inspect import describe
from refimpl.formats.matrix import Matrix
from refimpl.formats.quants.blocks import BLOCKS, fields_of
from refimpl.formats.quants.codecs import DEQUANTIZABLE, dequantize
from refimpl.host import available
from refimpl.kernels.machine import tiles
from refimpl.kernels.machine.tiles import held_bytes, tiled
from refimpl.kernels.machine.unpack import LAYOUTS
from refimpl.kernels.matmul import matmul, matmul_q8
from refimpl.loading.memory import MemoryRefusal, needed
from refimpl.model.weights import weights_from_gguf
from refimpl.reference.matmul import matmul as matmul_by_hand
from refimpl.reference.matmul import matmul_q8 as matmul_q8_by_hand

WIDE = sorted(DEQUANTIZABLE - set(LAYOUTS))
MIXED = ("IQ3_S", "IQ2_XXS", "Q4_0", "IQ1_M", "IQ2_S", "TQ1_0", "IQ3_XXS", "NVFP4", "IQ1_S", "IQ2_XS", "TQ2_0", "Q1_0", "Q8_K")
SAMPLE = prompt(20)


def random_blocks(block: str, *shape: int, seed: int) -> np.ndarray:
    """Random bytes whose scales are such that weights are as large as a random model's. uint8 (*lead, row_bytes)."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (*shape[:-1], BLOCKS[block].row_bytes(shape[-1])), dtype=np.uint8)
    fields, target = fields_of(raw, BLOCKS[block]), shape[-1] ** -0.5

    def scale(value: float):
        if block == "IQ1_M":
            half = int(np.float16(value).view(np.uint16))
            fields["scales"] = fields["scales"] & 0x0FFF | np.array([(half >> 4 * k & 15) << 12 for k in range(4)], np.uint16)
        elif block == "NVFP4":
            fields["d"] = fields["d"] & 7 | 0x10        # 2**-5 to 2**-4
        else:
            fields["d"] = value
    scale(1.0)
    if block != "NVFP4":
        scale(target / float(np.sqrt(np.mean(dequantize(raw, block) ** 2))))
    assert 0.3 < float(np.sqrt(np.mean(dequantize(raw, block).astype(np.float64) ** 2))) / target < 4
    return raw


def in_types(types: tuple[str, ...]):
    """A change of `write_model`: matrices get random blocks of these types in turn, wherever the block fits the row."""
    def change(tensors):
        out, n = [], 0
        for name, block, data in tensors:
            wanted = types[n % len(types)]
            if wanted == "Q4_0" and "_exps" in name:        # kernels for experts of two kinds would take a minute to compile
                wanted = "IQ3_S"
            if data.ndim > 1 and "ffn_gate_inp" not in name and data.shape[-1] % BLOCKS[wanted].elements == 0:
                n += 1
                block, data = wanted, random_blocks(wanted, *data.shape, seed=n)
            out.append((name, block, data))
        assert n > len(types)
        return out
    return change


def as_float32(change):
    """The same change, with every type that has no kernels dequantized."""
    return lambda tensors: [(name, "F32", dequantize(data, block)) if block in WIDE else (name, block, data)
                            for name, block, data in change(tensors)]


def wide_model(shape: str):
    """Rows of 256 all over, so that every type fits."""
    own = {"26B-A4B": dict(num_hidden_layers=3, layer_types=["sliding_attention"] * 2 + ["full_attention"], moe_intermediate_size=256,
                           num_experts=4),
           "E2B": dict(layer_types=pattern(3, 2), num_hidden_layers=8, num_kv_shared_layers=3)}[shape]
    return random_model(shape, seed=3, **dict(hidden_size=256, intermediate_size=256, head_dim=64, global_head_dim=128) | own)


@pytest.fixture(scope="module", params=[pytest.param("26B-A4B", marks=pytest.mark.exhaustive), "E2B"])     # experts of F32: compiled for it
def files(request, tmp_path_factory):
    """(a file of mixed types, the same weights with F32 in place of types without kernels)"""
    folder, hf = tmp_path_factory.mktemp("wide"), wide_model(request.param)
    return tuple(write_model(folder / f"{name}.gguf", hf, "F32", change=change)
                 for name, change in (("mixed", in_types(MIXED)), ("plain", as_float32(in_types(MIXED)))))


# ---- products

@pytest.mark.parametrize("block", WIDE)
def test_products_of_every_type(block):
    """Kernels: the bits of the F32 matrix. Reference: exact in both arithmetics. Odd sizes, and experts."""
    w = Matrix(random_blocks(block, 3, 37, 512, seed=5), block)
    x = np.random.default_rng(6).standard_normal((5, 512)).astype(np.float32)
    for e in range(3):
        one = Matrix(w.raw[e], block)
        want = matmul(x, tiled(one.dequantized(), 1))
        for product in (matmul, matmul_q8):
            assert np.array_equal(product(x, tiled(one, 2)), want)
        exact = np.einsum("TD,OD->TO", x.astype(np.float64), dequantize(one.raw, block))
        assert np.abs(want - exact).max() < 1e-5 * np.abs(exact).max()
        assert np.array_equal(matmul_q8_by_hand(x, one), matmul_by_hand(x, one))
        assert np.abs(matmul_by_hand(x, one) - exact).max() < 1e-5 * np.abs(exact).max()


def test_tiles_are_filled_a_few_rows_at_a_time(monkeypatch):
    """The same tiles whatever a chunk holds, also of a fused matrix cut in two; and no second copy of the whole."""
    whole = Matrix(random_blocks("IQ3_S", 2, 700, 1024, seed=7), "IQ3_S")
    for matrix in (whole, whole.rows(0, 333), whole.rows(333, 700)):
        want = tiled(matrix.dequantized(), 1)
        for chunk in (1, 100_000, 1 << 26):
            monkeypatch.setattr(tiles, "CHUNK_BYTES", chunk)
            got = tiled(matrix, 2)
            assert (got.type, got.shape) == ("F32", matrix.shape) and np.array_equal(got.raw, want.raw)
    monkeypatch.setattr(tiles, "CHUNK_BYTES", 100_000)
    dequantize(whole.raw[0, :16], "IQ3_S")
    tracemalloc.start()
    held = tiled(whole, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held.n_bytes == 4 * 2 * 704 * 1024 < peak < held.n_bytes + 2_000_000 and held_bytes(whole) == 4 * 2 * 700 * 1024


# ---- models

def test_the_same_bits_as_the_weights_in_float32(files):
    mixed, plain = files
    for arithmetic in ("exact", "q8"):
        ours = refimpl.load(mixed, arithmetic=arithmetic, threads=1)
        logits = ours.logits(SAMPLE)
        assert np.array_equal(logits, refimpl.load(plain, arithmetic=arithmetic, threads=1).logits(SAMPLE))
        assert np.array_equal(logits, refimpl.load(mixed, arithmetic=arithmetic, threads=2).logits(SAMPLE))
        cache, states = ours.new_cache(), []
        for part in (SAMPLE[:1], SAMPLE[1:6], SAMPLE[6:]):
            states.append(ours.prefill(part, cache))
        assert np.array_equal(ours.head(np.concatenate(states)), logits)
        assert set(ours.held_as_float32) == set(MIXED) & set(WIDE)


def test_kernels_and_reference_agree_as_on_float32_files(files):
    mixed, plain = files
    error, usual = (worst(refimpl.load(path, arithmetic="exact").logits(SAMPLE), reference(path).logits(SAMPLE)) for path in files)
    print(f"\n{error:.1e} of the largest logit, {usual:.1e} with float32 weights")
    assert error < 1e-4 and error <= 2 * usual
    assert reference(mixed).held_as_float32 == {}
    assert np.array_equal(reference(mixed, weights="quantized").logits(SAMPLE), reference(plain, weights="quantized").logits(SAMPLE))
    assert np.array_equal(reference(mixed, arithmetic="q8").logits(SAMPLE), reference(plain, arithmetic="q8").logits(SAMPLE))


# ---- memory

def need_of(path, *context):
    file, config = opened(path)
    return needed(weights_from_gguf(file, config), config, *context, held_bytes)


def test_four_bytes_a_weight_are_counted(files):
    mixed, plain = (need_of(path, 64, 8, np.float32) for path in files)
    assert mixed.weights == plain.weights and not plain.held_as_float32
    model = refimpl.load(files[0], arithmetic="exact")
    assert model.held_as_float32 == mixed.held_as_float32
    file = opened(files[0])[0]
    for kind, names in mixed.held_as_float32.items():
        for name in names:
            stored = name if name in file.tensors else re.sub("_(gate|up)_exps", "_gate_up_exps", name)
            assert file.tensors[stored].type == kind
    assert "per_layer_token_embd.weight" not in sum(mixed.held_as_float32.values(), [])        # only looked up in


def test_an_embedding_that_is_only_looked_up_in_stays_as_it_is(tmp_path):
    def untied(tensors):
        tensors = in_types(("IQ2_XS",))(tensors)
        head = next(data for name, _, data in tensors if name == "token_embd.weight")
        return [*tensors, ("output.weight", "F32", dequantize(head, "IQ2_XS"))]
    path = write_model(tmp_path / "untied.gguf", wide_model("E2B"), "F32", change=untied)
    model = refimpl.load(path, arithmetic="exact")
    assert model.weights.embedding_VD.type == "IQ2_XS" and "token_embd.weight" not in model.held_as_float32["IQ2_XS"]
    assert worst(model.logits(SAMPLE), reference(path).logits(SAMPLE)) < 1e-4


def test_what_does_not_fit_is_refused_with_the_remedy(files, monkeypatch):
    from refimpl.loading import model

    need = need_of(files[0], 1, 512, np.float16)
    monkeypatch.setattr(model, "available", lambda: need.without_context - 1)
    with pytest.raises(MemoryRefusal) as refusal:
        refimpl.load(files[0])
    line = str(refusal.value)
    for words in (str(files[0]), "there are no kernels for IQ", "held as float32", f"`refimpl convert {files[0]} --type Q4_K`"):
        assert words in line
    assert "\n" not in line
    monkeypatch.setattr(model, "available", lambda: need.without_context)
    with pytest.raises(MemoryRefusal, match="smaller context") as refusal:
        refimpl.load(files[0])
    assert "no kernels" not in str(refusal.value)
    monkeypatch.setattr(model, "available", available)
    with pytest.raises(MemoryRefusal, match="a smaller file helps"):
        monkeypatch.setattr(model, "available", lambda: 1 << 20)
        refimpl.load(files[1])


def test_the_command_line_says_so(files):
    code, out, err = run("generate", "-m", files[0], "-p", "a", "-n", 2)
    assert code == 0 and err.count("note: there are no kernels for ") == 1 and "first token_embd.weight" in err and "refimpl convert" in err
    described = describe(files[0], 64)
    assert "held as float32, 4 bytes a weight (counted above)" in as_text(described)
    assert described["memory"]["weight_bytes"] == describe(files[1], 64)["memory"]["weight_bytes"]
    assert "no kernels" not in as_text(describe(files[1], 64))


def test_a_drafter_counts_too(tmp_path, monkeypatch):
    from refimpl.loading import drafter

    target = refimpl.load(write_model(tmp_path / "m.gguf", random_model("12B")), arithmetic="exact")
    hf = random_drafter("12B", hidden_size=64, intermediate_size=128)
    wide, plain = (write_drafter(tmp_path / f"{name}.gguf", hf, change=change) for name, change in (
        ("wide", in_types(("NVFP4",))), ("plain", as_float32(in_types(("NVFP4",))))))
    ours, same = (refimpl.propose(target, refimpl.load_drafter(path, target), prompt(30), 4) for path in (wide, plain))
    assert ours == same and len(ours) == 4
    stored = sum(info.n_bytes for info in refimpl.load_drafter(wide, target).file.tensors.values())
    monkeypatch.setattr(drafter, "available", lambda: 2 * stored)
    with pytest.raises(MemoryRefusal, match="the drafter needs"):
        refimpl.load_drafter(wide, target)
