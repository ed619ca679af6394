"""Hugging Face directories of models: they run, as transformers does, and say what is wrong with them."""

import json
import shutil

import numpy as np
import pytest
import torch
from cli import run
from directories import QUANTIZATION, change_json, multimodal, pack, save, save_w4a16, scales_of, unpack, write_vocabulary
from few_layers import few_layers
from safetensors.torch import load_file, save_file
from shapes import SHAPES, oracle, pattern, prompt, random_drafter, random_model, reference, worst

import refimpl
from refimpl.cli.show.inspect import as_text
from refimpl.files.inspect import describe
from refimpl.formats.checkpoint import CheckpointError
from refimpl.formats.matrix import stored_bytes
from refimpl.formats.quants import w4a16
from refimpl.formats.quants.codecs import dequantize
from refimpl.loading.memory import needed
from refimpl.loading.open import open_directory
from refimpl.model.weights import weights_from_gguf

TOLERANCE = 1e-4

def rounded(model, dtype):
    """The model with its weights rounded to `dtype`, its constants as they were."""
    with torch.no_grad():
        for p in [*model.parameters(), *(b for name, b in model.named_buffers() if name.endswith("layer_scalar"))]:
            p.copy_(p.to(dtype).float())
    return model


def error_of(folder, hf, n: int = 24, **options) -> float:
    ids = prompt(n)
    return worst(refimpl.load(folder, **options).logits(ids), oracle(hf, ids)["result_output"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "shard", "old_form"), [(torch.float32, "1GB", False), (torch.bfloat16, "40KB", True)])
def test_logits_equal_transformers(tmp_path, shape, dtype, shard, old_form):
    hf = rounded(random_model(shape, **few_layers(shape)), dtype)
    folder = save(tmp_path / shape, hf, dtype, shard, old_form)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "40KB")
    assert ("per_layer_config" in json.loads((folder / "config.json").read_text())) != old_form
    assert error_of(folder, hf, backend="reference") < TOLERANCE


@pytest.mark.parametrize("shape", ["E2B", pytest.param("26B-A4B", marks=pytest.mark.exhaustive)])
def test_kernels(tmp_path, shape):
    """Experts in every run: `test_w4a16_with_kernels`."""
    for dtype in (torch.bfloat16, torch.float16):
        hf = rounded(random_model(shape, **few_layers(shape)), dtype)
        assert error_of(save(tmp_path / f"{shape}-{dtype}", hf, dtype), hf, arithmetic="exact") < TOLERANCE


# ---- configuration

def test_per_layer_config_counts_where_both_forms_are_there(tmp_path):
    """As in transformers, which does not look at the other then."""
    hf = random_model("31B", **few_layers("31B"))
    folder = save(tmp_path / "m", hf)
    change_json(folder / "config.json", global_head_dim=999, num_global_key_value_heads=4)
    assert type(hf.config).from_pretrained(folder).to_dict()["per_layer_config"] == hf.config.to_dict()["per_layer_config"]
    assert error_of(folder, hf, backend="reference") < TOLERANCE


def test_global_key_value_heads_count_only_where_keys_are_values(tmp_path):
    hf = random_model("E4B", **few_layers("E4B"))
    folder = save(tmp_path / "m", hf, old_form=True)
    change_json(folder / "config.json", num_global_key_value_heads=1)
    assert error_of(folder, hf, backend="reference") < TOLERANCE


@pytest.mark.parametrize(("shape", "unified"), [("E2B", False), ("26B-A4B", False), ("12B", True)])
@pytest.mark.parametrize("old_form", [False, True])
def test_multimodal_directories(tmp_path, shape, unified, old_form):
    model, text = multimodal(shape, unified)
    folder = save(tmp_path / "m", model, shard="100KB", old_form=old_form)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == ("gemma4_unified" if unified else "gemma4") and "text_config" in config
    assert error_of(folder, text, backend="reference") < TOLERANCE
    file = open_directory(folder)
    assert file.ignored and all("--mmproj loads it" in reason for reason in file.ignored.values())
    held = {name for shard in folder.glob("*.safetensors") for name in load_file(shard)}
    assert len(held) == len(file.ignored) + len(file.tensors) - 1 and all("vision" in name or "audio" in name for name in file.ignored)


def test_untied_head(tmp_path):
    hf = random_model("12B", tie_word_embeddings=False)
    with torch.no_grad():
        hf.lm_head.weight.normal_(0, 0.2)
    folder = save(tmp_path / "m", hf)
    assert error_of(folder, hf, backend="reference") < TOLERANCE
    change_json(folder / "config.json", tie_word_embeddings=True)
    assert open_directory(folder).ignored == {"lm_head.weight": "the head is the embedding (tie_word_embeddings)"}


@pytest.mark.parametrize("shape", ["12B", "E4B"])
def test_drafters_with_targets_from_directories(tmp_path, shape):
    drafter = random_drafter(shape, n_centroid=20 if shape == "E4B" else 0)
    drafter.save_pretrained(tmp_path / "d")
    target = save(tmp_path / "m", random_model(shape, **few_layers(shape)))
    ids = prompt(12)
    for options in ({"backend": "reference"}, {"arithmetic": "exact"}):
        model = refimpl.load(target, **options)
        draft = refimpl.load_drafter(tmp_path / "d", model)
        assert len(refimpl.propose(model, draft, ids, 3)) == 3
        plain = refimpl.generate(model, ids, max_new_tokens=12, temperature=0)
        assert refimpl.generate(model, ids, max_new_tokens=12, temperature=0, drafter=draft).ids == plain.ids


# ---- W4A16

@pytest.mark.parametrize("shape", SHAPES)
def test_w4a16_logits_equal_transformers(tmp_path, shape):
    hf = random_model(shape, seed=2, **few_layers(shape))
    folder = save_w4a16(tmp_path / shape, hf)
    assert error_of(folder, hf, backend="reference") < TOLERANCE
    assert {info.type for info in open_directory(folder).tensors.values()} == {"F32", "BF16", "Q4_0"}


@pytest.mark.parametrize("shape", ["26B-A4B", "E2B"])
def test_w4a16_with_kernels(tmp_path, shape):
    hf = random_model(shape, seed=2, **few_layers(shape))
    assert error_of(save_w4a16(tmp_path / shape, hf), hf, arithmetic="exact") < TOLERANCE


def bytes_and_scales(packed):
    words = packed["m.weight_packed"].numpy()
    return words.view(np.uint8).reshape(len(words), -1), packed["m.weight_scale"].float().numpy()


@pytest.mark.parametrize("seed", range(3))
def test_w4a16_blocks_are_the_weights_of_compressed_tensors(seed):
    torch.manual_seed(seed)
    weight = torch.randn(24, 160) * 10.0 ** torch.randint(-3, 3, (24, 1))
    packed = pack("m.weight", weight)
    exact, raw = unpack(packed).numpy(), bytes_and_scales(packed)
    assert not w4a16.misfits(*raw).any()
    assert np.array_equal(dequantize(w4a16.to_q4_0(*raw), "Q4_0"), exact)
    assert np.array_equal(w4a16.to_float32(*raw), exact)
    rounded_once = torch.from_numpy(exact).to(torch.bfloat16)           # compressed-tensors computes in the scale's dtype
    assert torch.equal(rounded_once, unpack(packed, torch.bfloat16))


def test_every_scale_of_bfloat16():
    """All 65,536 of them: what is called exact is exact, and from 2^-17 to 65280 everything is."""
    scale = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(-1, 1)
    scale = scale[scale.isfinite()].reshape(-1, 1)
    codes = torch.arange(32).remainder(16).sub(8).to(torch.int8)
    packed = pack("m.weight", torch.zeros(len(scale), 32), torch.ones_like(scale))
    words = w4a16_words(codes.expand(len(scale), 32))
    packed |= {"m.weight_packed": words, "m.weight_scale": scale}
    raw, exact = bytes_and_scales(packed), unpack(packed).numpy()
    bad = w4a16.misfits(*raw)[:, 0]
    with np.errstate(over="ignore"):
        got = dequantize(w4a16.to_q4_0(*raw), "Q4_0")
    assert np.array_equal(got[~bad], exact[~bad]) and not (got[bad] == exact[bad]).all(axis=1).any()
    size = scale.float().abs().numpy()[:, 0]
    assert not bad[(size >= 2.0**-17) & (size <= 65280)].any() and bad[size > 65280].all()
    assert np.array_equal(w4a16.to_float32(*raw), exact)


def w4a16_words(codes: torch.Tensor) -> torch.Tensor:
    from compressed_tensors.compressors import pack_to_int32

    return pack_to_int32(codes.contiguous(), 4)


@pytest.mark.parametrize("shape", ["12B", "26B-A4B"])
def test_a_scale_that_is_no_half_keeps_the_matrix_exact(tmp_path, shape):
    """One group of one matrix (of one expert) has a scale below 2^-17: that matrix is held as float32, the others as Q4_0."""
    tiny, hit = torch.tensor(2.0**-20 * 1.0078125, dtype=torch.bfloat16), []

    def scale_of(name, weight):
        scale = scales_of(weight)
        if name.endswith("layers.2.mlp.up_proj.weight" if shape == "12B" else "layers.2.experts.3.up_proj.weight"):
            scale[1, 0] = tiny
            hit.append(name)
        return scale

    hf = random_model(shape, seed=2, layer_types=pattern(2, 1), num_hidden_layers=3)
    folder = save_w4a16(tmp_path / "m", hf, scale_of)
    file = open_directory(folder)
    ours = "blk.2.ffn_up.weight" if shape == "12B" else "blk.2.ffn_up_exps.weight"
    assert hit and file.tensors[ours].type == "F32" and file.tensors["blk.1.ffn_up.weight"].type == "Q4_0"
    weights = hf.state_dict()
    theirs = (weights["model.layers.2.mlp.up_proj.weight"] if shape == "12B" else
              weights["model.layers.2.experts.gate_up_proj"].chunk(2, dim=1)[1])
    assert np.array_equal(file.raw(ours).view("<f4"), theirs.numpy())
    assert error_of(folder, hf, backend="reference") < TOLERANCE


def test_asking_for_the_size_makes_no_weights(tmp_path, monkeypatch):
    """`inspect`, and the question whether it fits, must not unpack 10 GB."""
    folder = save_w4a16(tmp_path / "m", random_model("26B-A4B"))
    model = reference(folder, weights="quantized")
    want = needed(weights_from_gguf(model.file, model.config), model.config, 10, 4, np.dtype(np.float16), stored_bytes)
    monkeypatch.setattr(w4a16, "to_q4_0", None)
    file = open_directory(folder)
    assert needed(weights_from_gguf(file, model.config), model.config, 10, 4, np.dtype(np.float16), stored_bytes) == want
    described = describe(folder)
    assert described["types"]["Q4_0"]["tensors"] > 40 and json.dumps(described)
    assert "Q4_0" in as_text(described)


def test_inspect_shows_what_is_ignored(tmp_path):
    folder = save(tmp_path / "m", multimodal("E2B", False)[0], shard="100KB")
    described = describe(folder)
    text = as_text(described)
    assert f"{described['safetensors_files']} safetensors files" in text and described["safetensors_files"] > 3
    assert f"{len(described['ignored'])} tensors, belongs to the part that sees; --mmproj loads it" in text
    random_drafter("12B").save_pretrained(tmp_path / "d")
    assert "a drafter, for a target of width 64" in as_text(describe(tmp_path / "d"))


def test_the_command_inspects_a_directory(tmp_path):
    folder = save(tmp_path / "m", random_model("12B"))
    status, out, err = run("inspect", "-m", folder, "--json")
    assert status == 0 and json.loads(out)["model"]["n_layer"] == 6, err


# ---- vocabulary and generation

@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save(tmp_path_factory.mktemp("plain") / "model", random_model("12B"), shard="100KB")


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    return save_w4a16(tmp_path_factory.mktemp("packed") / "model", random_model("12B"))


def test_tokens_equal_the_tokenizers_package(plain):
    from tokenizers import Tokenizer

    hf, ours = Tokenizer.from_file(str(plain / "tokenizer.json")), reference(plain).tokenizer
    for text in ("the cat\n", "the thing <eos> 12", "né 中"):
        assert ours.encode(text, bos=False, special=True) == hf.encode(text, add_special_tokens=False).ids


def test_generation_config(tmp_path, plain):
    folder = shutil.copytree(plain, tmp_path / "m")
    change_json(folder / "generation_config.json", eos_token_id=[1, 262, 263], suppress_tokens=[270, 271],
                temperature=0.7, top_k=5, top_p=0.9)
    metadata = open_directory(folder).metadata
    tokenizer = reference(folder).tokenizer
    assert {1, 262, 263} <= tokenizer.end_of_generation and tokenizer.suppress == (270, 271) and tokenizer.eos == 1
    assert [metadata[f"general.sampling.{key}"] for key in ("temp", "top_k", "top_p")] == [0.7, 5, 0.9]


def test_chat_template_from_either_place(tmp_path, plain):
    folder = shutil.copytree(plain, tmp_path / "m")
    assert "tokenizer.chat_template" not in open_directory(folder).metadata
    several = [{"name": "tool", "template": "no"}, {"name": "default", "template": "inside"}]
    change_json(folder / "tokenizer_config.json", chat_template=several)
    assert open_directory(folder).metadata["tokenizer.chat_template"] == "inside"
    (folder / "chat_template.jinja").write_text("beside")
    assert open_directory(folder).metadata["tokenizer.chat_template"] == "beside"


def test_special_pieces(tmp_path, plain):
    """Named in tokenizer_config.json in any of the ways in use, or marked in tokenizer.json; a control token is not text."""
    folder = shutil.copytree(plain, tmp_path / "m")
    tokens = list(open_directory(folder).metadata["tokenizer.ggml.tokens"])
    change_json(folder / "tokenizer_config.json", image_token=tokens[290], extra_special_tokens=[tokens[291]],
                eos_token={"content": "<eos>", "lstrip": False})
    kinds = open_directory(folder).metadata["tokenizer.ggml.token_type"]
    assert [kinds[i] for i in (0, 1, 2, 3, 4, 5, 261, 290, 291, 292)] == [3, 3, 3, 3, 3, 6, 1, 3, 3, 1]
    change_json(folder / "tokenizer_config.json", extra_special_tokens={"video_token": tokens[292]})
    assert [open_directory(folder).metadata["tokenizer.ggml.token_type"][i] for i in (291, 292)] == [1, 3]


# ---- what is wrong with a directory

def shard_of(folder, part: str):
    """The shard that holds a tensor with `part` in its name, and that name."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name in weight_map if part in name)
    return folder / weight_map[name], name


def edit_tensors(change):
    def edit(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    return edit


def without_a_tensor(folder):
    path, name = shard_of(folder, "layers.2.mlp.up_proj")
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != name}, path)


def in_two_shards(folder):
    path, name = shard_of(folder, "layers.2.mlp.up_proj")
    other, _ = shard_of(folder, "layers.4.mlp.up_proj")
    save_file(load_file(other) | {name: load_file(path)[name]}, other)


def config(**new):
    return lambda folder: change_json(folder / "config.json", **new)


def beside(name: str, **new):
    return lambda folder: change_json(folder / name, **new)


def cut(folder, n: int = 100):
    path, _ = shard_of(folder, "layers.2.mlp.up_proj")
    path.write_bytes(path.read_bytes()[:-n])


def long_header(folder):
    path, _ = shard_of(folder, "layers.2.mlp.up_proj")
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


PLAIN_FAULTS = [
    (lambda f: (f / "config.json").unlink(), "config.json: no such file; expected a Hugging Face directory"),
    (lambda f: ((f / "config.json").unlink(), (f / "x.gguf").touch()), "to run x.gguf in this folder, name the file"),
    (lambda f: shard_of(f, "layers.2.mlp")[0].unlink(), "files are missing, first model-0"),
    (without_a_tensor, "'model.layers.2.mlp.up_proj.weight' is in model-00"),
    (in_two_shards, "is in another file too"),
    (long_header, "expected a header of at most"),
    (cut, "the file is cut off, download it again"),
    (config(model_type="llama"), "model_type is 'llama'; refimpl runs gemma4, "),
    (config(model_type=None), "model_type is None"),
    (config(hidden_size=None), "is no configuration of a Gemma 4 model: hidden_size is missing"),
    (config(layer_types=3), "is no configuration"), (config(layer_types=["full_attention"]), "layer_types: expected 6 entries"),
    (config(per_layer_config=None), "global_head_dim is missing"),
    (config(per_layer_config={"5": {"head_dim": 32, "intermediate_size": 7}}), "per_layer_config: expected head_dim"),
    (config(hidden_activation="relu"), "hidden_activation 'relu'"), (config(attention_bias=True), "attention_bias true"),
    (config(use_bidirectional_attention="all"), "use_bidirectional_attention"),
    (config(num_attention_heads=8), "has shape (64, 64), expected (128, 64)"),
    (config(sliding_window=0), "sliding_window is 0"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file; it holds the vocabulary: download the whole repository"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "is no vocabulary of Gemma 4: KeyError 'model'"),
    (beside("tokenizer.json", model={"type": "WordPiece"}), "expected a BPE model with byte_fallback, found WordPiece"),
    (beside("tokenizer.json", model={"type": "BPE", "byte_fallback": True, "vocab": {"a": 5}, "merges": []}, added_tokens=[]),
     "no token has the id 0"),
    (beside("tokenizer.json", added_tokens=[{"id": 1, "content": "other"}]), "id 1 is '<eos>' in the model and 'other'"),
    (lambda f: write_vocabulary(f, 299), "the vocabulary has 299 tokens, the embedding 300 rows"),
    (beside("generation_config.json", eos_token_id=[1, 300]), "expected ids from 0 to 299"),
    (beside("generation_config.json", eos_token_id=[261, 262, 263]), "expected 2 at most"),
    (config(quantization_config={"quant_method": "bitsandbytes"}), "quantized with 'bitsandbytes'; this version reads W4A16"),
    (config(quantization_config=3), "quantized with 3"),
]


def scheme(**weights):
    group = QUANTIZATION["config_groups"]["group_0"]
    return config(quantization_config=QUANTIZATION | {"config_groups": {"g": group | {"weights": group["weights"] | weights}}})


UP = "model.layers.2.mlp.up_proj"
PACKED_FAULTS = [
    (config(quantization_config=QUANTIZATION | {"format": "nvfp4-pack-quantized"}), "compressed-tensors 'nvfp4-pack-quantized'"),
    (config(quantization_config=QUANTIZATION | {"config_groups": {}}), "without config_groups"),
    (config(quantization_config=QUANTIZATION | {"config_groups": {"g": {"weights": None}}}), "without a description of the weights"),
    (config(quantization_config=QUANTIZATION | {"config_groups": {
        "g": QUANTIZATION["config_groups"]["group_0"] | {"input_activations": {"num_bits": 8}}}}), "quantized activations"),
    (scheme(num_bits=8), "num_bits 8"), (scheme(group_size=128), "group_size 128"), (scheme(symmetric=False), "symmetric False"),
    (scheme(actorder="group"), "actorder 'group'"), (scheme(strategy="channel"), "strategy 'channel'"),
    (scheme(type="float"), "type 'float'"),
    (edit_tensors(lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(2)})), "asymmetric weights"),
    (edit_tensors(lambda t: t.update({f"{UP}.weight_g_idx": torch.zeros(2)})), "actorder"),
    (edit_tensors(lambda t: t.pop(f"{UP}.weight_scale")), "up_proj.weight_scale' is missing"),
    (edit_tensors(lambda t: t.pop(f"{UP}.weight_packed")), "is not one of a Gemma 4 model"),
    (edit_tensors(lambda t: t.update({f"{UP}.weight": torch.zeros(128, 64)})), "there is an unpacked"),
    (edit_tensors(lambda t: t.update({f"{UP}.weight_shape": torch.tensor([128, 32])})), "words (128, 4) and scales (128, 1) were expected"),
    (edit_tensors(lambda t: t.update({f"{UP}.weight_shape": torch.tensor([128, 72])})), "rows of whole groups of 32"),
    (edit_tensors(lambda t: t.update({f"{UP}.weight_shape": torch.tensor([-128, 64])})), "weight_shape is -128 x 64"),
    (edit_tensors(lambda t: t.update({f"{UP}.weight_shape": torch.tensor([128.0, 64.0])})), "two I64 as its shape"),
    (edit_tensors(lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].T.contiguous()})), "found (128, 8) and (2, 128)"),
    (edit_tensors(lambda t: t[f"{UP}.weight_scale"].fill_(float("nan"))), "a scale is no finite number"),
    (lambda f: edit_tensors(lambda t: t.update(pack(f"{UP}.weight", torch.ones(96, 64))))(f), "has shape (96, 64), expected (128, 64)"),
]


@pytest.mark.parametrize(("kind", "change", "expected"), [("plain", *fault) for fault in PLAIN_FAULTS]
                         + [("packed", *fault) for fault in PACKED_FAULTS])
def test_odd_directories_get_one_line(tmp_path, plain, packed_folder, kind, change, expected):
    folder = shutil.copytree(plain if kind == "plain" else packed_folder, tmp_path / "m")
    change(folder)
    with pytest.raises(refimpl.GGUFError) as caught:
        reference(folder)
    assert expected in str(caught.value) and "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert isinstance(caught.value, CheckpointError) or "expected" in expected or "embedding" in expected or "window" in expected


@pytest.mark.parametrize("change", [lambda members: members.pop(3), lambda members: members.update({99: members.pop(3)}),
                                    lambda members: members.update({3: torch.zeros(32, 32)})])
def test_experts_that_do_not_stack(tmp_path, change):
    folder = save(tmp_path / "m", random_model("26B-A4B", **few_layers("26B-A4B")))

    def split(tensors):
        down = dict(enumerate(tensors.pop("model.layers.0.experts.down_proj")))
        change(down)
        tensors.update({f"model.layers.0.experts.{e}.down_proj.weight": value.clone() for e, value in down.items()})

    edit_tensors(split)(folder)
    with pytest.raises(CheckpointError, match="are not numbered from 0 to 1., or differ in shape"):
        open_directory(folder)
