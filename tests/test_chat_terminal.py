"""`refimpl chat` as somebody at a terminal meets it, and in pipes."""

import json
import os
import signal
import stat
import subprocess
import sys

import pytest
from cli import ROOT, assert_one_line, process, run
from terminal_chat import ALT_ENTER, CTRL_C, CTRL_D, LEFT, UP, Chat, spoken, with_template

import refimpl
from refimpl.cli.conversation import transcript
from refimpl.cli.conversation.line import Line, meaning, opens_block
from refimpl.cli.conversation.turns import with_files
from refimpl.text.chat import CHANNEL_END, THOUGHT, encode_chat

REFERENCE = ("--backend", "reference", "--cache-dir", "none")
LINES = "class A:\n    x = 1\n\n    def f(self):\n/exit\n        return self.x"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("chat") / "chat.gguf")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of the scripted conversation."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def scripted(model, data):
    """One conversation for many tests, with a model that answers by a script (terminal_chat.py)."""
    chat = Chat(model, *REFERENCE, "--session", "s", data=data, scripted=True)
    yield chat
    assert chat.end() == 0


@pytest.fixture
def chat(scripted):
    """The same, from the beginning."""
    scripted.say("/clear")
    scripted.say("/system -")
    return scripted


# ---- the line

def test_a_paste_is_one_message_whatever_is_in_it(chat, data):
    chat.paste(LINES)
    assert f"{len(LINES)} characters" in chat.say("")
    for text in ('"""Module."""\nx = 1', "/help\nwhat does this command do?", "/usr/bin/env: No such file", "a\r\nb"):
        chat.paste(text)
        chat.say("")
    assert spoken(data)[::2] == [LINES, '"""Module."""\nx = 1', "/help\nwhat does this command do?", "/usr/bin/env: No such file", "a\nb"]


def test_a_long_paste_arrives_whole(chat, data):
    text = "".join(f"{i}, " for i in range(2700))[:12_512] + "!"
    chat.paste(text)
    assert "12513 characters" in chat.say("") and spoken(data)[0] == text


def test_a_line_is_edited_and_found_again(chat, data):
    chat.say("helo" + LEFT + "l")
    chat.say(UP + "!")
    chat.say("one" + ALT_ENTER + "two")
    chat.say("")
    chat.say("   ")
    assert spoken(data)[::2] == ["hello", "hello!", "one\ntwo"]
    history = data / "history"
    assert "+hello!\n" in history.read_text() and stat.S_IMODE(history.stat().st_mode) == 0o600


def test_quotes_open_a_block(chat, data):
    chat.keys('"""first\r')
    chat.keys("\r")
    chat.say('/exit"""')
    assert spoken(data)[0] == "first\n\n/exit"


@pytest.mark.parametrize(("typed", "line"), [
    ("/help", Line("help", "")), (" /system  be kind\nplease ", Line("system", "be kind\nplease")), ("//help", Line(None, "/help")),
    ("/", Line("", "")), ("/?", Line("?", "")), ("/usr/bin/x is gone", Line(None, "/usr/bin/x is gone")), ("  hi\n", Line(None, "hi")),
    ('"""a\nb"""', Line(None, "a\nb")), ('"""a', Line(None, "a")), ('"""', Line(None, "")), ("", Line(None, ""))])
def test_what_a_line_means(typed, line):
    assert meaning(typed) == line
    assert meaning(typed, literal=True) == Line(None, typed.strip())


def test_where_a_block_ends():
    assert [opens_block(text) for text in ('"""', '""" x', '"""x"""', '""""""', '"""""', 'x """', "")] == [True, True, False, False, True,
                                                                                                     False, False]


# ---- commands

def test_commands_are_not_sent(chat, data):
    said = chat.say("/help")
    assert all(f"/{name}" in said for name in ("undo", "regen", "file PATH", "exit"))
    assert "did you mean /help?" in chat.say("/hlep") and "/help lists them" in chat.say("/zzzz")
    assert "takes nothing" in chat.say("/undo it") and "/save FILE: writes" in chat.say("/save")
    assert "said nothing yet" in chat.say("/regen") and "said nothing yet" in chat.say("/undo") and "nothing to forget" in chat.say("/drop")
    assert spoken(data) == []
    assert "5 characters" in chat.say("//help") and spoken(data)[0] == "/help"


def test_messages_are_taken_back_answered_again_and_edited(chat, data):
    chat.say("first")
    chat.say("second")
    assert "seed 1, 6 characters" in chat.say("/regen") and "seed 2, 6 characters" in chat.say("/regen")
    assert len(spoken(data)) == 4 and "forgotten: second" in chat.say("/undo") and spoken(data)[0] == "first" and len(spoken(data)) == 2
    chat.say("third")
    assert "forgotten: first" in chat.say("/drop") and spoken(data)[::2] == ["third"]
    chat.say("/edit")
    assert "seed 0, 6 characters" in chat.say("!") and spoken(data)[::2] == ["third!"]


def test_the_instruction_is_set_shown_and_removed(chat, data):
    assert "no instruction" in chat.say("/system")
    chat.say("/system be kind")
    chat.say("hello")
    assert json.loads((data / "sessions/s.json").read_text())["system"] == "be kind" and "be kind" in chat.say("/system")
    chat.say("/clear")
    assert "be kind" in chat.say("/system")
    chat.say("/system -")
    assert json.loads((data / "sessions/s.json").read_text())["system"] is None


def test_a_file_goes_along(chat, data, tmp_path):
    (tmp_path / "a b.txt").write_text("contents ```\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    chat.say(f'/file "{tmp_path}/a b.txt" what is it?')
    wanted = "a b.txt:\n````\ncontents ```\n````\n\n"
    assert spoken(data)[0] == wanted + "what is it?"
    assert "goes along" in chat.say(f"/file {tmp_path}/a b.txt")
    chat.say("and now?")
    chat.say("alone")
    assert spoken(data)[2::2] == [wanted + "and now?", "alone"]
    assert "not UTF-8" in chat.say(f"/file {tmp_path}/latin.txt") and "No such file" in chat.say(f"/file {tmp_path}/c.txt why?")
    chat.say(f"/file {tmp_path}/a b.txt")
    chat.say("/file -")
    chat.say("bare")
    assert spoken(data)[6::2] == ["bare"]
    assert with_files([], "x") == "x" and with_files([("n", "t")], "") == "n:\n```\nt\n```"


def test_a_conversation_is_saved_and_loaded(chat, data, tmp_path):
    chat.say("hello")
    assert "saved to" in chat.say(f"/save {tmp_path}/c.json") and "saved to" in chat.say(f"/save {tmp_path}/c.json")
    assert stat.S_IMODE((tmp_path / "c.json").stat().st_mode) == 0o600
    (tmp_path / "notes.txt").write_text("mine")
    assert "exists and is no saved" in chat.say(f"/save {tmp_path}/notes.txt") and (tmp_path / "notes.txt").read_text() == "mine"
    assert "/nowhere/x: No such file" in chat.say("/save /nowhere/x")
    chat.say("/clear")
    assert "line 1, column 1" in chat.say(f"/load {tmp_path}/notes.txt") and "No such file" in chat.say("/load nowhere")
    assert "goes on after 2 messages" in chat.say(f"/load {tmp_path}/c.json") and spoken(data)[0] == "hello"
    (data / "sessions/broken.json").write_text("{")
    said = chat.say("/sessions")
    assert "s: 2 messages (this one)" in said and "broken: cannot be read" in said
    assert "2 messages, a context of" in chat.say("/stats")


# ---- Ctrl-C

def test_ctrl_c_at_the_prompt_gives_a_new_one(chat, data):
    chat.keys(CTRL_C)
    chat.ready()
    chat.keys("half a mess")
    chat.keys(CTRL_C)
    chat.ready()
    chat.say("hello")
    assert spoken(data)[::2] == ["hello"]
    chat.say(UP + UP + "age")
    assert spoken(data)[2] == "half a message"


def test_ctrl_c_while_a_message_is_read_gives_it_back(chat, data):
    chat.say("before")
    chat.keys("slow prompt\r")
    chat.shows("READING")
    chat.keys(CTRL_C)
    chat.ready()
    assert len(spoken(data)) == 2
    assert "15 characters" in chat.say("\x01no, ")           # Ctrl-A: in front of it
    assert spoken(data)[::2] == ["before", "no, slow prompt"]


def test_ctrl_c_stops_an_answer_and_keeps_what_there_is(chat, data):
    chat.keys("slow answer\r")
    chat.shows("WRITING")
    chat.keys(CTRL_C)
    chat.ready()
    assert spoken(data) == ["slow answer", "WRITING"]


def test_a_message_that_does_not_fit_comes_back_after_a_command(chat, data):
    chat.say("before")
    said = chat.say("too long, perhaps")
    assert "the context holds 8; /drop forgets" in said and "comes back" in said
    chat.say("/drop")
    chat.say("\x01not ")
    assert spoken(data)[::2] == ["not too long, perhaps"]


def test_what_is_typed_during_an_answer_waits_for_the_next_prompt(chat, data):
    chat.keys("pause\r")
    chat.shows("WRITING")
    before = chat.terminal.before
    assert before.rindex("\x1b[?2004h") > before.rindex("\x1b[?2004l"), "pastes are not marked as such"
    chat.paste(LINES)
    chat.keys("\r")
    assert "class" not in chat.ready() and f"{len(LINES)} characters" in chat.ready()
    assert spoken(data)[::2] == ["pause", LINES]


# ---- thoughts

def test_thoughts_are_dim_and_their_markers_never_shown(chat, data):
    said = chat.say("think")
    assert THOUGHT not in said and CHANNEL_END not in said and "thought" not in said
    shown = said.replace("\x1b[0m\x1b[2m", "")
    assert "\x1b[2mlet me see\x1b[0m\r\n\r\nso it is\r\n" in shown
    assert spoken(data) == ["think", "so it is"]


def test_a_terminal_is_not_given_orders(chat, data):
    assert "a\ufffd[31mb\tc\ufffdd\r\n" in chat.say("escape")
    assert spoken(data)[1] == "a\x1b[31mb\tc\x9bd\n"


def test_a_pipe_gets_the_answer_without_thoughts(model, monkeypatch, tmp_path):
    from terminal_chat import scripted_events

    from refimpl.decode import session

    monkeypatch.setattr(session, "events", scripted_events)
    assert run("chat", model, *REFERENCE, "--think", stdin="think") == (0, "so it is\n", "")


# ---- a real model

def test_what_was_read_is_not_read_again_and_a_full_context_goes_on(model, tmp_path):
    chat = Chat(model, "-n", 24, "-c", 128, "--temp", 0, "-v", data=tmp_path, env={"NO_COLOR": "1"})
    first = chat.say("def first(x):")
    assert "reused 0 tokens, read" in first and "begins like it" in first
    second = chat.say("def second(x):")
    empty_thought = 6           # tokens that the template puts before an answer, but not before earlier ones
    known = int(second.split("reused ")[1].split()[0])          # more where there was time to read ahead
    assert known >= int(first.split(", read ")[1].split()[0]) - empty_thought
    said = [second, *(chat.say(f"def f{i}(x): return x + {i}") for i in range(3))]
    assert any("tokens of context are left; /drop" in text and "-c 256" in text for text in said)
    assert any("128 tokens is full; /drop" in text or "the context holds 128; /drop" in text for text in said)
    chat.keys(CTRL_C)
    chat.ready()
    for _ in range(5):
        chat.say("/drop")
    assert "reused" in chat.say("\x15def again(x):")
    assert chat.end(CTRL_D) == 0


def test_without_a_limit_an_answer_is_stopped_and_the_conversation_goes_on(model, tmp_path):
    chat = Chat(model, *REFERENCE, "--temp", "1.5", "--session", "s", data=tmp_path)
    chat.keys("class A:\r")
    chat.terminal.expect(r"\x1b\[1A\x1b\[2K[^\x1b]{20}")          # behind the bar of the prompt: words of the answer
    chat.keys(CTRL_C)
    chat.ready()
    assert spoken(tmp_path)[0] == "class A:" and "tokens" in chat.say("/stats")
    assert chat.end() == 0


# ---- sessions

def test_a_session_survives_being_killed(model, tmp_path):
    chat = Chat(model, *REFERENCE, "--session", "s", data=tmp_path, scripted=True)
    chat.say("one")
    chat.keys("slow answer\r")
    chat.shows("WRITING")
    assert_one_line(run("chat", model, "--session", "s", env={"REFIMPL_DATA_DIR": str(tmp_path)}), 1, "s is open in another")
    chat.terminal.kill(signal.SIGKILL)
    chat.terminal.wait()
    assert spoken(tmp_path)[0] == "one" and len(spoken(tmp_path)) == 2
    path = tmp_path / "sessions/s.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    chat = Chat(model, *REFERENCE, "--session", "s", data=tmp_path, scripted=True)
    chat.say(UP + UP + "!")          # what was typed is known again too
    assert chat.end() == 0 and spoken(tmp_path)[2:] == ["one!", "seed 0, 4 characters"]


def test_a_session_goes_on_in_pipes(model, tmp_path):
    env = {"REFIMPL_DATA_DIR": str(tmp_path)}
    command = ("chat", model, "-n", 5, "--temp", 0, "--session", "s", *REFERENCE)
    assert run(*command, "--system", "short", stdin="def a(x):", env=env)[0] == 0
    code, out, err = run(*command, "-v", stdin="def b(x):\n\n\ndef c(x):\n", env=env)
    assert code == 0 and out.strip() and "goes on after 2 messages" in err
    m = refimpl.load(model, backend="reference")
    messages = [{"role": "system", "content": "short"}, *({"role": role, "content": text} for role, text in
                                                         zip(("user", "assistant", "user"), spoken(tmp_path)))]
    n = len(encode_chat(m.tokenizer, m.file.metadata["tokenizer.chat_template"], messages))
    assert f"read {n} (" in err and spoken(tmp_path)[2] == "def b(x):\n\n\ndef c(x):"


@pytest.mark.parametrize(("text", "says"), [
    ("{", "line 1, column 2"), ("[]", "expected"), ('{"format": "other"}', "'other'"), (b"\xff", "byte 0: not UTF-8"),
    ('{"format": "refimpl chat 1"}', "messages is not a list"), ("[" * 100_000, "nested"),
    ('{"format": "refimpl chat 1", "messages": [], "system": 1}', "system"),
    ('{"format": "refimpl chat 1", "messages": [{"role": "system", "content": ""}]}', "message 1: expected"),
    ('{"format": "refimpl chat 1", "messages": [{"role": "user", "content": "\\ud800"}]}', "message 1: content")])
def test_a_bad_transcript_is_one_line(tmp_path, text, says):
    path = tmp_path / "sessions/s.json"
    path.parent.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_one_line(run("chat", "nowhere.gguf", "--session", "s", env={"REFIMPL_DATA_DIR": str(tmp_path)}), 1, str(path), says)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 65, "a\n"])
def test_a_name_cannot_lead_elsewhere(name, tmp_path):
    assert_one_line(run("chat", "--session", name, env={"REFIMPL_DATA_DIR": str(tmp_path)}), 1, "cannot name a session")


def test_where_nothing_can_be_written_the_conversation_goes_on(model):
    chat = Chat(model, *REFERENCE, "--session", "s", data="/proc/nowhere", scripted=True)
    assert "the conversation is not on disk" in chat.say("hello") and "5 characters" in chat.say(UP)
    assert chat.end(CTRL_D) == 0


def test_a_full_disk_leaves_the_old_transcript(tmp_path):
    path = tmp_path / "s.json"
    transcript.write(path, "m", [{"role": "user", "content": "kept"}])
    code = ("import sys; from refimpl.cli.conversation import transcript; from pathlib import Path\n"
            "transcript.write(Path(sys.argv[1]), 'm', [{'role': 'user', 'content': 'x' * 100_000}])")
    done = subprocess.run(["bash", "-c", f"trap '' XFSZ; ulimit -f 8; exec {sys.executable} -c \"$0\" {path}", code], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "OSError" in done.stderr
    assert transcript.read(path).messages == [{"role": "user", "content": "kept"}] and os.listdir(tmp_path) == ["s.json"]


# ---- pipes

@pytest.mark.parametrize("called", [run, pytest.param(process, marks=pytest.mark.exhaustive)])
def test_standard_input_is_one_message(model, called):
    code, out, err = called("chat", model, "-n", 5, "--temp", 0, *REFERENCE, stdin="def a(x):\n\n/exit\n")
    assert code == 0 and out.strip() and err == "stopped at 5 tokens (-n)\n"
    assert run("chat", model, *REFERENCE, stdin="\n") == (0, "", "note: standard input is empty, there is nothing to answer\n")
    assert_one_line(run("chat", model, *REFERENCE, stdin=b"caf\xe9"), 1, "not UTF-8")
    assert run("chat", model, "-n", -1, "-c", 24, *REFERENCE, stdin="def")[2].endswith("24 tokens is full; -c 48 at the start gives more\n")
    assert_one_line(run("chat", model, *REFERENCE, "-c", 8, stdin="long enough"), 1, "the context holds 8")
    assert_one_line(run("chat", model, "--cache-ram", "much"), 2, "is no size")
