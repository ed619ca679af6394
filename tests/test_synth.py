"""Synthetic files have the sizes of the real ones, and one of the true 26B-A4B shape runs in the reference within 4 GB."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

import refimpl
from refimpl.files import synth
from refimpl.files.synth import (
    RECIPES,
    SHAPES,
    config_of,
    drafter_metadata,
    drafter_tensors,
    model_tensors,
    recipe_type,
    shape_names,
    synthesise,
    vocabulary_metadata,
)
from refimpl.files.synth_projector import projector_tensors, projector_type
from refimpl.formats.gguf import open_gguf
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import QUANTIZABLE
from refimpl.loading.hf_names import fitting_type, gguf_metadata
from refimpl.loading.model import BUILT_IN
from refimpl.loading.projector import load_projector
from refimpl.model.config import config_from_gguf
from refimpl.text.chat import encode_chat
from refimpl.text.templates import GEMMA4_TEMPLATE
from refimpl.text.tokenizer import Tokenizer

PARAMETERS = {"12B": 11.907e9, "26B-A4B": 25.233e9, "31B": 30.697e9}        # published: 11.91, 25.23 and 30.70 billion
DRAFTER_PARAMETERS = {"E2B": 77.7e6, "E4B": 78.518e6, "12B": 422.86e6, "26B-A4B": 419.7e6, "31B": 469.5e6}
FILE_BYTES = {  # of the files in circulation, less 16 MB of metadata
    ("E4B", "google-q4_0"): 5_154_941_280 - 16e6, ("26B-A4B", "google-q4_0"): 13.45 * 2**30 - 16e6,
    ("31B", "google-q4_0"): 17.65e9 - 16e6, ("E2B", "unsloth-q4_0"): 2_620_368_960 - 16e6,
    ("26B-A4B", "unsloth-q4_0"): 13.26 * 2**30 - 16e6, ("31B", "unsloth-q4_0"): 16.09 * 2**30 - 16e6}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name):
    total = sum(math.prod(shape) for tensor, shape in model_tensors(config_of(name)) if tensor != "rope_freqs.weight")
    assert abs(total / PARAMETERS[name] - 1) < 1e-3


@pytest.mark.parametrize("name", DRAFTER_PARAMETERS)
def test_drafters_have_49_tensors_and_the_published_size(name):
    tensors = dict(drafter_tensors(name))
    assert len(tensors) == (51 if name in ("E2B", "E4B") else 49)          # the two of the centroid head
    parameters = {tensor: shape for tensor, shape in tensors.items() if tensor != "masked_embd_ordering"}
    assert abs(sum(map(math.prod, parameters.values())) / DRAFTER_PARAMETERS[name] - 1) < 1e-3


@pytest.mark.parametrize("name,recipe", FILE_BYTES)
def test_files_have_the_size_of_the_real_ones(name, recipe):
    config = config_of(name)
    n_layer, total = len(config["layer_types"]), 0
    for tensor, shape in model_tensors(config):
        block = BLOCKS[recipe_type(recipe, tensor, shape, n_layer)]
        total += math.prod(shape) // block.elements * block.n_bytes
    assert abs(total / FILE_BYTES[name, recipe] - 1) < 2e-3


def test_q4_k_m_falls_back_where_a_row_does_not_divide():
    config = config_of("26B-A4B")
    types = {recipe_type("q4_k_m", tensor, shape, 30) for tensor, shape in model_tensors(config)}
    assert types == {"F32", "Q4_K", "Q6_K", "Q5_0", "Q8_0"}


def test_recipes_of_one_type():
    """Rows of 704 (down projections of the experts) are no multiple of 256."""
    config = config_of("26B-A4B")
    others = {"q2_k": {"Q4_0"}, "q3_k": {"Q4_0"}, "iq4_xs": {"IQ4_NL"}, "iq4_nl": set(), "mxfp4": set()}
    for recipe, more in others.items():
        types = {recipe_type(recipe, tensor, shape, 30) for tensor, shape in model_tensors(config)}
        assert types == {"F32", "Q6_K", recipe.upper()} | more


def test_types_that_do_not_fit_are_replaced_as_llama_cpp_replaces_them():
    """tensor_type_fallback in llama-quant.cpp: rows of whole blocks of 32, and rows that are not even that."""
    small = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL",
             "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q8_K": "Q8_0"}          # the last one is ours: ggml has no weights of it
    for block in sorted(QUANTIZABLE - {"F32", "F16", "BF16"}):
        assert fitting_type(block, 512) == block
        assert fitting_type(block, 96) == small.get(block, block)
        assert fitting_type(block, 40) == "F16"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("n_layer", [None, 12, 2])
def test_every_cut_is_a_model_that_the_configuration_accepts(name, n_layer):
    config = config_of(name, n_layer)
    tensors = dict(model_tensors(config))
    read = config_from_gguf(gguf_metadata(config), tensors, config["vocab_size"], "synthetic")
    assert read.layers[-1].attention.value == "full" and len(read.layers) == (n_layer or len(config["layer_types"]))
    for layer in read.layers:
        assert layer.has_own_kv == (f"blk.{layer.index}.attn_k.weight" in tensors)
        assert tensors[f"blk.{layer.index}.attn_q.weight"][0] == layer.n_head * layer.head_dim
        assert tensors[f"blk.{layer.index}.ffn_up.weight"][0] == layer.ffn.n_ff


def test_whole_models_share_what_the_published_ones_share():
    e2b = config_from_gguf(gguf_metadata(config := config_of("E2B")), dict(model_tensors(config)), 1, "synthetic")
    assert {layer.kv_from for layer in e2b.layers[15:]} == {13, 14} and e2b.layers[15].ffn.n_ff == 2 * e2b.layers[14].ffn.n_ff
    e4b = config_from_gguf(gguf_metadata(config := config_of("E4B")), dict(model_tensors(config)), 1, "synthetic")
    assert {layer.kv_from for layer in e4b.layers[24:]} == {22, 23}


def test_vocabulary_has_gemmas_special_ids():
    tokens = vocabulary_metadata()["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == 262_144
    assert tokens[2] == "<bos>" and tokens[106] == "<turn|>" and tokens[238] == "<0x00>" and tokens[493] == "<0xFF>"


def test_a_model_can_chat_with_its_own_template_and_vocabulary():
    metadata = vocabulary_metadata()
    tokenizer = Tokenizer.from_metadata(metadata, "synthetic")
    ids = encode_chat(tokenizer, GEMMA4_TEMPLATE, [{"role": "user", "content": "hello"}])
    assert ids[0] == 2 and ids[1] == 105 and ids.count(106) == 1          # <bos><|turn>user ... <turn|> <|turn>model


def test_wrong_names_are_refused(tmp_path):
    for args, says in ((("9B",), "unknown shape '9B'"), (("12B", "q3"), "unknown recipe 'q3'"), (("12B", "google-q4_0", 49), "2 to 48"),
                       (("12B-assistant", "google-q4_0", 2), "always has four layers")):
        with pytest.raises(ValueError, match=says):
            synthesise(args[0], tmp_path / "x.gguf", *args[1:])
    assert not list(tmp_path.iterdir()) and len(shape_names()) == 15 and len(RECIPES) == 8


def test_a_drafter_is_written_whole(tmp_path):
    synthesise("E2B-assistant", tmp_path / "d.gguf", "unsloth-q4_0")
    with open_gguf(tmp_path / "d.gguf") as file:
        assert dict(drafter_tensors("E2B")) == {name: info.shape for name, info in file.tensors.items()}
        assert {key for key in drafter_metadata("E2B")} <= set(file.metadata)
        assert sum(math.prod(shape) for name, shape in drafter_tensors("E4B") if name != "masked_embd_ordering") == 78_518_020  # published


def test_two_narrow_layers_of_the_26b_run(tmp_path, monkeypatch):
    """With the vocabulary of the built-in model."""
    settings, *rest = SHAPES["26B-A4B"]
    narrow = dict(vocab_size=4096, hidden_size=256, intermediate_size=256, num_experts=16, moe_intermediate_size=64)
    monkeypatch.setitem(SHAPES, "26B-A4B", (settings | narrow, *rest))
    with open_gguf(BUILT_IN) as file:
        vocabulary = {key: getattr(value, "tolist", lambda value=value: value)() for key, value in file.metadata.items()
                      if key.startswith("tokenizer.ggml.")}
    monkeypatch.setattr(synth, "vocabulary_metadata", lambda: vocabulary)
    synthesise("26B-A4B", tmp_path / "x.gguf", n_layer=2)
    model = refimpl.load(tmp_path / "x.gguf", backend="reference")
    out = refimpl.generate(model, model.tokenizer.encode("hello there"), max_new_tokens=2, temperature=0)
    assert out.stats.n_generated == 2 and model.file.tensors["token_embd.weight"].type == "Q6_K"
    assert model.file.metadata["tokenizer.chat_template"] == GEMMA4_TEMPLATE


CHILD = """
import json, re, sys, time
import refimpl

began = time.perf_counter()
model = refimpl.load(sys.argv[1], backend="reference")
loaded = time.perf_counter() - began
ids = model.tokenizer.encode("hello there")
out = refimpl.generate(model, ids, max_new_tokens=2, temperature=0)
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"load_seconds": loaded, "seconds": time.perf_counter() - began, "peak_bytes": peak, "new": len(out.ids),
                  "head": model.weights.head_VD.type}))
"""


@pytest.mark.exhaustive
def test_two_layers_of_the_26b_run_within_4_gb(tmp_path):
    path = tmp_path / "26b.gguf"
    synthesise("26B-A4B", path, n_layer=2)
    done = subprocess.run([sys.executable, "-c", CHILD, path], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(f"\n{path.stat().st_size / 1e9:.2f} GB file: {result}")
    with open_gguf(path) as file:
        assert file.metadata["tokenizer.chat_template"] == GEMMA4_TEMPLATE
    assert result["new"] == 2 and result["head"] == "Q6_K"
    assert result["peak_bytes"] < 4e9


PROJECTOR_BYTES = {     # of files in circulation
    ("E2B", "bf16"): 986_833_664, ("E2B", "q8_0"): 557_368_064, ("E4B", "bf16"): 991_552_256, ("E4B", "q8_0"): 559_874_816,
    ("12B", "bf16"): 175_115_264, ("12B", "q8_0"): 158_987_616, ("26B-A4B", "bf16"): 1_194_828_160, ("26B-A4B", "q8_0"): 806_408_320,
    ("26B-A4B", "f16"): 1_193_058_432}


@pytest.mark.parametrize(("name", "recipe"), PROJECTOR_BYTES)
def test_projectors_have_the_size_of_the_published_ones(name, recipe):
    """Less their header."""
    n_tensors, n_bytes = 0, 0
    for tensor, shape in projector_tensors(name):
        block = projector_type(recipe, tensor, shape)
        n_bytes += -(-math.prod(shape[:-1]) * BLOCKS[block].row_bytes(shape[-1]) // 32) * 32
        n_tensors += 1
    assert n_tensors == {"E2B": 1411, "E4B": 1411, "12B": 11, "26B-A4B": 356}[name]
    assert 0 < PROJECTOR_BYTES[name, recipe] - n_bytes < 90_000


def test_a_projector_of_the_12b_runs(tmp_path):
    path = tmp_path / "mmproj.gguf"
    synthesise("12B-mmproj", path, "q8_0")
    projector = load_projector(path, backend="reference")
    assert projector.encoder_free and projector.n_embd == 3840
    cells, positions = np.zeros((4, 6912), np.float32), np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    assert np.isfinite(projector.image_tokens(cells, positions)).all()
    with pytest.raises(ValueError, match="unknown recipe"):
        synthesise("12B-mmproj", path, "q4_k_m")
    with pytest.raises(ValueError, match="all its layers"):
        synthesise("12B-mmproj", path, "q8_0", n_layer=3)
