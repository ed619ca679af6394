"""Bytes read, from shapes alone: the same as from a file of that shape, and those of the published models."""

import pytest

from refimpl.files import synth
from refimpl.formats.gguf import open_gguf
from refimpl.lab.bench.bandwidth import weight_bytes
from refimpl.lab.explain.weight_traffic import PARTS, drafter_bytes, part_of, read_bytes
from refimpl.model.config import config_from_gguf

SMALL = dict(vocab_size=1024, hidden_size=256, intermediate_size=256)


SMALL_SHAPES = {"26B-A4B": SMALL | dict(num_experts=16, top_k_experts=4, moe_intermediate_size=64), "12B": SMALL, "E2B": SMALL}
# every shape and every recipe; what takes longest to encode in one shape only
OFTEN = {*((name, recipe) for name in SMALL_SHAPES for recipe in ("google-q4_0", "unsloth-q4_0")),
         *(("26B-A4B", recipe) for recipe in ("q4_k_m", "q3_k", "mxfp4")), *(("E2B", recipe) for recipe in synth.RECIPES)}


@pytest.mark.parametrize("name,recipe", [
    pytest.param(name, recipe, marks=() if (name, recipe) in OFTEN else pytest.mark.exhaustive)
    for recipe in synth.RECIPES for name in SMALL_SHAPES])
def test_a_row_reads_what_the_file_says(name, recipe, monkeypatch, tmp_path):
    settings, *rest = synth.SHAPES[name]
    monkeypatch.setitem(synth.SHAPES, name, (settings | SMALL_SHAPES[name], *rest))
    monkeypatch.setattr(synth, "N_VOCAB", 1024)
    monkeypatch.setattr(synth, "vocabulary_metadata", dict)         # whose special ids lie beyond these 1,024
    synth.synthesise(name, tmp_path / "x.gguf", recipe, n_layer=6)
    file = open_gguf(tmp_path / "x.gguf")
    config = config_from_gguf(file.metadata, file.tensors.keys(), 1024, file.path)
    scales = 4 * 6                              # each layer's output scale is a single number, which the other does not count
    assert sum(read_bytes(name, 1, recipe, n_layer=6).values()) == weight_bytes(file, config) + scales


def test_the_published_figures():
    """Measured by others for Google's file: experts 801 MB, head 605 MB, dense 301 MB of 2,390; the whole file has 14.4 GB."""
    parts = read_bytes("26B-A4B")
    assert [round(parts[part] / 1e7) for part in ("experts", "head", "dense feed-forward")] == [80, 61, 30]
    assert sum(parts.values()) == pytest.approx(2.39e9, rel=0.01)
    assert sum(read_bytes("26B-A4B", all_experts=True).values()) == pytest.approx(14.424e9, rel=1e-3)
    assert sum(read_bytes("31B").values()) == pytest.approx(17.635e9, rel=1e-3)


def test_more_rows_read_more_experts_and_nothing_else():
    one, five = read_bytes("26B-A4B"), read_bytes("26B-A4B", 5)
    assert five["experts"] / one["experts"] == pytest.approx((1 - (1 - 1 / 16) ** 5) * 16, rel=1e-6)
    assert {part for part in PARTS if five[part] > 1.001 * one[part]} == {"experts"}
    assert sum(read_bytes("31B", 5).values()) < 1.001 * sum(read_bytes("31B").values())


def test_every_matrix_has_a_part():
    big = {tensor for name in synth.SHAPES for tensor, shape in synth.model_tensors(synth.config_of(name))
           if len(shape) > 1 and part_of(tensor) == "the rest"}
    assert {tensor.split(".")[2] if tensor.startswith("blk") else tensor for tensor in big} == {
        "ffn_gate_inp", "inp_gate", "proj", "per_layer_token_embd.weight", "per_layer_model_proj.weight"}


def test_a_drafter_step_reads_its_weights():
    assert drafter_bytes("26B-A4B", "unsloth-q4_0") == pytest.approx(419.7e6 * 18 / 32, rel=0.01)
