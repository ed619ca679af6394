"""Quantization-aware training: the grids are those of the files, exports lose nothing, and the comparison is what it says."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from refimpl.formats.gguf import open_gguf
from refimpl.formats.gguf_writer import write_gguf
from refimpl.formats.quants.blocks import BLOCKS, bytes_of, fields_of, pack
from refimpl.formats.quants.codecs import dequantize
from refimpl.formats.quants.k.q4_k import pack_scales
from refimpl.lab.explain import qat_figures
from refimpl.loading.hf_names import gguf_metadata, gguf_name
from refimpl.loading.model import BUILT_IN
from refimpl.tiny import corpus, qat_results
from refimpl.tiny.training import grids, held_out, network, qat, qat_export, qat_release, train, vocabulary
from refimpl.tiny.training.optimiser import is_quantized

SMALL = corpus.Corpus("3", *({"a": text} for text in ["x = 1\n" * 600, "def f():\n    pass\n" * 300, "y = 2\n" * 99, "z = 3\n" * 900]))


def weights(*shape, seed=0):
    """Of many sizes, with rows of zeros, equal weights, and a pair of opposite largest ones."""
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-5, 2, shape[0])[:, None]
    w[3] = 0
    w[4, :32] = 0.5
    w[5, 7], w[5, 9] = 1000, -1000
    return w


def same_bits(a, b):
    return np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@pytest.fixture(scope="module")
def model():
    return network.build_model(0)


@pytest.fixture(scope="module")
def tokenizer():
    metadata = open_gguf(BUILT_IN).metadata
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    return vocabulary.tokenizer_from_parts(vocab, [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]])


# ---- what is exported is what was trained

@pytest.mark.parametrize("grid", [grids.Q4_0, grids.THREE_BITS, grids.TWO_BITS], ids=lambda grid: grid.name)
def test_a_q4_0_file_gives_back_the_weights_of_the_training(grid, model, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, gguf_metadata(model.config.to_dict()), qat_export.q4_0_tensors(model.config.to_dict(), model.state_dict(), grid))
    file = open_gguf(path)
    seen = 0
    for name, p in model.named_parameters():
        info, raw = file.tensors[gguf_name(name)], file.raw(gguf_name(name))
        if is_quantized(name):
            assert info.type == "Q4_0"
            with grids.on_grid([p], grid):
                assert same_bits(dequantize(raw, "Q4_0"), p.detach().numpy()), name
            seen += 1
        else:
            assert info.type == "F32" and np.array_equal(dequantize(raw, "F32"), p.detach().numpy())
    assert seen == 6 * 9 - 1 + 1 and file.raw("rope_freqs.weight").size      # the full layer has no values of its own; the embedding


@pytest.mark.parametrize(("grid", "n_codes"), [(grids.Q4_0, 16), (grids.THREE_BITS, 8), (grids.TWO_BITS, 4)], ids=["4", "3", "2"])
def test_grids_of_fewer_bits_are_rounded_to_nearest(grid, n_codes):
    w = weights(64, 96)
    codes = grid.encode(w)
    d, blocks = codes.scales[0].float(), w.reshape(-1, 32)
    assert codes.q.min() == -grid.half and codes.q.max() == grid.half - 1 and len(codes.q.unique()) == n_codes
    every = torch.arange(-grid.half, grid.half)[:, None, None] * d
    nearest = (every - blocks).abs().amin(0)
    # float32's scale chooses the code, float16's is stored: a weight half-way between two may fall to the other side
    assert ((grid.decode(codes) - blocks).abs() <= nearest + grid.half * (d.abs() * 2.0 ** -10 + 2.0 ** -24)).all()
    fields = fields_of(qat_export.q4_0_bytes(w, grid), BLOCKS["Q4_0"])
    assert np.array_equal(fields["d"].reshape(-1), codes.scales[0].numpy()[:, 0])
    assert same_bits(dequantize(qat_export.q4_0_bytes(w, grid), "Q4_0"), grid.round(w))


@pytest.mark.parametrize("grid", [grids.Q4_0, grids.THREE_BITS, grids.TWO_BITS], ids=lambda grid: grid.name)
def test_the_notebook_rounds_as_the_training_does(grid):
    """Without torch."""
    w = weights(64, 96)
    rounded, d = qat_figures.on_signed_maximum(w.numpy(), grid.half)
    assert same_bits(rounded, grid.round(w)) and same_bits(d, grid.encode(w).scales[0].float()[:, 0])
    assert same_bits(qat_figures.on_w4a16(w.numpy()), grids.W4A16.round(w))


def test_w4a16_is_what_compressed_tensors_reads():
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    w = weights(48, 96)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True))
    triple = qat_export.w4a16_tensors("weight", w, grids.W4A16)
    assert triple["weight_packed"].dtype == torch.int32 and tuple(triple["weight_packed"].shape) == (48, 12)
    assert triple["weight_scale"].dtype == torch.bfloat16 and triple["weight_shape"].tolist() == [48, 96]
    decoded = PackedQuantizationCompressor.decompress(dict(triple), scheme)["weight"]
    assert decoded.dtype == torch.bfloat16
    assert same_bits(decoded.float(), grids.W4A16.round(w))
    blocks = w.reshape(48, 3, 32)
    scale, _ = calculate_qparams(blocks.amin(2), blocks.amax(2), scheme.weights)
    zero = triple["weight_scale"] == 0                         # theirs is a tiny number there
    assert zero.sum() == 3 and torch.equal(scale.bfloat16()[~zero], triple["weight_scale"][~zero])


def test_the_affine_grid_is_q4_k_over_the_flattened_matrix():
    w = weights(40, 32)
    w[8:16] = w[8:16].abs() + 1                                 # a superblock without negative weights: its minimum is 0
    q, (d, s, dmin, m) = grids.Q4_K.encode(w)
    raw = bytes_of(BLOCKS["Q4_K"], d=d.numpy()[:, 0], dmin=dmin.numpy()[:, 0], scales=pack_scales(s.numpy(), m.numpy()),
                   qs=pack(q.numpy().astype(np.uint8).reshape(-1, 256), n_bits=4, group=32))
    assert raw.shape == (720,), "5 superblocks of 144 bytes in a row"
    assert same_bits(dequantize(raw.reshape(5, 144), "Q4_K").reshape(w.shape), grids.Q4_K.round(w))
    step = (w.reshape(-1, 32).amax(1) - w.reshape(-1, 32).amin(1).clamp(max=0))[:, None] / 15
    superblock = step.reshape(5, 8).amax(1).repeat_interleave(8)[:, None]
    assert ((grids.Q4_K.round(w) - w).reshape(-1, 32).abs() <= 0.55 * step + superblock * 0.13).all()


# ---- the training

def test_the_gradient_is_that_of_the_rounded_weights_and_moves_the_unrounded():
    layer, x = torch.nn.Linear(64, 8, bias=False), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    before = layer.weight.detach().clone()
    with grids.on_grid([layer.weight], grids.TWO_BITS):
        rounded = layer.weight.detach().clone()
        assert torch.equal(rounded, grids.TWO_BITS.round(before)) and not torch.equal(rounded, before)
        (layer(x) ** 2).sum().backward()
    assert torch.equal(layer.weight.detach(), before)
    assert torch.allclose(layer.weight.grad, 2 * (x @ rounded.T).T @ x, rtol=1e-4, atol=1e-4)
    with pytest.raises(KeyError), grids.on_grid([layer.weight], grids.TWO_BITS):
        raise KeyError
    assert torch.equal(layer.weight.detach(), before), "restored also when training is interrupted"


def test_learning_rate_of_a_branch_rises_and_falls_to_zero():
    factors = [qat.factor(step, 100) for step in range(100)]
    assert factors[0] == 0.1 and max(factors) == factors[qat.WARM_UP - 1] == factors[qat.WARM_UP] == 1
    assert 0 < factors[-1] < 0.02 and all(a > b for a, b in zip(factors[qat.WARM_UP:], factors[qat.WARM_UP + 1:]))


def test_histogram_counts_every_weight_between_levels():
    p = torch.nn.Parameter(torch.zeros(2, 32))
    with torch.no_grad():
        p[0, 0], p[0, 1], p[0, 2] = -4.0, 1.0, 2.04            # d = 2: at -2, 0.5 and 1.02; 29 zeros. The second row has no scale
    counts = qat.histogram([p], grids.TWO_BITS)
    assert sum(counts) == 32 and len(counts) == 5 * qat.BINS_PER_LEVEL
    place = {round(i / qat.BINS_PER_LEVEL - 2.5, 4): n for i, n in enumerate(counts) if n}
    assert place == {-2.0: 1, 0.0: 29, 0.5: 1, 1.0: 1}


def test_held_out_measures_are_their_formulas(model, tokenizer):
    text = "".join(corpus.read_corpus().heldout.values())[:9000]
    ids = train.encode_parts(tokenizer, {"a": text})[0]
    n_bytes = held_out.bytes_of_ids(tokenizer)
    assert n_bytes[ids].sum() == len(text.encode()), "the tokens of a text cover all of its bytes"
    held = held_out.HeldOut([ids], n_bytes, 2)
    assert held.ids_BT.shape == (2, 512) and len(held.target_T) == 512
    reference = held.states(model), model.model.embed_tokens.weight.detach().clone()
    own = held.measure(model, reference)
    assert own["kl"] == 0 and own["top1"] == 1
    assert model.config._experts_implementation == "refimpl_grouped", "the training's experts are back"
    reference = reference[0], 4 * reference[1]                  # far from the model, so that both directions of the divergence differ
    matrices = [p for name, p in model.named_parameters() if is_quantized(name)]
    with grids.on_grid(matrices, grids.TWO_BITS), torch.no_grad():
        found = held.measure(model, reference)
        x_TD, cap = held.states(model), model.config.final_logit_softcapping
        ours = torch.log_softmax(torch.tanh(x_TD @ model.model.embed_tokens.weight.T / cap).double() * cap, 1)
    theirs = torch.log_softmax(torch.tanh(reference[0] @ reference[1].T / cap).double() * cap, 1)
    nats = torch.nn.functional.nll_loss(ours, held.target_T).item()
    assert found["nats"] == pytest.approx(nats, rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats * 512 / math.log(2) / held.n_bytes, rel=1e-4)
    assert found["kl"] == pytest.approx(torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean").item(), rel=1e-2)
    assert found["kl"] > 0 and found["top1"] == pytest.approx((ours.argmax(1) == theirs.argmax(1)).double().mean().item(), abs=0.01)


@pytest.mark.exhaustive
def test_a_run_is_resumed_and_its_branches_see_the_same_batches(model, tokenizer, tmp_path, monkeypatch, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    torch.save(model.state_dict(), base / "model.pt")
    tokenizer.save(str(base / "tokenizer.json"))
    monkeypatch.setattr(corpus, "read_corpus", lambda: SMALL)
    monkeypatch.setattr(qat, "CORE", ("float", "2-bit"))
    monkeypatch.setattr(qat_release, "CORE", ("float", "2-bit"))
    monkeypatch.setattr(qat, "plan", lambda args: [(0, "float"), (0, "2-bit")])
    batches, original = [], qat.backward

    def watched(model, ids, target):
        if len(batches) == 3:
            batches.append(None)
            raise KeyboardInterrupt
        batches.append(ids.clone())
        return original(model, ids, target)
    monkeypatch.setattr(qat, "backward", watched)
    command = ["--base", str(base), "--out", str(out), "--seeds", "1", "--steps", "2", "--batch", "1", "--windows", "1"]
    with pytest.raises(KeyboardInterrupt):
        qat.main(command)                                       # in the second branch
    assert {json.loads(line)["trained"] for line in (out / "rows.jsonl").read_text().splitlines()} == {"float"}
    qat.main(command)
    assert len(batches) == 6 and torch.equal(batches[0], batches[2]) and torch.equal(batches[0], batches[4])
    assert torch.equal(batches[1], batches[5]) and not torch.equal(batches[0], batches[1])
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    ways = [(row["trained"], row["stored"]) for row in rows]
    assert ways == [("float", "float"), *(("float", grid) for grid in grids.GRIDS), ("2-bit", "2-bit")]
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 0 and len(rows[-1]["history"]["histograms"]) == 3
    with pytest.raises(SystemExit, match="other options"):
        qat.main([*command[:-1], "2"])
    qat_release.main(["--out", str(out)])
    found = qat_results.gather(out)
    assert {row["converted"] for row in found["releases"]} == {*qat_results.RELEASES, qat_release.RULE, qat_release.LEAST_SQUARES}
    assert found["against"][0]["grid"] == "2-bit" and "2 bits, trained" in qat_results.as_text(found)


# ---- what ships

def test_the_results_that_ship_agree_with_their_rows():
    found = qat_results.results()
    rows = found["rows"]
    assert {row["seed"] for row in rows} == {0, 1, 2} and found["settings"]["seeds"] == 3
    for mean in found["mean"]:
        values = [row["bits_per_byte"] for row in rows if (row["trained"], row["stored"]) == (mean["trained"], mean["stored"])]
        assert len(values) == mean["seeds"] and mean["bits_per_byte"] == pytest.approx(np.mean(values), abs=2e-5)
    against = {entry["grid"]: entry for entry in found["against"]}
    assert all(x < 0 for grid in ("2-bit", "3-bit") for x in against[grid]["difference"]), "with few bits training on the grid helps"
    assert found["releases_mean"] == qat_results._means(found["releases"], ("trained", "converted"))
    releases = {(m["trained"], m["converted"]): m for m in found["releases_mean"]}
    assert releases["w4a16", "absmax"]["kl"] > 5 * releases["w4a16", "recovered"]["kl"]
    assert Path(qat_results.FILE).stat().st_size < 100_000
    text = qat_results.as_text(found)
    assert "Q4_0, 2 bits, trained" in text and "W4A16" in text


@pytest.mark.exhaustive
def test_the_base_can_be_made(tokenizer, tmp_path, monkeypatch):
    """`--qat 0` trains in float to the end, and leaves the two files that qat.py starts from."""
    monkeypatch.setattr(corpus, "read_corpus", lambda: SMALL)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    train.main(["--qat", "0", "--workers", "1", "--steps", "2", "--batch", "1", "--out", str(tmp_path)])
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["grid"] is False, "the last step is in float"
    start = network.build_model(0).state_dict()
    trained = torch.load(tmp_path / "model.pt", weights_only=True)
    assert trained.keys() == start.keys() and not torch.equal(trained["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    _, _, base, _, _ = qat.prepare(qat.parse_arguments(["--base", str(tmp_path), "--windows", "1"]))
    assert all(torch.equal(base[name], trained[name]) for name in start), "qat.py starts from it"
