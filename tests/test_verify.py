"""Checking files and machines: each kind of damage is found and named; the bits of the built-in model are the known ones."""

import hashlib
import json
import shutil
from pathlib import Path

import cli
import numpy as np
import pytest
from directories import save
from shapes import random_model, write_model

from refimpl.cli.show.verify import as_text
from refimpl.files import reproducibility as selftest
from refimpl.files import verify as module
from refimpl.files.verify import check_metadata, check_structure, compare_runs, not_finite, verify
from refimpl.formats.gguf import open_gguf
from refimpl.formats.quants.blocks import BLOCKS, bytes_of
from refimpl.kernels.machine.isa import BEST, ISA, ORDER
from refimpl.loading.model import BUILT_IN

DIGEST = hashlib.sha256(BUILT_IN.read_bytes()).hexdigest()
FLOATS = [(name, field) for name, block in BLOCKS.items() for field, kind, _ in block.fields
          if np.dtype(kind).kind == "f" or name == "BF16"]


def damaged(tmp_path, tensor: str, row: int, number: int, patch: bytes) -> Path:
    """The built-in model with `patch` at the start of a block."""
    path, file = tmp_path / "damaged.gguf", open_gguf(BUILT_IN)
    info = file.tensors[tensor]
    data = bytearray(BUILT_IN.read_bytes())
    at = info.offset + row * info.row_bytes + number * BLOCKS[info.type].n_bytes
    data[at:at + len(patch)] = patch
    path.write_bytes(data)
    return path


def states(result) -> dict[str, str]:
    return {check["name"]: check["state"] for check in result["checks"]}


def findings(result) -> list[str]:
    return [line for check in result["checks"] for line in check["findings"]]


# ---- files

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name,field", FLOATS)
def test_every_float_field_of_every_type_is_looked_at(name, field, value):
    block = BLOCKS[name]
    rng, n = np.random.default_rng(0), 6
    fields = {f: (rng.integers(0, 100, (4, n, count) if count > 1 else (4, n))).astype(kind) for f, kind, count in block.fields}
    assert list(not_finite(bytes_of(block, **fields), block)) == []
    for row, at in ((2, 3), (3, 5)):
        fields[field][row, at] = value if name != "BF16" else (np.array(value, np.float32).view(np.uint32) >> 16)
    ((what, count, first),) = not_finite(bytes_of(block, **fields), block)
    assert field in what or what == "a number"
    assert (count, first) == (2, 2 * n + 3)


def test_a_tensor_is_looked_at_in_pieces(monkeypatch):
    block, values = BLOCKS["F32"], np.zeros((50, 8), np.float32)
    values[[7, 33, 49], [1, 2, 7]] = np.nan
    for step in (1, 32, 100, 1 << 20):
        monkeypatch.setattr(module, "STEP_BYTES", step)
        assert list(not_finite(values.view(np.uint8), block)) == [("a number", 3, 7 * 8 + 1)]


@pytest.mark.parametrize("tensor,row,number,patch,says", [
    ("blk.2.attn_q.weight", 5, 1, np.float16(np.nan).tobytes(), "a scale (d)"),
    ("blk.0.ffn_norm.weight", 0, 9, np.float32(np.inf).tobytes(), "a number"),
    ("blk.4.ffn_down_exps.weight", 300, 0, np.float16(-np.inf).tobytes(), "a scale (d)")])
def test_damage_is_named_by_tensor_and_block(tmp_path, tensor, row, number, patch, says):
    path = damaged(tmp_path, tensor, row, number, patch)
    result = verify(path)
    (line,) = findings(result)
    info = open_gguf(path).tensors[tensor]
    at = info.offset + row * info.row_bytes + number * BLOCKS[info.type].n_bytes
    assert f"{path}: tensor {tensor} ({info.type}): 1 of " in line and says in line
    assert line.endswith(f"the first in block {number} of row {row}, byte {at}"), line
    assert not result["ok"] and states(result) == {"structure": "ok", "metadata": "ok", "sha256": "ok", "numbers": "FAILED",
                                                   "copy": "left out", "same bits": "left out", "known bits": "left out"}


def test_truncated_missing_and_other_files_are_one_line_each(tmp_path):
    whole = BUILT_IN.read_bytes()
    for name, content, says in (("cut.gguf", whole[:-1000], "cut off"), ("head.gguf", whole[:3000], "it is cut off or damaged"),
                                ("text.gguf", b"hello", "GGUF"), ("missing.gguf", None, "no such file")):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        result = verify(path)
        assert [says in line and str(path) in line and "\n" not in line for line in findings(result)] == [True], findings(result)
        assert not result["ok"] and states(result)["numbers"] == states(result)["same bits"] == "left out"


def test_a_tensor_with_no_place_is_found(tmp_path):
    path = tmp_path / "renamed.gguf"
    path.write_bytes(BUILT_IN.read_bytes().replace(b"blk.3.ffn_up.weight", b"blk.3.ffn_xx.weight"))
    check, file = check_structure(path)
    assert check.state == "FAILED" and "blk.3.ffn_up.weight is missing" in check.findings[0] and file is not None


def test_a_key_that_this_version_does_not_know_is_named_and_refused_by_strict(tmp_path):
    path = write_model(tmp_path / "future.gguf", random_model("12B"), extra={"gemma4.future.trick": 1, "gemma4x.other": 2})
    for strict, state in ((False, "ok"), (True, "FAILED")):
        check = check_metadata(open_gguf(path), strict)
        assert check.state == state and "gemma4.future.trick" in check.summary and "gemma4x" not in check.summary
        assert len(check.findings) == 1 and "gemma4.future.trick is not a key this version knows" in check.findings[0]
    assert check_metadata(open_gguf(BUILT_IN), True).state == "ok"


def test_hash_is_held_against_a_given_one():
    assert states(verify(None, sha256=[DIGEST.upper()], run=False))["sha256"] == "ok"
    result = verify(None, sha256=["0" * 64], run=False)
    assert not result["ok"] and DIGEST in findings(result)[0] and "expected " + "0" * 64 in findings(result)[0]
    assert "2 hashes given for a model of 1 files" in findings(verify(None, sha256=[DIGEST] * 2, run=False))[0]
    assert DIGEST in as_text(verify(None, run=False))


def test_a_drafter_is_looked_at_and_not_run():
    result = verify(BUILT_IN.with_name("drafter.gguf"))
    assert result["ok"] and states(result)["numbers"] == "ok" and states(result)["same bits"] == "left out"


@pytest.mark.parametrize("parts,finite", [((0x0000, 0x0000, 0xC000, 0x7000), False), ((0x0000, 0x0000, 0xB000, 0x7000), True)])
def test_a_scale_in_four_parts_is_checked(parts, finite):
    """IQ1_M keeps its half in the upper nibbles of four words: 0x7C00 is infinite, 0x7B00 is 57344."""
    block = BLOCKS["IQ1_M"]
    scales = np.zeros((2, 3, 4), np.uint16)
    scales[1, 2] = parts
    raw = bytes_of(block, qs=np.zeros((2, 3, 32), np.uint8), qh=np.zeros((2, 3, 16), np.uint8), scales=scales)
    assert list(not_finite(raw, block)) == ([] if finite else [("a scale", 1, 5)])


def test_a_file_in_the_hubs_cache_is_held_against_what_the_hub_lists(tmp_path):
    """The cache keeps a large file under the SHA-256 that the repository lists, and links to it."""
    for digest, state in ((DIGEST, "ok"), ("0" * 64, "FAILED")):
        blob, link = tmp_path / "blobs" / digest, tmp_path / "snapshots" / digest[:4] / "model.gguf"
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(BUILT_IN, blob)
        link.symlink_to(blob)
        result = verify(link, run=False)
        assert states(result)["sha256"] == state and (state == "FAILED" or "as the hub lists it" in as_text(result))


def test_a_directory_is_looked_at(tmp_path):
    folder = save(tmp_path / "model", random_model("E2B"))
    result = verify(folder, run=False)
    assert result["ok"] and "Hugging Face directory" in as_text(result)
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-4:] = b"\xff" * 4
    shard.write_bytes(data)
    assert "not finite" in findings(verify(folder, run=False))[0]


# ---- machines

def test_built_in_model_has_the_known_bits():
    """What this machine computes is what was computed where the hashes were taken. A change of the arithmetic changes them."""
    found = list(selftest.runs(None, [("q8", 2, 16), ("exact", 2, 16), ("q8", 1, selftest.N_TOKENS)]))
    assert {run["isa"] for run in found} == {ISA}
    assert [run["sha256"] for run in found] == [selftest.KNOWN[arithmetic] for arithmetic in ("q8", "exact", "q8")]


def test_a_process_of_its_own_runs_under_the_set_it_is_given():
    said = []
    selftest.run_in_process(None, BEST, [("q8", 1, 80)], said.append)
    runs = [what["run"] for what in said if "run" in what]
    assert said[-1] == {"end": True} and [(run["isa"], run["threads"], run["sha256"]) for run in runs] == [(BEST, 1, selftest.KNOWN["q8"])]


def test_a_process_that_fails_says_why(tmp_path):
    said = []
    selftest.run_in_process(tmp_path / "nothing.gguf", BEST, [("q8", 1, 80)], said.append)
    assert len(said) == 1 and "no such file" in said[0]["error"]
    said.clear()
    selftest.run_in_process(None, "nonsense", [("q8", 1, 80)], said.append)
    assert len(said) == 1 and "REFIMPL_ISA=nonsense" in said[0]["error"]


def played(change):
    """check_runs with every process played: the known hashes, but for what `change` makes of a run."""
    def run_in_process(path, isa, combinations, receive):
        for arithmetic, threads, rows in combinations:
            receive({"run": change({"isa": isa, "arithmetic": arithmetic, "threads": threads, "rows": rows,
                                 "sha256": selftest.KNOWN[arithmetic]})})
    return run_in_process


def test_other_bits_are_named_by_where_they_came_from(monkeypatch):
    def change(run):
        return run | ({"sha256": "0"} if (run["rows"], run["arithmetic"]) == (2, "q8") else {})
    monkeypatch.setattr(selftest, "run_in_process", played(change))
    same, known = module.check_runs(None, 3)
    assert same.findings == [f"q8: other bits on {BEST}, threads 3, 2 rows a call than on {BEST}, threads 3, 1 rows a call"]
    assert same.state == "FAILED" and known.state == "ok"
    monkeypatch.setattr(selftest, "run_in_process", played(lambda run: run | {"sha256": "0"}))
    same, known = module.check_runs(None, 3)
    assert same.state == "ok" and known.state == "FAILED" and len(known.findings) == 2
    assert module.check_runs(Path("other.gguf"), 3)[1].state == "left out"


def test_the_plan_has_every_width_number_of_threads_and_set(monkeypatch):
    monkeypatch.setattr(selftest, "run_in_process", played(lambda run: run))
    same, known = module.check_runs(None, 5)
    isas = ", ".join(reversed(ORDER[:ORDER.index(BEST) + 1]))
    assert f"runs: {isas}; threads: 5, 1, 2; rows a call: 1, 2, 5, 16, 80" in same.summary and known.state == "ok"
    assert compare_runs([], False)[0].state == "ok"


# ---- the command

def test_command_line(tmp_path):
    def run(*args):
        return cli.run("verify", *args)
    code, out, err = run("--no-run", "--json", "--sha256", DIGEST)
    assert code == 0 and json.loads(out)["ok"] and err == ""
    path = damaged(tmp_path, "blk.2.attn_q.weight", 5, 1, np.float16(np.nan).tobytes())
    code, out, err = run("-m", path)
    assert code == 1 and err == "" and out.count("FAILED") == 1 and "blk.2.attn_q.weight" in out and "Traceback" not in out
    code, out, err = run("--sha256", "xyz")
    assert code == 2 and out == "" and "64 hexadecimal digits" in err
    shutil.rmtree(tmp_path)
    assert run("-m", path)[0] == 1
