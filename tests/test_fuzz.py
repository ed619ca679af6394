"""Any bytes either load or are refused in one line, in time and memory that go with the size of the file; see fuzz_cases.py.

1,000 generated cases a run (10,000 with -m exhaustive), most of them always the same and some new every time. What ever broke the promise
is in files/fuzz.
`python tests/fuzz.py` searches on with the help of coverage.
"""

import json
import os
import signal
import struct
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fuzz_cases import (
    BASES,
    PROJECTORS,
    laid_out,
    make_directory,
    make_gguf,
    make_template,
    read_checkpoint,
    read_everything,
    record,
    run_directory,
    run_gguf,
    run_projector,
    run_template,
    traced_peak,
)
from gguf_bytes import ARRAY, BOOL, STRING, U8, U64, array_key, gguf, key, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refimpl
from refimpl.formats.gguf import open_gguf
from refimpl.text.chat import encode_chat
from refimpl.text.templates import GEMMA4_TEMPLATE
from refimpl.text.tokenizer import Tokenizer

FOUND = Path(__file__).parent / "files" / "fuzz"
SECONDS = 2.0                   # of processor time that a case of less than 100 kB may take; a valid one takes 0.005
DECISIONS = st.binary(max_size=48)


# Each makes a function of bytes that raises for what breaks the promise -------------------------------------------------------


def gguf_bytes(folder):
    path = folder / "x.gguf"

    def run(data):
        path.write_bytes(data)
        return read_everything(path)
    return run


def safetensors_bytes(folder):
    (folder / "config.json").write_text("{}")

    def run(data):
        (folder / "model.safetensors").write_bytes(data)
        return read_checkpoint(folder)
    return run


def gguf_decisions(folder, backend="reference"):
    path = folder / "x.gguf"

    def run(data):
        path.write_bytes(make_gguf(data))
        return run_gguf(path, backend)
    return run


def projector_decisions(folder, backend="reference"):
    path = folder / "x.gguf"

    def run(data):
        path.write_bytes(make_gguf(data, PROJECTORS))
        return run_projector(path, backend)
    return run


def directory_decisions(folder):
    valid, inside = folder / "target.gguf", folder / "d"
    valid.write_bytes(make_gguf(b""))
    target = refimpl.load(valid, backend="reference")
    inside.mkdir()

    def run(data):
        for file in inside.iterdir():
            file.unlink()
        for name, raw in make_directory(data).items():
            (inside / name).write_bytes(raw)
        return run_directory(inside, target)
    return run


def template_decisions(folder):
    return lambda data: run_template(make_template(data))


TARGETS = {"container": gguf_bytes, "header": safetensors_bytes, "model": gguf_decisions, "projector": projector_decisions,
           "directory": directory_decisions, "template": template_decisions}
EXAMPLES = [bytes([how, base, changes, what, *range(20)])
            for how in (0, 1, 4, 9) for base in range(3) for changes in (0, 2) for what in (0, 5)]
SMALL = [gguf([array_key("t", STRING, ["ab", ""]), key("b", BOOL, True), key("n", U64, 7)], [tensor("w", [32, 2], 2)], bytes(36)),
         gguf([key("general.alignment", 4, 64)], [tensor("v", [8]), tensor("w", [4, 2], offset=64)], bytes(96), alignment=64)]
SEEDS = {"container": [*SMALL, make_gguf(b"")], "model": EXAMPLES, "projector": EXAMPLES, "directory": EXAMPLES[:8],
         "template": EXAMPLES[:8], "header": [make_directory(data)["model.safetensors"][:4000] for data in (b"", b"\1\2\3", b"\2\3\4\5")]}


@contextmanager
def in_time(seconds=SECONDS):
    """Fails, instead of hanging, once the block has used its processor time."""
    def stop(*_):
        raise AssertionError(f"more than {seconds} s of processor time")
    before, start = signal.signal(signal.SIGVTALRM, stop), time.process_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert time.process_time() - start < seconds


def many(n, always_the_same):
    """Settings of a fuzz test of `n` cases: always the same ones, or new ones every time."""
    return settings(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck), derandomize=always_the_same, database=None,
                    print_blob=True)


def written(folder, raw, name="x.gguf"):
    (folder / name).write_bytes(raw)
    return folder / name


# 1,000 cases, or 10,000 ------------------------------------------------------------------------------------------------------------------


def changed(seeds):
    """A seed with some bytes overwritten, or cut off."""
    def apply(seed, changes, cut):
        raw = bytearray(seed)
        for place, byte in changes:
            raw[place % len(raw)] = byte
        return bytes(raw[:cut] if cut < len(raw) else raw)
    return st.builds(apply, st.sampled_from(seeds), st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 255)), max_size=4),
                     st.integers(0, 20_000))


@pytest.mark.parametrize("part", [0.1, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("target, n, always_the_same, shares", [
    ("model", 2500, True, {"container": 0.2, "load": 0.05, "logits": 0.1}), ("model", 1000, False, {}),
    ("projector", 1200, True, {"container": 0.1, "load": 0.05, "tokens": 0.1}), ("projector", 500, False, {}),
    ("directory", 1200, True, {"container": 0.1, "load": 0.1, "logits": 0.1}), ("directory", 500, False, {}),
    ("container", 400, True, {"container": 0.1, "read": 0.05}), ("header", 200, True, {"container": 0.1}),
    ("template", 500, True, {"text": 0.1, "error": 0.3}), ("template", 200, False, {})])
def test_any_bytes_load_or_are_refused_in_one_line(tmp_path, target, n, always_the_same, shares, part):
    """`shares`: how many at least must get how far, so that the cases do not all die at the first check."""
    run, came, n = TARGETS[target](tmp_path), Counter(), max(80, int(n * part))     # fewer would say nothing about shares

    @many(n, always_the_same)
    @given(data=changed(SEEDS[target]) if target in ("container", "header") else DECISIONS)
    def check(data):
        with in_time():
            came[run(data)] += 1
    check()
    assert sum(came.values()) >= n and all(came[how] >= share * n for how, share in shares.items()), came


def test_the_decisions_begin_with_valid_files(tmp_path):
    assert run_gguf(written(tmp_path, make_gguf(b""))) == "logits" == TARGETS["directory"](tmp_path)(b"")
    for base in range(3):
        assert TARGETS["model"](tmp_path)(bytes([1, base])) == "logits"
        assert TARGETS["projector"](tmp_path)(bytes([1, base])) == "tokens"


@pytest.mark.parametrize("count", [0, 2])
def test_an_array_in_the_place_of_any_other_value(tmp_path, count):
    """Arrays compare, count and convert unlike everything else."""
    _, records, tensors = BASES["experts"]
    entries, body = laid_out(tensors)
    for name in records:
        keys = records | {name: array_key(name, U8, count=count, raw=bytes(count))}
        raw = gguf(list(keys.values()), [tensor(*entry) for entry in entries], bytes(body))
        assert run_gguf(written(tmp_path, raw)) in ("load", "logits"), name


@pytest.mark.parametrize(("decisions", "n"), [
    (gguf_decisions, 80), (projector_decisions, 40), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (
        (gguf_decisions, 300), (projector_decisions, 100)))])
def test_no_index_of_a_file_reaches_a_kernel_unchecked(tmp_path, decisions, n):
    """The same through the compiled kernels, which check nothing themselves."""
    run, came = decisions(tmp_path, "kernels"), Counter()

    @many(n, True)
    @given(data=DECISIONS)
    def check(data):
        came[run(data)] += 1
    check()
    assert came["logits"] + came["tokens"] >= n / 10, came


@pytest.mark.parametrize("path", sorted(FOUND.iterdir()), ids=lambda path: path.name)
def test_what_once_broke_the_promise(path, tmp_path):
    with in_time():
        TARGETS[path.name.split("-")[0]](tmp_path)(path.read_bytes())


# Memory and time ---------------------------------------------------------------------------------------------------------------

N = 65_536
LARGE = {       # files of megabytes, made to take many times their size
    "one emoji makes a text four times as wide": lambda: gguf([key("k", STRING, wide(40 << 20))]),
    "many such texts": lambda: gguf([key(f"k{i}", STRING, wide(4 << 20)) for i in range(8)]),
    "such keys": lambda: gguf([key("k%03d" % i + "a" * 65000 + "\U0001f642", U8, 1) for i in range(400)]),
    "text that is not UTF-8": lambda: gguf([key("k", STRING, struct.pack("<Q", 15 << 20) + b"\xff" * (15 << 20))]),
    "empty strings": lambda: gguf([array_key("t", STRING, count=1 << 17, raw=bytes(1 << 20))]),
    "an array of bools": lambda: gguf([array_key("k", BOOL, count=8 << 20, raw=bytes(8 << 20))]),
    "as many keys as there may be": lambda: gguf([b"".join(key(str(i), U8, 1) for i in range(N))], n_keys=N),
    "as many tensors as there may be": lambda: many_tensors(N),
    "an eighth as many": lambda: many_tensors(N // 8),
    "an array that says it is longer": lambda: gguf([array_key("k", U64, count=1 << 60, raw=bytes(4 << 20))]),
    "arrays of arrays": lambda: gguf([array_key("k", ARRAY, count=1, raw=struct.pack("<IQ", ARRAY, 1) * 300_000)]),
}


def many_tensors(n):
    return gguf([], [b"".join(tensor(str(i), [1], offset=32 * i) for i in range(n))], bytes(32 * n), n_tensors=n)


def wide(n):
    """A string of `n` letters and an emoji, as bytes of a file."""
    return struct.pack("<Q", n + 4) + b"a" * n + "\U0001f642".encode()


def peak_within(call, n_bytes):
    came, peak = traced_peak(call)
    assert peak < 3 * n_bytes + (64 << 20), f"{peak / 2**20:.0f} MB for a file of {n_bytes / 2**20:.1f} MB"
    return came


@pytest.mark.parametrize("what", [pytest.param(what, marks=pytest.mark.exhaustive if what == "as many tensors as there may be" else ())
                                  for what in LARGE])
def test_memory_and_time_go_with_the_size_of_the_file(what, tmp_path):
    raw = LARGE[what]()
    path = written(tmp_path, raw)
    with in_time(2 + len(raw) / 2e6):
        opened_or_refused(path)
    peak_within(lambda: opened_or_refused(path), len(raw))      # apart from the time: counting allocations takes most of it


def opened_or_refused(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnicodeWarning)
        try:
            return open_gguf(path)
        except refimpl.GGUFError as error:
            assert "\n" not in str(error)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = {
    "empty lists": lambda: b'{"a":[' + b"[]," * (2 << 20) + b"[]]}",
    "a product of endless numbers": lambda: json.dumps({"a": ENTRY | {"shape": [10**4000] * 1500}}).encode(),
    "a million dimensions": lambda: json.dumps({"a": ENTRY | {"shape": [1] * 200_000}}).encode(),
    "a wide text": lambda: b'{"a":"' + b"a" * (7 << 20) + '\U0001f642"}'.encode(),
    "deep": lambda: b"[" * 400_000,
    "many tensors on one place": lambda: json.dumps({f"t{i}": ENTRY for i in range(10_000)}).encode(),
    "no text as a type": lambda: json.dumps({"a": ENTRY | {"dtype": []}}).encode(),
    "a name twice": lambda: (json.dumps({"a": ENTRY})[:-1] + "," + json.dumps({"a": ENTRY})[1:]).encode(),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_of_safetensors_files_too(what, tmp_path):
    header = HEADERS[what]()
    raw = struct.pack("<Q", len(header)) + header + bytes(64)
    (tmp_path / "config.json").write_text("{}")
    written(tmp_path, raw, "model.safetensors")
    with in_time(2 + len(raw) / 1e6):
        assert peak_within(lambda: read_checkpoint(tmp_path), len(raw)) == "container", "none of them is valid"


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert read_checkpoint(tmp_path) == "container"


@pytest.mark.parametrize("n", [40, pytest.param(100, marks=pytest.mark.exhaustive)])
def test_a_share_of_the_cases_stays_within_its_memory(tmp_path, n):
    run = gguf_decisions(tmp_path)

    @many(n, True)
    @given(data=DECISIONS)
    def check(data):
        peak_within(lambda: run(data), (tmp_path / "x.gguf").stat().st_size if data else 0)
    check()


def test_what_a_file_says_about_its_context_takes_no_memory(tmp_path):
    raw, records = make_gguf(b""), BASES["dense"][1]
    for name in ("gemma4.context_length", "gemma4.attention.sliding_window"):
        assert raw.count(records[name]) == 1
        raw = raw.replace(records[name], record(name, 1 << 30))
    path = written(tmp_path, raw)
    assert peak_within(lambda: run_gguf(path), len(raw)) == "logits"


# Vocabularies ------------------------------------------------------------------------------------------------------------------

BYTES = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256))]
CHAIN, POWERS = ["a" * n for n in range(1, 400)], ["a" * 2**n for n in range(15)]
ABSURD = {      # tokens, merges, the type of the tokens, the unit of a long text
    "a chain of merges": (CHAIN, [f"{token} a" for token in CHAIN[:-1]], 1, "a"),
    "the same from the left": (CHAIN, [f"a {token}" for token in CHAIN[:-1]], 1, "a"),
    "powers": (POWERS, [f"{token} {token}" for token in POWERS[:-1]], 1, "a"),
    "merges in a circle": (["a", "b", "ab", "ba", "aba", "bab", "abab"], ["a b", "b a", "ab a", "ba b", "aba b", "a bab"] * 50, 1, "ab"),
    "merges of nothing": (["a", "", "aa"], [" ", "a ", " a", "a a"], 1, "a"),
    "a token of a million characters": (["a", "b" * 10**6], [], 1, "ab"),
    "all of it from bytes": (["b"], [], 1, "\U0001f642"),
    "many tokens that are looked for first": ([f"<{i}>" for i in range(5000)], [], 4, "<77><"),
    "nested tokens that are looked for first": (["a" * n + "b" for n in range(200)], [], 4, "a"),
    "many control tokens": ([f"<|{i}|>" for i in range(20_000)], [], 3, "<|7|><|"),
    "nested control tokens": (["a" * n + "b" for n in range(1, 256)], [], 3, "aaa"),
}


def tokenizer_of(tokens, merges, kind):
    types = np.array([3, 3, 3, 2] + [6] * 256 + [kind] * len(tokens), np.int32)
    return Tokenizer.from_metadata({
        "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": BYTES + tokens, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1}, "x")


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_vocabularies_encode_in_time_that_goes_with_the_text(what):
    *parts, unit = ABSURD[what]
    tokenizer, text = tokenizer_of(*parts), unit * (30_000 // len(unit.encode()))
    for special in (False, True):
        with in_time(3):                                        # it takes 0.1 s at most; if it went with the square, a minute
            ids = tokenizer.encode(text, special=special)
        assert tokenizer.decode(ids, special=True) == "<bos>" + text
    with in_time(3):
        encode_chat(tokenizer, GEMMA4_TEMPLATE, [{"role": "user", "content": text[:20_000]}])


@pytest.mark.parametrize("tokens, merges, kind, says", [
    (["a" * 257], [], 4, "more than 256 characters"), (["a" * 257], [], 3, "more than 256 characters"),
    ([f"{i}" for i in range(1 << 19)], [], 1, "expected at most 524288"), (["a"], ["a a"] * ((1 << 20) + 1), 1, "expected at most 1048576"),
    (["a"], ["a zq"], 1, "unknown token 'zq'"), (["a"], ["a a"], 1, "unknown token 'aa'"), (["a"], ["a" * 10**6], 1, "is not two tokens")])
def test_vocabularies_beyond_the_limits_are_refused(tokens, merges, kind, says):
    with pytest.raises(refimpl.TokenizerError, match=says) as caught:
        tokenizer_of(tokens, merges, kind)
    assert len(str(caught.value)) < 1000


def test_overlapping_markers_of_a_hostile_vocabulary_stay_text_too():
    tokenizer = tokenizer_of(["xyz", "yzw", "zw"], [], 3)
    ids = encode_chat(tokenizer, GEMMA4_TEMPLATE, [{"role": "user", "content": "xyzw"}])
    assert not {260, 261, 262} & set(ids)
