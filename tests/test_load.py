"""Loading a model: whatever is wrong with a file, it either loads or says so in one line. Sizes and names are checked before use."""

import re
from unittest import mock

import numpy as np
import pytest
import shapes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import SHAPES, prompt, random_model, write_model

import refimpl
from refimpl import GGUFError, TokenizerError
from refimpl.model.config import unknown_keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def small(folder):
    """The smallest MoE and its bytes: little vocabulary, three layers."""
    hf = random_model("26B-A4B", num_hidden_layers=3, layer_types=["sliding_attention"] * 2 + ["full_attention"], num_experts=4)
    return hf, write_model(folder / "small.gguf", hf, "Q4_0")


CHANGES = {
    "no block count": ("gemma4.block_count", None, "block_count is missing"),
    "block count 0": ("gemma4.block_count", 0, "block_count is 0"),
    "block count a text": ("gemma4.block_count", "three", "expected one int"),
    "block count too large": ("gemma4.block_count", 4, "3 entries for 4 layers"),
    "block count too small": ("gemma4.block_count", 2, "entries for 2 layers"),
    "width not the tensors'": ("gemma4.embedding_length", 96, "expected (300, 96)"),
    "heads not the tensors'": ("gemma4.attention.head_count", 2, "blk.0.attn_q.weight has shape"),
    "heads no multiple": ("gemma4.attention.head_count", 3, "no multiple"),
    "odd head width": ("gemma4.attention.key_length_swa", 15, "value_length_swa is 16"),
    "experts not the tensors'": ("gemma4.expert_count", 5, "has shape (4, "),
    "no experts": ("gemma4.expert_count", 0, "expert_count is 0"),
    "more used than there are": ("gemma4.expert_used_count", 5, "expected 1 to 4"),
    "all layers shared": ("gemma4.attention.shared_kv_layers", 3, "expected 0 to 2"),
    "full layers without a donor": ("gemma4.attention.shared_kv_layers", 1, "shares keys and values"),
    "negative eps": ("gemma4.attention.layer_norm_rms_epsilon", -1.0, "expected 0.0 to 1.0"),
    "eps not a number": ("gemma4.attention.layer_norm_rms_epsilon", float("nan"), "is nan"),
    "pattern of floats": ("gemma4.attention.sliding_window_pattern", np.ones(3, np.float32), "outside"),
    "pattern too short": ("gemma4.attention.sliding_window_pattern", np.array([True]), "1 entries for 3 layers"),
    "softcap of zero": ("gemma4.final_logit_softcapping", 0.0, "final_logit_softcapping is 0"),
    "window of zero": ("gemma4.attention.sliding_window", 0, "sliding_window is 0"),
    "another tokenizer": ("tokenizer.ggml.model", "llama", "only 'gemma4'"),
    "vocabulary too small": ("tokenizer.ggml.tokens", ["a"], "token types"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_metadata_that_does_not_fit(what, small, folder):
    key, value, says = CHANGES[what]
    hf, _ = small
    path = folder / "changed.gguf"
    if value is None:
        keys = {k: v for k, v in shapes.gguf_metadata(hf.config.to_dict()).items() if k != key}
        with mock.patch("shapes.gguf_metadata", lambda config: keys):
            write_model(path, hf, "Q4_0")
    else:
        write_model(path, hf, "Q4_0", extra={key: value})
    with pytest.raises((GGUFError, TokenizerError)) as caught:
        refimpl.load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and says in message, message


def test_a_key_of_a_newer_version_is_a_note(small, folder):
    hf, path = small
    newer = write_model(folder / "newer.gguf", hf, "Q4_0", extra={"gemma4.attention.new_idea": 1, "gemma4.zeal": [1.5], "other.key": 2})
    with pytest.warns(UserWarning, match="does not know gemma4.attention.new_idea, gemma4.zeal and ignores them") as caught:
        model = refimpl.load(newer)
    assert len(caught) == 1 and str(newer) in str(caught[0].message) and caught[0].filename == __file__
    assert unknown_keys(model.file.metadata) == ["gemma4.attention.new_idea", "gemma4.zeal"]
    known = refimpl.load(path)
    assert unknown_keys(known.file.metadata) == [] and np.array_equal(model.logits([2, 5, 6]), known.logits([2, 5, 6]))


def edited(name, change):
    """The tensors, with `change(type, data)` (a list of pairs) in place of the one of this name."""
    return lambda tensors: [(n, *pair) for n, t, d in tensors for pair in (change(t, d) if n == name else [(t, d)])]


TENSORS = {
    "missing": (edited("blk.1.ffn_down.weight", lambda t, d: []), "blk.1.ffn_down.weight is missing"),
    "no embedding": (edited("token_embd.weight", lambda t, d: []), "token_embd.weight is missing"),
    "one too many": (lambda tensors: [*tensors, ("blk.0.surprise.weight", "F32", np.ones(3, np.float32))], "first: blk.0.surprise.weight"),
    "wrong shape": (edited("blk.2.attn_norm.weight", lambda t, d: [(t, d[:-1])]), "blk.2.attn_norm.weight has shape (63,)"),
    "unknown to us": (edited("blk.0.ffn_up.weight", lambda t, d: [("I8", d.view(np.int8))]), "blk.0.ffn_up.weight"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_fit(what, small, folder):
    change, says = TENSORS[what]
    path = write_model(folder / "changed.gguf", small[0], "Q4_0", change=change)
    with pytest.raises(GGUFError, match=re.escape(says)):
        refimpl.load(path)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_changed_bytes_load_or_are_refused(small, folder, data):
    """Bytes of the header, metadata or tensor index overwritten: a model that runs, or one line."""
    raw = bytearray(small[1].read_bytes())
    end = raw.find(b"blk.2.post_ffw_norm_2.weight") + 100
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    path = folder / "fuzzed.gguf"
    path.write_bytes(raw)
    try:
        model = refimpl.load(path)
    except (GGUFError, TokenizerError) as e:
        assert "\n" not in str(e)
        return
    if model.config.n_ctx >= 8:
        with np.errstate(all="ignore"):
            assert model.logits([2, 5, 6]).shape == (3, model.config.n_vocab)


@pytest.mark.parametrize("ids", [[], [-1], [300], [1.5], [[1, 300]], None, [10**30]])
def test_ids_outside_of_the_vocabulary_never_reach_the_model(ids, small):
    with pytest.raises(ValueError, match="token id"):
        refimpl.load(small[1]).logits(ids)


@pytest.mark.parametrize(("path", "meant"), [
    ("google/gemma-4-E4B-it-qat-q4_0-gguf", "hf:google/gemma-4-E4B-it-qat-q4_0-gguf"),
    ("unsloth/gemma-4-E4B-it-GGUF:Q4_K_M", "hf:unsloth/gemma-4-E4B-it-GGUF:Q4_K_M"),
    ("u/m@v2:Q4_0", "hf:u/m@v2:Q4_0"),
    ("https://huggingface.co/google/gemma-4-12B", "hf:google/gemma-4-12B"),
    ("https://hf.co/google/gemma-4-12B?library=x", "hf:google/gemma-4-12B"),
    ("https://huggingface.co/u/m/tree/main", "hf:u/m"),
    ("https://huggingface.co/u/m/blob/v2/MTP/x-Q4_0.gguf", "hf:u/m@v2:MTP/x-Q4_0.gguf"),
    ("https://huggingface.co/u/m/resolve/main/x.gguf?download=true", "hf:u/m:x.gguf")])
def test_a_near_miss_is_answered(path, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for what in (lambda: refimpl.load(path), lambda: refimpl.load_drafter(path, refimpl.load())):
        with pytest.raises(GGUFError, match=re.escape(f"{path}: no such file; did you mean {meant}?")):
            what()


def test_what_may_be_a_path_is_no_near_miss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in ("models/gemma", "a/m.gguf", "./m", "../m", "m", "a/b/c", tmp_path / "x" / "y"):
        with pytest.raises(GGUFError, match="no such file$"):
            refimpl.load(path)


def test_arguments_of_load(small):
    for wrong in ({"backend": "cuda"}, {"arithmetic": "fp8"}, {"weights": "float16"}, {"threads": 0},
                  {"threads": 2, "backend": "reference"}, {"weights": "float32"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            refimpl.load(small[1], **wrong)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_configuration_says_what_transformers_says(shape, folder):
    hf = random_model(shape)
    config = refimpl.load(write_model(folder / f"{shape}.gguf", hf)).config
    for layer, module in zip(config.layers, hf.model.layers):
        attention = module.self_attn
        assert (layer.attention.value == "sliding") == attention.is_sliding and layer.head_dim == attention.head_dim
        assert layer.n_head // layer.n_kv == attention.num_key_value_groups and layer.ffn.n_ff == module.mlp.intermediate_size
        assert layer.has_own_kv == (not attention.is_kv_shared_layer)
        assert layer.values_are_keys == (attention.use_alternative_attention and layer.has_own_kv)


def test_generation_stops_where_it_should(small):
    model = refimpl.load(small[1])
    ids = prompt(12)
    out = refimpl.generate(model, ids, max_new_tokens=0)
    assert out.ids == [] and out.text == "" and out.stats.stop == "limit"
    out = refimpl.generate(model, ids, max_new_tokens=50, n_ctx=20)
    assert out.stats.stop in ("context", "end") and len(out.ids) <= 9
    free = refimpl.generate(model, ids, max_new_tokens=30, temperature=1.0, seed=1)
    assert "".join(refimpl.stream(model, ids, max_new_tokens=30, temperature=1.0, seed=1)) == free.text == model.tokenizer.decode(free.ids)
    assert free.stats.n_generated == len(free.ids) and free.stats.n_prompt == 12
    with pytest.raises(refimpl.ContextFull, match="12 tokens, the context holds 11"):
        refimpl.generate(model, ids, n_ctx=11)
    with pytest.raises(ValueError, match="drafter"):
        refimpl.generate(model, ids, drafter=model)
    with pytest.raises(ValueError, match="max_new_tokens"):
        refimpl.generate(model, ids, max_new_tokens=-2)
