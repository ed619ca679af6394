"""compare: no alarm for correct engines, the right verdict on known differences, one clear line for what cannot be compared."""

import copy
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from few_layers import few_layers
from shapes import SHAPES, pattern, prompt, random_drafter, random_model, reference, round_to, write_drafter, write_model
from typer.testing import CliRunner

import refimpl
from refimpl.cli import app
from refimpl.formats.checkpoint import CheckpointError
from refimpl.lab.compare.compare import compare, compare_steps, compare_with
from refimpl.lab.compare.diagnoses import diagnose
from refimpl.lab.compare.engines import llamacpp_dumps, transformers
from refimpl.lab.compare.engines.choose import open_any
from refimpl.lab.compare.known_bugs import BUGS, inject
from refimpl.lab.compare.mismatch import Mismatch
from refimpl.lab.compare.names import graph_order
from refimpl.lab.compare.record import trace, write_trace
from refimpl.lab.compare.reports import heat_map
from refimpl.lab.compare.tolerance import SAFETY, a_priori, carried, in_q8, judge, measured
from refimpl.lab.compare.trace import Trace, TraceError

IDS = prompt(24)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """shape -> (transformers' model, path of its file in Q4_0): the same weights."""
    folder, found = tmp_path_factory.mktemp("m"), {}
    for shape, overrides in (("26B-A4B", dict(layer_types=pattern(3, 1), num_hidden_layers=4)), ("E2B", few_layers("E2B"))):
        hf = random_model(shape, seed=2, **overrides)
        found[shape] = hf, write_model(folder / f"{shape}.gguf", hf, "Q4_0")
        round_to(hf, "Q4_0")
    return found


@pytest.fixture(scope="module")
def right(made):
    """The model that judges, in exact arithmetic, and its trace."""
    return {shape: (m := reference(path, weights="quantized"), trace(m, IDS)) for shape, (_, path) in made.items()}


# ---- correct engines

@pytest.mark.parametrize("engine, shape", [
    *((engine, "26B-A4B") for engine in ("transformers float32", "transformers bfloat16", "kernels exact", "kernels q8", "reference q8")),
    *((engine, "E2B") for engine in ("transformers float32", "kernels q8")),
    *(pytest.param(engine, "E2B", marks=pytest.mark.exhaustive) for engine in ("transformers bfloat16", "kernels exact", "reference q8"))])
def test_correct_engines_raise_no_alarm(shape, engine, made, right):
    (hf, path), (model, ours) = made[shape], right[shape]
    if engine.startswith("transformers"):
        theirs = transformers.trace(copy.deepcopy(hf).to(getattr(torch, engine.split()[1])), IDS)
    else:
        theirs = trace({"kernels exact": lambda: refimpl.load(path, arithmetic="exact"), "kernels q8": lambda: refimpl.load(path),
                        "reference q8": lambda: in_q8(model)}[engine](), IDS)
    for found in (compare_with(model, ours, theirs), compare_steps(model, theirs)):
        assert found.first is None, (found.first, found.diagnosis)
        assert len(found.judged) >= 0.7 * len(ours.names()), found.tie
        assert max(j.error / j.tolerance for j in found.judged if j.tolerance) < 0.8
    assert {*theirs.names()} >= {name for name in ours.names() if not name.startswith("cache")}


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_has_every_name(shape, tmp_path):
    """All models and drafters, each value in our layout and equal to ours."""
    hf, drafting = random_model(shape, seed=1, **few_layers(shape)), random_drafter(shape)
    model = reference(write_model(tmp_path / "m.gguf", hf))
    drafter = refimpl.load_drafter(write_drafter(tmp_path / "d.gguf", drafting), model)
    ours = trace(model, IDS[:12], drafter=drafter, draft_max=2)
    theirs = transformers.trace(hf, IDS[:12], drafting, 2)
    assert {name for name in ours.names() if not name.startswith("cache")} == set(theirs.names())
    assert all(ours.value(name).array.shape == theirs.value(name).array.shape for name in theirs.names())
    assert compare_with(model, ours, theirs).first is None


# ---- what departs

def test_two_faults_are_told_apart_step_by_step(made, right):
    """The first alone in a comparison of runs; both, and nothing else, step by step, also in 8 bits."""
    model, ours = right["26B-A4B"]
    with inject(BUGS["values not normalised"]), inject(BUGS["layer scalar left out"]):
        exact, in_8_bits = trace(model, IDS), trace(in_q8(model), IDS)
    runs = compare_with(model, ours, exact)
    assert runs.first.name == "Vcur_normed-0" and sum(j.verdict == "departs" for j in runs.judged) > 100
    wrong = {f"{name}-{i}" for i in range(4) for name in ("Vcur_normed", "l_out")}
    for theirs in (exact, in_8_bits):
        found = compare_steps(model, theirs)
        assert {j.name for j in found.judged if j.verdict == "departs"} == wrong and found.first.name == "Vcur_normed-0"


def synthetic(**changes) -> Trace:
    """A router's logits and choices, made up."""
    logits = np.array([[3.0, 2.0, 1.0, 0.5], [3.0, 2.0, 1.999999, 0.5], [0.0, 1.0, 2.0, 3.0]], np.float32)
    arrays = {"ffn_moe_logits-0": logits, "ffn_moe_topk-0": np.argsort(-logits, axis=1)[:, :2].astype(np.int32),
              "ffn_moe_weights-0": np.array([[0.7, 0.3]] * 3, np.float32), "l_out-0": np.ones((3, 8), np.float32)}
    return Trace("made up", (2, 3, 4), (0, 1, 2), "exact", arrays | changes)


def test_equal_experts_may_change_places():
    noise, a = {"ffn_moe_logits-0": 1e-7, "ffn_moe_weights-0": 1e-7, "l_out-0": 1e-7}, synthetic()
    tied = synthetic(**{"ffn_moe_topk-0": np.array([[0, 1], [0, 2], [3, 2]], np.int32), "l_out-0": np.diag([1, 9, 9]) @ np.ones((3, 8))})
    found = compare(a, tied, noise)
    assert found.first is None and "changed places at position 1" in found.tie
    assert found.judged[-1].name == "l_out-0" and found.judged[-1].position == 0, "rows after the tie were judged"
    wrong = synthetic(**{"ffn_moe_topk-0": np.array([[0, 2], [0, 1], [3, 2]], np.int32)})
    found = compare(a, wrong, noise)
    assert found.first.name == "ffn_moe_topk-0" and found.first.position == 0 and found.diagnosis.kind == "other choice"
    other_order = synthetic(**{"ffn_moe_topk-0": np.array([[1, 0], [0, 1], [3, 2]], np.int32),
                               "ffn_moe_weights-0": np.array([[0.3, 0.7], [0.7, 0.3], [0.7, 0.3]], np.float32)})
    assert compare(a, other_order, noise).first is None


def test_order_is_that_of_the_forward_pass():
    names = ["result_output", "l_out-10", "l_out-2", "ffn_moe_topk-2", "Qcur-2", "inp_scaled", "attn_norm-0", "result_norm", "foo-1",
             "l_out"]
    assert graph_order(names) == [names[i] for i in (5, 6, 4, 3, 2, 1, 7, 0)]


def test_noise_grows_and_is_carried():
    assert carried({"b": 2.0, "c": 1.0}, ["a", "b", "c", "d"]) == {"a": 0.0, "b": 2.0, "c": 1.0, "d": 2.0}
    guess = a_priori(["a", "b"], "float32")
    assert 0 < guess["a"] < guess["b"] < 1e-6 < 1e-3 < a_priori(["a"], "q8")["a"] < a_priori(["a"], "bfloat16")["a"] < 0.02


def test_the_tolerance_is_tight(made, right):
    """Thirty times the rounding of float32 in one tensor of one row is noticed: SAFETY is not there to be generous."""
    model, ours = right["E2B"]
    moved = dict(ours.arrays)
    noise = measured(model, IDS, "exact", lambda a, b: {j.name: j.error for j in compare(a, b, {}).judged if j.error})
    moved["attn_out-4"] = ours.arrays["attn_out-4"].copy()
    moved["attn_out-4"][7] *= 1 + 6 * SAFETY * noise["attn_out-4"]
    found = compare_with(model, ours, dataclasses.replace(ours, arrays=moved))
    assert found.first.name == "attn_out-4" and found.first.position == 7 and found.first.tolerance < 1e-4


def test_the_largest_logits_are_compared_by_token(made, right):
    """Of two traces that list other tokens, or of which one has all; a token that is not listed is below the listed ones."""
    model, ours = right["E2B"]
    some, fewer = trace(model, IDS, logits=40), trace(in_q8(model), IDS, logits=12)
    for a, b in ((ours, some), (some, ours), (some, fewer), (fewer, some), (ours, fewer)):
        found = compare_with(model, a, b)
        assert found.first is None and found.judged[-1].name.startswith("result_output."), found.first
    wrong = dict(fewer.arrays)
    wrong["result_output.top"] = fewer.arrays["result_output.top"].copy()
    wrong["result_output.top"][0] *= -1
    found = compare_with(model, ours, dataclasses.replace(fewer, arrays=wrong))
    assert found.first.name == "result_output.top" and found.first.position == 0
    wrong = dict(some.arrays)
    wrong["result_output.ids"] = np.roll(some.arrays["result_output.ids"], 40, axis=0)
    assert compare_with(model, some, dataclasses.replace(some, arrays=wrong)).first.name == "result_output.top"
    wrong["result_output.ids"] = some.arrays["result_output.ids"] + 400
    with pytest.raises(TraceError, match="is outside of the vocabulary of this run, 300"):
        compare(ours, dataclasses.replace(some, arrays=wrong))


# ---- kinds, on arrays made up

RANDOM = np.random.default_rng(0)
A = RANDOM.standard_normal((12, 4, 16)).astype(np.float32)
ROWS = RANDOM.uniform(0.5, 2, (12, 4, 1)).astype(np.float32)
CHANNELS = RANDOM.uniform(0.5, 2, 16).astype(np.float32)
KINDS = {
    "sign": -A, "constant factor": 0.5 * A, "shifted rows": np.roll(A, 1, 0),
    "swapped halves": A.reshape(12, 4, 2, 8)[:, :, ::-1].reshape(A.shape),
    "interleaved pairs": A.reshape(12, 4, 2, 8).swapaxes(2, 3).reshape(A.shape), "transposed": A.swapaxes(1, 2).reshape(A.shape),
    "permuted heads": A[:, [1, 0, 3, 2]], "permuted": A.reshape(12, 64)[:, RANDOM.permutation(64)].reshape(A.shape),
    "factor per row": A * ROWS, "factor per channel": A * CHANNELS, "missing norm": A * ROWS * CHANNELS, "offset": A + np.float32(0.3),
    "pointwise function": 2 * np.tanh(A / 2), "zeros": 0 * A, "not finite": np.where(A > 2, np.nan, A), "another shape": A[:, :3],
    "rounded": A.astype(np.float16), "noise": A + np.float32(0.01) * RANDOM.standard_normal(A.shape).astype(np.float32),
    "stale row": np.concatenate([A[:7], A[3:4], A[8:]]), "other": RANDOM.standard_normal(A.shape).astype(np.float32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    found = diagnose(Mismatch("Qcur-3", A, KINDS[kind], np.arange(12), 1e-6, lambda name: None))
    assert found.kind == kind, found


# ---- other engines' files

def test_npz_and_safetensors_by_the_convention(tmp_path, right):
    model, ours = right["E2B"]
    some = {name: ours.arrays[name] for name in ("l_out-0", "Qcur-2", "result_output")}
    flat = {"l_out-0": some["l_out-0"][None].astype(np.float64), "Qcur-2": some["Qcur-2"].reshape(24, -1)}
    np.savez(tmp_path / "a.npz", ids=np.array(IDS), arithmetic="float32", mine=np.ones(3), **some | flat)
    found = compare_with(model, ours, open_any(str(tmp_path / "a.npz")))
    assert found.first is None and [j.name for j in found.judged] == ["l_out-0", "Qcur-2", "result_output"] and found.unknown == ["mine"]
    from safetensors.numpy import save_file

    save_file({name: value[5:9] * (1 if name != "Qcur-2" else 2) for name, value in some.items()}
              | {"ids": np.array(IDS), "positions": np.arange(5, 9)}, tmp_path / "b.safetensors", {"arithmetic": "float32"})
    found = compare_with(model, ours, open_any(str(tmp_path / "b.safetensors")))
    assert found.first.name == "Qcur-2" and found.diagnosis.kind == "constant factor" and found.first.position in range(5, 9)


def printed(value: np.ndarray, name: str) -> list[str]:
    """A tensor as llama.cpp's common_debug_print_tensor prints it: innermost axis last, the first and last three of each, then the sum."""
    sizes = (1,) * (4 - value.ndim) + value.shape
    lines = [f"common_debug_cb_eval: {name:>24} = (f32)    MUL_MAT(a{{1, 1, 1, 1}}, b{{1, 1, 1, 1}}}}) = "
             f"{{{', '.join(map(str, sizes[::-1]))}}}"]
    value = value.reshape(sizes)
    for i3 in range(sizes[0]):
        lines.append("    [")
        for i2 in llamacpp_dumps.shown(sizes[1]):
            lines += ["        [", *(["        ..., "] if i2 == 3 and sizes[1] > 6 else [])]
            for i1 in llamacpp_dumps.shown(sizes[2]):
                words = [f"{value[i3, i2, i1, i0]:12.4f}" for i0 in llamacpp_dumps.shown(sizes[3])]
                middle = ["   ..., "] if sizes[3] > 6 else []
                rest = ", " + "".join(middle) + ", ".join(words[3:]) if words[3:] else ""
                lines.append(f"            [{', '.join(words[:3])}{rest}  ],")
            lines.append("        ],")
        lines += ["    ]", f"    sum = {value.sum():f}"]
    return lines


def test_what_llama_cpp_prints(tmp_path, right):
    model, ours = right["E2B"]
    names = ["inp_scaled", "inp_per_layer", "attn_norm-0", "Qcur_normed-0", "l_out-0", "l_out-1"]
    head = [f"number of input tokens = {len(IDS)}", *(f"  {i}" for i in IDS)]
    tensors = [printed(ours.arrays[name], name) for name in names]
    last = printed(ours.arrays["result_output"][-1:], "result_output")
    path = tmp_path / "dump.txt"
    path.write_text("\n".join(["llama: hello", *head, *printed(np.ones((4, 4)), "leaf_3"), *sum(tensors, []), *last]))
    found = open_any(str(path))
    assert found.ids == tuple(IDS) and set(found.names()) == {*names, "result_output"}
    assert found.value("inp_per_layer").shape == (6, 32) and found.value("result_output").positions.tolist() == [23]
    assert compare_with(model, ours, found).first is None
    assert compare_with(model, ours, dataclasses.replace(found, arithmetic="exact")).first is None, "what printing rounds off is allowed"
    bad = ours.arrays["l_out-0"].copy()
    bad[22, 63] += 1e-2 * np.abs(bad).max() * 40
    tensors[4] = printed(bad, "l_out-0")
    path.write_text("\n".join([*head, *sum(tensors, [])]))
    assert compare_with(model, ours, open_any(str(path))).first.name == "l_out-0"
    path.write_text("\n".join([*head, *sum(tensors, [])][:-9]))
    with pytest.raises(TraceError, match=r"dump.txt: line \d+: l_out-1 is cut short: \d+ of 6 rows"):
        open_any(str(path))
    path.write_text("\n".join(tensors[0]))
    with pytest.raises(TraceError, match="no token ids"):
        open_any(str(path))


def test_what_llama_debug_saves(tmp_path, right):
    model, ours = right["E2B"]
    path = tmp_path / "llamacpp-m.bin"
    ours.arrays["result_output"][-1].astype("<f4").tofile(path)
    with pytest.raises(TraceError, match="llamacpp-m-tokens.bin is missing beside it"):
        open_any(str(path))
    np.array(IDS, "<i4").tofile(tmp_path / "llamacpp-m-tokens.bin")
    assert compare_with(model, ours, open_any(str(path))).first is None
    states = tmp_path / "llamacpp-m-embeddings.bin"
    np.array(IDS, "<i4").tofile(tmp_path / "llamacpp-m-embeddings-tokens.bin")
    ours.arrays["result_norm"].astype("<f4").tofile(states)
    assert [j.name for j in compare_with(model, ours, open_any(str(states))).judged] == ["result_norm"]
    (ours.arrays["result_norm"] / np.linalg.norm(ours.arrays["result_norm"], axis=1, keepdims=True)).astype("<f4").tofile(states)
    with pytest.raises(TraceError, match="--embd-normalize -1"):
        open_any(str(states))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(TraceError, match="cut short"):
        open_any(str(path))


@pytest.mark.parametrize("arrays, words", [
    ({}, "expected an array 'ids'"),
    ({"ids": np.arange(3)}, "expected 'arithmetic' to be one of exact, float32"),
    ({"ids": np.arange(3), "arithmetic": "fp8"}, "found 'fp8'"),
    ({"ids": np.arange(3), "arithmetic": "q8", "positions": np.array([3])}, "expected 'positions' to be int"),
    ({"ids": np.arange(3), "arithmetic": "q8", "l_out-0": np.ones((3, 2), "V2")}, "l_out-0 is of type |V2"),
    ({"ids": np.arange(3), "arithmetic": "q8", "l_out-0": np.float32(1)}, "l_out-0 is a single number"),
    ({"ids": np.arange(3), "arithmetic": "q8", "l_out-0": np.ones((2, 4))}, "l_out-0 has 2 rows, expected one for each of 3 positions"),
])
def test_bad_files_by_the_convention(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(TraceError, match=re.escape(words)):
        found = open_any(str(tmp_path / "x.npz"))
        [found.value(name) for name in found.names()]


def test_what_cannot_be_opened(tmp_path, right):
    path = tmp_path / "x.npz"
    np.savez(path, ids=np.arange(3), arithmetic="q8", x=np.ones(1000))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="unknown engine 'vllm'; choose from transformers, llama.cpp"):
        open_any("vllm:/model", (2, 3))
    for source, words in ((str(path), "it may be cut short"), ("transformers:/nowhere", "no config.json"),
                          ("transformers:", "name what it runs, transformers:DIRECTORY"),
                          (str(tmp_path / "x.h5"), "expected .safetensors, .npz")):
        with pytest.raises(TraceError, match=words):
            open_any(source, (2, 3))
    with pytest.raises(CheckpointError, match="no such file"):
        open_any(str(tmp_path / "no.safetensors"))
    with pytest.raises(TraceError, match="an engine runs the prompt of a trace; give the trace first"):
        open_any("llama.cpp:/x.gguf")


def test_what_cannot_be_compared(right):
    ours = right["E2B"][1]
    with pytest.raises(TraceError, match="no tensor in common"):
        compare(ours, dataclasses.replace(ours, arrays={"mine": A}))
    rows = {name: value[:3] for name, value in ours.arrays.items()}, {name: value[3:] for name, value in ours.arrays.items()}
    with pytest.raises(TraceError, match="no position in common"):
        compare(*(dataclasses.replace(ours, arrays=part, positions=at) for part, at in zip(rows, (range(3), range(3, 24)))))
    found = compare(ours, dataclasses.replace(ours, ids=(*IDS[:4], 9, *IDS[5:])))
    assert found.first.name == "ids" and found.diagnosis.text == (
        f"the prompts differ at token 4: {IDS[4]} and 9; give it the ids of the trace (2, {IDS[1]}, {IDS[2]}, {IDS[3]}, ...)")
    spelt = dataclasses.replace(ours, facts={"tokens": [f"t{i}" for i in IDS]})
    text = compare(spelt, dataclasses.replace(ours, ids=(*IDS[:4], IDS[2], *IDS[5:]))).diagnosis.text
    assert text.startswith(f"the prompts differ at token 4: {IDS[4]} 't{IDS[4]}' and {IDS[2]} 't{IDS[2]}'; give")
    assert compare(ours, dataclasses.replace(ours, ids=IDS[:9])).diagnosis.text.startswith("the prompts have 24 and 9 tokens")


# ---- the command

def test_the_command(made, right, tmp_path):
    model, ours = right["26B-A4B"]
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    write_trace(a, model, IDS)
    write_trace(b, refimpl.load(made["26B-A4B"][1]), IDS)
    with inject(BUGS["layer scalar left out"]):
        write_trace(c, model, IDS)
    same = CliRunner().invoke(app, ["compare", str(a), str(b)])
    assert same.exit_code == 0 and "the same within rounding" in same.stdout and "measured" in same.stdout, same.output
    wrong = CliRunner().invoke(app, ["compare", str(a), str(c), "--json", "--plot", str(tmp_path / "p.png")])
    said = json.loads(wrong.stdout)
    assert wrong.exit_code == 1 and said["first"]["name"] == "l_out-0" and said["kind"] == "constant factor" and not said["same"]
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG" and len(said["tensors"]) == len(ours.names())
    steps = CliRunner().invoke(app, ["compare", str(a), str(c), "--steps"])
    assert steps.exit_code == 1 and "departs first: l_out-0" in steps.stdout and "agree, 3 of " in steps.stdout, steps.stdout
    guessed = CliRunner().invoke(app, ["compare", str(a), str(c), "--guess", "--all"])
    assert guessed.exit_code == 1 and "tolerances guessed" in guessed.stdout and len(guessed.stdout.splitlines()) > len(ours.names())
    wrong_model = CliRunner().invoke(app, ["compare", str(a), str(b), "-m", str(made["E2B"][1])])
    assert wrong_model.exit_code == 3 and "is not the model of" in wrong_model.output and len(wrong_model.stderr.splitlines()) == 1
    no_engine = CliRunner().invoke(app, ["compare", str(a), "llama.cpp:" + str(made["26B-A4B"][1])])
    try:
        import llama_cpp  # noqa: F401
        assert no_engine.exit_code == 0, no_engine.output
    except ImportError:
        assert no_engine.exit_code == 3 and "llama_cpp is not installed" in no_engine.output


def test_the_heat_map(right):
    ours = right["26B-A4B"][1]
    bad = dict(ours.arrays) | {"l_out-3": ours.arrays["l_out-3"] * 2}
    found = compare(ours, dataclasses.replace(ours, arrays=bad))
    axes = heat_map.plot(found).axes[0]
    image = axes.images[0].get_array()
    row = [label.get_text() for label in axes.get_yticklabels()].index("layer 3")
    column = [label.get_text() for label in axes.get_xticklabels()].index("l_out")
    assert image[row, column] > 3 and np.nansum(image > 0) == 1 and "departs first at l_out-3" in axes.get_title()
    with pytest.raises(TraceError, match="the picture cannot be written"):
        heat_map.plot(found, "/nowhere/x.png")


def test_a_model_that_the_kernels_refuse_is_judged_by_the_reference(tmp_path):
    path = write_model(tmp_path / "m.gguf", random_model("12B", head_dim=24, global_head_dim=48))
    assert judge(path).backend.name == "reference" and math.isfinite(judge(path).logits([2, 5])[0, 0])


def test_the_command_says_what_is_wrong_with_its_arguments(right, tmp_path, monkeypatch):
    from cli import assert_one_line, run

    path = tmp_path / "right.safetensors"
    write_trace(path, right["26B-A4B"][0], IDS)
    np.savez(tmp_path / "theirs.npz", ids=np.arange(3))
    (tmp_path / "x.txt").write_text("hello")
    for line, status, words in (
            (("x.txt", path), 3, "the trace to judge by comes first"), (("theirs.npz", path), 3, "the trace to judge by comes first"),
            ((path, "nothing.log"), 3, "nothing.log"), ((path, "nothing"), 3, "nothing: no such file"),
            ((path, path, "--guess", "--steps"), 2, "choose one")):
        assert_one_line(run("compare", *line, cwd=tmp_path), status, words)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert_one_line(run("compare", path, path, "--guess", "--plot", tmp_path / "p.png"), 3, "pip install")
