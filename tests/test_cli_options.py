"""Options: llama.cpp's spellings, near misses, help, and files that are not overwritten."""

import json
import os

import pytest
from cli import assert_one_line, run
from shapes import random_model, write_model

from refimpl.cli.llamacpp_options import NOTHING, REFUSED

GREEDY = ("generate", "-p", "def ", "--temp", 0, "--backend", "reference")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("options") / "small.gguf", random_model("12B"))


@pytest.mark.parametrize("spelling", ["--predict", "--n-predict"])
def test_spellings_of_llama_cpp(spelling):
    assert run(*GREEDY, spelling, 3)[:2] == run(*GREEDY, "-n", 3)[:2]


def test_options_that_mean_nothing_here_are_named_once_and_change_nothing():
    wanted = run(*GREEDY, "-n", 3)
    status, out, err = run(*GREEDY, "-n", 3, "-ngl", 99, "--n-gpu-layers=9", "-fa", "on", "-b", 512, "--mmap", "-ctk", "q8_0")
    assert (status, out) == wanted[:2] and err.startswith("note: -ngl, -fa, -b, --mmap, -ctk have no effect here") and err.count("\n") == 1
    assert run(*GREEDY, "-n", 3, "-fa")[2].startswith("note: -fa has no effect here")


def test_options_that_would_change_the_text_are_refused_unless_neutral():
    assert_one_line(run(*GREEDY, "--repeat-penalty", 1.1), 2, "--repeat-penalty is not supported: a repetition penalty")
    assert_one_line(run(*GREEDY, "--repeat-penalty=1.1"), 2, "--repeat-penalty")
    assert_one_line(run(*GREEDY, "--grammar", "x"), 2, "grammars")
    assert_one_line(run(*GREEDY, "-cnv"), 2, "refimpl chat")
    assert run(*GREEDY, "-n", 1, "--repeat-penalty", "1.0")[0] == 0
    assert not set(NOTHING) & set(REFUSED)


def test_the_value_of_an_option_is_left_alone():
    assert run("generate", "-p", "-fa", "-n", 1, "--temp", 0, "--backend", "reference")[1].startswith("-fa")


def test_a_model_by_position(small):
    reference = ("-p", "ab", "-n", 2, "--temp", 0, "--backend", "reference")
    assert run("generate", small, *reference) == run("generate", "-m", small, *reference)
    assert run("inspect", small)[:1] == (0,)
    for command in ("generate -p x", "inspect", "verify", "bench", "chat", "trace --ids 2 -o x.safetensors", "eval -f x"):
        assert_one_line(run(*command.split(), small, "-m", small), 2, "give the model once")


@pytest.mark.parametrize(("model", "says"), [("google/gemma-4-E2B", "did you mean hf:google/gemma-4-E2B?"),
                                             ("https://huggingface.co/google/gemma-4-E2B", "did you mean hf:google/gemma-4-E2B?"),
                                             ("nothing.gguf", "no such file")])
def test_near_misses_of_models_get_one_line(model, says):
    assert_one_line(run("generate", "-p", "x", "-m", model), 1, says)
    assert_one_line(run("inspect", model), 1, says)


def test_hf_repo_is_a_model_on_the_hub():
    assert_one_line(run("inspect", "-hf", "nothing"), 1, "hf:nothing: expected hf:owner/name")
    assert_one_line(run("inspect", "--hf-repo=nothing"), 1, "hf:nothing")
    assert_one_line(run("inspect", "-hf", "a/b", "-hff", "x"), 2, "-hf owner/name:FILE")
    assert_one_line(run(*GREEDY, "-md", "nothing.gguf"), 1, "nothing.gguf")
    assert_one_line(run(*GREEDY, "--draft", 16), 2, "--draft-max 16")


def test_near_misses_of_names():
    assert_one_line(run("genrate"), 2, "no command 'genrate'; did you mean 'generate'?")
    assert_one_line(run("xyz"), 2, "no command 'xyz'; choose from generate, chat,")
    assert_one_line(run("generate", "--promt", "x"), 2, "--prompt")


def test_help_and_version():
    status, out, err = run("-h")
    names = [line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.startswith("  ") and line.strip()][:17]
    assert status == 0 and names == ("generate chat serve fit inspect convert verify bench synth trace compare judge eval sweep glass "
                                     "notebooks cache").split()
    assert 'refimpl generate -p "def main():"' in out and "refimpl chat hf:" in out and "..." not in out.partition("Commands:")[2]
    assert "--install-completion" in out
    assert run("-V")[1] == run("--version")[1]
    for name in names:
        assert run(name, "-h")[:2] == run(name, "--help")[:2] and run(name, "-h")[0] == 0


def test_nothing_is_overwritten_without_force(small, tmp_path, monkeypatch):
    there = tmp_path / "there.safetensors"
    there.write_text("precious")
    for command in (f"convert {small} -o {there}", f"synth E2B -o {there}", f"trace {small} --ids 2 -o {there}",
                    f"eval -f nothing.txt -o {there}", f"compare a b --plot {there}", f"compare a b --html {there}"):
        status = 3 if command.startswith("compare") else 1          # where 1 means that engines differ
        assert_one_line(run(*command.split()), status, f"{there} exists; --force overwrites it")
        assert there.read_text() == "precious"
    assert run("trace", small, "--ids", "2", "-o", there, "--backend", "reference", "--force")[0] == 0
    assert there.read_bytes()[:8] != b"precious" and os.listdir(tmp_path) == [there.name]


def test_a_trace_is_a_safetensors_file(tmp_path):
    assert_one_line(run("trace", "--ids", 2, "-o", tmp_path / "x.npz"), 2, "x.npz: a trace is a safetensors file")
    assert not list(tmp_path.iterdir())


def test_an_error_is_an_object_for_programs():
    status, out, err = run("inspect", "nothing.gguf", "--json")
    assert status == 1 and json.loads(out) == {"error": "nothing.gguf: no such file"} and err == "refimpl: nothing.gguf: no such file\n"
    status, out, err = run("generate", "--json")
    assert status == 2 and "-p TEXT" in json.loads(out)["error"]


def test_why_a_text_stops_is_said(small):
    assert "stopped at 2 tokens (-n)\n" in run(*GREEDY, "-n", 2, "-v")[2]
    assert "stopped at" not in run(*GREEDY, "-n", 2)[2]                 # standard output is no terminal
    assert "the context of 5 tokens is full (-c)\n" in run("generate", small, "-p", "ab", "-c", 5, "--temp", 0, "-v")[2]


def test_the_cache_is_shown_and_cleared(tmp_path):
    for name in ("kernels-avx2-0123456789abcdef", "kernels-portable-fedcba9876543210", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(bytes(1000))
    env = {"REFIMPL_CACHE_DIR": str(tmp_path)}
    status, out, err = run("cache", env=env)
    assert status == 0 and "kernels-avx2-0123456789abcdef" in out and "other\n" not in out and "of another version" in out
    listed = json.loads(run("cache", "--json", env=env)[1])["kernels"]
    assert [(entry["bytes"], entry["in_use"]) for entry in listed] == [(1000, False)] * 2
    assert_one_line(run("cache", "--clear", "owner/nothing", env=env), 2, "expected old, kernels, weights, read, or a downloaded model")
    assert "2.00 kB freed" in run("cache", "--clear", "old", env=env)[1]
    assert os.listdir(tmp_path) == ["other"]
