"""Traces with pictures and sounds: what is in them, no alarm for correct engines, and what departs where inputs or prompts differ."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from tower_traces import BUDGET, RATE, opened, parts, picture, small_budget, sound, tower_folder  # noqa: F401  (a fixture)
from typer.testing import CliRunner

import refimpl
from refimpl import Audio, Image
from refimpl.cli import app
from refimpl.lab.compare.compare import compare, compare_steps, compare_with
from refimpl.lab.compare.engines import transformers
from refimpl.lab.compare.engines.choose import open_any
from refimpl.lab.compare.known_bugs import inject
from refimpl.lab.compare.names import TOWERS, graph_order, place_of
from refimpl.lab.compare.record import trace, write_trace
from refimpl.lab.compare.reports import heat_map
from refimpl.lab.compare.tolerance import in_q8
from refimpl.lab.compare.towers.inputs import given_of, traced_prompt, with_soft_tokens
from refimpl.lab.compare.towers.known_bugs import TOWER_BUGS
from refimpl.lab.compare.trace import TraceError, open_trace

KINDS = ["small", "large", "unified"]


class Made:
    """A small model in both implementations, its prompt and right trace."""

    def __init__(self, folder, kind):
        self.kind, (self.theirs, self.folder) = kind, tower_folder(folder, kind)
        self.model, self.projector = opened(self.folder)
        self.ids, self.media = traced_prompt(self.model, self.projector, [*parts(self.projector), Image(picture(60, 90, 5), BUDGET), "ab"])
        self.ours = trace(self.model, self.ids, media=self.media)


@pytest.fixture(scope="module")
def made_of(tmp_path_factory):
    """By its kind, made when it is asked for."""
    return functools.cache(lambda kind: Made(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="module", params=KINDS)
def made(request, made_of):
    return made_of(request.param)


@pytest.mark.parametrize("kind, dtype", [
    *((kind, "float32") for kind in KINDS), ("small", "bfloat16"),
    *(pytest.param(kind, "bfloat16", marks=pytest.mark.exhaustive) for kind in ("large", "unified"))])
def test_transformers_raises_no_alarm(made_of, kind, dtype):
    made = made_of(kind)
    theirs = transformers.trace(str(made.folder), made.ids, dtype=dtype, given=given_of(made.ours))
    found = compare_with(made.model, made.ours, theirs, made.media)
    assert found.first is None, (found.first, found.diagnosis)
    assert max(j.error / j.tolerance for j in found.judged if j.tolerance) < 0.8
    missing = {place_of(name).name for name in made.ours.names() if name not in theirs.names()}
    assert missing == {"cache_k", "cache_v", *(("Qcur", "Kcur") if made.kind == "small" else ())}       # no modules of the conformer
    assert all(theirs.value(name).array.shape == made.ours.value(name).array.shape or name.endswith(("kqv_out-0", "kqv_out-1", "kqv_out-2"))
               or ".Vcur-" in name for name in theirs.names())


def test_kernels_and_8_bits_raise_no_alarm(made):
    model = refimpl.load(made.folder, arithmetic="exact")
    projector = refimpl.load_projector(made.folder, target=model)
    ids, media = traced_prompt(model, projector, parts(projector))
    ids_of_ours, ours = traced_prompt(made.model, made.projector, parts(made.projector))
    assert ids_of_ours == ids
    in_8_bits = trace(in_q8(made.model), ids, media=[dataclasses.replace(part, projector=in_q8(part.projector)) for part in ours])
    for theirs in (trace(model, ids, media=media), in_8_bits):
        found = compare_steps(made.model, theirs, ours)
        assert found.first is None, (found.first, found.diagnosis)


def test_soft_tokens_are_those_of_the_projector(made):
    expected = [*parts(made.projector), Image(picture(60, 90, 5), BUDGET), "ab"]
    assert np.array_equal(made.ours.arrays["result_output"], made.model.logits(expected, projector=made.projector))
    for part in made.media:
        rows = [t for t, i in enumerate(made.ids) if i == -1 - made.media.index(part)]
        assert np.array_equal(made.ours.arrays[f"{part.name}.projected"], made.ours.arrays["inp_scaled"][rows])
    names = {name.name for tower in TOWERS.values() for name in tower}
    assert {place_of(name).name for name in made.ours.names() if place_of(name).tower} <= names
    order = graph_order(made.ours.names())
    assert order.index("image0.positions") < order.index("image0.projected") < order.index("image1.patches") < order.index("inp_scaled")


def test_two_faults_are_told_apart_step_by_step(made_of):
    """One in a tower, one behind it."""
    made = made_of("large")
    with inject(TOWER_BUGS["not standardized"]), inject(TOWER_BUGS["images see ahead in full layers too"]):
        theirs = trace(made.model, made.ids, media=made.media)
    found = compare_steps(made.model, theirs, made.media)
    assert {j.name for j in found.judged if j.verdict == "departs"} == {"image0.std_scaled", "image1.std_scaled", "kqv_out-1"}
    figure = heat_map.plot(found)
    assert "image1.around" in [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_a_projector_gives_as_many_soft_tokens_as_there_are_places(made_of):
    made = made_of("unified")
    with pytest.raises(TraceError, match="image0 is 8 soft tokens, the prompt has places for 9"):
        with_soft_tokens([-1, *made.ids], made.media)


def test_files_and_other_engines_files(made, tmp_path):
    """A trace file is what was in memory; a dump may have placeholders, or any negative id, in the places of soft tokens."""
    write_trace(tmp_path / "a.safetensors", made.model, made.ids, media=made.media)
    found = open_trace(tmp_path / "a.safetensors")
    assert all(np.array_equal(found.value(name).array, array) for name, array in made.ours.arrays.items()) and found.ids == made.ours.ids
    listed = found.facts["media"]
    assert [part["name"] for part in listed] == [part.name for part in made.media]
    assert listed[0]["sha256"] == Image(picture(), BUDGET).digest
    assert [listed[0][key] for key in ("width", "height", "budget", "n_tokens")] == [37, 80, BUDGET, 8]
    some = {name: made.ours.arrays[name] for name in ("image0.inp", "image1.projected", "inp_scaled", "l_out-0", "result_output")}
    placeholder = {-1 - k: part["placeholder"] for k, part in enumerate(listed)}
    for theirs in (np.array([placeholder.get(i, i) for i in made.ids]), np.minimum(made.ids, np.where(np.array(made.ids) < 0, -7, 999))):
        np.savez(tmp_path / "b.npz", ids=theirs, arithmetic="float32", **some)
        judged = compare(found, open_any(str(tmp_path / "b.npz")))
        assert judged.first is None and [j.name for j in judged.judged] == list(some)
    np.savez(tmp_path / "b.npz", ids=np.array(made.ids), arithmetic="float32", **{name: value[None] for name, value in some.items()})
    assert compare(found, open_any(str(tmp_path / "b.npz"))).first is None, "the batch axis is still there"
    np.savez(tmp_path / "b.npz", ids=np.array(made.ids), arithmetic="float32", **some | {"image0.inp": some["image0.inp"][:-1]})
    judged = compare(found, open_any(str(tmp_path / "b.npz")))
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes().replace(b'"image0\\"', b'"xmage0\\"'))
    with pytest.raises(TraceError, match="names media otherwise"):
        open_trace(tmp_path / "c.safetensors")
    assert judged.first.name == "image0.inp" and judged.diagnosis.kind == "another shape" and "rows, expected" in judged.diagnosis.text


def test_another_picture_is_said(made):
    second = next(part for part in made.media if part.name == "image1")
    other = dataclasses.replace(second, given=second.given | {"patches": second.given["patches"][::-1]},
                                facts=second.facts | {"sha256": "0"})
    others = [other if part is second else part for part in made.media]
    found = compare(made.ours, trace(made.model, made.ids, media=others))
    assert found.first.name == "image1.patches" and found.diagnosis.kind == "another file" and "SHA-256 0..." in found.diagnosis.text


def test_the_command(tmp_path):
    from PIL import Image as Pillow
    from soundfile import write as write_sound

    _, folder = tower_folder(tmp_path, "small")
    Pillow.fromarray(picture()).save(tmp_path / "p.png")
    write_sound(tmp_path / "s.wav", sound()[0], RATE, subtype="FLOAT")
    common = ["trace", "-m", str(folder), "-p", "ab", "--image", str(tmp_path / "p.png"), "--audio", str(tmp_path / "s.wav"),
              "--image-tokens", str(BUDGET), "--backend", "reference"]
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    run = CliRunner().invoke(app, [*common, "-o", str(a), "--json"])
    assert run.exit_code == 0, run.output
    said = json.loads(run.stdout)
    assert [part["name"] for part in said["media"]] == ["image0", "audio0"] and said["media"][1]["samples"] == len(Audio(sound()).samples_N)
    with inject(TOWER_BUGS["norm behind the projection"]):
        assert CliRunner().invoke(app, [*common, "-o", str(b)]).exit_code == 0
    wrong = CliRunner().invoke(app, ["compare", str(a), str(b), "--guess"])
    assert wrong.exit_code == 1 and "departs first: image0.projected" in wrong.stdout, wrong.output
    same = CliRunner().invoke(app, ["compare", str(a), f"transformers:{folder}", "--steps"])
    assert same.exit_code == 0 and "the same within rounding" in same.stdout, same.output
    run = CliRunner().invoke(app, ["trace", "-m", str(folder), "--ids", "2,5", "--image", str(tmp_path / "p.png"), "-o", str(b), "--force"])
    assert run.exit_code == 2 and "stand before a text" in run.output
    run = CliRunner().invoke(app, [*common, "-o", str(b), "--force", "--tensors", "l_out-*"])
    lacking = CliRunner().invoke(app, ["compare", str(b), str(a), "--guess"])
    assert lacking.exit_code == 0, lacking.output
    lacking = CliRunner().invoke(app, ["compare", str(b), f"transformers:{folder}", "--guess"])
    assert lacking.exit_code == 3 and "image0.patches: trace it too" in lacking.output and len(lacking.stderr.splitlines()) == 1
