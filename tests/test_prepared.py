"""Rearranged weights on the disk: the same bits from the copy as from the file, and whatever is wrong with a copy, none of it computes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli import assert_one_line, run
from filelock import FileLock

import refimpl
from refimpl.files.verify import verify
from refimpl.loading import model as loading
from refimpl.loading import prepared, residency, tile_file, tile_folders
from refimpl.loading.memory import products_of
from refimpl.loading.model import BUILT_IN
from refimpl.model.weights import weights_from_gguf

IDS = list(range(2, 40))
ALL = 66         # matrices of the built-in model


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The built-in model as a file of its own; nothing is too small to be kept."""
    monkeypatch.setattr(prepared, "SMALL", 0)
    for module in (tile_file, tile_folders):
        monkeypatch.setattr(module, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr("refimpl.kernels.machine.cache_folder.cache_root", lambda: tmp_path / "cache")
    return shutil.copy(BUILT_IN, tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def expected():
    return refimpl.load(cache_disk=0, threads=1).logits(IDS).tobytes()


def started(path, expected, **options):
    """Loads and computes. Returns (names of the matrices that were mapped from the start, the notes); everything is written at the end."""
    made = []
    original = prepared.preparer

    def remember(*args):
        made.append(original(*args))
        return made[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "preparer", remember)
        model = refimpl.load(path, threads=1, **options)
    before = made[0].mapped
    assert model.logits(IDS).tobytes() == expected
    model.wait_until_kept()
    return before, model.notes


def folder_of(tmp_path) -> Path:
    (folder,) = (tmp_path / "cache").glob("weights-*")
    return folder


def test_the_second_start_maps_everything(source, expected, tmp_path):
    first, notes = started(source, expected)
    assert not first and len(notes) == 1 and "mapped from the next start on" in notes[0]
    second, notes = started(source, expected)
    index = json.loads((folder_of(tmp_path) / "index.json").read_bytes())
    assert not notes and set(index["done"]) == second and len(second) == ALL
    model = refimpl.load(source, threads=1)
    tiles = model.weights.head_VD.raw
    assert tiles.flags.writeable, "else every kernel is compiled twice"
    while isinstance(tiles.base, np.ndarray):
        tiles = tiles.base
    assert isinstance(tiles, np.memmap) and Path(tiles.filename).resolve() == (folder_of(tmp_path) / "tiles").resolve()
    assert not started(source, expected, cache_disk=0)[0], "0: none is read either"


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's own account of the mapping")
def test_touching_maps_every_page_of_a_matrix_and_no_other(tmp_path):
    matrices = [SimpleNamespace(name=name, type="Q4_0", shape=(4096, 4096)) for name in "ab"]
    copy = tile_file.TileFile(tmp_path, "key", "model", [], matrices)
    copy.create()
    copy.touch({"b"})
    account = Path("/proc/self/smaps").read_text().partition(str(copy.data))[2]
    assert int(account.partition("Rss:")[2].split()[0]) == copy.n_bytes // 2 >> 10


def test_a_small_model_and_a_disk_of_nothing_keep_nothing(source, expected, tmp_path, monkeypatch):
    assert started(source, expected, cache_disk=0) == (frozenset(), ())
    monkeypatch.setattr(prepared, "SMALL", 10**8)
    assert started(source, expected) == (frozenset(), ()) and not (tmp_path / "cache").exists()


def cut(folder):
    os.truncate(folder / "tiles", 5000)


def altered(folder):
    with open(folder / "tiles", "r+b") as file:
        file.write(b"\xff" * 4096)


def emptied(folder):
    (folder / "index.json").write_text("{")


def of_another_model(folder):
    index = json.loads((folder / "index.json").read_bytes())
    (folder / "index.json").write_text(json.dumps(index | {"key": "0" * 64}))


def nonsense(folder):
    index = json.loads((folder / "index.json").read_bytes())
    (folder / "index.json").write_text(json.dumps(index | {"done": {"head": "x", "blk.0.attn_q.weight": None}}))


def gone(folder):
    (folder / "tiles").unlink()


def a_folder(folder):
    gone(folder)
    (folder / "tiles").mkdir()
    (folder / "tiles" / "x").touch()


DAMAGES = [(cut, "not as they were written"), (altered, "1 matrices are not as they were written"), (emptied, ""), (of_another_model, ""),
           (nonsense, ""), (gone, "")]


@pytest.mark.parametrize("damage,says", DAMAGES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_damaged_copy_is_made_again(damage, says, source, expected, tmp_path):
    started(source, expected)
    damage(folder_of(tmp_path))
    before, notes = started(source, expected)
    assert says in "; ".join(notes) and len(before) in (0, ALL - 1)
    assert len(started(source, expected)[0]) == ALL


def test_what_cannot_be_written_is_a_note(source, expected, tmp_path):
    started(source, expected)
    a_folder(folder_of(tmp_path))
    assert "rearranged at every start" in "; ".join(started(source, expected)[1])
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    before, notes = started(source, expected)
    assert not before and f"{tmp_path / 'cache'}" in notes[0]


def test_a_file_that_changed_is_another_model(source, expected, tmp_path):
    started(source, expected)
    os.utime(source)
    assert not started(source, expected)[0] and len(list((tmp_path / "cache").glob("weights-*"))) == 2
    moved = source.rename(tmp_path / "moved.gguf")
    assert len(started(moved, expected)[0]) == ALL, "the same file under another name"


def test_a_changed_weight_under_the_same_time_and_size(source, tmp_path, expected):
    """Beyond what an opening notices where it lies between the samples; here it is in one."""
    status = os.stat(source)
    started(source, expected)
    with open(source, "r+b") as file:
        file.seek((status.st_size - 4096) * 40 // 63 + 10)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not prepared.preparer(*arguments(source)).mapped


def arguments(path, cache_disk=prepared.CACHE_DISK):
    model = refimpl.load(path, threads=1, cache_disk=0)
    return (model.file, products_of(stored(model)), model.backend.prepare, model.backend.held, cache_disk)


def test_another_process_writes(source, expected, tmp_path):
    started(source, expected)
    folder = folder_of(tmp_path)
    emptied(folder)
    with FileLock(folder / "lock"):
        before, notes = started(source, expected)
    assert not before and "another process is writing" in notes[0] and (folder / "index.json").read_text() == "{"


def test_where_memory_is_short_tiles_are_written_before_they_are_used(source, expected, monkeypatch, tmp_path):
    model = refimpl.load(source, threads=1, cache_disk=0, n_ctx=64)
    need = loading.needed(stored(model), model.config, 64, loading.CHUNK, model.backend.kv_type, model.backend.held)
    monkeypatch.setattr(loading, "available", lambda: need.total - 1)
    with pytest.raises(refimpl.MemoryRefusal):
        refimpl.load(source, threads=1, cache_disk=0, n_ctx=64)
    before, _ = started(source, expected, n_ctx=64)
    assert len(before) == ALL and len(started(source, expected, n_ctx=64)[0]) == ALL
    monkeypatch.setattr(loading, "available", lambda: need.total - need.weights)
    with pytest.raises(refimpl.MemoryRefusal):              # vectors, keys and values still need memory
        refimpl.load(source, threads=1, n_ctx=64)


def stored(model):
    return weights_from_gguf(model.file, model.config)


def test_a_full_disk(source, expected, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tile_folders.shutil, "disk_usage", lambda path: usage._replace(free=tile_folders.FREE_BYTES + 1000))
    before, notes = started(source, expected)
    assert not before and "the disk of" in notes[0] and not list((tmp_path / "cache").glob("weights-*/tiles"))
    monkeypatch.undo()


def test_a_disk_that_fills_up_leaves_fewer_matrices(source, expected, monkeypatch, tmp_path):
    keep, kept = tile_file.TileFile.keep, []

    def until_full(self, matrix, tiles):
        if len(kept) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        kept.append(matrix.name)
        keep(self, matrix, tiles)
        self.commit()
    monkeypatch.setattr(tile_file.TileFile, "keep", until_full)
    started(source, expected)
    monkeypatch.setattr(tile_file.TileFile, "keep", keep)
    assert started(source, expected)[0] == set(kept)
    assert len(started(source, expected)[0]) == ALL


def test_what_is_kept_is_bounded(source, expected, tmp_path):
    copies = [shutil.copy(source, tmp_path / f"{i}.gguf") for i in range(3)]
    for i, path in enumerate(copies):
        os.utime(path, (i, i))
        started(path, expected)
    folders = tile_folders.tile_folders()
    size = max(folder.n_bytes for folder in folders)
    assert [Path(f.files[0]).name for f in folders] == ["2.gguf", "1.gguf", "0.gguf"] and all(f.current for f in folders)
    assert "more than --cache-disk allows" in started(source, expected, cache_disk=size // 2)[1][0]
    started(copies[0], expected)                        # used: now 1.gguf is the oldest
    started(source, expected, cache_disk=int(2.5 * size))
    assert {Path(f.files[0]).name for f in tile_folders.tile_folders()} == {"model.gguf", "0.gguf"}


def test_of_another_user_nothing_is_used(source, expected, monkeypatch):
    started(source, expected)
    mine = os.getuid()
    monkeypatch.setattr(tile_file, "ours", lambda path: path.stat().st_uid == mine + 1)
    before, notes = started(source, expected)
    assert not before and "belongs to another user" in notes[0]


def test_a_process_that_is_killed_leaves_what_it_had(source, expected, tmp_path):
    code = f"""
import time
from refimpl.loading import prepared, tile_file, tile_folders
from pathlib import Path
prepared.SMALL = 0
for module in (tile_file, tile_folders):
    module.cache_root = lambda: Path({str(tmp_path / "cache")!r})
keep = tile_file.TileFile.keep
def slowly(self, *args):
    keep(self, *args)
    self.commit()
    print("kept", flush=True)
    time.sleep(0.05)
tile_file.TileFile.keep = slowly
import refimpl
refimpl.load({str(source)!r}, threads=1)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        for _ in range(5):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    before, _ = started(source, expected)
    assert 5 <= len(before) < ALL and len(started(source, expected)[0]) == ALL


def test_verify_compares_all_of_it(source, expected, tmp_path):
    def copy_check():
        (check,) = (check for check in verify(source, run=False)["checks"] if check["name"] == "copy")
        return check
    assert copy_check()["state"] == "left out"
    started(source, expected)
    assert copy_check()["state"] == "ok" and f"{ALL} of {ALL}" in copy_check()["summary"]
    with open(folder_of(tmp_path) / "tiles", "r+b") as file:
        file.seek(9000)                                 # between the samples
        file.write(b"\x01\x02\x03\x04")
    assert len(refimpl.load(source, threads=1).weights.layers) == 6
    check = copy_check()
    assert check["state"] == "FAILED" and len(check["findings"]) == 1 and "--clear weights" in check["findings"][0]


def test_the_command_lists_and_clears(source, expected, tmp_path):
    started(source, expected)
    code, out, _ = run("cache")
    assert code == 0 and "rearranged weights of model.gguf" in out and "changed" not in out
    os.utime(source)
    code, out, _ = run("cache", "--json")
    (entry,) = json.loads(out)["weights"]
    assert not entry["current"] and entry["files"] == [str(source)] and entry["bytes"] > 10**6
    code, out, _ = run("cache", "--clear", "old")
    assert code == 0 and not list((tmp_path / "cache").glob("weights-*"))
    started(source, expected)
    assert run("cache", "--clear", "weights", "--json")[0] == 0 and not list((tmp_path / "cache").glob("weights-*"))
    with pytest.raises(ValueError, match="not a folder"):
        tile_folders.remove([tmp_path])


def test_what_a_killed_measurement_left_is_removed_and_a_running_ones_is_not(source, tmp_path):
    """`fit --check` makes such folders."""
    for name in ("trial-killed", "trial-at_work"):
        inside = tmp_path / "cache" / name / "weights-0123456789abcdef"
        inside.mkdir(parents=True)
        (inside / "tiles").write_bytes(bytes(50_000))
    with FileLock(tmp_path / "cache" / "trial-at_work" / "lock"):
        code, out, _ = run("cache", "--json")
        assert sorted((Path(entry["path"]).name, entry["current"]) for entry in json.loads(out)["weights"]) == [
            ("trial-at_work", True), ("trial-killed", False)] and all(entry["bytes"] >= 50_000 for entry in json.loads(out)["weights"])
        assert run("cache", "--clear", "old")[0] == 0
    assert [path.name for path in (tmp_path / "cache").glob("trial-*")] == ["trial-at_work"]


@pytest.mark.parametrize("size", ["x", "-1", "3 parsecs", ""])
def test_a_size_that_is_none(size):
    assert_one_line(run("generate", "-p", "x", "--cache-disk", size), 2, "is no size")


def test_a_file_that_changes_while_it_is_mapped(source):
    model = refimpl.load(source, threads=1, cache_disk=0)
    os.replace(shutil.copy(source, f"{source}.new"), source)
    model.logits(IDS)                                   # moved into its place: the old one is still ours
    model = refimpl.load(source, threads=1, cache_disk=0)
    time.sleep(0.01)
    with open(source, "r+b") as file:
        file.write(b"GGUF")
    with pytest.raises(refimpl.GGUFError, match="was changed while it was in use; load it again"):
        model.logits(IDS)


def test_locking_says_what_it_locked(source, monkeypatch):
    (note,) = refimpl.load(source, threads=1, cache_disk=0, lock=True).notes
    assert "locked in memory" in note

    class Refusing:
        def mlock(self, *args):
            return -1
    monkeypatch.setattr(residency.ctypes, "CDLL", lambda *args, **options: Refusing())
    assert "only 0.00 GB" in refimpl.load(source, threads=1, cache_disk=0, lock=True).notes[0]
