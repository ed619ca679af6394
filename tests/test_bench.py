"""Measuring speed: what a token reads, counted by hand; turns, ratios and the same ids for both. llama.cpp is not run here."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from cli import assert_one_line, run
from shapes import opened, random_model, write_model

from refimpl.cli.show.bench import as_text
from refimpl.kernels.machine.isa import ORDER
from refimpl.lab.bench import bandwidth
from refimpl.lab.bench import bench as module
from refimpl.lab.bench.bandwidth import bytes_per_token, kv_read, read_bandwidth, sum_parts, weight_bytes
from refimpl.lab.bench.bench import ModelEngine, Plan, bench, compare, random_ids
from refimpl.model.cache import Cache

# Q4_0: 18 bytes for 32 weights. Matrices of the test models (width 64, 4 heads of 16 or 32), rows times bytes of a row:
QUERY, OUTPUT = 64 * 36, 64 * 36                    # sliding: 4 * 16 rows of 64 weights, and 64 rows of 4 * 16
FULL_QUERY, FULL_OUTPUT = 128 * 36, 64 * 72
EMBEDDING, EMBEDDING_ROW = 300 * 36, 36


# ---- what a token reads

def test_a_token_reads_the_share_of_the_experts_that_it_uses(moe):
    experts = (16 * 2 * 32 * 36 + 16 * 64 * 18) * 3 // 16       # 3 of 16: gate and up, 32 rows of 64 each; down, 64 rows of 32
    dense = 2 * 96 * 36 + 64 * 54
    router = 4 * 16 * 64
    sliding = QUERY + OUTPUT + 2 * 32 * 36 + dense + experts + router + 4 * (8 * 64 + 2 * 16 + 16)     # 8 norms or scales of 64
    full = FULL_QUERY + FULL_OUTPUT + 32 * 36 + dense + experts + router + 4 * (8 * 64 + 2 * 32 + 16)    # no values of its own
    assert weight_bytes(*moe) == 5 * sliding + full + EMBEDDING + EMBEDDING_ROW + 4 * 64


def test_a_token_reads_one_row_of_a_table_and_nothing_that_is_shared(ple):
    per_layer, norms = 32 * 36 + 64 * 18, 4 * 5 * 64
    own = QUERY + OUTPUT + 2 * 16 * 36 + 2 * 96 * 36 + 64 * 54 + per_layer + norms + 4 * 2 * 16
    own_full = FULL_QUERY + FULL_OUTPUT + 2 * 32 * 36 + 2 * 96 * 36 + 64 * 54 + per_layer + norms + 4 * 2 * 32
    shared = QUERY + OUTPUT + 2 * 192 * 36 + 64 * 108 + per_layer + norms + 4 * 16
    shared_full = FULL_QUERY + FULL_OUTPUT + 2 * 192 * 36 + 64 * 108 + per_layer + norms + 4 * 32
    table_row, projection = 320 // 32 * 18, 320 * 36
    total = EMBEDDING + EMBEDDING_ROW + 4 * 64 + table_row + projection + 4 * 32
    assert weight_bytes(*ple) == total + 4 * own + own_full + 4 * shared + shared_full


def test_an_untied_head_is_read_instead_of_the_embedding(tmp_path, moe):
    def with_head(tensors):
        return [*tensors, ("output.weight", *next(rest for name, *rest in tensors if name == "token_embd.weight"))]
    path = write_model(tmp_path / "untied.gguf", random_model("26B-A4B"), "Q4_0", change=with_head)
    assert weight_bytes(*opened(path)) == weight_bytes(*moe)


def test_keys_and_values_in_sight_are_read(moe, ple):
    _, config = moe
    assert kv_read(config, 0, 4) == 2 * 4 * (5 * 2 * 16 + 32)
    assert kv_read(config, 99, 2) == 2 * 2 * (5 * 2 * 16 * 7 + 32 * 100)         # the window is 7
    _, config = ple
    assert kv_read(config, 99, 2) == 2 * 2 * (8 * 16 * 7 + 2 * 32 * 100)         # 10 layers read them, though 5 make none


def test_the_mean_over_the_new_tokens_counts(moe):
    file, config = moe
    traffic = bytes_per_token(file, config, 3, 6, 4)
    assert traffic.kv == 8 * (5 * 2 * 16 * (4 + 5 + 6 + 7 + 7 + 7) + 32 * (4 + 5 + 6 + 7 + 8 + 9)) / 6
    assert traffic.total == traffic.kv + weight_bytes(file, config) and traffic.weights == weight_bytes(file, config)


# ---- bandwidth

def test_bandwidth_reads_every_byte_once():
    data = np.random.default_rng(0).integers(0, 100, 3 * 7 * bandwidth.STEP // 4).astype(np.float32)
    out = np.empty(3, np.float32)
    sum_parts(data, out)
    assert out.tolist() == data.reshape(3, -1).sum(axis=1).tolist()
    bandwidth.fill_parts(data, 3)
    assert (data == 1).all()


def test_bandwidth_gives_one_figure_a_pass(monkeypatch):
    """Bytes of the buffer over the seconds of one pass, by a clock that ticks."""
    ticks = itertools.count()
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: 2 * next(ticks))
    assert read_bandwidth(1, 1 << 20, 4) == [(1 << 20) / 2] * 4


# ---- taking turns

class Fake:
    """An engine that takes a second for every thing it is asked for, or as long as `pace` says."""

    kv_bytes = 2
    facts = {"version": "0", "n_threads": 1}

    def __init__(self, log: list, name: str, pace=(1.0,)):
        self.log, self.name, self.pace, self.runs = log, name, list(pace), 0

    def measure(self, context, ids, together):
        self.log.append((self.name, list(context), list(ids), together))
        self.runs += 1
        return self.pace[(self.runs - 2) % len(self.pace)]              # the first one is the warm-up


def test_engines_take_turns_with_the_same_ids_and_the_warm_up_does_not_count(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0)
    log, steps = [], []
    engines = {"A": Fake(log, "A", (1, 2, 3)), "B": Fake(log, "B", (2, 4, 12))}
    test = compare("decode", engines, [9, 9], [5, 6, 7, 8], False, 3, lambda what, total: module.contextlib.nullcontext(steps.append))
    assert [entry[0] for entry in log] == ["A", "B"] * 4 and len(steps) == 8
    assert [entry[1:] for entry in log[:2]] == [([], [5, 6], False)] * 2                # the warm-up
    assert all(entry[1:] == ([9, 9], [5, 6, 7, 8], False) for entry in log[2:])
    assert test["engines"]["A"]["seconds"] == [1, 2, 3] and test["engines"]["B"]["seconds"] == [2, 4, 12]
    assert test["engines"]["A"]["tokens_per_second"] == {"median": 2, "min": 4 / 3, "max": 4}
    assert test["engines"]["A"]["ms_per_token"] == 500
    assert test["ratio"] == {"of_medians": 2, "min": 2, "max": 4, "pairs": [2, 2, 4]}    # above 1: the first is faster


def test_a_single_engine_has_no_ratio():
    assert "ratio" not in compare("prompt", {"A": Fake([], "A")}, [], [1, 2], True, 1)


class Recorder:
    """A model that remembers what it was asked, and a clock that only it moves."""

    def __init__(self, moe, monkeypatch):
        self.config, self.calls, self.now = moe[1], [], 0.0
        self.backend = SimpleNamespace(kv_type=np.dtype(np.float32))
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def new_cache(self, n_ctx):
        self.calls.append(("cache", n_ctx))
        return Cache(self.config, n_ctx, 8, np.float32)

    def prefill(self, ids, cache):
        self.calls.append(("prefill", list(ids)))
        self.now += len(ids)
        return np.zeros((len(ids), 4), np.float32)

    def head(self, state_TD):
        self.calls.append(("head", len(state_TD)))
        self.now += 100


def test_ours_runs_the_context_untimed_and_the_head_once_a_call(moe, monkeypatch):
    model = Recorder(moe, monkeypatch)
    ours = ModelEngine(model, 50)
    assert ours.kv_bytes == 4
    model.calls.clear()
    assert ours.measure([], [1, 2, 3], True) == 103
    assert model.calls == [("cache", 50), ("prefill", [1, 2, 3]), ("head", 1)]
    model.calls.clear()
    assert ours.measure([7, 8], [1, 2], False) == 202
    assert model.calls == [("cache", 50), ("prefill", [7, 8]), ("prefill", [1]), ("head", 1), ("prefill", [2]), ("head", 1)]


def test_ids_are_ordinary_pieces_and_the_same_for_the_same_seed(moe):
    file, config = moe
    model = type("Model", (), {"file": file})()
    types = file.metadata["tokenizer.ggml.token_type"]
    prompt, context, new = random_ids(model, Plan(40, 30, 20))
    assert (len(prompt), len(context), len(new)) == (40, 20, 30) and {int(types[i]) for i in prompt + context + new} == {1}
    assert (prompt, context, new) == random_ids(model, Plan(40, 30, 20)) != random_ids(model, Plan(40, 30, 20, seed=1))
    assert Plan(40, 30, 20).n_ctx == 50 and Plan(60, 30, 20).n_ctx == 60


# ---- all together

@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(module, "PAUSE", 0)


def test_a_comparison_reports_every_figure(quick, monkeypatch):
    log = []

    class Opponent(Fake):
        def __init__(self, path, n_ctx, n_threads):
            super().__init__(log, f"{path.name} {n_ctx} {n_threads}", (0.5,))

        @staticmethod
        def check():
            log.append("checked")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            log.append("closed")

    monkeypatch.setattr(module, "OPPONENTS", {"llama.cpp": Opponent})
    result = json.loads(json.dumps(bench(None, Plan(8, 4, 3, 2), backend="reference", opponent="llama.cpp")))
    assert log[0] == "checked" and log[-1] == "closed" and len(log) == 2 + 2 * 3 and log[1][0] == "model.gguf 8 1"
    prompt, decode = result["tests"]
    assert (prompt["tokens"], prompt["depth"], decode["tokens"], decode["depth"]) == (8, 0, 4, 3)
    assert prompt["engines"]["llama.cpp"]["tokens_per_second"]["median"] == 16 and len(prompt["ratio"]["pairs"]) == 2
    ours, theirs = decode["engines"]["refimpl"], decode["engines"]["llama.cpp"]
    assert ours["bytes_per_token"]["weights"] == theirs["bytes_per_token"]["weights"] > 0
    assert ours["bytes_per_token"]["kv"] == 2 * theirs["bytes_per_token"]["kv"] > 0         # float32 against float16
    best = result["bandwidth"]["bytes_per_second"]
    assert len(result["bandwidth"]["passes"]) == 20 and best == max(result["bandwidth"]["passes"])
    assert theirs["share_of_bandwidth"] == pytest.approx(8 * theirs["bytes_per_token"]["total"] / best)
    assert theirs["tokens_per_second_at_most"] == pytest.approx(best / theirs["bytes_per_token"]["total"])
    here = result["machine"]
    assert here["cpu"] and here["isa"] in ORDER and here["threads"] == 1 and here["threading_layer"]
    assert set(here["versions"]) == {"python", "refimpl", "numpy", "numba", "llvmlite"}
    text = as_text(result)
    for words in ("prompt 8", "decode 4 after 3", "16.00", "ratio", "of bandwidth", "llama.cpp", here["cpu"], " %"):
        assert words in text
    assert text.replace("─", "").isascii()


def test_a_second_engine_that_does_not_fit_is_refused(quick, monkeypatch):
    monkeypatch.setattr(module, "available", lambda: 1 << 20)
    monkeypatch.setattr(module, "OPPONENTS", {"llama.cpp": type("Here", (), {"check": staticmethod(lambda: None)})})
    with pytest.raises(ValueError, match="llama.cpp beside refimpl needs another 0.01 GB"):
        bench(None, Plan(8, 0), backend="reference", opponent="llama.cpp")


def test_one_test_alone(quick):
    only = bench(None, Plan(0, 3, 0, 1), backend="reference")
    assert [test["test"] for test in only["tests"]] == ["decode"] and only["opponent"] is None
    only = bench(None, Plan(5, 0, 0, 1), backend="reference")
    assert [test["test"] for test in only["tests"]] == ["prompt"] and "share_of_bandwidth" not in only["tests"][0]["engines"]["refimpl"]
    with pytest.raises(ValueError, match="nothing to measure"):
        bench(None, Plan(0, 0))


def test_on_the_command_line(quick):
    code, out, err = run("bench", "-p", 8, "-n", 3, "-r", 2, "-d", 2, "--backend", "reference", "--json")
    result = json.loads(out)
    assert code == 0 and err == "" and result["plan"]["depth"] == 2 and result["plan"]["backend"] == "reference"
    assert [len(test["engines"]["refimpl"]["seconds"]) for test in result["tests"]] == [2, 2]
    code, out, err = run("bench", "-p", 8, "-n", 0, "-r", 1, "--backend", "reference")
    assert code == 0 and "prompt 8" in out and "decode" not in out
    assert_one_line(run("bench", "--vs", "vllm"), 2, "llama.cpp")
    assert_one_line(run("bench", "-p", 0, "-n", 0), 2, "nothing to measure")
    assert_one_line(run("bench", "-m", "missing.gguf"), 1, "missing.gguf")
