"""llama.cpp's process: requests, answers, errors and aborts, each in one line.

Most tests do NOT run llama.cpp: a few lines of Python play the child (ANSWERS, LOGITS), as llama-cpp-python takes minutes to build and is
no dependency of the tests. The last ones, marked exhaustive, run the real one where it is installed.
"""

import importlib.util
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import refimpl
from refimpl.cli import app
from refimpl.extras import MissingExtra
from refimpl.lab.bench.bench import Plan, bench
from refimpl.lab.compare.compare import compare_with
from refimpl.lab.compare.engines import choose, llamacpp_live
from refimpl.lab.compare.record import trace, write_trace
from refimpl.lab.compare.tolerance import judge
from refimpl.lab.engines import EVALUATED, TIMED, TRACED, known, parse
from refimpl.lab.llamacpp import client, process
from refimpl.lab.llamacpp.client import LlamaCpp, LlamaCppError
from refimpl.lab.llamacpp.process import serve
from refimpl.loading.model import BUILT_IN

INSTALLED = importlib.util.find_spec("llama_cpp") is not None
real = pytest.mark.skipif(not INSTALLED, reason="llama.cpp is not installed (pip install llama-cpp-python==0.3.36)")

ANSWERS = """
import json, os, signal, sys
print(json.dumps({"version": "1.2", "arguments": sys.argv[1:]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    assert request["ask"] == "time"
    if request["ids"] == [15]:
        sys.stderr.write("the cause\\nand what follows\\n"); sys.stderr.flush()
        print(json.dumps({"error": "no luck"}), flush=True)
        continue
    sys.stderr.write("loading\\n"); sys.stderr.flush()
    if request["ids"] == [13]:
        sys.stderr.write("GGML_ASSERT(id != 13) failed\\n"); sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGABRT)
    if request["ids"] == [14]:
        sys.exit(3)
    print(json.dumps({"seconds": len(request["context"]) + len(request["ids"]) / 10 + request["together"]}), flush=True)
"""


def child(code: str = ANSWERS, path="some model.gguf", **options) -> LlamaCpp:
    return LlamaCpp(path, 512, 2, command=[sys.executable, "-c", code], **options)


# ---- the client

def test_a_process_is_asked_and_answers():
    with child() as engine:
        assert engine.facts["version"] == "1.2"
        path, *rest = engine.facts["arguments"]
        assert path.startswith("/") and path.endswith("some model.gguf") and rest == ["512", "2", "2048", "512"]
        assert engine.measure([1, 2], [3], False) == 2.1 and engine.measure([], [3, 4], True) == 1.2
        started = engine._process
    assert started.poll() is not None                       # nothing is left running
    with child(batch=64) as engine:
        assert engine.facts["arguments"][1:] == ["512", "2", "64", "64"]


def test_an_abort_is_one_line_with_its_last_words():
    with child() as engine:
        engine.measure([], [1], True)
        with pytest.raises(LlamaCppError, match=r"^llama.cpp stopped \(SIGABRT\): GGML_ASSERT\(id != 13\) failed$"):
            engine.measure([], [13], True)
        with pytest.raises(LlamaCppError, match="stopped"):            # and it stays so
            engine.measure([], [1], True)
    with child() as engine, pytest.raises(LlamaCppError, match=r"^llama.cpp stopped \(status 3\): loading$"):
        engine.measure([], [14], True)


def test_an_error_is_one_line_with_its_cause_and_not_the_end():
    with child() as engine:
        engine.measure([], [1], True)
        with pytest.raises(LlamaCppError, match="^llama.cpp: no luck: the cause$"):
            engine.measure([], [15], True)
        assert engine.measure([], [1], True) == 1.1
    with pytest.raises(LlamaCppError, match=r"^llama.cpp stopped \(status 0\): it did not say why$"):
        child("pass")


def test_a_model_that_is_refused_leaves_no_process(monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(start(*args, **options)) or started[-1])
    with pytest.raises(LlamaCppError, match="^llama.cpp: no such model$"):
        child("import time; print('{\"error\": \"no such model\"}', flush=True); time.sleep(100)")
    assert started[0].poll() is not None


LOGITS = '''
import json, sys
import numpy as np
print(json.dumps({"n_threads": 1}), flush=True)
seen = []
for line in sys.stdin:
    request = json.loads(line)
    assert request["ask"] == "logits" and len(request["ids"]) <= 5
    seen[request["start"]:] = request["ids"]
    if request["file"]:
        rows = range(request["start"], request["start"] + len(request["ids"]))
        np.array([[100 * row + v + sum(seen[:row + 1]) for v in range(3)] for row in rows], np.float32).tofile(request["file"])
    print(json.dumps({"rows": len(request["ids"])}), flush=True)
'''


def test_rows_of_logits_come_in_order():
    ids = [7, 1, 8, 2, 9, 3, 6, 5, 4, 1, 1, 2, 3]
    with child(LOGITS, batch=5) as engine:
        for first in (0, 1, 4, 5, 6, 12, 0):
            rows = list(engine.rows(ids, first))
            assert [len(part) for part in rows] == [5] * ((13 - first) // 5) + [(13 - first) % 5] * ((13 - first) % 5 > 0)
            want = [[100 * row + v + sum(ids[:row + 1]) for v in range(3)] for row in range(first, 13)]
            assert np.concatenate(rows).tolist() == want


TENSORS = '''
import json, sys
import numpy as np
print(json.dumps({"version": "1"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    with open(request["file"], "wb") as out:
        np.savez(out, **{f"{name}-0": np.full((2, 3), len(request["ids"]), np.float32) for name in request["names"]})
    print(json.dumps({"tensors": len(request["names"])}), flush=True)
'''


def test_a_trace_comes_back_by_name():
    with child(TENSORS) as engine:
        found = engine.trace(np.array([5, 6, 7]), ["Qcur", "l_out"])
    assert sorted(found) == ["Qcur-0", "l_out-0"] and found["l_out-0"].tolist() == [[3, 3, 3]] * 2


def test_a_missing_llamacpp_is_named_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtra, match="^llama_cpp is not installed; pip install llama"):
        bench(tmp_path / "missing.gguf", Plan(), opponent="llama.cpp")
    with pytest.raises(MissingExtra, match="^llama_cpp is not installed"):
        choose.open_any(f"llama.cpp:{tmp_path / 'missing.gguf'}", [2, 3])


# ---- the child

def test_the_child_answers_line_by_line_and_survives_errors():
    class Engine:
        facts = {"version": "0"}

        def answer(self, ask, ids, start=0):
            if not ids:
                raise RuntimeError("two\nlines")
            return {ask: sum(ids) + start}

    replies = []
    serve(Engine(), io.StringIO('{"ask": "time", "ids": [5, 6], "start": 2}\n{"ask": "time", "ids": []}\nnonsense\n'
                                '{"ask": "logits", "ids": [2]}\n'), replies.append)
    assert replies[:3] == [{"version": "0"}, {"time": 13}, {"error": "two lines"}] and "error" in replies[3]
    assert replies[4] == {"logits": 2}


def test_the_real_child_starts_and_says_why_it_cannot_load(tmp_path):
    """Without llama-cpp-python that is the reason, with it the file is."""
    with pytest.raises(LlamaCppError, match="the model could not be loaded" if INSTALLED else "^llama.cpp: No module named 'llama_cpp'$"):
        LlamaCpp(tmp_path / "missing.gguf", 32, 1)


def test_a_tensor_of_llama_cpp_is_read_by_its_strides():
    memory = np.arange(24, dtype=np.int32).reshape(4, 6)
    tensor = process.Tensor(type=26, ne=(3, 4, 1, 1), nb=(4, 24, 96, 96), data=memory.ctypes.data, name=b"ffn_moe_topk-3")
    assert np.array_equal(process.array_of(tensor), memory[:, :3]), "a view of the first three of six"
    assert process.Tensor.data.offset == 248 and process.Tensor.name.offset == 256          # ggml.h, on 64 bits


def test_its_tensors_in_our_terms(moe):
    """Its own weights of experts, the renormalised ones times the experts' scales; tensors of sizes that are no positions are left out."""
    ids = np.array([[3, 1, 0], [2, 5, 4]], np.int32)
    found = {"ffn_moe_weights-0": np.ones((2, 3, 1)), "ffn_moe_weights_norm-0": np.full((2, 3), 0.25, np.float32), "ffn_moe_topk-0": ids,
             "h_nextn": np.ones((2, 4)), "norm-0": np.ones((2, 4)), "Qcur_pos-0": np.arange(16.0).reshape(2, 2, 4),
             "l_out-0": np.ones((3, 5))}
    ours = llamacpp_live.in_our_terms(found, 2, moe[0])
    scale = moe[0].raw("blk.0.ffn_down_exps.scale").view("<f4").ravel()
    assert set(ours) == {"ffn_moe_weights-0", "ffn_moe_topk-0", "Qcur_pos-0"} and len(set(scale)) > 8
    assert np.array_equal(ours["ffn_moe_weights-0"], 0.25 * scale[ids]) and np.array_equal(ours["Qcur_pos-0"][1], np.arange(8, 16))


# ---- names of engines

def test_engines_are_named_in_one_way(tmp_path, monkeypatch):
    assert parse("kernels:exact", EVALUATED) == ("kernels", "exact") and parse("reference", EVALUATED) == ("reference", "")
    assert parse("llama.cpp:a:b.gguf", TRACED) == ("llama.cpp", "a:b.gguf")
    assert parse("kernels", TRACED) == (None, "kernels") and parse("./x:y.npz", TRACED) == (None, "./x:y.npz")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^unknown engine 'vllm'; choose from transformers, llama.cpp$"):
        parse("vllm:model", TRACED)
    (tmp_path / "vllm:model").touch()
    assert parse("vllm:model", TRACED) == (None, "vllm:model"), "a file of that name"
    with pytest.raises(ValueError, match="^unknown engine 'vllm'; choose from llama.cpp$"):
        known("vllm", TIMED)


# ---- the real one

@real
@pytest.mark.exhaustive
def test_llama_cpp_times_scores_and_traces_the_built_in_model():
    """One process, its three requests; its logits and every tensor of its graph agree with ours."""
    model = judge(None)
    ids = model.tokenizer.encode("def main(self):\n    for line in self.lines:\n")
    with LlamaCpp(BUILT_IN, 64, 1, batch=8) as engine:
        assert engine.facts["version"] == "0.3.36" and engine.facts["n_batch"] == 8
        whole = np.concatenate(list(engine.rows(ids, 0)))
        assert engine.measure(ids[:4], ids[4:], True) > 0 and engine.measure([], ids[:3], False) > 0
        assert np.array_equal(np.concatenate(list(engine.rows(ids, 5))), whole[5:]), "timing left something in the cache"
        with pytest.raises(LlamaCppError, match="^llama.cpp: "):
            engine.measure([], [10**6], True)
        assert len(engine.trace(ids, ["l_out"])) == model.config.n_layer
    assert whole.shape == (len(ids), model.config.n_vocab)
    assert (whole.argmax(axis=1) == model.logits(ids).argmax(axis=1)).mean() > 0.8
    found = compare_with(model, trace(model, ids), llamacpp_live.trace(BUILT_IN, ids))
    assert found.first is None and len(found.judged) > 100, (found.first, found.tie)


@real
@pytest.mark.exhaustive
def test_the_commands_run_llama_cpp(tmp_path):
    write_trace(tmp_path / "a.safetensors", refimpl.load(), refimpl.load().tokenizer.encode("import os\n"))
    (tmp_path / "text.py").write_text("import os\n\n\ndef walk(top):\n    return sorted(os.listdir(top))\n" * 4)
    for arguments in (["compare", str(tmp_path / "a.safetensors"), f"llama.cpp:{BUILT_IN}"],
                      ["bench", "-p", "16", "-n", "4", "-r", "2", "-t", "1", "--vs", "llama.cpp", "--json"],
                      ["eval", "-f", str(tmp_path / "text.py"), "--against", "llama.cpp", "--json"]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        if arguments[0] == "bench":
            assert set(json.loads(done.stdout)["tests"][0]["engines"]) == {"refimpl", "llama.cpp"}
        if arguments[0] == "eval":
            found = json.loads(done.stdout)["comparison"]
            assert found["same_top"] > 0.95 and 0 < found["kl_low"] < 0.01 and math.isfinite(found["base_perplexity"])


def test_paths_of_the_child_reach_the_package():
    assert (Path(client.PACKAGE) / "refimpl" / "lab" / "llamacpp" / "process.py").exists()
