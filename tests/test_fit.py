"""Predicting speed and memory: work counted by hand, the formula with made-up machines, what fits, and the command."""

import functools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli import assert_one_line, run
from hypothesis import given
from hypothesis import strategies as st

import refimpl
from refimpl.files.outline import model_outline
from refimpl.files.synth import SHAPES
from refimpl.formats.matrix import stored_bytes
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.lab.bench import fit as module
from refimpl.lab.bench import fit_check, speed
from refimpl.lab.bench.bandwidth import weight_bytes
from refimpl.lab.bench.disk import Room, read_speed
from refimpl.lab.bench.fit import FROM_DISK, NO, YES, best_of, fits, missing_bytes
from refimpl.lab.bench.predict import Memory, call_seconds, draft_work, memory_of, outlined, prompt_seconds, step_seconds, visible
from refimpl.lab.bench.speed import Heads, Line, Rest, Speed, heads_of, mean_of, measure_rest, measure_speed
from refimpl.loading.memory import longest_context
from refimpl.model.backend import kernel_backend, reference_backend
from refimpl.model.cache import cache_bytes
from refimpl.model.drafter import drafter_weights_from_gguf
from refimpl.model.drafter_config import drafter_config_from_gguf

GB, HALF = 10**9, np.dtype(np.float16)
NO_REST, NO_TIME = Rest(Line(0, 0), 0), {rows: 0.0 for rows in speed.ROWS}


def no_attention(config):
    return {heads: {1: Line(0, 0)} for heads in heads_of(config)}


# ---- what a call meets

def test_weights_are_counted_by_what_meets_them(moe, ple):
    work = outlined(moe[0]).work
    attention = 5 * (64 * 64 * 2 + 2 * 32 * 64) + 128 * 64 * 2 + 32 * 64            # the full layer has no values of its own
    assert work.every == {"Q4_0": attention + 6 * 3 * 96 * 64, "F32": 6 * 16 * 64} and work.head == {"Q4_0": 300 * 64}
    assert work.expert == {"Q4_0": 6 * 3 * 32 * 64} and (work.n_expert, work.n_used) == (16, 3)
    work = outlined(ple[0]).work
    assert not work.expert and work.n_weights == sum(work.every.values()) + 300 * 64
    assert sum(work.every.values()) == sum(math.prod(info.shape) for name, info in ple[0].tensors.items() if len(info.shape) == 2 and
                                           "token_embd" not in name and not any(f"blk.{i}.attn_{kv}." in name for i in range(5, 10)
                                                                                for kv in "kv"))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("recipe", ["google-q4_0", "q4_k_m"])
def test_a_file_that_is_not_there_has_the_work_of_one_that_is(name, recipe):
    """Bytes that a token reads, as they are counted elsewhere: matrices here, with vectors and a row of each table there."""
    model = outlined(model_outline(name, recipe))
    work = model.work
    shares = ((work.every, 1), (work.head, 1), (work.expert, work.n_used))
    matrices = sum(share * n * BLOCKS[kind].n_bytes // BLOCKS[kind].elements for part, share in shares for kind, n in part.items())
    assert 0 < weight_bytes(model.source, model.config, stored_bytes) - matrices < 3e-3 * matrices


# ---- the formula

def test_products_take_what_their_types_take_with_so_many_rows(moe):
    model = outlined(moe[0])
    machine = Speed({"Q4_0": {1: 2.0, 8: 9.0}, "F32": {1: 5.0, 8: 5.0}}, no_attention(model.config), 1.0)
    work = model.work
    one = 2 * (work.every["Q4_0"] + 3 * work.expert["Q4_0"]) + 5 * work.every["F32"]
    assert call_seconds(model, machine, NO_REST, [(0, 1)], 0) == pytest.approx(one)
    assert call_seconds(model, machine, NO_REST, [(0, 1)], 1) == pytest.approx(one + 2 * work.head["Q4_0"])
    met = 16 * (1 - (13 / 16) ** 4)                                  # experts of four rows, each with 12 / met rows
    four = 5 * work.every["Q4_0"] + met * (2 + 12 / met - 1) * work.expert["Q4_0"] + 5 * work.every["F32"] + 2 * work.head["Q4_0"]
    for sequences in ([(0, 4)], [(7, 1)] * 4, [(3, 2), (9, 2)]):     # whoever's rows they are
        assert call_seconds(model, machine, NO_REST, sequences, 1) == pytest.approx(four)


def test_rows_between_and_beyond_those_measured():
    machine = Speed({"Q4_0": {1: 2.0, 8: 9.0, 32: 33.0}}, {}, 1.0)
    assert [machine.of_weights("Q4_0", 10, rows) for rows in (0.5, 1, 4, 8, 20, 32, 64)] == [20, 20, 50, 90, 210, 330, 660]
    line = {1: Line(1, 2), 8: Line(0, 1)}
    machine = Speed({}, {Heads(4, 2, 16): line}, 1.0)
    assert [machine.of_attention(Heads(4, 2, 16), rows, 100) for rows in (1, 7, 8, 500)] == [201, 201, 100, 100]


@given(st.integers(0, 3000), st.integers(1, 600), st.sampled_from([None, 7, 512]))
def test_what_is_visible_is_added_up_row_by_row(depth, rows, window):
    layer = type("Layer", (), {"window": window})()
    assert visible(layer, depth, rows) == sum(min(depth + row + 1, window or 10**9) for row in range(rows))


def test_attention_counts_heads_and_depth_of_each_sequence(moe):
    model = outlined(moe[0])
    machine = Speed({"Q4_0": NO_TIME, "F32": NO_TIME}, {heads: {1: Line(1000, 1)} for heads in heads_of(model.config)}, 1.0)
    sliding, full = 5 * 2 * 64, 2 * 128                              # 4 heads of 16 and of 32, scores and values
    assert step_seconds(model, machine, NO_REST, 0) == 6000 + sliding + full
    assert step_seconds(model, machine, NO_REST, 99) == 6000 + 7 * sliding + 100 * full
    assert step_seconds(model, machine, NO_REST, 99, users=3) == 3 * step_seconds(model, machine, NO_REST, 99)
    assert step_seconds(model, machine, NO_REST, 9, rows=2) == 6000 + 14 * sliding + (10 + 11) * full


def test_a_prompt_goes_chunk_by_chunk_and_only_its_end_meets_the_head(moe):
    model = outlined(moe[0])
    machine = Speed({"Q4_0": NO_TIME, "F32": NO_TIME}, no_attention(model.config), 1.0)
    rest = Rest(Line(10, 0.001), 500)
    assert prompt_seconds(model, machine, rest, 1100) == pytest.approx(3 * 10 + 1.1 + 500)
    assert step_seconds(model, machine, rest, 5, users=2, rows=3) == pytest.approx(10 + 0.006 + 6 * 500)
    rows = {1: 0.0, 512: 1.0}
    machine = Speed({"Q4_0": rows, "F32": rows}, no_attention(model.config), 1.0)
    assert prompt_seconds(model, machine, NO_REST, 512) > prompt_seconds(model, machine, NO_REST, 500) > 0


def test_what_lies_between_two_measurements():
    one, two = (Speed({"Q4_0": {1: s}}, {Heads(1, 1, 16): {1: Line(s, 2 * s)}}, 10 * s) for s in (1.0, 3.0))
    assert mean_of(one, two) == Speed({"Q4_0": {1: 2.0}}, {Heads(1, 1, 16): {1: Line(2.0, 4.0)}}, 20.0)


# ---- measuring: by a clock that depends on what is called with what

@pytest.fixture
def clock(monkeypatch):
    """Products take 3 s and 1 a weight and row; attention 5 s and 2 a multiply-add; a forward pass 7 s and 4 a row; a head 6 s."""
    calls = []

    def seconds(function, *args):
        calls.append((function, args))
        if function.__name__ == "attend":
            q_TNH, kept, first_T, end_T = args
            assert not first_T.any() and len(set(end_T.tolist())) == 1 and end_T[0] <= speed.QUERIES[0][2]
            return 5 + 2 * 2 * q_TNH.size * int(end_T[0])
        if function.__name__ in ("forward", "head"):
            return 7 + 4 * len(args[3]) if function.__name__ == "forward" else 6
        x_TD, tiles = args
        return len(x_TD) * tiles.shape[0] * tiles.shape[1]
    monkeypatch.setattr(speed, "seconds", seconds)
    return calls


def test_products_and_attention_are_measured_for_every_type_and_kind_of_heads(clock, monkeypatch):
    monkeypatch.setattr(speed, "MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr(speed, "QUERIES", ((1, 64, 256), (8, 64, 256)))
    monkeypatch.setattr(speed, "read_bandwidth", lambda *_: [1.0, 9.0, 2.0])
    found = measure_speed({"Q4_0", "F32"}, {Heads(4, 2, 16)}, kernel_backend("q8", 1))
    assert found.product == {kind: {rows: rows for rows in speed.ROWS} for kind in ("F32", "Q4_0")} and found.bandwidth == 2
    assert found.attention == {Heads(4, 2, 16): {1: Line(5, 2), 8: Line(5, 2)}}
    products = [args[1] for function, args in clock if function.__name__ != "attend"]
    assert max(tiles.n_bytes for tiles in products) > 900_000        # of one row: from memory
    assert all(tiles.raw.base is not None or tiles.n_bytes for tiles in products)


@pytest.mark.parametrize("small", ["moe", "ple"])
def test_the_rest_is_a_forward_pass_without_products(small, clock, request):
    source, _ = request.getfixturevalue(small)
    model, products = outlined(source), []
    backend = reference_backend("exact", lambda matrix: matrix)
    counting = type(backend)(**vars(backend) | {"matmul": lambda x_TD, w_OD: products.append(w_OD.shape) or np.empty(1)})
    assert measure_rest(model.config, model.weights, counting) == Rest(Line(7, 4), 6)
    assert set(products) == {speed.TINY}                             # the weights of the model are never looked at


def test_the_disk_is_read(tmp_path, monkeypatch):
    assert read_speed(tmp_path, 8 << 20) > 0 and not list(tmp_path.iterdir())
    monkeypatch.delattr("os.posix_fadvise")
    assert read_speed(tmp_path) is None


def test_a_full_disk_is_named_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("refimpl.lab.bench.disk.read_speed", lambda folder: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    fitted = run("fit", "hf:google/gemma-4-E2B-it-qat-q4_0-gguf")
    assert_one_line(fitted, 1, str(tmp_path), "No space left on device", "REFIMPL_CACHE_DIR names another folder")


# ---- memory

def test_memory_grows_with_users_and_is_that_of_the_loader(moe):
    model = outlined(moe[0])
    one, five = (memory_of(model, 500, HALF, users) for users in (1, 5))
    assert one.cache == cache_bytes(model.config, 500, 512, HALF) and five.cache == 5 * one.cache and five.weights == one.weights
    assert one.total == one.weights + one.cache + one.buffers + one.process
    assert memory_of(model, 500, HALF, rows=64).buffers < one.buffers


@given(st.integers(0, 40 * GB), st.sampled_from(["12B", "31B"]))
def test_the_longest_context_is_the_last_that_fits(n_bytes, name):
    config = CONFIGS[name]
    n = longest_context(config, n_bytes, HALF, 512)
    assert n == 0 or cache_bytes(config, n, 512, HALF) <= n_bytes
    assert n == config.n_ctx or cache_bytes(config, n + 1024, 512, HALF) > n_bytes
    assert longest_context(config, cache_bytes(config, 9 * 1024, 512, HALF), HALF, 512) == 9 * 1024


CONFIGS = {name: outlined(model_outline(name, "google-q4_0")).config for name in ("12B", "31B")}


def test_what_fits_and_what_comes_from_the_disk():
    need = Memory(weights=14 * GB, cache=2 * GB, buffers=GB // 2, process=GB // 2)
    for memory, disk, verdict in ((17, 0, YES), (16.9, 20, FROM_DISK), (16.9, 13, NO), (3, 20, FROM_DISK), (2.9, 20, NO)):
        assert fits(need, 0, Room(int(memory * GB), disk * GB, 1.0, 1.0, 0.1))[0] == verdict
    assert fits(need, GB, Room(17 * GB, 20 * GB, 1.0, 1.0, 0.1)) == (FROM_DISK, GB)


def test_missing_experts_are_read_when_they_are_chosen_and_other_weights_always(moe, ple):
    model = outlined(moe[0])
    weights = memory_of(model, 64, HALF).weights
    assert missing_bytes(model, weights, 1600) == 1600 * 3 / 16
    assert missing_bytes(model, weights, weights) == weights        # then it is more than the experts that is missing
    assert missing_bytes(outlined(ple[0]), 10**6, 1600) == 1600


# ---- the table

FAST = Room(100 * GB, 100 * GB, GB, GB, 0.1)


def a_machine(types, heads, backend, progress):
    """Q4_0 in a picosecond a weight, others slower; 20 rows as fast as one."""
    return Speed({kind: {rows: (1 if kind == "Q4_0" else 2) * max(1, rows / 20) * 1e-12 for rows in speed.ROWS} for kind in types},
                 {each: {1: Line(0, 1e-12)} for each in heads}, 30 * GB)


common_files = functools.cache(module.common_files)         # their outlines take as long as all that is predicted of them


@pytest.fixture
def here(monkeypatch):
    """A made-up machine, to be changed."""
    monkeypatch.setattr(module, "common_files", common_files)
    monkeypatch.setattr(module, "measure_speed", a_machine)
    monkeypatch.setattr(module, "measure_rest", lambda *_: Rest(Line(1e-3, 1e-4), 1e-4))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    room = [FAST]
    monkeypatch.setattr(module, "measure_room", lambda backend: room[0])
    return room


def test_the_common_files_of_all_five(here):
    code, out, _ = run("fit", "--json")
    result = json.loads(out)
    assert code == 0 and len(result["rows"]) == 15 and {row["model"] for row in result["rows"]} == set(SHAPES)
    by_name = {row["name"]: row for row in result["rows"]}
    row = by_name["hf:google/gemma-4-26B-A4B-it-qat-q4_0-gguf"]
    assert row["fits"] == YES and row["type"] == "refimpl chat -m hf:google/gemma-4-26B-A4B-it-qat-q4_0-gguf" and row["drafted"] == 0
    assert row["memory"]["file"] == pytest.approx(14.42e9, rel=1e-3) and row["memory"]["total"] == pytest.approx(15.24e9, rel=0.01)
    assert row["memory"]["most_context"] == 262_144 and row["prompt"] > row["decode"] > row["decode_full"] > 0
    assert row["load"]["first"] > row["load"]["cold"] > row["load"]["next"]
    assert best_of(result["rows"])["model"] == "31B"
    text = run("fit")[1]
    assert "best here: 31B, the largest that makes 5 new tokens/s: refimpl chat -m hf:google/gemma-4-31B-it-qat-q4_0-gguf" in text


def test_a_small_machine_reads_from_the_disk_or_says_no(here):
    here[0] = Room(10 * GB, 15 * GB, GB, GB, 0.1)
    rows = {(row["model"], row["file"]): row for row in json.loads(run("fit", "--json", "--users", 2)[1])["rows"]}
    fast, slow = rows["12B", "Q4_K_M"], rows["26B-A4B", "Google's QAT, Q4_0"]
    assert fast["fits"] == YES and slow["fits"] == FROM_DISK and rows["31B", "Q4_K_M"]["fits"] == NO
    assert 0 < slow["decode"] < 3 and "decode" not in rows["31B", "Q4_K_M"] and slow["memory"]["most_context"] == 0
    assert fast["type"] == "refimpl serve -m hf:unsloth/gemma-4-12B-it-GGUF:Q4_K_M -np 2 -c 8192"
    text = run("fit")[1]
    assert "from the disk: memory cannot hold all" in text and "best here: 12B" in text
    here[0] = Room(GB // 10, 0, None, GB, 0.1)
    assert "none fits" in run("fit")[1]


def test_other_programs_are_mentioned(here, monkeypatch):
    assert run("fit", "hf:google/gemma-4-E2B-it-qat-q4_0-gguf")[2] == ""
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    assert "other programs are running" in run("fit", "hf:google/gemma-4-E2B-it-qat-q4_0-gguf")[2]


def test_one_name_or_file_and_what_comes_beside_it(here, moe, tmp_path):
    name = "hf:google/gemma-4-E4B-it-qat-q4_0-gguf"
    plain = json.loads(run("fit", name, "--json")[1])["rows"]
    drafted = json.loads(run("fit", name, "--json", "--draft", "--mmproj", "--accept", ".9,.8")[1])["rows"]
    assert len(plain) == 1 and drafted[0]["drafted"] == 2 and drafted[0]["decode"] > plain[0]["decode"]
    assert drafted[0]["type"] == f"refimpl chat -m {name} --draft hf:google/gemma-4-E4B-it-qat-q4_0-unquantized-assistant"
    assert drafted[0]["memory"]["extras"] > 1e9 and plain[0]["memory"]["extras"] == 0
    code, out, _ = run("fit", "-m", moe[0].path, "-c", 64)
    assert code == 0 and "memory: weights" in out and f"type: refimpl chat -m {moe[0].path}" in out and "best here" not in out
    assert_one_line(run("fit", "-m", moe[0].path, "--draft"), 1, "no drafter", "width 64")
    assert_one_line(run("fit", "-m", "hf:owner/unknown"), 1, "is not in the list", "download it first")
    assert_one_line(run("fit", "-m", tmp_path / "missing.gguf"), 1, "no such file")
    (tmp_path / "text.gguf").write_text("hello")
    assert_one_line(run("fit", tmp_path / "text.gguf"), 1, "text.gguf")
    assert_one_line(run("fit", "--draft", "--accept", "x"), 2, "--accept")
    assert_one_line(run("fit", "--draft", "--accept", ".5,.6"), 1, "each at most the one before it")
    assert_one_line(run("fit", "FILE"), 1, "FILE: no such file")


def test_centroids_spare_most_of_a_drafters_head(here):
    """Of the E4B's 262,144 rows a step computes 4,096, and 2,048 centroids."""
    from refimpl.files.outline import drafter_outline

    file, target = drafter_outline("E4B"), outlined(model_outline("E4B", "google-q4_0")).config
    config = drafter_config_from_gguf(file.metadata, target.n_vocab, target, file.path)
    dense, centroid = (draft_work(drafter_weights_from_gguf(file, config, head))["BF16"] for head in ("dense", "centroid"))
    assert dense - centroid == (262_144 - 4_096 - 2_048) * 256


# ---- predicted and measured

def test_bench_prints_the_prediction_beside(monkeypatch):
    monkeypatch.setattr(speed, "MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr("refimpl.lab.bench.bench.BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr("refimpl.lab.bench.bench.measure_speed", a_machine)
    monkeypatch.setattr("refimpl.lab.bench.bench.measure_rest", lambda *_: Rest(Line(1.0, 0), 1.0))
    code, out, err = run("bench", "-p", 8, "-n", 2, "-r", 1, "--json")
    prompt, decode = (test["engines"]["refimpl"] for test in json.loads(out)["tests"])
    assert code == 0 and "chosen: " in err and " in memory" in err
    assert prompt["predicted_tokens_per_second"] == pytest.approx(4, rel=0.01)
    assert decode["predicted_tokens_per_second"] == pytest.approx(0.5, rel=0.01)
    assert decode["predicted_to_measured"] == pytest.approx(0.5 / decode["tokens_per_second"]["median"], rel=0.01)
    assert "predicted" in run("bench", "-p", 8, "-n", 0, "-r", 1)[1]


def test_a_check_tabulates_errors(monkeypatch):
    monkeypatch.setattr(fit_check, "check_memory", lambda path, threads: (103, 100))
    monkeypatch.setattr(fit_check, "check_starts", lambda path, threads: {"cold": (3.0, 4.0)})
    engine = {"predicted_tokens_per_second": 9.0, "tokens_per_second": {"median": 10.0, "min": 8.0, "max": 11.0}}
    monkeypatch.setattr(fit_check, "bench", lambda path, plan, **_: {"machine": {"cpu": "C", "isa": "avx2", "threads": 2}, "tests": [
        {"test": "decode", "engines": {"refimpl": engine}}]})
    code, out, _ = run("fit", "--check", "a.gguf", "--json")
    decode, memory, start = json.loads(out)["errors"]
    assert code == 0 and decode["error"] == pytest.approx(-0.1) and (memory["error"], memory["bound"]) == (pytest.approx(0.03), 0.03)
    assert (start["what"], start["error"]) == ("cold start", pytest.approx(-0.25))
    assert "-10.0 %" in run("fit", "--check", "a.gguf")[1]


def test_memory_of_a_process_is_what_was_predicted():
    """The built-in model, which is little beside the process itself."""
    predicted, measured = fit_check.check_memory(refimpl.loading.model.BUILT_IN)
    assert predicted == pytest.approx(measured, rel=0.2)


def test_starts_are_timed_to_the_first_token(monkeypatch):
    """Of the built-in model, by processes that wait in place of computing: in a folder that has the kernels, and keeps its files."""
    asked = []

    def waiting(path, threads, *options, cache, **streams):
        asked.append(sorted(file.name.partition("-")[0] for file in Path(cache).iterdir()))
        wait = f"import time; time.sleep(0.1); print('a', flush=True); time.sleep(0.2); open({cache + '/weights-0'!r}, 'w')"
        return subprocess.Popen([sys.executable, "-c", wait if fails is None else fails], **streams)
    fails = None
    monkeypatch.setattr(fit_check, "_generating", waiting)
    monkeypatch.setattr(fit_check, "_keep", lambda path, threads, cache: None)
    measure, rooms = fit_check.measure_room, []
    monkeypatch.setattr(fit_check, "measure_room", lambda backend: rooms[0] if rooms else rooms.append(measure(backend)) or rooms[0])
    began = time.perf_counter()
    found = fit_check.check_starts(refimpl.loading.model.BUILT_IN)
    whole = time.perf_counter() - began
    assert list(found) == ["first", "next", "cold"] and asked == [["kernels", "lock"], *2 * [["kernels", "lock", "weights"]]]
    assert found["first"][0] > found["cold"][0] >= found["next"][0] > 0 and min(measured for _, measured in found.values()) > 0.1, found
    assert sum(measured for _, measured in found.values()) < whole - 3 * 0.2, "the rest of a process does not count"
    fails = "raise SystemExit(3)"
    with pytest.raises(ValueError, match="could not be started to time it: status 3: it said nothing"):
        fit_check.check_starts(refimpl.loading.model.BUILT_IN)
