"""The model that ships: it is what transformers says it is, its training can be repeated, and its baselines are sound."""

import contextlib
import dataclasses
import functools
import json
import math

import gguf
import numpy as np
import pytest
import torch
from shapes import oracle, reference, worst, write_drafter
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

import refimpl
from refimpl.decode.sampling import Sampling
from refimpl.formats.gguf import GGUFError
from refimpl.formats.quants.codecs import dequantize, quantize
from refimpl.loading.hf_names import gguf_name
from refimpl.loading.hub import local
from refimpl.loading.model import BUILT_IN
from refimpl.tiny import corpus
from refimpl.tiny.groups import balanced_groups
from refimpl.tiny.ngram import NgramModel
from refimpl.tiny.training import export, grids, network, train, train_drafter

PROMPT = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n    def pop(self):\n        if not self.items:\n" * 4


@pytest.fixture(scope="module")
def built_in():
    return reference()


@pytest.fixture(scope="module")
def quick():
    """The same with kernels."""
    return refimpl.load(threads=1)


@pytest.fixture(scope="module")
def as_transformers():
    return transformers_of(BUILT_IN, network.SHAPE)


@functools.cache
def text_files():
    return corpus.read_corpus()


def transformers_of(path, shape):
    """transformers' model with the weights of a shipped file, which reach it through the gguf package."""
    config = Gemma4TextConfig(**shape)
    config._attn_implementation = config._experts_implementation = "eager"
    model = Gemma4ForCausalLM(config).eval()
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist())
               for t in gguf.GGUFReader(path).tensors}
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name != "lm_head.weight":
                value.copy_(torch.from_numpy(np.array(tensors[gguf_name(name)])))
    return model


def test_shipped_file_equals_transformers_at_every_layer(built_in, as_transformers):
    ids, got = built_in.tokenizer.encode(PROMPT), {}
    assert len(ids) > 2 * 64, "the prompt must cross the window"
    built_in.logits(ids, tap=got.__setitem__)
    for name, want in oracle(as_transformers, ids).items():
        if not name.startswith("ffn_moe_topk"):         # experts may change places where their weights are equal
            assert worst(got[name], want) < 1e-4, name


def test_shipped_file_has_the_features_of_the_26b(built_in):
    config, types = built_in.config, {info.type for info in built_in.file.tensors.values()}
    kinds = [layer.attention.value for layer in config.layers]
    assert kinds == ["sliding"] * 5 + ["full"] and config.layers[0].window == 64 and config.softcap == 30
    assert config.layers[5].values_are_keys and config.layers[5].head_dim == 2 * config.layers[0].head_dim
    assert {(layer.ffn.n_expert, layer.ffn.n_used) for layer in config.layers} == {(128, 8)}
    assert types == {"Q4_0", "F32"} and BUILT_IN.stat().st_size < 12e6


def test_the_second_model_equals_transformers_and_has_the_features_of_e2b():
    path, got = local("built-in:e2b"), {}
    model = reference(path)
    ids = model.tokenizer.encode(PROMPT)
    model.logits(ids, tap=got.__setitem__)
    for name, want in oracle(transformers_of(path, network.E2B_SHAPE), ids).items():
        assert worst(got[name], want) < 1e-4, name
    layers = model.config.layers
    assert [layer.kv_from for layer in layers] == [0, 1, 2, 3, 2, 2, 2, 3] and not any(layer.values_are_keys for layer in layers)
    assert {layer.ffn.n_ff for layer in layers if layer.has_own_kv} == {192} and {layer.ffn.n_ff for layer in layers[4:]} == {384}
    assert model.config.n_ple == 32 and path.stat().st_size < 4e6
    assert [model.tokenizer.encode(text) for text in (PROMPT, "<|turn>\xe8")] == [reference().tokenizer.encode(text)
                                                                                for text in (PROMPT, "<|turn>\xe8")]


def test_built_in_models_have_names():
    assert local("built-in") == BUILT_IN and local("built-in", "drafter").parent == BUILT_IN.parent
    with pytest.raises(GGUFError, match="there is built-in and"):
        refimpl.load("built-in:e4b")
    second = reference(local("built-in:e2b"))
    assert refimpl.load_drafter(None, second).file.path == local("built-in:e2b", "drafter") != local("built-in", "drafter")
    with pytest.raises(GGUFError, match="has no projector"):         # and not the first model's
        refimpl.load_projector(None, second)


def test_groups_of_the_vocabulary_are_of_one_size_and_near():
    rows = np.random.default_rng(0).normal(size=(8, 16))[np.arange(64) % 8] + 0.01 * np.random.default_rng(1).normal(size=(64, 16))
    group_V = balanced_groups(rows, 8, 20, seed=1)
    assert (np.bincount(group_V) == 8).all()
    assert np.mean([len(set(group_V[i::8])) == 1 for i in range(8)]) >= 0.5


def test_all_experts_are_in_use(quick):
    """Over some library code, every expert of every layer is chosen by some token."""
    text = "".join(list(text_files().validation.values())[:3])
    ids, seen = quick.tokenizer.encode(text)[:3000], {}
    quick.prefill(ids, quick.new_cache(), tap=lambda name, value: seen.setdefault(name, []).append(value.copy()))
    for i in range(6):
        used = np.unique(np.concatenate([chosen.ravel() for chosen in seen[f"ffn_moe_topk-{i}"]]))
        assert len(used) > 110, f"layer {i} uses {len(used)} of 128 experts"


def test_text_is_not_stuck(quick):
    """At temperature 0.7, as the file asks for, the commonest 4-gram of a continuation is no large part of it."""
    sampling = Sampling.from_metadata(quick.file.metadata)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 0, 1.0)
    for start in ("def ", "class "):
        ids = refimpl.generate(quick, quick.tokenizer.encode(start), max_new_tokens=150, temperature=0.7, top_k=0, top_p=1.0,
                               seed=1).ids
        grams = [tuple(ids[i:i + 4]) for i in range(len(ids) - 3)]
        assert not grams or max(map(grams.count, grams)) <= 0.25 * len(grams), quick.tokenizer.decode(ids)


def test_quick_attention_experts_and_loss_equal_transformers():
    torch.manual_seed(0)
    model = network.build_model(0)
    ids = torch.randint(0, 4096, (2, 193))              # three windows
    x, y = ids[:, :-1], ids[:, 1:]

    def gradients(attention, experts, masks):
        model.zero_grad()
        model.config._attn_implementation, model.config._experts_implementation = attention, experts
        logits = model(input_ids=x, use_cache=False, attention_mask=masks).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 4096), y.reshape(-1))
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    def distance(a, b):
        return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in b)

    want_loss, want = gradients("eager", "eager", None)
    loss, got = gradients("refimpl_block", "eager", network.NO_MASKS)
    assert abs(loss - want_loss) < 1e-5 and distance(got, want) < 1e-4
    loss, got = gradients("eager", "refimpl_grouped", None)             # bfloat16 inside: the choice of experts may change
    assert abs(loss - want_loss) < 1e-2 and distance(got, want) < 0.5
    model.zero_grad()
    model.config._attn_implementation, model.config._experts_implementation = "refimpl_block", "refimpl_grouped"
    nats, balance = network.loss_of(model, x, y, with_router=True)
    assert abs(nats.item() - want_loss) < 2e-2 and 0.9 < balance.item() < 4


def test_training_rounds_to_the_very_weights_of_the_file():
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    w[3] = 0
    w[4, :32] = 0.5
    assert np.array_equal(grids.Q4_0.round(w).numpy(), dequantize(quantize(w.numpy(), "Q4_0"), "Q4_0"))


@pytest.mark.exhaustive
def test_quick_training_run_exports_a_model_that_loads(tmp_path):
    """`python -m refimpl.tiny.training.train --quick`, interrupted in the middle and resumed, then exported."""
    run = tmp_path / "run"
    stopped = train.parse_arguments(["--quick", "--out", str(run)])
    assert stopped.steps == 12
    original = train.torch.save

    def stop_after_second_save(*args):
        original(*args)
        if (run / "state-0.pt").exists():
            raise KeyboardInterrupt

    train.torch.save = stop_after_second_save
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main(["--quick", "--out", str(run)])
    finally:
        train.torch.save = original
    train.main(["--quick", "--out", str(run)])
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 12 and log[-1]["validation_nats"] < math.log(4096) + 0.5
    export.main([str(run), "-o", str(tmp_path / "m.gguf")])
    model = reference(tmp_path / "m.gguf")
    assert np.isfinite(model.logits(model.tokenizer.encode("def f():\n"))).all()
    state = torch.load(run / "model.pt", weights_only=True)
    held = model.weights.layers[0].attention.query_AD.float32()
    assert np.array_equal(held, grids.Q4_0.round(state["model.layers.0.self_attn.q_proj.weight"]).numpy())


def test_split_keeps_files_and_their_tests_apart():
    text = text_files()
    parts = [set(part) for part in (text.library, text.tests, text.validation, text.heldout)]
    assert sum(map(len, parts)) == len(set.union(*parts)) and all(parts)
    stems = {name.split("/")[-1].removesuffix(".py").lstrip("_") for name in text.heldout} - {"init", "main", "util"}
    assert not [name for name in text.tests if name.split("/")[-1].removesuffix(".py") in {f"test_{stem}" for stem in stems}]


def test_bits_of_a_text_are_the_model_s_own(built_in, quick):
    """A short text in one window: minus the logarithm of the probabilities. A long one: every token counted once."""
    from refimpl.tiny.evaluate import model_bits

    ids = built_in.tokenizer.encode(PROMPT)
    logits = torch.from_numpy(built_in.logits(ids[:-1])).double()
    want = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item() / math.log(2)
    assert abs(model_bits(built_in, ids) - want) < 1e-3
    counted = []
    long = [ids[0], *(ids[1:] * 7)]
    model_bits(quick, long, counted.append)
    assert sum(counted) == len(long) - 1 and len(counted) > 2


def test_ngram_probabilities_sum_to_one_and_learn():
    rng = np.random.default_rng(0)
    files = [rng.integers(0, 5, 300) for _ in range(4)] + [np.tile([1, 2, 3], 50)]
    model = NgramModel(files)
    history = [1, 2, 3, 1]
    before = model.bits(np.array(history))
    total = sum(2.0 ** -(model.bits(np.array([*history, w])) - before) for w in range(4096))
    assert abs(total - 1) < 1e-6
    assert model.bits(np.tile([1, 2, 3], 20)) < 0.2 * model.bits(rng.integers(0, 5, 60))


# ---- the drafter

def test_training_runs_the_steps_that_drafting_takes(tmp_path, monkeypatch):
    """All positions at once, in torch, against one position after the other, in the reference: the normed states of all four steps."""
    from refimpl.model import drafter as drafting
    from refimpl.model.gemma4 import embed

    target = train_drafter.load_target()
    made = train_drafter.build_drafter(target, 0)
    for p in made.parameters():
        if p.ndim == 1:
            torch.nn.init.uniform_(p, 0.3, 0.8)
    model = reference()
    ours = refimpl.load_drafter(write_drafter(tmp_path / "d.gguf", made, metadata=model.file.metadata), model)
    ids = model.tokenizer.encode("".join(text_files().validation.values())[:2000])[:192]
    seen = []

    def look(z_TD, w_VD, p_TV):
        seen.append(z_TD.detach().numpy().reshape(-1, train_drafter.WIDTH))
        assert np.allclose(p_TV.float().sum(-1), 1, atol=0.03)
        return torch.zeros(()), torch.zeros(len(z_TD), dtype=torch.long)
    monkeypatch.setattr(train_drafter.SoftCrossEntropy, "apply", look)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    monkeypatch.setattr(train_drafter, "LOW", torch.float32)
    target.config._experts_implementation = "eager"
    losses, right = train_drafter.run(target, made, torch.tensor([ids]), 1)
    assert len(losses) == 4 and right.shape == (4, len(seen[0])) and len(seen[0]) == len(ids) - 5
    for p in (1, 2, 40, 63, 64, 65, 130, len(ids) - 5):
        cache = model.new_cache()
        state, angles = model.prefill(ids[:p], cache)[-1], drafting.angles_at(ours.weights, p)
        for j in range(4):
            embedding = embed(model.config, model.weights, np.array([ids[p + j]]))[0]
            z, state = drafting.draft_step(ours.config, ours.weights, model.backend, embedding, state, angles, cache)
            assert worst(seen[j][p - 1], z) < 2e-3, (p, j)


@pytest.mark.parametrize("name", ["built-in", "built-in:e2b"])
def test_a_drafter_that_ships_predicts_held_out_code(name, monkeypatch):
    """Two short texts, and bigrams of some files, are enough to see that it is the trained one; `python -m refimpl.tiny.evaluate_drafter`
    measures it.
    """
    from refimpl.tiny import evaluate_drafter

    text = text_files()
    some = dataclasses.replace(text, library=dict(list(text.library.items())[::32]), tests={}, heldout=dict(list(text.heldout.items())[:6]))
    monkeypatch.setattr(evaluate_drafter, "read_corpus", lambda: some)
    monkeypatch.setattr(evaluate_drafter, "NEW", 48)
    found = evaluate_drafter.evaluate(name, 2, 4, 0.0)
    print(f"\n{found}")
    assert found["drafter"]["acceptance"][0] > 0.5 and found["drafter"]["tokens_per_round"] > 2
    assert found["drafter"]["accepted"] > found["bigram"]["accepted"]
