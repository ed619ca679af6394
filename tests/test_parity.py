"""The forward pass against transformers 5.22.2: every shape, every layer, every position, several block types."""

import numpy as np
import pytest
import torch
from few_layers import few_layers
from shapes import SHAPES, oracle, prompt, random_model, reference, round_to, worst, write_model

import refimpl
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.lab.compare import known_bugs
from refimpl.lab.compare.known_bugs import BUGS, inject

TOLERANCE = 1e-4          # of the largest logit
Q4_K_FITS = dict(hidden_size=256, intermediate_size=256)       # rows of 256, so that Q4_K is really used


def compare(path, hf, ids, **options) -> dict[str, float]:
    """Runs both and returns the relative error of every layer's output and of the logits."""
    model, got = reference(path, **options), {}
    model.logits(ids, tap=got.__setitem__)
    return {name: worst(got[name], value) for name, value in oracle(hf, ids).items()}


def assert_close(errors: dict[str, float]):
    bad = {name: error for name, error in errors.items() if not error < TOLERANCE}
    assert not bad, f"first tensor that departs: {next(iter(bad))}, {next(iter(bad.values())):.1e}"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_layer_equals_transformers(shape, tmp_path, record_property):
    hf = random_model(shape)
    errors = compare(write_model(tmp_path / "m.gguf", hf), hf, prompt())
    record_property("error", errors["result_output"])
    print(f"\n{shape}: logits {errors['result_output']:.1e} of the largest")
    assert_close(errors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", ["Q4_0", "Q4_K", "Q8_0"])
def test_quantized_files_equal_transformers_with_the_same_weights(shape, block, tmp_path):
    hf = random_model(shape, seed=3, **(Q4_K_FITS | few_layers(shape) if block == "Q4_K" else {}))
    path = write_model(tmp_path / "m.gguf", hf, block)
    assert block in {info.type for info in reference(path).file.tensors.values()}
    assert_close(compare(path, round_to(hf, block), prompt(24), weights="quantized"))


@pytest.mark.parametrize("block", ["F16", "BF16", "Q5_1", "Q6_K", *(pytest.param(rare, marks=pytest.mark.exhaustive) for rare in (
    "Q4_1", "Q5_0", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"))])
def test_the_other_block_types(block, tmp_path):
    """Some of them: test_blocks.py has the numbers of every type."""
    hf = random_model("26B-A4B", seed=4, **few_layers("26B-A4B") | (Q4_K_FITS if BLOCKS[block].elements == 256 else {}))
    path = write_model(tmp_path / "m.gguf", hf, block)
    assert_close(compare(path, round_to(hf, block), prompt(24), weights="quantized"))


def test_weights_held_as_float32_give_the_same_bits(tmp_path):
    path = write_model(tmp_path / "m.gguf", random_model("26B-A4B"), "Q4_0")
    ids = prompt(20)
    assert np.array_equal(reference(path, weights="float32").logits(ids), reference(path, weights="quantized").logits(ids))


@pytest.mark.parametrize("shape", SHAPES)
def test_any_chunking_gives_the_same_bits(shape, tmp_path):
    model = reference(write_model(tmp_path / "m.gguf", random_model(shape)))
    ids = prompt(30)
    whole = model.logits(ids)
    for sizes in ([1] * 30, [5] * 6, [11, 1, 18], [29, 1]):
        cache, first, states = model.new_cache(), 0, []
        for size in sizes:
            states.append(model.prefill(ids[first:first + size], cache))
            first += size
        assert np.array_equal(model.head(np.concatenate(states)), whole), f"chunks of {sizes}"


def test_greedy_text_equals_transformers(tmp_path):
    for shape in SHAPES:
        hf = random_model(shape, seed=5)
        model = reference(write_model(tmp_path / f"{shape}.gguf", hf))
        ids = prompt(20)
        out = refimpl.generate(model, ids, max_new_tokens=8, temperature=0)
        want = hf.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=1)[0, len(ids):].tolist()
        assert out.ids == [i for i in want if i != 1]


def fuse_qkv(tensors):
    """attn_q, attn_k, attn_v of a layer as one tensor."""
    by_name = {name: (block, data) for name, block, data in tensors}
    for i in range(20):
        names = [f"blk.{i}.attn_{x}.weight" for x in "qkv"]
        if all(name in by_name for name in names):
            block = by_name[names[0]][0]
            by_name[f"blk.{i}.attn_qkv.weight"] = (block, np.concatenate([by_name.pop(name)[1] for name in names]))
    return [(name, *value) for name, value in by_name.items()]


def split_experts(tensors):
    """Fused gate and up experts as two tensors."""
    out = []
    for name, block, data in tensors:
        if name.endswith("ffn_gate_up_exps.weight"):
            half = data.shape[1] // 2
            out += [(name.replace("gate_up", "gate"), block, np.ascontiguousarray(data[:, :half])),
                    (name.replace("gate_up", "up"), block, np.ascontiguousarray(data[:, half:]))]
        else:
            out.append((name, block, data))
    return out


def test_files_in_the_wild_fused_qkv(tmp_path):
    hf = random_model("E4B")
    assert_close(compare(write_model(tmp_path / "m.gguf", hf, change=fuse_qkv), hf, prompt(20)))


def test_files_in_the_wild_split_experts(tmp_path):
    hf = random_model("26B-A4B")
    assert_close(compare(write_model(tmp_path / "m.gguf", hf, "Q8_0", change=split_experts), round_to(hf, "Q8_0"), prompt(20)))


def test_files_in_the_wild_shared_layers_with_leftover_keys(tmp_path):
    hf = random_model("E2B")
    rng = np.random.default_rng(0)

    def add_leftovers(tensors):
        return tensors + [(f"blk.{i}.{name}.weight", "F32", rng.standard_normal(shape).astype(np.float32)) for i in range(5, 10)
                          for name, shape in (("attn_k", (32 if i == 9 else 16, 64)), ("attn_v", (32 if i == 9 else 16, 64)),
                                              ("attn_k_norm", (32 if i == 9 else 16,)))]
    path = write_model(tmp_path / "m.gguf", hf, change=add_leftovers)
    assert len(reference(path).weights.ignored) == 15
    assert_close(compare(path, hf, prompt(20)))


def test_separate_output_matrix(tmp_path):
    hf = random_model("12B", tie_word_embeddings=False)
    assert "lm_head.weight" in hf.state_dict()
    assert_close(compare(write_model(tmp_path / "m.gguf", hf), hf, prompt(20)))


def test_scalar_or_array_metadata(tmp_path):
    hf = random_model("E4B")
    as_arrays = {"gemma4.attention.head_count_kv": np.full(12, 2, np.int32),
                 "gemma4.feed_forward_length": np.full(12, 128, np.int32), "gemma4.attention.head_count": np.full(12, 4, np.int32)}
    assert_close(compare(write_model(tmp_path / "m.gguf", hf, extra=as_arrays), hf, prompt(12)))


def test_suppressed_tokens_are_never_picked(tmp_path):
    hf = random_model("12B")
    model = reference(write_model(tmp_path / "a.gguf", hf))
    first = refimpl.generate(model, prompt(), max_new_tokens=1, temperature=0).ids[0]
    extra = {"tokenizer.ggml.suppress_tokens": np.array([first], np.int32)}
    again = reference(write_model(tmp_path / "b.gguf", hf, extra=extra))
    assert refimpl.generate(again, prompt(), max_new_tokens=1, temperature=0).ids[0] != first


# ---- the comparison notices what engines really got wrong

ON = {known_bugs.MOE: ("26B-A4B", "Q4_0", {}), known_bugs.PLE: ("E2B", "Q4_0", {}),
      known_bugs.K_QUANTS: ("26B-A4B", "Q4_K", Q4_K_FITS)}
NO_LAYER_SHOWS = {      # test_known_bugs.py has them, by the tensor that does
    "embedding scale rounded to bfloat16": "the scale of these small models is 8, which bfloat16 holds",
    "per-layer projection not scaled": "a norm follows", "positions counted from 1": "rotations count the distance only"}
OF_THE_TARGET = [name for name, bug in BUGS.items() if not bug.first.startswith("draft") and name not in NO_LAYER_SHOWS]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By the kind of model: (file, what transformers computes for its weights)."""
    made = {}
    for kind, (shape, block, overrides) in ON.items():
        hf = random_model(shape, seed=6, **few_layers(shape) | overrides)
        path = write_model(tmp_path_factory.mktemp("bugs") / f"{kind}.gguf", hf, block)
        made[kind] = path, oracle(round_to(hf, block), prompt(24))
    return made


def first_departure(path, want) -> str:
    """The first layer (or the logits) that differs by more than the tolerance; "" when all agree."""
    got = {}
    reference(path, weights="quantized").logits(prompt(24), tap=got.__setitem__)
    return next((name for name, value in want.items() if not worst(got[name], value) < TOLERANCE), "")


@pytest.mark.parametrize("name", OF_THE_TARGET)
def test_a_known_bug_is_noticed(name, models):
    path, want = models[BUGS[name].on]
    with inject(BUGS[name]):
        assert first_departure(path, want), "not noticed"
    assert first_departure(path, want) == "", "the change was not undone"
