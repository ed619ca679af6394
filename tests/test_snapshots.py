"""What was read, on the disk: known after a restart, and nothing that is wrong with a file gets into an answer."""

import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import psutil
import pytest
from cli import run
from kernel_cases import same
from shapes import prompt
from terminal_chat import with_template

import refimpl
from refimpl.decode import snapshots as module
from refimpl.decode.prefixes import Prefixes
from refimpl.decode.snapshots import Snapshots
from refimpl.formats.safetensors import CheckpointError

TEXT = prompt(500)
ENOUGH = 1 << 30


@pytest.fixture(scope="module")
def model():
    return refimpl.load()


@pytest.fixture(scope="module")
def states(model):
    """The state of every token of TEXT, read in one go."""
    return model.prefill(TEXT, model.new_cache())


def begin(model, folder, limit=ENOUGH, budget=ENOUGH):
    return Prefixes(model, budget, Snapshots(folder, model, limit))


def read(prefixes, n, states):
    """Reads the first n tokens of TEXT and compares. Returns how many were known."""
    found = prefixes.find(TEXT[:n], None)
    known = found.cache.length
    state_TD = prefixes.model.prefill(TEXT[known:n], found.cache)
    assert same(state_TD, states[known:n])
    prefixes.keep(TEXT[:n], found.cache)
    return known


@pytest.fixture
def folder(tmp_path, model, states):
    """Three turns: files of 200, 150 and 100 tokens."""
    prefixes = begin(model, tmp_path)
    assert [read(prefixes, n, states) for n in (200, 350, 450)] == [0, 200, 350]
    assert prefixes.snapshots.notes == [] and len(files(tmp_path)) == 3
    return tmp_path


def files(folder):
    """The oldest turn first."""
    found = list(folder.glob("read-*/*.safetensors"))
    return sorted(found, key=lambda path: json.loads(header(path)["__metadata__"]["refimpl"])["first"])


def header(path):
    raw = path.read_bytes()
    return json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])


def test_after_a_restart_nothing_is_read_again(folder, model, states):
    prefixes = begin(model, folder)
    assert prefixes.n_bytes == 0, "mapped"
    assert read(prefixes, 450, states) == 449 and read(begin(model, folder), 500, states) == 450
    assert read(begin(model, folder), 350, states) == 349, "back to an earlier end"
    assert read(begin(model, folder, budget=0), 500, states) == 499, "files alone are enough"


def test_a_turn_writes_what_is_new(folder, model):
    sizes = [path.stat().st_size for path in files(folder)]
    blocks = [json.loads(header(path)["__metadata__"]["refimpl"])["blocks"] for path in files(folder)]
    windows = [table.window for table in model.new_cache(1).tables]
    assert dict(zip(windows, zip(*blocks))) == {64: ([2, 3], [4, 5], [6, 7]), None: ([0, 1, 2, 3], [3, 4, 5], [5, 6, 7])}
    assert sizes[1] < sizes[0]
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in folder.glob("read-*")) or os.name == "nt"


@pytest.mark.parametrize("which, known", [(0, 0), (1, 200), (2, 350)])
@pytest.mark.parametrize("damage", ["cut", "altered", "header", "empty", "renamed", "gone"])
def test_a_damaged_file_is_passed_over(folder, model, states, which, known, damage):
    path = files(folder)[which]
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(raw[:-100])
    elif damage == "altered":
        raw[-1000] ^= 1
        path.write_bytes(raw)
    elif damage == "header":
        path.write_bytes(raw.replace(b'"first', b'"worst', 1).replace(b"first", b"worst", 1))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "renamed":
        path.rename(path.with_name("0" * 32 + ".safetensors"))
    else:
        path.unlink()
    prefixes = begin(model, folder)
    assert read(prefixes, 450, states) in (known, known // 64 * 64)
    assert [("passed over" in note) for note in prefixes.snapshots.notes] == [True] * (damage != "gone")
    assert read(begin(model, folder), 450, states) == 449, "written again"


def test_another_model_has_another_folder(folder, model, states, tmp_path):
    changed = shutil.copy(model.file.path, tmp_path / "other.gguf")
    other = refimpl.load(changed)
    assert begin(other, folder).find(TEXT[:450], None).cache.length == 0
    exact = refimpl.load(arithmetic="exact")
    assert begin(exact, folder).find(TEXT[:450], None).cache.length == 0
    moved = Snapshots(folder, other, ENOUGH).folder
    shutil.copytree(files(folder)[0].parent, moved)
    prefixes = begin(other, folder)
    assert prefixes.find(TEXT[:450], None).cache.length == 0
    assert len(prefixes.snapshots.notes) == 3 and "of another model or version" in prefixes.snapshots.notes[0]


def test_the_least_recently_used_go_first(folder, model, states):
    sizes = sum(path.stat().st_size for path in files(folder))
    prefixes = begin(model, folder, limit=sizes + 1000)
    other = [3, *TEXT[:300]]
    found = prefixes.find(other, None)
    model.prefill(other, found.cache)
    prefixes.keep(other, found.cache)
    assert sum(path.stat().st_size for path in files(folder)) <= sizes + 1000
    assert begin(model, folder).find(other, None).cache.length == 300
    assert read(begin(model, folder), 450, states) in (200, 350), "the end of the older sequence went, not its beginning"


def test_what_had_to_make_room_is_forgotten(folder, model):
    """The tree of a server that runs for months has no more than the disk has."""
    sizes = sum(path.stat().st_size for path in files(folder))
    prefixes = begin(model, folder, limit=sizes, budget=0)
    for first in range(300, 320):
        found = prefixes.find([first, *TEXT[:199]], None)
        model.prefill([first, *TEXT[:199]][found.cache.length:], found.cache)
        prefixes.keep([first, *TEXT[:199]], found.cache)
    nodes = list(prefixes._nodes())
    assert {snapshot.name for node in nodes for snapshot in node.stored.values()} == {path.stem for path in files(folder)}
    assert 0 < len(files(folder)) < 6 and all(node.n_known or node.children for node in nodes) and not prefixes.snapshots.deleted


def test_a_file_is_open_only_while_its_blocks_are_used(folder, model, states):
    """Each turn writes one, and a process may have some thousand descriptors."""
    process = psutil.Process()
    if not hasattr(process, "num_fds"):
        pytest.skip("no descriptors to count")
    prefixes = begin(model, folder)
    before = process.num_fds()
    found = prefixes.find(TEXT[:450], None)
    assert found.cache.length == 449 and process.num_fds() == before + 3
    again = prefixes.find(TEXT[:450], None)
    assert process.num_fds() == before + 3, "mapped once"
    del found, again
    assert process.num_fds() == before
    assert read(prefixes, 500, states) == 450 and process.num_fds() == before


def test_a_file_that_goes_while_the_model_is_loaded(folder, model, states):
    """Another process had to make room, or somebody has cleared the folder: what is left is used, and it is nothing to tell."""
    prefixes = begin(model, folder)
    min(files(folder), key=lambda path: path.stat().st_mtime_ns).unlink()           # the latest turn: those before count as used later
    assert read(prefixes, 450, states) in (320, 350) and prefixes.snapshots.notes == []
    for path in files(folder):
        path.unlink()
    assert read(prefixes, 450, states) == 0 and read(prefixes, 450, states) == 449


def test_a_file_that_cannot_be_opened_now_is_not_deleted(folder, model, states, monkeypatch):
    """All descriptors are taken, say: what was read is read again."""
    prefixes, before = begin(model, folder), files(folder)

    def refuse(path, *args):
        raise CheckpointError(path, None, "cannot be opened: Too many open files")
    with monkeypatch.context() as patch:
        patch.setattr(module, "map_file", refuse)
        assert prefixes.find(TEXT[:450], None).cache.length == 0
    assert set(before) <= set(files(folder)) and read(begin(model, folder), 450, states) == 449


def test_a_full_disk_and_a_folder_that_cannot_be_written(model, states, tmp_path, monkeypatch):
    def full(self, name, row, rows):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
    with monkeypatch.context() as patch:
        patch.setattr(module.TensorWriter, "write", full)
        told = []
        prefixes = Prefixes(model, ENOUGH, Snapshots(tmp_path, model, ENOUGH, told.append))
        assert [read(prefixes, n, states) for n in (200, 350, 450)] == [0, 200, 350], "it goes on in memory"
        assert "No space left on device" in told[0] and not list(tmp_path.rglob("*.tmp"))
        assert told == prefixes.snapshots.notes and len(told) == 1, "once, not for every answer"
    (tmp_path / "file").write_text("")
    prefixes = begin(model, tmp_path / "file")
    assert read(prefixes, 200, states) == 0 and "not kept on the disk" in prefixes.snapshots.notes[0]


def test_of_another_user_nothing_is_used(folder, model, monkeypatch):
    if not hasattr(os, "getuid"):
        pytest.skip("no users")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    for path in files(folder):
        os.chown(path, 54321, -1) if os.geteuid() == 0 else None
    prefixes = begin(model, folder)
    assert prefixes.find(TEXT[:450], None).cache.length == 0 and "belongs to another user" in prefixes.snapshots.notes[0]


KILLED = """
import os, signal, sys
import refimpl
from refimpl.decode.prefixes import Prefixes
from refimpl.decode import snapshots
model = refimpl.load()
prefixes = Prefixes(model, 1 << 30, snapshots.Snapshots(sys.argv[1], model, 1 << 30))
ids = [int(i) for i in sys.argv[2].split(",")]
for n in (200, 350, 450):
    if n == 450:
        write = snapshots.TensorWriter.write
        def killed(self, *args):
            write(self, *args)
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        snapshots.TensorWriter.write = killed
    found = prefixes.find(ids[:n], None)
    model.prefill(ids[found.cache.length:n], found.cache)
    prefixes.keep(ids[:n], found.cache)
"""


def test_a_process_that_is_killed_while_it_writes_leaves_the_turns_before(tmp_path, model, states):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), ",".join(map(str, TEXT))], capture_output=True)
    assert done.returncode == -9
    prefixes = begin(model, tmp_path)
    assert read(prefixes, 450, states) == 350 and prefixes.snapshots.notes == []


def test_two_processes_write_the_same_file_once(folder, model, states):
    one, two = begin(model, folder), begin(model, folder)
    before = len(files(folder))
    assert read(one, 500, states) == 450 == read(two, 500, states) and len(files(folder)) == before + 1
    assert np.array_equal(one.find(TEXT, None).cache.length, two.find(TEXT, None).cache.length)


def test_the_command_lists_and_clears(folder, model):
    environment = {"REFIMPL_CACHE_DIR": str(folder)}
    [path] = folder.glob("read-*")
    size = sum(file.stat().st_size for file in files(folder))
    assert json.loads(run("cache", "--json", env=environment)[1])["read"] == [{"path": str(path), "bytes": size, "model": model.name}]
    assert f"what {model.name} has read" in run("cache", env=environment)[1]
    assert str(path) in run("cache", "--clear", "read", env=environment)[1] and not path.exists()


def test_a_session_goes_on_after_a_restart(tmp_path):
    path = with_template(tmp_path / "chat.gguf")
    answers = []
    for _ in range(2):
        session = refimpl.load(path).session(system="be short", cache_dir=tmp_path)
        answers.append([session.chat(text, max_new_tokens=12).text for text in ("def f(x):", "class A:")])
        assert [message["role"] for message in session.messages] == ["system", *["user", "assistant"] * 2] and session.notes == ()
        reused, n_prompt = session.stats.reused, session.stats.n_prompt
    assert answers[0] == answers[1] and reused == n_prompt - 1, "the second time it was all known"
    cold = session.model.session(system="be short")
    for text, answer in zip(("def f(x):", "class A:"), answers[0]):
        assert cold.chat(text, max_new_tokens=12).text == answer, "and is what an answer without a disk is"
    session.read_ahead()
    session.chat("import", max_new_tokens=5)
    cold.chat("import", max_new_tokens=5)
    assert session.messages == cold.messages
    assert cold.stats.n_prompt - cold.stats.reused > 12 + session.stats.n_prompt - session.stats.reused, "the answer had been read ahead"


def test_the_checksum_counts(folder, model, states, monkeypatch):
    """Without it a changed byte would be computed with."""
    path = files(folder)[1]
    raw = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(raw[:8], "little")
    raw[first:] = b"\x3c" * (len(raw) - first)
    path.write_bytes(raw)
    monkeypatch.setattr(module, "zlib", SimpleNamespace(crc32=lambda raw: mock.ANY))
    with pytest.raises(AssertionError):
        read(begin(model, folder), 500, states)
