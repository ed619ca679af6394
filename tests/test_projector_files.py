"""Projectors: files equal those of llama.cpp's converter, give the bits of their directories, and wrong ones are refused in one line."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import run
from directories import change_json
from shapes import random_drafter, random_model, reference, write_drafter, write_model
from tower_models import KINDS, SIDE, picture, random_towers, save_towers, sound

import refimpl
from refimpl.cli.show.inspect import as_text
from refimpl.files.convert import convert
from refimpl.files.inspect import describe
from refimpl.formats.gguf import GGUFError, open_gguf
from refimpl.formats.gguf_writer import write_gguf
from refimpl.loading import projector as projectors
from refimpl.loading.memory import tower_bytes
from refimpl.loading.projector import load_projector
from refimpl.loading.towers.directory import open_projector

FILES = Path(__file__).parent / "files"
sys.path.insert(0, str(FILES))
from make_mmproj import CASES, COMPUTED, LISTING, listing, make_directory, with_numbers  # noqa: E402

GUESSED = {"general.name", "general.size_label"}            # see the docstring of files/convert.py


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A directory of each kind in bfloat16."""
    root = tmp_path_factory.mktemp("towers")
    return {kind: save_towers(root / kind, random_towers(kind), torch.bfloat16) for kind in KINDS}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_llama_cpps_converter(tmp_path, case):
    source, target = make_directory(case, tmp_path), tmp_path / "out.gguf"
    convert(source, target, CASES[case][3], projector=True)
    ours, theirs = with_numbers(listing(target), target), json.loads(LISTING.read_text())[case]
    for name in [name for name in theirs["tensors"] if name.endswith(COMPUTED)]:
        assert np.allclose(ours["tensors"][name].pop(), theirs["tensors"][name].pop(), rtol=3e-7, atol=0), name
    assert ours["tensors"] == theirs["tensors"]
    keys = (ours["keys"].keys() | theirs["keys"].keys()) - GUESSED
    assert {key: ours["keys"].get(key) for key in keys} == {key: theirs["keys"].get(key) for key in keys}


def asked(projector) -> list[np.ndarray]:
    """What a projector makes of a picture and, if it hears, of a clip."""
    side = SIDE * (3 if projector.encoder_free else 1)
    tokens = [projector.image_tokens(*picture(6, 3, side))]
    return tokens + ([projector.audio_tokens(sound(30, 40 if projector.encoder_free else 128))] if projector.hears else [])


@pytest.mark.parametrize("kind", KINDS)
def test_directory_and_file_give_the_same_bits(tmp_path, folders, kind):
    done = convert(folders[kind], tmp_path / "mmproj.gguf", projector=True)
    assert done["types"].keys() == {"F32", "BF16"} and done["tensors"] == len(open_projector(folders[kind]).tensors)
    for options in ({"backend": "reference"}, {"arithmetic": "exact"}, {"arithmetic": "q8"}):
        a, b = (load_projector(path, **options) for path in (folders[kind], tmp_path / "mmproj.gguf"))
        assert a.config == b.config and a.sees and a.hears == (kind != "large")
        assert all(map(np.array_equal, asked(a), asked(b))), options


def test_a_file_can_be_converted_again(tmp_path, folders):
    convert(folders["small"], tmp_path / "bf16.gguf", projector=True)
    for mark in (True, False):                  # a GGUF file says itself what it is
        convert(tmp_path / "bf16.gguf", tmp_path / f"{mark}.gguf", "Q8_0", projector=mark)
    convert(folders["small"], tmp_path / "q8.gguf", "Q8_0", projector=True)
    assert (tmp_path / "True.gguf").read_bytes() == (tmp_path / "False.gguf").read_bytes() == (tmp_path / "q8.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["small", "unified"])
def test_rounded_on_loading_is_the_file_that_a_converter_rounds(tmp_path, folders, kind):
    convert(folders[kind], tmp_path / "q8.gguf", "Q8_0", projector=True)
    for options in ({"backend": "reference"}, {"arithmetic": "exact"}, {"arithmetic": "q8"}):
        a, b, stored = (load_projector(path, weights=weights, **options) for path, weights in (
            (folders[kind], "Q8_0"), (tmp_path / "q8.gguf", "stored"), (folders[kind], "stored")))
        assert all(map(np.array_equal, asked(a), asked(b))) and not all(map(np.array_equal, asked(a), asked(stored)))
    with pytest.raises(ValueError, match="expected 'stored' or 'Q8_0'"):
        load_projector(folders[kind], weights="q4")


def test_on_the_command_line(tmp_path, folders):
    status, out, err = run("convert", folders["large"], "--mmproj", "-o", tmp_path / "m.gguf", "--type", "q8_0", "--json")
    assert status == 0 and json.loads(out)["types"].keys() == {"F32", "F16", "Q8_0"}, err
    assert load_projector(tmp_path / "m.gguf", backend="reference").config.vision.head_dim == 24


# ---- told apart, one line each

def refused(call, *words: str):
    with pytest.raises(GGUFError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def not_loaded(path, *words: str):
    refused(lambda: load_projector(path, backend="reference"), *words)


def test_a_model_a_drafter_and_a_projector_are_told_apart(tmp_path, folders):
    model = write_model(tmp_path / "model.gguf", random_model("12B"))
    drafter = write_drafter(tmp_path / "drafter.gguf", random_drafter("12B"))
    convert(folders["small"], tmp_path / "mmproj.gguf", projector=True)
    refused(lambda: load_projector(model), "this is a model", "-m")
    refused(lambda: load_projector(drafter), "this is a drafter", "-md")
    refused(lambda: refimpl.load(tmp_path / "mmproj.gguf"), "this is a projector", "--mmproj")
    refused(lambda: refimpl.load_drafter(tmp_path / "mmproj.gguf", reference(model)), "this is a projector", "--mmproj")
    refused(lambda: convert(model, tmp_path / "x.gguf", projector=True), "this is a model")
    (tmp_path / "text").mkdir()
    shutil.copytree(folders["small"], tmp_path / "text", dirs_exist_ok=True)
    change_json(tmp_path / "text" / "config.json", vision_config=None, audio_config=None)
    refused(lambda: load_projector(tmp_path / "text"), "config.json", "reads text only")
    change_json(tmp_path / "text" / "config.json", model_type="gemma4_assistant")
    refused(lambda: load_projector(tmp_path / "text"), "config.json", "a drafter")


def test_a_projector_of_another_width_is_refused(tmp_path, folders):
    model = reference(write_model(tmp_path / "model.gguf", random_model("12B", hidden_size=96)))
    refused(lambda: load_projector(folders["small"], model), "64 wide", "takes 96")
    fitting = reference(write_model(tmp_path / "fits.gguf", random_model("12B")))
    assert load_projector(folders["small"], fitting).backend is fitting.backend


def changed(path, out, keys=None, leave=(), rename=None, bounds=None):
    """A copy of a projector file with other keys, without some tensors, with one renamed, with other bounds."""
    file = open_gguf(path)
    tensors = []
    for name, info in file.tensors.items():
        raw = file.raw(name)
        value = raw.view(np.float32).reshape(info.shape) if info.type == "F32" else raw
        if bounds and name.endswith(tuple(bounds)):
            value = np.array([bounds[name.rsplit(".")[-1]]], np.float32)
        if name not in leave:
            tensors.append(((rename or {}).get(name, name), info.type, value))
    write_gguf(out, {k: v for k, v in (dict(file.metadata) | (keys or {})).items() if v is not None}, tensors)
    return out


def test_damaged_files_are_refused_with_the_place(tmp_path, folders):
    whole, out = tmp_path / "whole.gguf", tmp_path / "x.gguf"
    convert(folders["small"], whole, projector=True)
    for keys, words in (
            ({"clip.vision.projector_type": "gemma3"}, ("clip.vision.projector_type", "'gemma3'", "gemma4v or gemma4uv")),
            ({"clip.audio.block_count": None}, ("clip.audio.block_count is missing",)),
            ({"clip.vision.block_count": 2}, ("unexpected tensors", "v.blk.2")),
            ({"clip.vision.embedding_length": 33}, ("v.patch_embd.weight has shape", "expected (33, 3, 4, 4)")),
            ({"clip.audio.projection_dim": 32}, ("projection_dim is 64", "32")),
            ({"clip.has_vision_encoder": False, "clip.has_audio_encoder": None}, ("neither",)),
            ({"clip.has_vision_encoder": "yes"}, ("clip.has_vision_encoder is 'yes'",)),
            ({"clip.audio.attention.head_count": 3}, ("clip.audio.embedding_length is 32", "3 heads"))):
        not_loaded(changed(whole, out, keys), "x.gguf", *words)
    for name in ("a.conv1d.1.weight", "v.blk.0.attn_q_norm.weight", "v.blk.1.attn_q.input_max", "mm.input_projection.weight"):
        not_loaded(changed(whole, out, leave=(name,)), f"tensor {name} is missing")
    not_loaded(changed(whole, out, rename={"v.blk.0.ln1.weight": "v.blk.0.ln7.weight"}), "v.blk.0.ln1")
    not_loaded(changed(whole, out, bounds={"input_min": 3.0}), "v.blk.0.attn_q", "not a range")
    with pytest.warns(UserWarning, match="clip.vision.wobble"):
        load_projector(changed(whole, out, {"clip.vision.wobble": 1}), backend="reference")


def test_infinite_bounds_are_none(tmp_path, folders):
    whole = tmp_path / "whole.gguf"
    bounds = {"input_min": -np.inf, "output_min": -np.inf, "input_max": np.inf, "output_max": np.inf}
    convert(folders["small"], whole, projector=True)
    names = [name for name in open_gguf(whole).tensors if name.endswith(tuple(bounds))]
    assert len(names) == 4 * (7 * 3 + 10 * 3)
    without, infinite = changed(whole, tmp_path / "a.gguf", leave=names), changed(whole, tmp_path / "b.gguf", bounds=bounds)
    free, same, limited = (asked(load_projector(path, backend="reference")) for path in (without, infinite, whole))
    assert all(map(np.array_equal, free, same)) and not any(map(np.array_equal, free, limited))


@pytest.mark.parametrize(("part", "key", "value"), [
    ("vision_config", "pooling_kernel_size", 2), ("vision_config", "hidden_activation", "relu"),
    ("vision_config", "num_key_value_heads", 1),
    ("vision_config", "rope_parameters", {"rope_type": "axial", "rope_theta": 10_000.0}), ("audio_config", "attention_context_left", 9),
    ("audio_config", "hidden_act", "gelu"), ("vision_config", "hidden_size", None), ("text_config", "hidden_size", "x")])
def test_settings_that_are_not_computed_are_refused(tmp_path, folders, part, key, value):
    shutil.copytree(folders["small"], tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config[part] = {k: v for k, v in (config[part] | {key: value}).items() if v is not None}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    not_loaded(tmp_path / "m", str(tmp_path / "m"))


def test_what_config_json_says_of_sight_fits_the_structure(tmp_path, folders):
    """Of the model too, if it has eyes; text-only directories may say nothing."""
    for kind, value, expected in (("small", "vision", None), ("large", None, "vision"), ("unified", None, "vision")):
        shutil.copytree(folders[kind], tmp_path / kind)
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert config["text_config"].get("use_bidirectional_attention") == expected
        config["text_config"]["use_bidirectional_attention"] = value
        (tmp_path / kind / "config.json").write_text(json.dumps(config))
        for load in (refimpl.load_projector, refimpl.load):
            refused(lambda load=load, kind=kind: load(tmp_path / kind, backend="reference"), "config.json",
                    f"use_bidirectional_attention is {value!r}, expected {expected!r}")


def test_inspect(tmp_path, monkeypatch):
    path = tmp_path / "mmproj.gguf"
    convert(save_towers(tmp_path / "model", random_towers("unified")), path, "F32", projector=True)
    described = describe(path)
    assert described["projector"]["n_out"] == 64 and described["projector"]["vision"]["side"] == 3 * SIDE
    assert "give it with --mmproj" in as_text(described) and "hears: n_samples 40" in as_text(described)
    memory = described["projector"]["memory"]
    assert "(for a picture of 1,120 tokens, or a sound of 30 s)\nfits this machine: yes" in as_text(described)
    room = memory["weight_bytes"] + memory["buffer_bytes"]
    assert memory["buffer_bytes"] == tower_bytes(load_projector(path).config) > memory["weight_bytes"] > 100_000
    monkeypatch.setattr(projectors, "available", lambda: room)
    load_projector(path)
    monkeypatch.setattr(projectors, "available", lambda: room - 1)
    with pytest.raises(refimpl.MemoryRefusal, match=r"mmproj.gguf: the projector needs .* GB to compute a large picture or sound in\)"):
        load_projector(path)
