"""Traces: what is in the file is what was computed; what is asked for is what is kept; nothing half-written, nothing damaged unnoticed."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy
from shapes import prompt, random_drafter, reference, write_drafter
from typer.testing import CliRunner

import refimpl
from refimpl.cli import app, complain
from refimpl.formats.checkpoint import CheckpointError
from refimpl.lab.compare import record
from refimpl.lab.compare.names import NAMES, TOWERS, graph_order, place_of
from refimpl.lab.compare.record import trace, write_trace
from refimpl.lab.compare.trace import TraceError, open_trace

IDS = prompt(20)


@pytest.fixture(scope="module")
def model(moe):
    return reference(moe[0].path)


@pytest.fixture(scope="module")
def drafter(model, tmp_path_factory):
    return refimpl.load_drafter(write_drafter(tmp_path_factory.mktemp("d") / "d.gguf", random_drafter("26B-A4B")), model)


@pytest.fixture(scope="module")
def whole(model):
    return trace(model, IDS)


def test_the_file_holds_what_was_computed(model, tmp_path, whole):
    path, seen = tmp_path / "t.safetensors", {}
    logits = model.logits(IDS, tap=seen.__setitem__)
    header = write_trace(path, model, IDS, prompt="text")
    found = safetensors.numpy.load_file(path)               # the format's own reader takes it
    assert set(seen) <= set(found) and np.array_equal(found["result_output"], logits)
    assert all(np.array_equal(found[name], value) for name, value in seen.items())
    opened = open_trace(path)
    assert all(np.array_equal(opened.value(name).array, array) for name, array in whole.arrays.items())
    assert set(opened.names()) == set(whole.names()) == set(graph_order(found))
    assert opened.ids == tuple(IDS) and opened.positions == tuple(range(20)) and opened.arithmetic == "exact"
    assert header["model_sha256"] == hashlib.sha256(model.file.path.read_bytes()).hexdigest() == opened.facts["model_sha256"]
    assert opened.facts["backend"] == "reference" and opened.facts["prompt"] == "text" and opened.facts["engine"].startswith("refimpl ")


@pytest.mark.parametrize("shape", ["moe", "ple"])
def test_every_name_that_a_layer_has_is_there(shape, request):
    file, config = request.getfixturevalue(shape)
    names = {place_of(name).name for name in trace(reference(file.path), IDS[:3]).names()}
    other = {"moe": ("ffn_norm", "ffn_out", "inp_per_layer_selected", "per_layer_proj", "inp_per_layer", "pe_in", "per_layer_embd_out"),
             "ple": [name.name for name in NAMES if name.only == "experts"]}[shape]
    assert names == {name.name for name in NAMES} - {*other, "inp_xh", "pre_proj", "h_nextn", "drafted", "emitted"}


def test_chunks_make_no_difference(model, whole, monkeypatch):
    monkeypatch.setattr(record, "CHUNK", 7)
    cut = trace(model, IDS)
    assert all(np.array_equal(cut.arrays[name], array) for name, array in whole.arrays.items()) and len(cut.arrays) == len(whole.arrays)


def test_positions_and_names_that_were_asked_for(model, whole, monkeypatch, tmp_path):
    monkeypatch.setattr(record, "CHUNK", 6)
    write_trace(tmp_path / "t.safetensors", model, IDS, positions=[19, 0, 3, 7, 8], tensors=["l_out-*", "ffn_moe_topk-?", "result_output"])
    some = open_trace(tmp_path / "t.safetensors")
    assert some.positions == (0, 3, 7, 8, 19) and len(some.names()) == 13
    for name in some.names():
        value = some.value(name)
        assert value.positions.tolist() == [0, 3, 7, 8, 19] and np.array_equal(value.array, whole.arrays[name][[0, 3, 7, 8, 19]]), name


def test_the_largest_logits_only(model, whole):
    some, logits = trace(model, IDS, logits=5), whole.arrays["result_output"]
    ids = some.arrays["result_output.ids"]
    assert np.array_equal(ids, np.argsort(-logits, axis=1, kind="stable")[:, :5]) and "result_output" not in some.arrays
    assert np.array_equal(some.arrays["result_output.top"], np.take_along_axis(logits, ids, axis=1))
    assert np.allclose(some.arrays["result_output.logsumexp"][:, 0], np.log(np.exp(logits.astype(np.float64)).sum(axis=1)), rtol=1e-6)


def test_the_cache_is_what_was_written(moe, whole):
    assert np.array_equal(whole.arrays["cache_k-0"], whole.arrays["Kcur_pos-0"])
    halves = trace(refimpl.load(moe[0].path), IDS)
    assert halves.arrays["cache_k-3"].dtype == np.float16 and halves.arithmetic == "q8"
    assert np.array_equal(halves.arrays["cache_v-3"], halves.arrays["Vcur_normed-3"].astype(np.float16))


def test_draft_steps_and_rounds(model, drafter, whole):
    found = trace(model, IDS, drafter=drafter, draft_max=3, rounds=2)
    proposed = [int(found.arrays[f"draft{j}.result_output"].argmax()) for j in range(3)]
    assert proposed == refimpl.propose(model, drafter, IDS, 3)
    emitted = [int(np.argmax(whole.arrays["result_output"][-1]))]
    for r in range(2):
        assert found.arrays[f"round{r}.verify.l_out-0"].shape == (4, 64) and found.arrays[f"round{r}.draft2.h_nextn"].shape == (1, 64)
        new = found.arrays[f"round{r}.emitted"].tolist()
        assert found.arrays[f"round{r}.verify.result_output"].argmax(axis=1)[:len(new)].tolist() == new
        emitted += new
    assert refimpl.generate(model, IDS, max_new_tokens=len(emitted), temperature=0).ids == emitted
    assert all(np.array_equal(found.arrays[name], array) for name, array in whole.arrays.items()), "drafting changed the prompt's values"
    order = graph_order(found.names())
    assert order.index("result_output") < order.index("draft0.l_out-0") < order.index("draft1.Qcur-0") < order.index("round0.drafted") \
        < order.index("round0.verify.l_out-0") < order.index("round0.emitted") < order.index("round1.draft0.inp_xh")


def test_nothing_is_left_of_a_run_that_fails(model, tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_text("what was there before")
    with pytest.raises(TraceError, match=r"no value is called 'foo\*'"):
        write_trace(path, model, IDS, tensors=["l_out-0", "foo*"])
    with pytest.raises(TraceError, match="the prompt has 20 tokens, 0 to 19"):
        write_trace(path, model, IDS, positions=[3, 20])
    with pytest.raises(TraceError, match="logits=0: expected 'all' or a number"):
        write_trace(path, model, IDS, logits=0)
    assert path.read_text() == "what was there before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="nowhere"):
        write_trace(tmp_path / "nowhere" / "t.safetensors", model, IDS)


def test_damage_is_noticed(model, tmp_path):
    path = tmp_path / "t.safetensors"
    write_trace(path, model, IDS, tensors=["l_out-*"])
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="are not at bytes"):
        open_trace(path)
    data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(TraceError, match="l_out-5 is damaged"):
        open_trace(path).value("l_out-5")
    for old, new, words in ((b"refimpl trace 1", b"refimpl trace 9", "is no 'refimpl trace 1'"),
                            (b'\\"ids\\"', b'\\"idz\\"', "KeyError: 'ids'")):
        path.write_bytes(bytes(data).replace(old, new))
        with pytest.raises(TraceError, match=words):
            open_trace(path)


def test_the_command(moe, tmp_path):
    out = tmp_path / "t.safetensors"
    run = CliRunner().invoke(app, ["trace", "-m", str(moe[0].path), "--ids", "2,5,7", "-o", str(out), "--backend", "reference", "--json",
                                   "--tensors", "l_out-*", "--positions", "1:3"])
    assert run.exit_code == 0, run.output
    said = json.loads(run.stdout)
    assert said["ids"] == [2, 5, 7] and said["positions"] == [1, 2] and said["tensors"] == 6
    assert open_trace(out).value("l_out-3").array.shape == (2, 64)
    names = CliRunner().invoke(app, ["trace", "--names"]).stdout
    assert len(names.splitlines()) == 3 * 2 + 2 + len(NAMES) + sum(map(len, TOWERS.values())) and "post_feedforward_layernorm_2" in names
    for arguments, words in ((["--ids", "2,x"], "expected token ids"), (["-p", "a", "--ids", "2"], "give the text"), ([], "give the text"),
                             (["--ids", "2", "--rounds", "1"], "--rounds needs --draft"),
                             (["--ids", "2", "--positions", "a:b"], "expected numbers and ranges")):
        failed = CliRunner().invoke(app, ["trace", "-m", str(moe[0].path), "-o", str(out), "--force", *arguments], standalone_mode=False)
        assert complain(failed.exception) == 2 and words in str(failed.exception.format_message()), arguments
