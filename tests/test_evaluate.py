"""Perplexity, divergence and its bounds, windows, runs that are kept, killed and resumed. llama.cpp is not run here."""

import errno
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import cli
import numpy as np
import pytest

import refimpl
from refimpl.cli.show.evaluate import as_text
from refimpl.lab.evaluate import evaluation, measure
from refimpl.lab.evaluate import logit_sources as sources
from refimpl.lab.evaluate.divergence import Kept, divergence, divergence_bounds, keep, log_sum_exp, most_probable
from refimpl.lab.evaluate.evaluate import evaluate
from refimpl.lab.evaluate.logit_sources import other_side, rows_at_once, side_of
from refimpl.lab.evaluate.run_files import read_windows, write_windows
from refimpl.lab.evaluate.saved_runs import read_run
from refimpl.lab.evaluate.summary import mean_and_error
from refimpl.lab.evaluate.windows import Document, Window, bytes_of, cut, read_documents
from refimpl.text.templates import GEMMA4_TEMPLATE

ROOT = Path(__file__).parent.parent
TEXT = "import os\n\n\ndef walk(top, names):\n    for name in sorted(names):\n        yield os.path.join(top, name)  # \u00e9\u2203\n" * 4
SIDE = side_of("kernels", None, None)


@pytest.fixture(scope="module")
def model():
    return refimpl.load()


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.py").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.py"


def distributions(seed: int, n: int = 50):
    """Logits of two distributions alike or not, flat or sharp, with a tail that q holds likely or not."""
    rng = np.random.default_rng(seed)
    p = rng.standard_normal(n) * rng.choice([0.1, 1, 4])
    q = p + rng.standard_normal(n) * rng.choice([0.01, 1, 5])
    return p.astype(np.float32), q.astype(np.float32)


# ---- divergence

def exact(p, q):
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (p, q))
    return float((p * np.log(p / q)).sum())


@pytest.mark.parametrize("seed", range(40))
def test_divergence_lies_between_its_bounds_which_close_in(seed):
    p, q = distributions(seed)
    true, before = exact(p, q), (0.0, math.inf)
    assert abs(divergence(p, q, log_sum_exp(p), log_sum_exp(q)) - true) < 1e-12
    for n_top in (1, 2, 3, 7, 20, 49, 50, 60):
        low, high = divergence_bounds(keep(p, n_top), q, log_sum_exp(q))
        assert low - 1e-12 <= true <= high + 1e-12, n_top
        assert before[0] - 1e-12 <= low and high <= before[1] + 1e-12, "more that is kept can only say more"
        before = low, high
    assert high - low < 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_both_bounds_are_reached_by_some_tail(seed):
    """No better ones exist: for what was kept, there is a tail with the least divergence and one with the largest."""
    p, q = distributions(seed)
    kept, n_top = keep(p, 5), 5
    probability = np.exp(kept.logit_K.astype(np.float64) - kept.log_sum)
    low, high = divergence_bounds(kept, q, log_sum_exp(q))
    log_q = q.astype(np.float64) - log_sum_exp(q)
    tail = np.setdiff1d(np.arange(len(q)), kept.id_K)
    mass = 1 - probability.sum()
    known = (probability * (np.log(probability) - log_q[kept.id_K])).sum()
    alike = mass * np.exp(log_q[tail]) / np.exp(log_q[tail]).sum()
    assert low == pytest.approx(max(0, known + (alike * (np.log(alike) - log_q[tail])).sum()), abs=1e-9)
    worst, left = np.zeros(len(tail)), mass
    for i in np.argsort(log_q[tail]):
        worst[i] = min(probability[n_top - 1], left)
        left -= worst[i]
    here = worst > 0
    assert high == pytest.approx(known + (worst[here] * (np.log(worst[here]) - log_q[tail][here])).sum(), abs=1e-9)


def test_tail_is_not_forgotten():
    """All that differs lies in the tail: half of the mass, on tokens that q never chooses."""
    p, q = np.zeros(8, np.float32), np.zeros(8, np.float32)
    p[0], q[4:] = np.log(7), -20
    low, high = divergence_bounds(keep(p, 1), q, log_sum_exp(q))
    assert low < exact(p, q) <= high + 1e-12 and high > 4


def test_most_probable_of_equal_ones_has_the_lower_id():
    assert most_probable(np.array([1, 3, 2, 3, 2, 2], np.float32), 4).tolist() == [1, 3, 2, 4]
    assert most_probable(np.zeros(5, np.float32), 3).tolist() == [0, 1, 2]
    assert most_probable(np.array([1, 2], np.float32), 9).tolist() == [1, 0]


# ---- windows

def test_every_token_counts_once_with_half_a_window_before_it():
    document = Document("x", (2,), tuple(range(100, 150)))
    windows = cut([document], 16, 8, "every", 2)
    counted = [token for window in windows for token in window.ids[window.first:]]
    assert counted == list(document.ids)
    for window in windows[1:]:
        assert window.ids[0] == 2 and len(window.ids) - 1 <= 16 and window.first >= 1 + 16 - 8
        assert list(window.ids[1:]) == list(range(window.ids[1], window.ids[1] + len(window.ids) - 1))
    assert windows[0].first == 1


def test_second_halves_are_llama_cpps():
    """Of tokens 2 10 11 ... in windows of 8: <bos> in front of each, first = 8 // 2, the rows 4, 5, 6 predict tokens 5, 6, 7."""
    document = Document("x", (2,), tuple(range(10, 30)))                # 21 tokens with <bos>: two windows, 5 left out
    assert cut([document], 8, 8, "second-half", 2) == [Window(0, (2, 10, 11, 12, 13, 14, 15, 16), 5),
                                                        Window(0, (2, 18, 19, 20, 21, 22, 23, 24), 5)]
    with pytest.raises(ValueError, match="whole window of 32"):
        cut([document], 32, 8, "second-half", 2)


def test_bytes_of_all_tokens_are_the_text(model):
    types = np.asarray(model.file.metadata["tokenizer.ggml.token_type"])
    assert bytes_of(np.array(model.tokenizer.encode(TEXT, bos=False)), model.tokenizer, types) == len(TEXT.encode())


def test_text_becomes_an_answer_and_a_conversation_one_document_a_turn(model, tmp_path):
    path = tmp_path / "talk.jsonl"
    talk = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": " import os "}, {"role": "user", "content": "b?"},
            {"role": "assistant", "content": "pass"}]
    path.write_text(json.dumps({"messages": talk}) + "\n\n" + json.dumps({"text": "import os"}) + "\n")
    tokenizer = model.tokenizer
    documents = read_documents([path], tokenizer, GEMMA4_TEMPLATE)
    assert [document.name.split("talk.jsonl:")[1] for document in documents] == ["1, message 1", "1, message 3", "3"]
    shown = [tokenizer.decode(document.prefix, special=True) for document in documents]
    assert all(words.startswith("<bos>") and words.count("model\n") == i for words, i in zip(shown, (1, 2, 1)))
    assert "b?" in shown[1] and "import os" in shown[1] and "b?" not in shown[0] and "Write a text." in shown[2]
    assert [tokenizer.decode(document.ids) for document in documents] == ["import os", "pass", "import os"]
    raw = read_documents([path.with_name("t.jsonl")] if path.with_name("t.jsonl").write_text('{"text": "x"}') else [], tokenizer, None)
    assert raw[0].prefix == (tokenizer.bos,)
    for line, says in (("{}", "expected"), ("[", "expected"), ('{"messages": [{"role": "user"}]}', "expected"),
                       ('{"messages": [{"role": "assistant", "content": "x"}]}', "nothing to answer")):
        path.write_text('{"text": "x"}\n' + line)
        with pytest.raises(ValueError, match=f"talk.jsonl:2: .*{says}"):
            read_documents([path], tokenizer, GEMMA4_TEMPLATE)


# ---- the figures

def test_figures_are_those_of_the_logits(model, text):
    """One window: the token at i is predicted at i - 1, from the model's own logits."""
    ids = model.tokenizer.encode(TEXT)
    logit_TV = model.logits(ids[:-1]).astype(np.float64)
    nll = np.log(np.exp(logit_TV).sum(axis=1)) - logit_TV[np.arange(len(ids) - 1), ids[1:]]
    result = evaluate(SIDE, [text])
    assert result["windows"] == 1 and result["tokens"] == len(ids) - 1 and result["bytes"] == len(TEXT.encode())
    assert result["nll"] == pytest.approx(nll.mean(), abs=1e-9) and result["perplexity"] == pytest.approx(math.exp(nll.mean()))
    assert result["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / len(TEXT.encode()))
    assert result["nll_error"] == pytest.approx(nll.std(ddof=1) / len(nll) ** 0.5)
    assert "perplexity" in as_text(result)


def test_documents_are_kept_apart(text):
    alone, both = evaluate(SIDE, [text]), evaluate(SIDE, [text, text])
    assert [part["nll"] for part in both["per_document"]] == [alone["nll"]] * 2 and both["tokens"] == 2 * alone["tokens"]


def test_comparison_is_that_of_two_whole_matrices(model, text, tmp_path):
    """Against the other arithmetic, and against a run that was kept, whose bounds hold the exact divergence."""
    other, run = refimpl.load(arithmetic="exact"), tmp_path / "run.parquet"
    result = evaluate(SIDE, [text], against=other_side("kernels:exact", SIDE), n_ctx=64, stride=64)
    ids, true, same, shared = model.tokenizer.encode(TEXT), [], [], []
    for low in range(1, len(ids), 64):
        part = [ids[0], *ids[low:low + 63]][:len(ids) - low]
        for p, q in zip(other.logits(part), model.logits(part)):
            true.append(exact(p, q))
            same.append(p.argmax() == q.argmax())
            shared.append(len({*most_probable(p, 10).tolist()} & {*most_probable(q, 10).tolist()}) / 10)
    found = result["comparison"]
    assert found["kl_exact"] and found["kl_low"] == pytest.approx(np.mean(true), rel=1e-6) and found["kl_low"] > 1e-5
    assert found["same_top"] == pytest.approx(np.mean(same)) and found["shared_top"] == pytest.approx(np.mean(shared))
    evaluate(other_side("kernels:exact", SIDE), [text], output=run, n_ctx=64, stride=64, n_top=100)
    kept = evaluate(SIDE, base=run)
    bounds = kept["comparison"]
    assert bounds["kl_low"] <= found["kl_low"] <= bounds["kl_high"] and not bounds["kl_exact"] and bounds["kl_low"] > 0.5 * found["kl_low"]
    for key in ("base_perplexity", "log_ratio", "same_top", "shared_top"):
        assert bounds[key] == pytest.approx(found[key], abs=1e-12), key
    assert kept["nll"] == result["nll"] and "between" in as_text(kept)


def test_rows_are_made_some_at_a_time_and_the_numbers_stay(text, monkeypatch):
    assert rows_at_once(262_144) == 64 and rows_at_once(300) == 512
    whole, seen = evaluate(SIDE, [text]), []
    original = measure._checked

    def watched(task, side, rows):
        for logit_RV in original(task, side, rows):
            seen.append(len(logit_RV))
            yield logit_RV
    monkeypatch.setattr(measure, "_checked", watched)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 7 * 4 * 4096)
    assert evaluate(SIDE, [text]) == whole and max(seen) == 7 and sum(seen) == whole["tokens"]


def test_logits_that_are_no_numbers_are_refused(text, monkeypatch):
    monkeypatch.setattr(sources.ModelSource, "rows", lambda self, ids, first: iter([np.full((len(ids) - first, 4096), np.nan, np.float32)]))
    with pytest.raises(ValueError, match="NaN or infinite logits in window 0"):
        evaluate(SIDE, [text])


def test_mean_and_error():
    assert mean_and_error(np.array([1e16, 1.0, -1e16, 1.0])) == (0.5, pytest.approx(np.std([1e16, 1, -1e16, 1], ddof=1) / 2))
    assert mean_and_error(np.array([3.0])) == (3.0, 0.0)


# ---- runs

COMMAND = "eval -c 32 --stride 4 -t 1 --json -f"


def test_a_killed_run_goes_on_where_it_was(text, tmp_path):
    whole = evaluate(SIDE, [text], output=tmp_path / "whole.parquet", n_ctx=32, stride=4, threads=1)
    output, parts = tmp_path / "run.parquet", tmp_path / "run.parquet.parts"
    command = [sys.executable, "-m", "refimpl", *COMMAND.split(), str(text), "-o", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    while len(list(parts.glob("[0-9]*.parquet"))) < 3 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not output.exists()
    done = sorted(parts.glob("[0-9]*.parquet"))
    assert 3 <= len(done) < whole["windows"]
    done[1].write_bytes(done[1].read_bytes()[:-40])                     # a damaged part is made again
    status, out, err = cli.run(*COMMAND.split(), text, "-o", output)
    assert status == 0 and f"{len(done) - 1} of {whole['windows']} windows were done" in err
    result = json.loads(out)
    assert result["nll"] == whole["nll"] and result["tokens"] == whole["tokens"]
    assert_same_run(output, tmp_path / "whole.parquet")
    assert not parts.exists()


def assert_same_run(one: Path, two: Path):
    """All but what tells of time and machine, to the last bit."""
    (about, windows, parts), (others_about, others_windows, others_parts) = read_windows(one), read_windows(two)
    assert about == others_about and windows == others_windows and len(parts) == len(others_parts)
    for part, other in zip(parts, others_parts):
        assert part.columns.keys() == other.columns.keys()
        assert all(part.columns[key].tobytes() == other.columns[key].tobytes() for key in part.columns)


def test_state_of_something_else_is_refused_and_left_alone(text, tmp_path, monkeypatch):
    output = tmp_path / "run.parquet"
    original = measure.about_machine

    def stop(threads):
        if len(list(tmp_path.glob("*.parts/[0-9]*"))) == 2:
            raise KeyboardInterrupt
        return original(threads)
    monkeypatch.setattr(measure, "about_machine", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(SIDE, [text], output=output, n_ctx=32)
    with pytest.raises(ValueError, match=r"run\.parquet\.parts holds another evaluation \(other .*n_ctx"):
        evaluate(SIDE, [text], output=output, n_ctx=64)
    assert len(list((tmp_path / "run.parquet.parts").glob("[0-9]*.parquet"))) == 2


def test_damaged_runs_are_refused(text, tmp_path):
    evaluate(SIDE, [text], output=tmp_path / "run.parquet", n_windows=1, n_ctx=32)
    whole = (tmp_path / "run.parquet").read_bytes()
    about, windows, (part,) = read_windows(tmp_path / "run.parquet")
    bad = tmp_path / "bad.parquet"
    for content in (b"", b"hello", whole[:200], whole[:-100], whole[:len(whole) // 2], whole[:100] + bytes(20) + whole[120:]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="no run of refimpl eval"):
            read_run(bad)
    columns = part.columns
    for change in ({"top_id": columns["top_id"] + 4096}, {"nll": columns["nll"][:-1]}, {"log_sum": columns["nll"].astype("f4")},
                   {"top_logit": columns["top_logit"][:, 1:]}, {"top_id": columns["nll"]}):
        write_windows(bad, about, windows, [part._replace(columns=columns | change)], about["documents"])
        with pytest.raises(ValueError, match="no run of refimpl eval"):
            read_run(bad)
    for other in (Window(0, windows[0].ids, len(windows[0].ids)), Window(0, tuple(i - 100 for i in windows[0].ids), windows[0].first)):
        write_windows(bad, about, [other], [part], about["documents"])
        with pytest.raises(ValueError, match="no run of refimpl eval"):
            read_run(bad)


def test_a_full_disk_is_one_line_and_what_is_done_is_kept(text, tmp_path, monkeypatch):
    output, original, written = tmp_path / "run.parquet", evaluation.Journal.add, []

    def add(self, *window):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.folder))
        written.append(original(self, *window))
    monkeypatch.setattr(evaluation.Journal, "add", add)
    with pytest.raises(ValueError, match=r"run\.parquet\.parts: No space left on device; 2 of \d+ windows are done and kept"):
        evaluate(SIDE, [text], output=output, n_ctx=32)
    monkeypatch.undo()
    assert any("resumed: 2 of" in note for note in evaluate(SIDE, [text], output=output, n_ctx=32)["notes"])


# ---- the command

def run(*args):
    return cli.run("eval", *args)


def test_the_command_line_refuses_what_makes_no_sense(text, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    for status, says, args in (
            (2, "-f FILE", ()), (2, "--base RUN", ("-f", text, "--base", "x")), (2, "--count", ("-f", text, "--count", "all")),
            (2, "--stride", ("-f", text, "-c", 8, "--stride", 9)), (1, "UTF-8", ("-f", tmp_path / "latin.txt")),
            (1, "no text", ("-f", tmp_path / "empty.txt")), (1, "choose from kernels, reference, llama", ("-f", text, "--backend", "x")),
            (1, "no such file", ("-f", text, "--against", "nothing.gguf")), (1, "No such file", ("--base", "nothing.npz"))):
        code, out, err = run(*args)
        assert code == status and out == "" and says in err and len(err.strip().splitlines()) == 1, (args, err)


def test_kept_is_what_it_says():
    row = np.array([0.5, 2, -1, 2], np.float32)
    kept = keep(row, 3)
    assert isinstance(kept, Kept) and kept.id_K.tolist() == [1, 3, 0] and kept.logit_K.tolist() == [2, 2, 0.5]
    assert kept.log_sum == pytest.approx(math.log(sum(math.exp(v) for v in row.tolist())))
