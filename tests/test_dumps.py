"""Dumps of other engines: the convention is written and read, what is wrong with one is said with its remedy, the exporters write it."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from cli import ROOT, assert_one_line, run
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import prompt, random_model, reference, write_model

from refimpl.lab.compare.compare import compare, compare_with
from refimpl.lab.compare.engines.check import check, nearest
from refimpl.lab.compare.engines.choose import open_any
from refimpl.lab.compare.engines.convention import OPTIONAL, TEXT
from refimpl.lab.compare.engines.foreign import write_npz
from refimpl.lab.compare.exporters import pytorch
from refimpl.lab.compare.names import NAMES
from refimpl.lab.compare.record import trace, write_trace

IDS = prompt(9)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(transformers' model, ours, our trace, its file)."""
    folder = tmp_path_factory.mktemp("dumps")
    hf = random_model("26B-A4B", seed=4)
    model = reference(write_model(folder / "m.gguf", hf))
    write_trace(folder / "right.safetensors", model, IDS, prompt="text")
    return hf, model, trace(model, IDS), folder / "right.safetensors"


def saved(path, ours, **changes):
    """A dump of a few tensors, changed; None leaves one out."""
    arrays = {name: ours.arrays[name] for name in ("inp_scaled", "attn_norm-0", "Qcur-1", "l_out-0", "l_out-1", "l_out-2", "result_output")}
    arrays = {"ids": np.array(IDS), "arithmetic": "float32"} | arrays | {name.replace("__", "-"): x for name, x in changes.items()}
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return str(path)


# ---- the convention

def test_a_trace_is_written_as_another_engine_would(made, tmp_path):
    _, _, ours, path = made
    example = tmp_path / "x.npz"
    write_npz(example, ours)
    with np.load(example, allow_pickle=False) as file:
        assert {"ids", "arithmetic", "positions", *ours.names()} == set(file.files) and str(file["arithmetic"]) == "exact"
        assert all(np.array_equal(file[name], ours.arrays[name]) for name in ours.names())
    found = check(str(example))
    assert found.ok and not found.notes and compare(ours, open_any(str(example)), {}).verdict == "same"


@pytest.mark.parametrize("change, words", [
    ({"ids": None, "input_ids": np.arange(9)}, "ids is missing: the token ids of the prompt, int (T,); is it input_ids?"),
    ({"ids": np.arange(9.0)}, "ids is float64, expected int: np.array(ids, np.int64)"),
    ({"ids": np.array([IDS])}, "ids has the shape (1, 9), expected (T,), without a batch axis"),
    ({"arithmetic": None}, "arithmetic is missing: expected one of exact, float32"),
    ({"arithmetic": "bf16"}, "arithmetic is 'bf16': expected one of exact, float32, bfloat16, float16, q8; did you mean bfloat16?"),
    ({"arithmetic": np.bytes_(b"bfloat")}, "did you mean bfloat16?"),
    ({"l_out__0": np.ones((64, 9), np.float32)}, "l_out-0 has the shape (64, 9), 64 rows, expected 9: the axes are in another order"),
    ({"l_out__0": np.ones((4, 64), np.float32)}, "4 rows, expected 9; positions says which they are, if not all"),
    ({"l_out__0": np.ones((9, 32), np.float32)}, "l_out-0 is 32 wide, others of the residual stream are 64"),
    ({"l_out__0": np.ones((9, 64), "V2")}, "l_out-0 is |V2, expected numbers; save bfloat16 as float32"),
    ({"l_out__0": np.array("x")}, "l_out-0 is <U1, expected numbers"), ({"l_out__0": np.float32(1)}, "expected a row for each position"),
    ({"blk.3.l_out": np.ones((9, 64))}, "blk.3.l_out: no known name; did you mean l_out-3?"),
    ({"positions": np.array([1, 0, 2, 3, 4, 5, 6, 7, 8])}, "expected 'positions' to be int (R,), rising"),
    ({"sampled": 3}, "'sampled' needs the 'temperature' beside it"),
    ({"sampled": 3.5, "temperature": 0.0}, "'sampled' to be one number, int"),
])
def test_what_is_wrong_is_said(made, tmp_path, change, words):
    found = check(saved(tmp_path / "x.npz", made[2], **change))
    assert not found.ok and any(words in line for line in found.wrong), found.wrong
    assert len(found.wrong) <= 2 and check(saved(tmp_path / "y.npz", made[2])).ok


def test_what_may_be_meant_so_is_a_note(made, tmp_path):
    bad = made[2].arrays["attn_norm-0"].copy()
    bad[3] = np.nan
    found = check(saved(tmp_path / "x.npz", made[2], l_out__1=None, attn_norm__0=bad, zzz=np.ones(3), l_out__3=made[2].arrays["l_out-3"]))
    assert found.ok and len(found.notes) == 3
    assert {"zzz: no known name, it is not compared", "l_out is not there of layer 1, others are",
            "attn_norm-0 has values that are NaN or infinite"} == set(found.notes)


def test_a_dump_is_checked_for_the_trace_that_judges_it(made, tmp_path):
    wrong = check(saved(tmp_path / "x.npz", made[2], Qcur__1=np.ones((9, 8)), ids=np.array([*IDS[:-1], 7])), made[2]).wrong
    assert len(wrong) == 2 and "differ at token 8" in wrong[0] and wrong[1].startswith("Qcur-1 is (8,) at each position, the trace has ")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(NAMES), st.integers(0, 40), st.integers(0, 6), st.booleans())
def test_a_known_name_spelled_otherwise_is_recognised(name, layer, style, upper):
    spelled = name.name.upper() if upper else name.name
    if not name.layered:
        assert nearest(spelled) == name.name
        return
    written = (f"{spelled}.{layer}", f"{spelled}_{layer}", f"layers.{layer}.{spelled}", f"blk.{layer}.{spelled}", f"{layer}.{spelled}",
               f"model.layers.{layer}.{spelled}", f"layer_{layer}.{spelled}")[style]
    assert nearest(written) == f"{name.name}-{layer}"


# ---- the command

def test_the_command_checks_and_tells_remedies(made, tmp_path):
    right, ours = made[3], made[2]
    good, bad = saved(tmp_path / "good.npz", ours), saved(tmp_path / "bad.npz", ours, ids=None)
    status, out, _ = run("compare", "--check", good)
    assert status == 0 and "7 tensors of known names, of 3 layers; 9 token ids, 9 positions" in out and "it can be compared" in out
    assert run("compare", right, "--check", good)[0] == 0
    status, out, _ = run("compare", "--check", bad, "--json")
    assert status == 3 and not json.loads(out)["ok"] and json.loads(out)["wrong"][0].startswith("ids is missing")
    assert_one_line(run("compare", good, right), 3, f"the trace to judge by comes first, refimpl compare {right} {good}")
    assert_one_line(run("compare", "missing.safetensors", right), 3, "missing.safetensors: no such file")
    assert_one_line(run("compare", right, tmp_path / "no.npz"), 3, "no.npz: No such file")
    for name, words in (("x.safetensors", "by its contents this is npz: name it so, x.npz"), ("x.dat", "name it so, x.npz; expected")):
        shutil.copy(good, tmp_path / name)
        assert_one_line(run("compare", right, tmp_path / name), 3, words)
    np.save(tmp_path / "one.npy", np.ones(3))
    assert_one_line(run("compare", right, tmp_path / "one.npy"), 3, "is a single array: numpy.savez")
    assert_one_line(run("compare", right, made[1].file.path), 3, "is a model, no values: refimpl trace -m")
    assert_one_line(run("compare", right), 2, "give two")
    assert_one_line(run("compare", right, good, "--check", good), 2, "--check takes TRACE")
    assert_one_line(run("compare", "--exporter", "jax"), 2, "expected pytorch, cpp, mlx")
    np.savez(tmp_path / "objects.npz", ids=np.array([{}]))
    assert_one_line(run("compare", "--check", tmp_path / "objects.npz"), 3, "holds Python objects")


def test_the_convention_is_in_the_help_and_on_its_page():
    assert TEXT in (ROOT / "refimpl/lab/compare/README.md").read_text()
    said = " ".join(run("compare", "--help")[1].split())
    assert all(f" {key}" in said for key in ("ids", "arithmetic", "positions", *OPTIONAL)) and "refimpl trace --npz FILE.npz" in said


def test_trace_writes_the_example(made, tmp_path):
    model = made[1].file.path
    call = ("trace", "-m", model, "--ids", "2,5,7", "--backend", "reference", "--tensors", "l_out-*", "--positions", "1:3")
    status, out, err = run(*call, "--npz", tmp_path / "x.npz")
    assert status == 0 and out.startswith(f"{tmp_path}/x.npz: 6 tensors") and [path.name for path in tmp_path.iterdir()] == ["x.npz"], err
    found = open_any(str(tmp_path / "x.npz"))
    assert found.positions == (1, 2) and found.arithmetic == "exact" and found.value("l_out-3").array.shape == (2, 64)
    assert len(found.facts["model_sha256"]) == 64
    status, out, _ = run(*call, "--npz", tmp_path / "y.npz", "-o", tmp_path / "y.safetensors", "--json")
    assert json.loads(out)["npz"] == str(tmp_path / "y.npz")
    assert run("compare", tmp_path / "y.safetensors", tmp_path / "y.npz", "--guess")[0] == 0
    for arguments, words in ((("--npz", "x.dat"), "use a name ending in .npz"), (("-o", "x.npz"), "or --npz x.npz"),
                             (("--npz", "z.npz", "--chat"), "--chat takes a text")):
        assert_one_line(run(*call, *arguments), 2, words)


# ---- exporters

def test_pytorch(made, tmp_path):
    hf, model, ours, _ = made
    with pytorch.Dump(hf) as dump:
        logits = hf(torch.tensor([IDS]), use_cache=False).logits
    dump.save(tmp_path / "x.npz", IDS, "float32", result_output=logits)
    found = compare_with(model, ours, open_any(str(tmp_path / "x.npz")))
    assert found.verdict == "same" and not found.unknown and check(str(tmp_path / "x.npz")).ok
    assert len(found.judged) > 90 and {"inp_scaled", "kqv_out-3", "ffn_moe_out-5", "result_norm", "result_output"} <= {
        j.name for j in found.judged}
    assert not dump.model._forward_hooks and not any(module._forward_hooks for module in hf.modules())


@pytest.fixture
def compiler():
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def test_cpp(made, tmp_path, compiler):
    """Compiled without warnings; what it writes is what NumPy, zip and compare read."""
    ours = made[2]
    (tmp_path / "refimpl_npz.hpp").write_text(run("compare", "--exporter", "cpp")[1])
    (tmp_path / "x.cpp").write_text("""
        #include "refimpl_npz.hpp"
        int main(int, char **argv) {
            std::vector<float> values(9 * 64);
            std::vector<std::int32_t> ids(9);
            std::FILE *file = std::fopen(argv[1], "rb");
            if (!file || std::fread(ids.data(), 4, 9, file) != 9 || std::fread(values.data(), 4, 9 * 64, file) != 9 * 64) return 1;
            std::fclose(file);
            refimpl::Npz out(argv[2]);
            out.add("ids", {9}, ids.data());
            out.add("arithmetic", "float32");
            out.add("prompt", "\\"quoted\\" \\xc3\\xa9");
            out.add("temperature", 0.5);
            out.add("l_out-0", {9, 64}, values.data());
            out.add("l_out-3", {1, 9, 64}, values.data());
            out.close();
            refimpl::Npz dropped(std::string(argv[2]) + ".dropped");
            try { refimpl::Npz nowhere("/nowhere/x.npz"); } catch (const std::runtime_error &) { return 0; }
            return 1;
        }""")
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "x.cpp", "-o", "x"]
    subprocess.run([compiler, *options], cwd=tmp_path, check=True, timeout=120)
    (tmp_path / "in.bin").write_bytes(np.array(IDS, "<i4").tobytes() + ours.arrays["l_out-0"].astype("<f4").tobytes())
    subprocess.run([tmp_path / "x", tmp_path / "in.bin", tmp_path / "x.npz"], check=True, timeout=60)
    assert zipfile.ZipFile(tmp_path / "x.npz").testzip() is None and not list(tmp_path.glob("*.part"))
    dump = open_any(str(tmp_path / "x.npz"))
    assert dump.ids == tuple(IDS) and dump.arithmetic == "float32" and dump.facts == {"prompt": '"quoted" \xe9', "temperature": 0.5}
    found = compare(ours, dump)
    assert found.first.name == "l_out-3" and [j.name for j in found.judged] == ["l_out-0", "l_out-3"]


class Array:
    """Stands in for an array of MLX, which does not run here: it has a type of its own, and NumPy takes it only as float32."""

    def __init__(self, x, dtype="bfloat16"):
        self.x, self.dtype = np.asarray(x), dtype

    def astype(self, dtype):
        return Array(self.x, dtype)

    def __array__(self, dtype=None, copy=None):
        assert self.dtype == "float32", "NumPy has no bfloat16"
        return np.array(self.x, np.float32)


class Module:
    """Stands in for a module of MLX: named_modules() lists it and those in it, in lists too."""

    def named_modules(self):
        found = [("", self)]
        for key, value in vars(self).items():
            for name, part in [(f"{key}.{i}", x) for i, x in enumerate(value)] if isinstance(value, list) else [(key, value)]:
                found += [(f"{name}.{path}".rstrip("."), x) for path, x in part.named_modules()] if isinstance(part, Module) else []
        return found


class Linear(Module):
    def __init__(self, n):
        self.w = np.random.default_rng(n).standard_normal((8, 8))

    def __call__(self, x):
        return Array(x.x @ self.w)


class Attention(Module):
    def __init__(self, n):
        self.q_proj, self.o_proj = Linear(n), Linear(n + 1)

    def __call__(self, x, mask=None):
        return self.o_proj(self.q_proj(x))


class Layer(Module):
    def __init__(self, n):
        self.self_attn = Attention(n)

    def __call__(self, x, mask=None):
        return Array(x.x + self.self_attn(x, mask=mask).x), None


class Body(Module):
    def __init__(self):
        self.layers, self.norm = [Layer(0), Layer(5)], Linear(9)

    def __call__(self, x):
        for layer in self.layers:
            x, _ = layer(x)
        return self.norm(x)


class Whole(Module):
    def __init__(self):
        self.model = Body()

    def __call__(self, x):
        return self.model(x)


def test_mlx_with_a_stand_in(tmp_path, monkeypatch):
    core = types.ModuleType("mlx.core")
    core.float32 = "float32"
    monkeypatch.setitem(sys.modules, "mlx", types.ModuleType("mlx"))
    monkeypatch.setitem(sys.modules, "mlx.core", core)
    exporter = importlib.import_module("refimpl.lab.compare.exporters.mlx")
    model, x, before = Whole(), np.random.default_rng(1).standard_normal((1, 3, 8)), Linear.__call__
    with exporter.Dump(model) as dump:
        logits = model(Array(x))
    dump.save(tmp_path / "x.npz", [2, 5, 7], "bfloat16", result_output=logits)
    found = open_any(str(tmp_path / "x.npz"))
    assert Linear.__call__ is before and sorted(found.names()) == [
        "Qcur-0", "Qcur-1", "kqv_out-0", "kqv_out-1", "l_out-0", "l_out-1", "result_norm", "result_output"]
    attention = model.model.layers[0].self_attn
    query = x[0] @ attention.q_proj.w
    assert np.allclose(found.arrays["Qcur-0"], query, atol=1e-5) and np.array_equal(found.arrays["Qcur-0"], found.arrays["kqv_out-0"])
    assert np.allclose(found.arrays["l_out-0"], x[0] + query @ attention.o_proj.w, atol=1e-4)


@pytest.mark.parametrize("name", ["pytorch", "cpp", "mlx"])
def test_exporters_are_printed_and_use_known_names(name):
    code = run("compare", "--exporter", name)[1]
    known = {known.name for known in NAMES}
    used = re.findall(r'": "(\w+)"', code) + [label.rpartition("-")[0] for label in re.findall(r'add\("(\w+-\d)"', code)]
    assert used and set(used) <= known, set(used) - known
