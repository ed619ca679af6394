"""The command line as a user meets it: its output, its complaints, its exit status."""

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from cli import ROOT, assert_one_line, files_of_at_most, process, run
from shapes import random_model, write_model

import refimpl
from refimpl.cli.app import replacing
from refimpl.formats.gguf_writer import write_gguf


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("cli") / "small.gguf", random_model("12B"))


def test_built_in_model_continues_a_prompt_on_standard_output():
    code, out, err = run("generate", "-p", "def main(", "-n", 12, "--temp", 0, "-v")
    assert code == 0 and out.startswith("def main(") and len(out) > 12
    assert "new 12 tokens" in err and "Traceback" not in err


def test_json_is_one_object_with_ids_text_and_timings():
    code, out, err = run("generate", "-p", "class ", "-n", 5, "--seed", 3, "--json")
    result = json.loads(out)
    assert code == 0 and len(result["ids"]) == result["n_generated"] == 5 and result["stop"] == "limit" and err == ""
    again = json.loads(run("generate", "-p", "class ", "-n", 5, "--seed", 3, "--json")[1])
    assert again["ids"] == result["ids"]
    assert json.loads(run("generate", "-p", "class ", "-n", 5, "--seed", 4, "--json")[1])["ids"] != result["ids"]


def test_prompt_from_standard_input_and_file(tmp_path):
    (tmp_path / "p.txt").write_text("import os\n")
    wanted = run("generate", "-p", "import os\n", "-n", 4, "--temp", 0)
    assert run("generate", "-p", "-", "-n", 4, "--temp", 0, stdin=b"import os\n") == wanted
    assert run("generate", "-f", tmp_path / "p.txt", "-n", 4, "--temp", 0) == wanted


def test_inspect_for_people_and_programs(small):
    code, out, _ = run("inspect", "-m", small)
    assert code == 0 and "sliding" in out and "memory" in out and "fits this machine: yes" in out
    assert "parameters" in out.splitlines()[2], "the summary comes first"
    assert "gemma4.block_count" not in out and "gemma4.block_count = 6" in run("inspect", "-m", small, "--all")[1]
    described = json.loads(run("inspect", "-m", small, "--json", "-c", 100)[1])
    assert described["metadata"]["general.architecture"] == "gemma4" and len(described["layers"]) == 6
    assert described["memory"]["kv_bytes"] == sum(4 * (1 * 32 * 128 if i == 5 else 2 * 16 * 128) for i in range(6)), "two blocks"


def test_chat_on_a_file_without_a_template_says_so(small):
    assert_one_line(run("chat", "-m", small, stdin=b"hello\n"), 1, "no chat template")           # before the first prompt


def test_chat_with_the_built_in_model():
    """It has no turns: messages and answers are one text that it continues, and never to the end of its context."""
    code, out, err = run("chat", "--backend", "reference", "--cache-dir", "none", "--temp", "0", "-n", "12", "--system", "import os",
                         stdin=b"def add(a, b):\n")
    assert code == 0 and out and out == run("generate", "--backend", "reference", "--temp", "0", "-n", "12",
                                            "-p", "import os\ndef add(a, b):\n")[1].replace("import os\ndef add(a, b):\n", "")
    assert "wrote 128 " in run("chat", "--cache-dir", "none", "--temp", "0", "-v", stdin=b"import sys\n")[2]


def test_bad_input_gets_one_line(small, tmp_path):
    whole = small.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-100])
    (tmp_path / "text.gguf").write_text("hello")
    write_gguf(tmp_path / "llama.gguf", {"general.architecture": "llama"}, [("token_embd.weight", "F32", np.zeros((4, 4), np.float32))])
    write_gguf(tmp_path / "draft.gguf", {"general.architecture": "gemma4-assistant"},
               [("token_embd.weight", "F32", np.zeros((4, 4), np.float32))])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")

    def integers(tensors):
        return [(name, "I8", np.zeros((*data.shape[:-1], 256), np.int8)) if name == "blk.0.ffn_up.weight" else (name, block, data)
                for name, block, data in tensors]
    other = write_model(tmp_path / "type.gguf", random_model("12B", hidden_size=256), change=integers)

    for name, says in (("missing.gguf", "no such file"), ("cut.gguf", "cut.gguf"), ("text.gguf", "GGUF"), ("llama.gguf", "'llama'"),
                       ("draft.gguf", "drafter"), (other.name, "I8"), (".", "folder")):
        assert_one_line(run("generate", "-p", "x", "-m", tmp_path / name), 1, says)
        if name != other.name:      # a type that cannot be computed with can still be looked at, and a drafter too
            assert_one_line(run("inspect", "-m", tmp_path / name), 1, "gemma4-assistant.embedding_length is missing" if name == "draft.gguf"
                            else says)
    assert "I8" in run("inspect", "-m", other)[1]
    assert_one_line(run("generate", "-m", small, "-p", "abcdefgh", "-c", 4), 1, "9 tokens", "holds 4")
    assert_one_line(run("generate", "-f", tmp_path / "latin.txt"), 1, "UTF-8")
    assert_one_line(run("generate", "-f", tmp_path / "nothing.txt"), 1, "No such file")
    assert_one_line(run("generate", "-p", "-", stdin=b"caf\xe9"), 1, "UTF-8")
    assert_one_line(run("generate", "-p", "x", "--min-p", 1), 1, "min_p")
    assert_one_line(run("generate", "-p", "x", "--arithmetic", "fp8"), 1, "'q8' or 'exact'")


def test_wrong_usage_gets_status_2():
    for line in ("generate -p x -n -2", "generate", "generate -p x -f y", "generate -p x --temp -1", "generate -p x --nonsense",
                 "generate -p x --think", "nonsense"):
        code, out, err = run(*line.split())
        assert code == 2 and out == "" and "Traceback" not in err and len(err.strip().splitlines()) == 1, (line, err)


def test_version_is_printed_and_nothing_else_done():
    for line in ("--version", "--version generate -p x"):
        assert run(*line.split()) == (0, refimpl.__version__ + "\n", "")


def test_empty_prompt_is_a_prompt():
    code, out, err = run("generate", "-p", "", "-n", 3, "--temp", 0)
    assert code == 0 and out.strip("\n") != "" or "Traceback" not in err


def test_closed_pipe_ends_quietly():
    command = f"{sys.executable} -m refimpl generate -p 'def ' -n 200 --temp 0 --backend reference | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, cwd=ROOT, timeout=120)
    assert done.stdout == b"d" and done.stderr == b""


def on_a_full_disk(*args) -> tuple[int, str]:
    """(exit status, standard error) of `refimpl ARGS` in this process, where nothing can be written to standard output."""
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full), contextlib.redirect_stderr(io.StringIO()) as err:
        return refimpl.cli.status(list(args)), err.getvalue()


def test_a_full_disk_gets_one_line_and_leaves_nothing(tmp_path):
    line = f"{sys.executable} -m refimpl generate -p 'def ' -n 3 --backend reference > /dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1 and done.stderr == b"refimpl: standard output: No space left on device\n", done.stderr
    for command in (["generate", "-p", "def ", "-n", "3"], ["generate", "-p", "def ", "-n", "3", "--json"], ["inspect"]):
        assert on_a_full_disk(*command) == (1, done.stderr.decode()), command
    target = tmp_path / "nowhere" / "x.gguf"
    assert_one_line(run("synth", "E2B-assistant", "-o", target), 1, f"{target}: No such file")
    with files_of_at_most(20 << 20):
        assert_one_line(run("synth", "E2B-assistant", "-o", tmp_path / "x.gguf"), 1, f"refimpl: {tmp_path / 'x.gguf'}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("named", [True, False])
def test_what_cannot_be_written_is_called_by_the_name_that_was_asked_for(tmp_path, named):
    path = tmp_path / "page.html"
    with pytest.raises(OSError, match="No space left") as raised, replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([str(temporary)] if named else []))
    assert raised.value.filename == str(path) and not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_was_said():
    command = [sys.executable, "-m", "refimpl", "generate", "-p", "def ", "-n", "100000", "--temp", "1", "--backend", "reference"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        said = b""
        while len(said) < 40 and (more := process.stdout.read1()):
            said += more
        process.send_signal(signal.SIGINT)
        rest, complaint = process.communicate(timeout=60)
    assert process.returncode == 130 and said.startswith(b"def ") and b"Traceback" not in complaint


def test_a_warning_is_a_note_of_one_line(small, tmp_path):
    value = b"\x06" + bytes(7)
    assert small.read_bytes().count(value + b"gemma4") == 2        # the architecture and the tokenizer's model
    (tmp_path / "odd.gguf").write_bytes(small.read_bytes().replace(value + b"gemma4", value + b"gemm\xff4", 1))
    code, out, err = run("inspect", "-m", tmp_path / "odd.gguf")
    assert code == 1 and err.splitlines()[0].startswith("note: metadata") and len(err.splitlines()) == 2 and "UnicodeWarning" not in err


def test_it_needs_no_writable_folder():
    """Nothing is written anywhere: an unwritable home or cache folder changes nothing."""
    env = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}
    assert process("generate", "-p", "def ", "-n", 2, "--backend", "reference", env=env)[0] == 0


@pytest.mark.exhaustive
def test_kernels_need_no_writable_folder():
    """They are compiled for this one process then."""
    env = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}
    assert process("generate", "-p", "def ", "-n", 2, env=env)[0] == 0


# ---- what is said to somebody who is nearly right

def test_help_is_a_command_and_an_unknown_one_is_answered_with_those_there_are():
    assert run("help") == run("--help")
    assert run("help", "cache")[1].startswith("Usage: refimpl cache")
    assert_one_line(run("brew"), 2, "no command 'brew'", "generate, chat, serve, fit, inspect")
    assert_one_line(run("help", "brew"), 2, "no command 'brew'")


def test_complaints_do_not_begin_with_a_phrase_that_says_nothing():
    assert run("generate")[2] == "refimpl: give the text with -p TEXT, -p - or -f FILE\n"
    assert "-n" in run("generate", "-p", "x", "-n", "x")[2]


def test_a_prompt_that_is_not_utf8_and_an_empty_name_get_one_line():
    assert_one_line(run("generate", "-p", "caf\udce9"), 1, "-p: not UTF-8")
    assert_one_line(run("generate", "-p", "x", "-m", ""), 1, "empty")
    assert_one_line(run("generate", "-p", "x", "-hf"), 2, "-hf requires an argument")


def test_a_terminal_without_the_characters_gets_the_text_anyway():
    code, out, err = process("generate", "-p", "é", "-n", 1, "--backend", "reference", env={"PYTHONIOENCODING": "ascii"})
    assert code == 0 and out.startswith("?") and err == ""


def test_a_folder_is_no_output(tmp_path):
    (tmp_path / "d.safetensors").mkdir()
    for line in (("trace", "-p", "x"), ("synth", "E2B-assistant"), ("convert", "x"), ("eval", "-f", "x")):
        assert_one_line(run(*line, "-o", tmp_path / "d.safetensors", "--force"), 1, "is a folder; give the name of a file")


def test_a_question_for_a_file_without_template_is_refused(small):
    assert_one_line(run("generate", "-m", small, "--chat", "-p", "x"), 1, "no chat template")
