"""The GGUF reader: what it must read exactly as gguf-py does, and what it must refuse, always with GGUFError.

Files on which readers are known to have failed, and the case (of BAD) or test here that has each:

    empty, magic only, cut header             empty, magic-only, cut-header, test_truncation_at_every_byte
    counts of 2^63                            n-keys-2^63, n-tensors-2^63, n-keys-beyond-the-bytes, n-tensors-beyond-the-bytes
    a string of 2^62 or past the end          string-length-2^62, string-past-the-end, key-length-2^62, key-past-the-end
    an array of 2^40 bytes                    array-of-2^40-u8, array-of-2^61-u64-wraps, array-of-2^61-strings
    an array of 10^6 with 8 bytes there       array-of-1e6-u8-with-8-bytes, array-of-strings-one-too-many
    nested arrays                             nested-array, nested-5000-deep
    a key or tensor twice                     duplicate-key, duplicate-tensor
    alignment 0 or 3, or huge                 alignment-0, alignment-3, alignment-131072, alignment-2147483648
    5 or 10^6 dimensions                      n-dims-5, n-dims-1e6, n-dims-0
    a product of dimensions that wraps        dims-product-wraps, dims-product-wraps-to-8
    a dimension of zero                       zero-dimension
    an unknown type                           unknown-type-99, removed-type-4
    a row that is not whole blocks            row-not-whole-blocks
    an offset past the end, data cut          offset-past-the-end, offset-2^64-32, data-one-byte-short, data-of-the-last-tensor-cut
    not aligned, two on one range, holes      offset-not-aligned, two-tensors-on-one-range, tensors-overlap-out-of-order,
                                              test_holes_between_tensors_are_harmless
    a name of 64 bytes                        name-64-bytes, name-64-bytes-in-32-letters
    a key that is not UTF-8                   key-not-utf8, test_values_that_are_not_utf8_are_replaced_with_a_warning
    a bool of 2                               bool-2, bool-2-in-array
    a scale of infinity or NaN                test_infinite_and_nan_scales_are_read_as_they_are (they reach the arithmetic, which survives)
"""

import gc
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import warnings

import gguf as gguf_py
import numpy as np
import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    TYPE_F32,
    TYPE_Q4_0,
    U8,
    U32,
    U64,
    array_key,
    gguf,
    key,
    string,
    tensor,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.formats.gguf import GGUFError, StringArray, open_gguf
from refimpl.formats.gguf_writer import Deferred, write_gguf
from refimpl.formats.matrix import Matrix
from refimpl.formats.quants.blocks import BLOCKS, TYPE_IDS

ARCH = key("general.architecture", STRING, "gemma4")
FLOATS = np.arange(8, dtype=np.float32).tobytes()


def write(folder, raw: bytes, name="model.gguf"):
    path = folder / name
    path.write_bytes(raw)
    return path


# What must be read ---------------------------------------------------------------------------------------------------------

METADATA = {
    "general.architecture": "gemma4", "general.name": "", "tokenizer.chat_template": "{{ 'ä\n\U0001f600' }}",
    "b.true": True, "b.false": False, "f": 0.25,
    "i.small": 7, "i.negative": -7, "i.big": 2**40, "i.most": 2**64 - 1, "i.least": -2**63,
    "list.str": ["<pad>", "", "▁a", "ß\U0001f600"], "list.bool": [True, False, True],
    "list.int": [8, 8, -2], "list.big": [1, 2**40], "list.float": [0.5, -1.0],
    **{f"np.{kind}": np.array([0, 1, 1], kind) for kind in ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32",
                                                            "uint64", "int64", "float32", "float64")},
    "np.scalar": np.uint16(65535),
}


def tensors_of_all_kinds():
    rng = np.random.default_rng(1)
    for name, block in BLOCKS.items():
        if name == "Q8_1" or name not in gguf_py.GGMLQuantizationType.__members__:
            continue                                            # gguf-py sizes Q8_1 otherwise (see blocks.py); newer types
        shape = (2, 3, block.n_bytes * 2)
        raw = rng.integers(0, 256, shape, np.uint8)
        is_plain = name in ("F16", "F32", "F64", "I8", "I16", "I32", "I64")
        yield f"{name}.weight", name, raw.view(name.replace("F", "float").replace("I", "int") if is_plain else "uint8")
    yield "one", "F32", np.ones(1, np.float32)
    yield "four", "F16", np.ones((2, 1, 3, 5), np.float16)


@pytest.fixture(scope="module")
def full_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "full.gguf"
    write_gguf(path, METADATA, tensors_of_all_kinds())
    return path


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray | StringArray | np.generic) else value


def test_round_trip_of_metadata(full_file):
    with open_gguf(full_file) as file:
        assert list(file.metadata) == list(METADATA)
        for name, want in METADATA.items():
            got = file.metadata[name]
            assert plain(got) == plain(want), name
            assert type(plain(got)) is type(plain(want)), name
            if name.startswith("np.") and isinstance(want, np.ndarray):
                assert got.dtype == want.dtype and not got.flags.writeable, name


def test_metadata_equals_gguf_py(full_file):
    reader = gguf_py.GGUFReader(full_file)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    with open_gguf(full_file) as file:
        assert {name: plain(value) for name, value in file.metadata.items()} == theirs


def test_tensors_equal_gguf_py(full_file):
    theirs = {t.name: t for t in gguf_py.GGUFReader(full_file).tensors}
    with open_gguf(full_file) as file:
        assert list(file.tensors) == list(theirs)
        for name, info in file.tensors.items():
            want, raw = theirs[name], file.raw(name)
            assert (info.type, info.n_bytes, info.offset) == (want.tensor_type.name, want.n_bytes, want.data_offset), name
            assert info.shape == tuple(reversed(want.shape.tolist())), name
            assert raw.shape == (*info.shape[:-1], info.row_bytes) and raw.tobytes() == want.data.tobytes(), name
            assert raw.dtype == np.uint8 and not raw.flags.writeable, name
        assert file.version == 3 and file.path == full_file and file.n_bytes == full_file.stat().st_size


def test_every_type_gguf_py_knows_can_be_listed(tmp_path):
    for ggml_type in gguf_py.GGMLQuantizationType:
        block = BLOCKS[TYPE_IDS[ggml_type]]
        path = write(tmp_path, gguf([ARCH], [tensor("w", [block.elements * 2, 3], ggml_type)], bytes(6 * block.n_bytes)))
        with open_gguf(path) as file:
            assert (file.tensors["w"].type, file.tensors["w"].row_bytes) == (ggml_type.name, 2 * block.n_bytes)


def test_version_2_reads_the_same(tmp_path):
    raw = gguf([ARCH], [tensor("w", [8])], FLOATS, version=struct.pack("<I", 2))
    with open_gguf(write(tmp_path, raw)) as file:
        assert file.version == 2 and file.raw("w").tobytes() == FLOATS


def test_custom_alignment(tmp_path):
    path = tmp_path / "aligned.gguf"
    write_gguf(path, {"general.architecture": "gemma4", "general.alignment": 4096},
               [(name, "F32", np.ones(3, np.float32)) for name in "ab"])
    with open_gguf(path) as file:
        assert [info.offset for info in file.tensors.values()] == [4096, 8192]
        assert file.raw("b").view(np.float32).tolist() == [1, 1, 1]


def test_holes_between_tensors_are_harmless(tmp_path):
    raw = gguf([ARCH], [tensor("b", [8], offset=64), tensor("a", [8])], FLOATS + bytes(32) + FLOATS)
    with open_gguf(write(tmp_path, raw)) as file:
        assert list(file.tensors) == ["b", "a"] and file.raw("b").tobytes() == FLOATS


def test_string_array_is_lazy_and_a_sequence(tmp_path):
    texts = ["<pad>", "", "▁de", "ß\U0001f600", "last"]
    with open_gguf(write(tmp_path, gguf([ARCH, array_key("t", STRING, texts), array_key("none", STRING)]))) as file:
        strings, none = file.metadata["t"], file.metadata["none"]
    assert len(strings) == 5 and strings[2] == "▁de" and strings[-1] == "last"
    assert strings[1:4] == texts[1:4] and strings[::-2] == texts[::-2]
    assert list(strings) == strings.tolist() == texts and "last" in strings and strings.index("ß\U0001f600") == 3
    assert len(none) == 0 and none.tolist() == []
    for i in (5, -6):
        with pytest.raises(IndexError):
            strings[i]
    with pytest.raises(IndexError):
        none[0]


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(st.text(max_size=4) | st.sampled_from([b"", b"\0" * 9, b"a\0\0\0\0\0\0\0b", b"x" * 255, b"x" * 256, b"x" * 300]),
                      min_size=1, max_size=40), cut=st.booleans())
def test_strings_of_any_length_are_found(tmp_path_factory, texts, cut):
    """Short ones at once, others one after the other: what looks like a length within a text is none."""
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    whole = gguf([ARCH, array_key("t", STRING, raw)])
    path = write(tmp_path_factory.getbasetemp(), whole[:-1] if cut else whole, "strings.gguf")
    if cut:
        with pytest.raises(GGUFError, match="before the end of the file"):
            open_gguf(path)
    else:
        assert [text.encode() for text in open_gguf(path).metadata["t"].tolist()] == raw


def test_values_that_are_not_utf8_are_replaced_with_a_warning(tmp_path):
    path = write(tmp_path, gguf([key("name", STRING, string(b"a\xff")), array_key("t", STRING, ["ok", b"\xfe"])]))
    with pytest.warns(UnicodeWarning, match="name"):
        file = open_gguf(path)
    assert file.metadata["name"] == "a\ufffd" and file.metadata["t"][0] == "ok"
    with pytest.warns(UnicodeWarning, match="'t'"):
        assert file.metadata["t"].tolist() == ["ok", "\ufffd"]


def test_close(tmp_path):
    file = open_gguf(write(tmp_path, gguf([ARCH, array_key("t", STRING, ["a"])], [tensor("w", [8])], FLOATS)))
    mapping, view = file._parts[0].mapping, file.raw("w")
    with file:
        pass
    file.close()                                                # twice is fine
    assert view.tobytes() == FLOATS and file.metadata["t"].tolist() == ["a"], "views and metadata outlive the file"
    for call in (lambda: file.raw("w"), file.release_all):
        with pytest.raises(ValueError, match="closed"):
            call()
    del view
    gc.collect()
    mapping.close()                                             # BufferError if something of ours still looked at it
    assert mapping.closed


def test_close_without_views_unmaps_and_a_bad_file_leaves_nothing_open(tmp_path):
    path = write(tmp_path, gguf([ARCH], [tensor("w", [8])], FLOATS))
    file = open_gguf(path)
    mapping = file._parts[0].mapping
    file.close()
    assert mapping.closed
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(GGUFError):
        open_gguf(path)
    with open("/proc/self/maps") as maps:
        assert str(path) not in maps.read()


def resident_kb(path) -> int:
    """How much of the file's mapping is in memory (Linux)."""
    with open("/proc/self/smaps") as lines:
        inside = False
        for line in lines:
            if line.split()[0].count("-") == 1 and ":" not in line.split()[0]:
                inside = line.rstrip().endswith(str(path))
            elif inside and line.startswith("Rss:"):
                return int(line.split()[1])
    return 0


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads Linux's own account of the mapping")
def test_released_pages_leave_memory_and_can_be_read_again(tmp_path):
    data = np.arange(2**20, dtype=np.float32)                   # 4 MiB each: the system may drop whole 2 MiB pages
    path = write(tmp_path, gguf([ARCH], [tensor("a", [2**20]), tensor("b", [2**20], offset=2**22)], data.tobytes() * 2))
    with open_gguf(path) as file:
        assert file.raw("a").sum() == file.raw("b").sum()
        before = resident_kb(path)
        file.release_all()
        after = resident_kb(path)
        assert before - after >= 8184, (before, after)
        assert file.raw("a").tobytes() == data.tobytes(), "and the tensor can be read again"


def test_missing_tensor_is_named(tmp_path):
    with open_gguf(write(tmp_path, gguf([ARCH]))) as file:
        with pytest.raises(GGUFError, match="blk.7.attn_q.weight"):
            file.raw("blk.7.attn_q.weight")


# What must be refused: the table in facts/field.md, section 4.2 ---------------------------------------------------------------

HEADER = 24                                                     # bytes before the first record


def with_tensors(*tensors, data=bytes(256), keys=(), **more):
    return gguf(list(keys), list(tensors), data, **more)


def with_key(record):
    return gguf([record])


# id -> (bytes, offset or None where it is not worth fixing, text that the message must hold)
BAD = {
    "empty": (b"", 0, "empty"),
    "magic-only": (b"GGUF", 4, "version"),
    "cut-header": (gguf()[:-1], 16, "number of keys"),
    "not-gguf": (b"PK\x03\x04" + bytes(60), 0, "starts with b'GGUF'"),
    "git-lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\n", 0, "git lfs pull"),
    "version-0": (gguf(version=struct.pack("<I", 0)), 4, "version 0"),
    "version-1": (gguf(version=struct.pack("<I", 1)), 4, "version 1; convert the model again"),
    "version-4": (gguf(version=struct.pack("<I", 4)), 4, "version 4"),
    "big-endian": (gguf(version=struct.pack(">I", 3)), 4, "big-endian"),
    "n-keys-2^63": (gguf(n_keys=2**63), 16, str(2**63)),
    "n-tensors-2^63": (gguf(n_tensors=2**63), 8, str(2**63)),
    "n-keys-beyond-the-bytes": (gguf([key("k", U8, 1)], n_keys=3), 8, "3 keys"),
    "n-tensors-beyond-the-bytes": (gguf([], [tensor("w", [8])], n_tensors=9), 8, "9 tensors"),
    "key-length-2^62": (with_key(struct.pack("<Q", 2**62) + bytes(99)), HEADER, "at most 65535 bytes"),
    "key-65536": (with_key(key("k" * 65536, U8, 1)), HEADER, "65536"),
    "key-past-the-end": (with_key(struct.pack("<Q", 60) + bytes(40)), HEADER + 8, "expected 60 bytes for key 1 of 1, found 40"),
    "string-length-2^62": (with_key(key("k", STRING, struct.pack("<Q", 2**62) + b"ab")), 45, "found 2 before the end"),
    "string-past-the-end": (with_key(key("k", STRING, struct.pack("<Q", 3) + b"ab")), 45, "expected 3 bytes for 'k', found 2"),
    "array-of-2^40-u8": (with_key(array_key("k", U8, count=2**40)), 49, f"expected {2**40} bytes"),
    "array-of-2^61-u64-wraps": (with_key(array_key("k", U64, count=2**61)), 49, f"expected {2**64} bytes"),
    "array-of-1e6-u8-with-8-bytes": (with_key(array_key("k", U8, count=10**6, raw=bytes(8))), 49, "found 8"),
    "array-of-2^61-strings": (with_key(array_key("k", STRING, count=2**61)), 49, f"{2**61} strings"),
    "array-of-strings-one-too-many": (with_key(array_key("k", STRING, ["abcdefgh"], count=2)), 65, "string 1 of"),
    "array-string-length-2^63": (with_key(array_key("k", STRING, count=2, raw=string("a") + struct.pack("<Q", 2**63))),
                                 58, "string 1 of"),
    "array-string-one-past-the-end": (with_key(array_key("k", STRING, count=1, raw=struct.pack("<Q", 4) + b"abc")),
                                      49, "string 0 of"),
    "nested-array": (with_key(array_key("k", ARRAY, count=1, raw=struct.pack("<IQ", U8, 1) + b"a")), 37, "array of arrays"),
    "nested-5000-deep": (with_key(array_key("k", ARRAY, count=1, raw=struct.pack("<IQ", ARRAY, 1) * 5000)),
                         37, "array of arrays"),
    "array-element-type-13": (with_key(array_key("k", 13, count=1, raw=bytes(8))), 37, "found 13"),
    "value-type-13": (with_key(key("k", 13, bytes(8))), 33, "found 13"),
    "duplicate-key": (gguf([key("k", U8, 1), key("k", U8, 2)]), HEADER + 14, "'k' is in the file twice"),
    "duplicate-tensor": (with_tensors(tensor("w", [8]), tensor("w", [8], offset=32)), HEADER + 33, "'w' is in the file twice"),
    **{f"alignment-{a}": (with_tensors(tensor("w", [8]), keys=[key("general.alignment", U32, a)]), 49, "power of two up to 65536")
       for a in (0, 3, 131072, 2**31)},
    "alignment-of-another-type": (with_key(key("general.alignment", U8, 32)), 49, "uint32"),
    "alignment-a-string": (with_key(key("general.alignment", STRING, "32")), 49, "uint32"),
    "alignment-an-array": (with_key(array_key("general.alignment", U32, [32])), 49, "uint32"),
    "n-dims-0": (with_tensors(tensor("w", [8], n_dims=0)), 33, "1 to 4 dimensions for tensor 'w', found 0"),
    "n-dims-5": (with_tensors(tensor("w", [8, 1, 1, 1, 1])), 33, "found 5"),
    "n-dims-1e6": (with_tensors(tensor("w", [8], n_dims=10**6)), 33, "found 1000000"),
    "dims-product-wraps": (with_tensors(tensor("w", [2**32, 2**32, 2])), HEADER, f"expected {2**67} bytes"),
    "dims-product-wraps-to-8": (with_tensors(tensor("w", [2**61 + 1, 8])), HEADER, f"expected {(2**61 + 1) * 32} bytes"),
    "zero-dimension": (with_tensors(tensor("w", [8, 0])), 37, "above zero for tensor 'w', found [8, 0]"),
    "unknown-type-99": (with_tensors(tensor("blk.0.w", [8], 99)), 51, "'blk.0.w' has the unknown type 99"),
    "removed-type-4": (with_tensors(tensor("w", [32], 4)), 45, "'w' has the unknown type 4"),
    "row-not-whole-blocks": (with_tensors(tensor("w", [40, 4], TYPE_Q4_0)), 37, "blocks of 32 elements (Q4_0)"),
    "offset-past-the-end": (with_tensors(tensor("w", [8], offset=1024)), HEADER, "from byte 1088, found 0 before"),
    "offset-2^64-32": (with_tensors(tensor("w", [8], offset=2**64 - 32)), HEADER, "found 0 before"),
    "data-one-byte-short": (with_tensors(tensor("w", [8]), data=bytes(31)),
                            HEADER, "32 bytes for tensor 'w' from byte 64, found 31"),
    "data-of-the-last-tensor-cut": (with_tensors(tensor("v", [8]), tensor("w", [8], offset=32), data=bytes(63)),
                                    HEADER + 33, "'w'"),
    "offset-not-aligned": (with_tensors(tensor("w", [8], offset=4)), HEADER, "of the alignment 32 for tensor 'w', found 4"),
    "two-tensors-on-one-range": (with_tensors(tensor("v", [8]), tensor("w", [8])), None, "'w' overlaps 'v'"),
    "tensors-overlap-out-of-order": (with_tensors(tensor("v", [8], offset=32), tensor("w", [16])), 128, "'v' overlaps 'w'"),
    "name-64-bytes": (with_tensors(tensor("w" * 64, [8])), HEADER, "at most 63 bytes for the name of tensor 1 of 1"),
    "name-64-bytes-in-32-letters": (with_tensors(tensor("ß" * 32, [8])), HEADER, "at most 63 bytes"),
    "name-length-2^62": (with_tensors(struct.pack("<Q", 2**62) + bytes(64)), HEADER, "at most 63 bytes"),
    "name-not-utf8": (with_tensors(tensor(b"\xff", [8])), HEADER + 8, "UTF-8 for the name of tensor 1"),
    "key-not-utf8": (with_key(key(b"k\xff", U8, 1)), HEADER + 8, "UTF-8 for key 1 of 1"),
    "bool-2": (with_key(key("k", BOOL, b"\x02")), 37, "expected 0 or 1 for a bool in 'k', found 2"),
    "bool-2-in-array": (with_key(array_key("k", BOOL, count=3, raw=b"\x01\x00\x02")), 51, "found 2"),
    "key-cut": (gguf([key("k", U64, 1)])[:-1], 37, "expected 8 bytes for 'k', found 7"),
}


def test_the_table_above_names_what_there_is():
    table = [line[46:].split("(")[0] for line in __doc__.splitlines() if line.startswith("    ")]
    names = {word for column in table for word in re.split(r"[,\s]+", column) if word}
    assert len(names) > 40 and not {name for name in names if name not in BAD and name not in globals()}


@pytest.mark.parametrize("scale", [b"\x00\x7c", b"\x00\xfc", b"\x00\x7e"])
def test_infinite_and_nan_scales_are_read_as_they_are(tmp_path, scale):
    path = write(tmp_path, gguf([ARCH], [tensor("w", [32, 2], TYPE_Q4_0)], (scale + bytes(range(16))) * 2))
    with open_gguf(path) as file:
        weights = Matrix(file.raw("w"), "Q4_0").float32()
    assert weights.shape == (2, 32) and not np.isfinite(weights).any()


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused(tmp_path, case):
    raw, offset, text = BAD[case]
    path = write(tmp_path, raw)
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError) as caught:
            open_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    error = caught.value
    assert text in error.what, error.what
    assert error.offset == offset or offset is None, str(error)
    assert error.path == path and "\n" not in str(error) and str(path) in str(error) and f"byte {error.offset}: " in str(error)
    assert peak < 200_000 + 8 * len(raw), f"{peak} bytes were allocated for a file of {len(raw)}"


def test_the_limits_themselves_are_accepted(tmp_path):
    """One step inside each bound that the table tests from outside."""
    raw = gguf([key("k" * 65535, U8, 1), key("general.alignment", U32, 65536), key("b", BOOL, b"\x01"), array_key("z", U8)],
               [tensor("w" * 63, [2, 1, 2, 2])], FLOATS, alignment=65536)
    with open_gguf(write(tmp_path, raw)) as file:
        assert file.tensors["w" * 63].shape == (2, 2, 1, 2) and file.metadata["b"] is True and file.metadata["z"].size == 0


def test_more_records_than_any_model_has(tmp_path):
    """An entry costs ten times its bytes once it is a Python object: a large file of tiny records must not fill the memory."""
    for raw in (gguf([b"".join(key(str(i), U8, 1) for i in range(65537))], n_keys=65537),
                gguf([], [bytes(65537 * 32)], n_tensors=65537)):
        with pytest.raises(GGUFError, match="at most 65536"):
            open_gguf(write(tmp_path, raw))


def test_paths_that_are_no_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path, text in ((tmp_path / "nothing.gguf", "no such file"), (tmp_path, "found a folder"), ("a\0b", "cannot be opened"),
                       (tmp_path / "pipe", "no regular file"), (tmp_path / ("n" * 5000), "cannot be opened")):
        with pytest.raises(GGUFError, match=text) as caught:
            open_gguf(path)
        assert caught.value.offset is None and ": byte " not in str(caught.value)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", refuse)                # root may read everything, so file modes would not do
    with pytest.raises(GGUFError, match="Permission denied"):
        open_gguf(__file__)


def test_error_is_one_line_and_survives_pickling():
    error = GGUFError("a\nb\udcff.gguf", 7, "x")
    assert str(error) == "a b?.gguf: byte 7: x"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_long_and_hostile_names_stay_short_in_messages(tmp_path):
    with pytest.raises(GGUFError) as caught:
        open_gguf(write(tmp_path, with_key(key("\n\x1b" * 30000, 13, b""))))
    assert len(caught.value.what) < 300 and "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


# Any bytes either load or raise GGUFError -------------------------------------------------------------------------------------

SMALL = gguf([ARCH, key("n", U32, 7), key("b", BOOL, True), array_key("t", STRING, ["ab", "", "ß"]), array_key("i", U64, [1, 2]),
              array_key("m", BOOL, [True, False]), key("general.alignment", U32, 64)],
             [tensor("v", [32, 3], TYPE_Q4_0), tensor("w", [4, 2], TYPE_F32, offset=64)],
             bytes(range(54)) + bytes(10) + FLOATS, alignment=64)


def read_all(path) -> dict:
    """Opens the file and touches everything in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnicodeWarning)
        with open_gguf(path) as file:
            contents = {name: plain(value) for name, value in file.metadata.items()}
            return contents | {"tensor " + name: (info, file.raw(name).tobytes()) for name, info in file.tensors.items()}


def test_truncation_at_every_byte(tmp_path):
    whole = read_all(write(tmp_path, SMALL))
    assert whole["t"] == ["ab", "", "ß"] and whole["tensor w"][1] == FLOATS
    for n in range(len(SMALL)):                                 # no padding at the end: every byte counts
        with pytest.raises(GGUFError) as caught:
            read_all(write(tmp_path, SMALL[:n]))
        assert caught.value.offset is not None and caught.value.offset <= n
    assert read_all(write(tmp_path, SMALL + bytes(5))) == whole


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255) | st.sampled_from([0, 1, 2, 127, 128])),
                        min_size=1, max_size=6), cut=st.integers(0, len(SMALL)), keep=st.booleans())
def test_mutated_bytes(tmp_path_factory, changes, cut, keep):
    raw = bytearray(SMALL)
    for i, byte in changes:
        raw[i] = byte
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(raw if keep else raw[:cut])
    try:
        read_all(path)
    except GGUFError as error:
        assert "\n" not in str(error)


numbers = st.integers(0, 9) | st.sampled_from([2**31, 2**32 - 1])
longs = st.integers(0, 99) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 32, 2**64 - 1])
names = st.sampled_from([b"a", b"b", b"general.alignment", b"split.count", b"split.no", b"\xff"]) | st.binary(max_size=70)
value_records = st.builds(key, names, st.integers(0, 13), st.binary(max_size=20))
array_records = st.builds(array_key, names, st.integers(0, 13), count=longs, raw=st.binary(max_size=40))
tensor_records = st.builds(tensor, names, st.lists(longs, max_size=5), numbers, longs, st.none() | numbers)


@settings(max_examples=300, deadline=None)
@given(keys=st.lists(value_records | array_records, max_size=3), tensors=st.lists(tensor_records, max_size=3),
       data=st.binary(max_size=200))
def test_structured_nonsense(tmp_path_factory, keys, tensors, data):
    """Well-formed frames around wild numbers get further into the reader than flipped bytes do."""
    path = tmp_path_factory.getbasetemp() / "nonsense.gguf"
    path.write_bytes(gguf(keys, tensors, data))
    try:
        read_all(path)
    except GGUFError as error:
        assert "\n" not in str(error)


# Split models -----------------------------------------------------------------------------------------------------------------


def split_keys(number, count=3, total=4):
    return [key("split.no", 2, struct.pack("<H", number)), key("split.count", 2, struct.pack("<H", count)),
            key("split.tensors.count", 5, struct.pack("<i", total))]


def write_split(folder, names=(("a", "b"), ("c",), ("d",)), change=None):
    """Three parts with one float row a tensor; `change` maps a part's number to other keys. Returns the paths."""
    paths = []
    for number, in_part in enumerate(names):
        keys = (change or {}).get(number, split_keys(number))
        tensors = [tensor(name, [8], offset=32 * i) for i, name in enumerate(in_part)]
        data = b"".join(np.full(8, ord(name), np.float32).tobytes() for name in in_part)
        raw = gguf(keys if number else [ARCH, *keys], tensors, data)
        paths.append(write(folder, raw, f"X-{number + 1:05}-of-00003.gguf"))
    return paths


def test_split_files_open_as_one(tmp_path):
    paths = write_split(tmp_path)
    with open_gguf(paths[0]) as file:
        assert [(info.name, info.part) for info in file.tensors.values()] == [("a", 0), ("b", 0), ("c", 1), ("d", 2)]
        assert all((file.raw(name).view(np.float32) == ord(name)).all() for name in "abcd")
        assert file.metadata["general.architecture"] == "gemma4" and file.metadata["split.no"] == 0
        assert file.n_bytes == sum(path.stat().st_size for path in paths)
        file.release_all()
        mappings = [part.mapping for part in file._parts]
    assert all(mapping.closed for mapping in mappings)


def test_split_written_by_gguf_py(tmp_path):
    writer = gguf_py.GGUFWriter(tmp_path / "X.gguf", "gemma4", split_max_tensors=2)
    arrays = {f"t{i}": np.full((2, 3), i, np.float32) for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "X-00001-of-00003.gguf") as file:
        assert list(file.tensors) == list(arrays)
        assert all((file.raw(name).view(np.float32) == array).all() for name, array in arrays.items())


@pytest.mark.parametrize("case, text", [
    ("second part opened", "open X-00001-of-00003.gguf"), ("second part named as the first", "open X-00001-of-00003.gguf"),
    ("part missing", "X-00002-of-00003.gguf"), ("part cut", "X-00003-of-00003.gguf"), ("renamed", "-00001-of-00003.gguf"),
    ("same part twice", "expected split.no = 1, found 2"), ("other count in a part", "expected split.count = 3, found 4"),
    ("other count in the name", "split.count says that the model has 4 parts"),
    ("tensor in two parts", "'a' is in an earlier part"), ("total wrong", "expected 5 tensors in all parts"),
    ("no keys", "found no such key"), ("part without keys", "found no such key"), ("no total", "as split.tensors.count"),
    ("count a bool", "as split.count"),
])
def test_split_files_refused(tmp_path, case, text):
    change = {"same part twice": {1: split_keys(2)}, "other count in a part": {2: split_keys(2, count=4)},
              "other count in the name": {0: split_keys(0, count=4)},
              "total wrong": {0: split_keys(0, total=5)}, "no keys": {0: []},
              "no total": {0: split_keys(0)[:2]}, "count a bool": {0: [key("split.count", BOOL, True), *split_keys(0)[::2]]},
              "second part named as the first": {0: split_keys(1)}, "part without keys": {1: []}}.get(case)
    names = (("a", "b"), ("c",), ("a" if case == "tensor in two parts" else "d",))
    paths = write_split(tmp_path, names, change)
    path = paths[0]
    if case == "second part opened":
        path = paths[1]
    elif case == "part missing":
        paths[1].unlink()
    elif case == "part cut":
        paths[2].write_bytes(paths[2].read_bytes()[:-1])
    elif case == "renamed":
        path = paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(GGUFError) as caught:
        open_gguf(path)
    assert text in str(caught.value), str(caught.value)
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) not in maps.read(), "the parts opened before the error are closed"


def test_one_of_one_is_not_a_split_model(tmp_path):
    for name, keys in (("X-00001-of-00001.gguf", []), ("model.gguf", split_keys(0, 1, 0)), ("model.gguf", split_keys(0, 0, 0))):
        open_gguf(write(tmp_path, gguf(keys), name)).close()


# Size -------------------------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from refimpl.formats.gguf import open_gguf

def kb(name):       # not getrusage: its peak is inherited from the process that started this one
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

calls = 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
before = kb("VmRSS")
sys.setprofile(count)
file = open_gguf(sys.argv[1])
sys.setprofile(None)
mb = (kb("VmHWM") - before) / 1024
assert "gguf" not in sys.modules, "slow to import"
tokens, merges = file.metadata["tokens"], file.metadata["merges"]
assert (len(tokens), tokens[262143], len(merges), merges[-1]) == (262144, "tok262143", 514906, "le ft514905")
assert len(tokens.tolist()) == 262144 and file.metadata["scores"].shape == (262144,)
print(calls, mb)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's own account of the memory")
def test_a_real_vocabulary_opens_at_once(tmp_path):
    """Gemma's own sizes: the 777,050 strings are found together, and none is copied."""
    n = 262_144
    path = write(tmp_path, gguf([ARCH, array_key("tokens", STRING, [f"tok{i}" for i in range(n)]),
                                 array_key("scores", F32, count=n, raw=bytes(4 * n)),
                                 array_key("token_type", I32, count=n, raw=bytes(4 * n)),
                                 array_key("merges", STRING, [f"le ft{i}" for i in range(514_906)])]))
    result = subprocess.run([sys.executable, "-c", MEASURE, path], check=True, capture_output=True, text=True)
    calls, mb = map(float, result.stdout.split())
    print(f"\n262,144 tokens and 514,906 merges: opened with {calls:.0f} calls and {mb:.0f} MB")
    assert calls < 10_000 and 5 < mb < 200, "less than the copied strings would be a fault of the measurement"


# The writer -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata, tensors, text", [
    ({}, [], "general.architecture"), ({"general.alignment": 3}, [], "power of two"),
    ({"general.alignment": 2**17}, [], "up to 65536"),
    ({"a": []}, [], "a: expected a list of one type"), ({"a": [1, True]}, [], "of one type"),
    ({"a": [1, "b"]}, [], "of one type"),
    ({"a": None}, [], "no GGUF type for NoneType"), ({"a": 2**64}, [], "no GGUF type holds"),
    ({"a": [2**63, -1]}, [], "no GGUF type holds"), ({"a": np.zeros((2, 2))}, [], "1-D array"),
    ({"a": np.zeros(0)}, [], "1-D array"), ({"a": np.zeros(2, "S3")}, [], "1-D array"),
    ({}, [("w", "Q9_9", np.zeros(3, np.uint8))], "no type Q9_9"),
    ({}, [("w", "F32", np.zeros(3))], "expected float32 for F32, found float64"),
    ({}, [("w", "Q4_0", np.zeros(18, np.float32))], "expected uint8"),
    ({}, [("w", "Q4_0", np.zeros(19, np.uint8))], "multiple"),
    ({}, [("w" * 64, "I8", np.zeros(3, np.int8))], "below 64 bytes"),
    ({}, [("w", "I8", np.zeros((), np.int8))], "1 to 4 dimensions"),
    ({}, [("w", "I8", np.zeros((1,) * 5, np.int8))], "1 to 4 dimensions"),
    ({}, [("w", "I8", np.zeros((2, 0), np.int8))], "none of them empty"),
    ({}, [("w", "I8", np.ones(3, np.int8))] * 2, "Duplicated"),
])
def test_writer_refuses(tmp_path, metadata, tensors, text):
    path = write(tmp_path, b"the old one")
    base = {} if text == "general.architecture" else {"general.architecture": "gemma4"}
    with pytest.raises(ValueError, match=text):
        write_gguf(path, base | metadata, tensors)
    assert path.read_bytes() == b"the old one" and list(tmp_path.iterdir()) == [path]


def test_writer_leaves_nothing_behind_when_the_disk_fails(tmp_path, monkeypatch):
    path = write(tmp_path, b"the old one")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(gguf_py.GGUFWriter, "write_tensor_data", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_gguf(path, {"general.architecture": "gemma4"}, [("w", "I8", np.ones(3, np.int8))])
    assert path.read_bytes() == b"the old one" and list(tmp_path.iterdir()) == [path]


def test_writer_makes_deferred_arrays_one_at_a_time(tmp_path):
    made, reported = [], []

    def make(k):
        made.append(k)
        return np.full(3, k, np.int8)
    deferred = [(f"w{k}", "I8", Deferred((3,), np.dtype(np.int8), lambda k=k: make(k))) for k in range(3)]
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "gemma4"}, deferred, lambda n_bytes: reported.append((n_bytes, len(made))))
    assert made == [0, 1, 2] and reported == [(3, 1), (3, 2), (3, 3)]
    with open_gguf(tmp_path / "m.gguf") as file:
        assert [file.raw(f"w{k}").view(np.int8).tolist() for k in range(3)] == [[0] * 3, [1] * 3, [2] * 3]
    wrong = Deferred((4,), np.dtype(np.int8), lambda: make(1))
    with pytest.raises(ValueError, match=r"expected an array int8 \(4,\), found int8 \(3,\)"):
        write_gguf(tmp_path / "n.gguf", {"general.architecture": "gemma4"}, [("w", "I8", wrong)])
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_writer_replaces_and_takes_strided_arrays(tmp_path):
    path = write(tmp_path, b"the old one")
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {"transposed": values.T, "strided": values[::2, 1:3]}
    write_gguf(str(path), {"general.architecture": "gemma4"}, ((name, "F32", array) for name, array in arrays.items()))
    with open_gguf(path) as file:
        for name, array in arrays.items():
            assert (file.raw(name).view(np.float32) == array).all()
    assert list(tmp_path.iterdir()) == [path]
