"""Hugging Face directories: drafters as transformers writes them, and files that are not what they say."""

import json
import shutil
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import SHAPES, prompt, random_drafter, random_model, reference, write_drafter, write_model

import refimpl
from refimpl.formats.checkpoint import CheckpointError, open_checkpoint
from refimpl.loading.open import open_drafter


@pytest.fixture(scope="module")
def drafters(tmp_path_factory):
    """For every shape: a drafter's directory and its GGUF file."""
    folder, made = tmp_path_factory.mktemp("directories"), {}
    for shape in SHAPES:
        drafter = random_drafter(shape, n_centroid=20 if shape == "E4B" else 0)
        drafter.save_pretrained(folder / shape)
        made[shape] = folder / shape, write_drafter(folder / f"{shape}.gguf", drafter)
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_a_directory_is_the_drafter_of_the_file(tmp_path, drafters, shape):
    model = reference(write_model(tmp_path / "m.gguf", random_model(shape)))
    directory, file = (refimpl.load_drafter(path, model) for path in drafters[shape])
    assert directory.config == file.config
    assert refimpl.propose(model, directory, prompt(20), 6) == refimpl.propose(model, file, prompt(20), 6)
    for name in file.file.tensors:
        assert np.array_equal(directory.file.raw(name), file.file.raw(name)) or name == "masked_embd_ordering"      # int64 there


def test_several_files_and_bfloat16(tmp_path, drafters):
    import torch

    drafter = random_drafter("12B").to(torch.bfloat16)
    drafter.save_pretrained(tmp_path / "d", max_shard_size="40KB")
    assert (tmp_path / "d" / "model.safetensors.index.json").exists()
    file = open_drafter(tmp_path / "d")
    model = reference(write_model(tmp_path / "m.gguf", random_model("12B")))
    assert file.tensors["token_embd.weight"].type == "BF16" and len(refimpl.propose(model, refimpl.load_drafter(tmp_path / "d", model),
                                                                                   prompt(9), 3)) == 3


def test_configurations_as_published(tmp_path, drafters):
    """They say `global_head_dim` and `num_global_key_value_heads` where transformers 5.22 writes `per_layer_config`."""
    for shape in ("26B-A4B", "E4B"):
        folder = shutil.copytree(drafters[shape][0], tmp_path / shape)
        config = json.loads((folder / "config.json").read_text())
        full = config["text_config"].pop("per_layer_config")["3"]
        config["text_config"] |= {"global_head_dim": full["head_dim"], "num_global_key_value_heads": full.get("num_key_value_heads")}
        (folder / "config.json").write_text(json.dumps(config))
        ours, theirs = open_drafter(folder), open_drafter(drafters[shape][0])
        assert {k: str(v) for k, v in ours.metadata.items()} == {k: str(v) for k, v in theirs.metadata.items()}


def change_config(**new):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | new).items() if v is not None}))
    return change


def change_text(**new):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] = {k: v for k, v in (config["text_config"] | new).items() if k != "per_layer_config" or v}
        (folder / "config.json").write_text(json.dumps(config))
    return change


def header(change):
    def write(folder):
        raw = (folder / "model.safetensors").read_bytes()
        n = struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8:8 + n])
        change(entries)
        text = json.dumps(entries).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n:])
    return write


def entry(**new):
    return header(lambda entries: entries["post_projection.weight"].update(new))


@pytest.mark.parametrize(("change", "expected"), [
    (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    (lambda f: (f / "config.json").write_text("[1]"), "expected a JSON object"),
    (lambda f: (f / "config.json").write_text("[" * 100_000), "cannot be read as JSON"),
    (lambda f: (f / "config.json").write_bytes(b"\xff"), "cannot be read as JSON"),
    (change_config(model_type="gemma4_text"), "expected a drafter's"),
    (change_config(text_config=None), "is no configuration of a Gemma 4 drafter: text_config is missing"),
    (change_config(text_config=3), "is no configuration"),
    (change_config(text_config={"layer_types": []}), "is no configuration"),
    (change_text(final_logit_softcapping=10**400), "a number is too large"),
    (change_text(global_head_dim=2**40, per_layer_config=None), "expected a head of 2 to 65536"),
    (change_text(num_attention_heads=10**4000), "is 1000"),
    (change_config(backbone_hidden_size=3840), "embedding_length_out is 3840, the target has 64"),
    (change_config(backbone_hidden_size="x"), "embedding_length_out is 'x', expected one int"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "found an empty one"),
    (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "expected a header of at most 0 bytes"),
    (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "expected a header of at most 2 bytes"),
    (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{]"), "the header is no JSON"),
    (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"), "no JSON object"),
    (entry(dtype="F8_E4M3"), "is F8_E4M3, which this version cannot read"), (entry(shape=[64, -48]), "expected a dtype, a shape"),
    (entry(shape=[64, 49]), "are not at bytes"), (entry(data_offsets=[0, 12288]), "overlap"),
    (entry(data_offsets=[1]), "two data_offsets"),
    (entry(data_offsets=[10**9, 10**9 + 12288]), "are not at bytes"), (entry(shape=[True, 1]), "expected a dtype"),
    (header(lambda entries: entries.update(odd=entries.pop("pre_projection.weight"))), "tensor 'odd' is not one of"),
    (header(lambda entries: entries.pop("pre_projection.weight")), "tensor nextn.pre_projection.weight is missing"),
    (header(lambda entries: entries.update(a=3)), "tensor 'a': expected a dtype"),
    (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'), "file names in this folder"),
    (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 3}'), "expected a weight_map"),
])
def test_odd_directories_get_one_line(tmp_path, drafters, change, expected):
    folder = shutil.copytree(drafters["12B"][0], tmp_path / "d")
    change(folder)
    model = reference(write_model(tmp_path / "m.gguf", random_model("12B")))
    with pytest.raises(refimpl.GGUFError) as caught:
        refimpl.load_drafter(folder, model)
    assert expected in str(caught.value) and "\n" not in str(caught.value) and str(folder) in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(at=st.integers(0, 3000), value=st.integers(0, 255), cut=st.integers(0, 3000))
def test_changed_bytes_open_or_are_refused(tmp_path_factory, drafters, at, value, cut):
    folder = tmp_path_factory.mktemp("changed")
    raw = bytearray((drafters["12B"][0] / "model.safetensors").read_bytes())
    raw[at] = value
    (folder / "model.safetensors").write_bytes(raw[:cut] if cut % 5 == 0 else raw)
    shutil.copy(drafters["12B"][0] / "config.json", folder)
    try:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.tensors:
            checkpoint.raw(name).sum()
    except CheckpointError:
        pass
