"""Drafting from the command line."""

import json

import pytest
from cli import assert_one_line, run
from shapes import random_drafter, random_model, write_drafter, write_model

from refimpl.loading.drafter import drafters_beside


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, its drafter, and one of another model."""
    folder = tmp_path_factory.mktemp("draft")
    return (write_model(folder / "small.gguf", random_model("12B"), "Q4_0"),
            write_drafter(folder / "fits.gguf", random_drafter("12B"), "Q8_0"),
            write_drafter(folder / "other.gguf", random_drafter("E2B"), "Q8_0"))


def test_the_built_in_model_drafts_and_says_the_same():
    wanted = json.loads(run("generate", "-p", "def main(", "-n", 40, "--seed", 3, "--json", "--draft", "none")[1])
    drafted = json.loads(run("generate", "-p", "def main(", "-n", 40, "--seed", 3, "--json")[1])
    fixed = json.loads(run("generate", "-p", "def main(", "-n", 40, "--seed", 3, "--json", "--draft-max", 3, "--draft-min-p", 0.3)[1])
    assert wanted["ids"] == drafted["ids"] == fixed["ids"] and "draft" not in wanted
    figures = drafted["draft"]
    assert figures["rounds"] > 5 and figures["tokens_per_round"] >= 1 and figures["verify_seconds"] > 0
    assert 1 < fixed["draft"]["tokens_per_round"] <= 4 and len(fixed["draft"]["acceptance"]) <= 3


def test_a_drafter_from_a_file(files):
    model, drafter, _ = files
    plain = run("generate", "-m", model, "-p", "abc", "-n", 20, "--temp", 0)
    code, out, err = run("generate", "-m", model, "-p", "abc", "-n", 20, "--temp", 0, "--draft", drafter, "--draft-max", 4, "-v")
    assert (code, out) == plain[:2] == (0, out) and plain[2] == ""
    assert "rounds of 1.00 tokens, 0 of" in err and "distinct experts" not in err and "; draft " in err
    assert run("generate", "-m", model, "-p", "abc", "-n", 20, "--temp", 0, "--draft", drafter, "--backend", "reference")[0] == 0


@pytest.mark.parametrize(("more", "words"), [
    (["--draft-max", "0"], "draft_max=0: expected 'auto' or a number from 1 to 8"),
    (["--draft-max", "-1"], "draft_max=-1"),
    (["--draft-max", "1000"], "draft_max=1000"),
    (["--draft-max", "many"], "draft_max='many'"),
    (["--draft", "nowhere.gguf"], "nowhere.gguf"),
    (["--draft", "README.md"], "README.md"),
    (["--draft-head", "centroid"], "has no centroid head"),
    (["--draft-head", "other"], "expected 'dense', 'centroid' or a number"),
])
def test_odd_arguments_get_one_line(more, words):
    assert_one_line(run("generate", "-p", "x", "-n", 3, *more), 1, words)


def test_files_that_do_not_go_together_get_one_line(files):
    model, drafter, other = files
    assert_one_line(run("generate", "-m", model, "-p", "x", "--draft", model), 1, "this is a model (gemma4), no drafter")
    assert_one_line(run("generate", "-m", drafter, "-p", "x"), 1, "this is a drafter", "cannot run alone")
    assert_one_line(run("generate", "-m", model, "-p", "x", "--draft", other), 1, "head_count_kv", "belongs to another model")
    assert_one_line(run("generate", "-p", "x", "--draft", drafter), 1, "embedding_length_out is 64, the target has 128")


@pytest.mark.parametrize("more", [[], ["--draft", "built-in"], ["--draft", "built-in:e2b"]])
def test_a_built_in_model_drafts_with_its_own_drafter(more):
    code, out, err = run("generate", "-m", "built-in:e2b", "-p", "def ", "-n", 8, "-v", *more)
    assert code == 0 and " draft tokens accepted" in err, err


def test_a_drafter_beside_the_model_is_offered(tmp_path, files):
    model = tmp_path / "gemma-4-12B-it-qat-Q4_0.gguf"
    model.write_bytes(files[0].read_bytes())
    (tmp_path / "gemma-4-12B-it-mtp-Q8_0.gguf").write_bytes(files[1].read_bytes())
    code, out, err = run("generate", "-m", model, "-p", "abc", "-n", 2)
    assert code == 0 and err.startswith("note: ") and err.count("\n") == 1
    assert "gemma-4-12B-it-mtp-Q8_0.gguf makes the same text faster" in err
    assert run("generate", "-m", model, "-p", "abc", "-n", 2, "--draft", "none")[2] == ""


def test_names_that_are_offered(tmp_path):
    model = tmp_path / "gemma-4-26B-A4B-it-Q4_K_M.gguf"
    good = ["mtp-gemma-4-26B-A4B-it.gguf", "gemma-4-26B-A4B-it-assistant-BF16.gguf", "gemma-4-26B-A4B-it-Q8_0-MTP.gguf"]
    for name in (*good, model.name, "mtp-gemma-4-E2B-it.gguf", "gemma-4-26B-A4B-it-Q8_0.gguf", "mtp.gguf", "gemma-4-26B-A4B-it-mtp.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in drafters_beside(model)] == sorted(good)


def test_inspect_shows_a_drafter_as_one(files):
    code, out, err = run("inspect", "-m", files[1])
    assert code == 0 and err == "" and "heads: dense" in out
    assert "a drafter, for a target of width 64 and 300 tokens: give it with --draft" in out
    described = json.loads(run("inspect", "-m", files[1], "--json")[1])
    assert described["drafter"]["n_layer"] == 4 and described["drafter"]["n_embd"] == 48 and described["types"] and described["tensors"]


def test_bench_with_a_drafter(files):
    result = json.loads(run("bench", "-m", files[0], "--draft", files[1], "-n", 12, "-r", 2, "--draft-max", "auto,2", "--accept", "1,1",
                            "--json")[1])
    assert list(result["decode"]) == ["plain", "auto", "2"] and result["plan"]["simulated_acceptance"] == [1.0, 1.0]
    two = result["decode"]["2"]
    assert len(two["seconds"]) == 2 and two["draft"]["tokens_per_round"] > 2 and two["draft"]["acceptance"] == [1.0, 1.0]
    assert two["ratio"]["min"] <= two["ratio"]["of_medians"] * 1.01 and result["decode"]["plain"]["tokens_per_second"]["median"] > 0
    code, out, err = run("bench", "-m", files[0], "--draft", files[1], "-n", 8, "-r", 1, "--accept", ".5,.2")
    assert code == 0 and "SIMULATION" in out and "0.5, 0.2" in out and "plain" in out and "auto" in out
    code, out, err = run("bench", "--draft", "built-in", "-n", 12, "-r", 1, "--draft-max", "2", "--prompt", "def main(", "--temp", "0.7")
    assert code == 0 and "SIMULATION" not in out and "accepted by position" in out


@pytest.mark.parametrize(("more", "status", "words"), [
    (["--accept", ".5"], 2, "need --draft"), (["--draft", "built-in", "--vs", "llama.cpp"], 2, "refimpl alone"),
    (["--draft", "built-in", "--accept", "a"], 2, "expected numbers"), (["--draft", "built-in", "--accept", ".5,.6"], 1, "each at most"),
    (["--draft", "built-in", "--accept", "1.5"], 1, "chances of 0 to 1"), (["--draft", "built-in", "--draft-max", "1,99"], 1, "1 to 8"),
])
def test_odd_bench_arguments(more, status, words):
    assert_one_line(run("bench", *more), status, words)
