"""GGUF files: header, metadata, tensor index and memory-mapped tensor bytes. Decoding the blocks is not done here.

    "GGUF" | version u32 | n_tensors u64 | n_keys u64
    n_keys    x   key: string | type u32 | value
    n_tensors x   name: string | n_dims u32 | dims u64 x n_dims, fastest axis first | type u32 | offset u64
    zeros up to the alignment | data; tensor offsets count from here

A string is a u64 length and that many bytes. An array value is: element type u32 | length u64 | elements. All numbers are
little-endian. Versions 2 and 3 have the same layout.

The file is treated as hostile. Nothing in it is trusted before it is compared with the bytes that are there: any input either opens
or raises `GGUFError`, in time linear in the size of the file, and with memory for a small multiple of it. No check helps
against another program that truncates the file while it is mapped.

Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md. Where we are stricter (overlaps, zero
dimensions, nested arrays, bool bytes, upper bounds), the reason is at the check.
"""

import contextlib
import math
import mmap
import os
import re
import stat
import struct
import warnings
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from refimpl.formats.quants.blocks import BLOCKS, TYPE_IDS

VERSIONS = (2, 3)
BOOL, STRING, ARRAY = 7, 8, 9                                   # metadata type ids that need care of their own
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "<u1", 10: "<u8", 11: "<i8", 12: "<f8"}
MIN_KEY_BYTES = 8 + 0 + 4 + 1                                   # length of an empty key, type, one-byte value
MIN_TENSOR_BYTES = 8 + 0 + 4 + 8 + 4 + 8                        # length of an empty name, n_dims, one dim, type, offset

# Upper bounds far above any real file (the 26B has 658 tensors and about 60 keys). An entry takes ten times its bytes as a
# Python object, so without them the memory would be no small multiple of the file.
MAX_RECORDS = 65_536
MAX_KEY_CHARS = 65_535                                          # bytes; the specification's own limit
MAX_TEXT_BYTES = 16 << 20                                       # of all keys and single strings; as str they may take four times that
MAX_SHORT_BYTES = 64 << 20                                      # of an array of strings that is looked through at once
MAX_NAME_BYTES = 63                                             # ggml keeps names in 64 bytes with a final zero
MAX_DIMS = 4
MAX_ALIGNMENT = 65_536
MAX_MESSAGE_CHARS = 500
DEFAULT_ALIGNMENT = 32


class GGUFError(Exception):
    """A file that cannot be read as GGUF. One line: file, byte offset (None: no one place), what was expected and found."""

    def __init__(self, path: str | os.PathLike, offset: int | None, what: str):
        """Keeps the three parts as attributes, for callers that report them in their own way."""
        super().__init__(path, offset, what)
        self.path, self.offset, self.what = path, offset, what

    def __str__(self) -> str:
        """The one line."""
        place = "" if self.offset is None else f"byte {self.offset}: "
        what = self.what if len(self.what) <= MAX_MESSAGE_CHARS else f"{self.what[:MAX_MESSAGE_CHARS]}..."       # it may quote the file
        line = f"{os.fspath(self.path)}: {place}{what}"
        return " ".join(line.encode("utf-8", "replace").decode().splitlines())      # paths may hold newlines and stray bytes


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and how to read it. `shape` is in NumPy's order: the last axis is a contiguous row (ggml's ne0)."""

    name: str
    type: str                   # of the blocks, such as "Q4_0": a key of blocks.BLOCKS
    shape: tuple[int, ...]      # in elements
    n_bytes: int
    offset: int                 # in bytes from the start of its file
    part: int                   # which file of a split model, from 0

    @property
    def row_bytes(self) -> int:
        """Bytes in one row: whole blocks, as rows do not share blocks."""
        return self.n_bytes // math.prod(self.shape[:-1])


class StringArray(Sequence):
    """An array of strings, decoded on access: a vocabulary opens in the time that finding the lengths takes.

    Bytes that are not UTF-8 become U+FFFD, with a UnicodeWarning. The bytes are a copy, so it outlives the file.
    """

    def __init__(self, key: str, blob: bytes, starts: np.ndarray):
        """`starts` (n + 1,) int64: where each string starts in `blob`; its u64 length is in the 8 bytes before."""
        self._key, self._blob, self._starts = key, blob, starts

    def __len__(self) -> int:
        """Number of strings."""
        return len(self._starts) - 1

    def __getitem__(self, i):
        """One string, or a list of them for a slice."""
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]                                 # negative indices, IndexError
        return _text(self._blob[self._starts[i]:self._starts[i + 1] - 8], self._key)

    def __iter__(self) -> Iterator[str]:
        """The strings in order."""
        return iter(self.tolist())

    def __repr__(self) -> str:
        """Key and length; never the strings."""
        return f"<StringArray {_shown(self._key)}, {len(self):,} strings>"

    def tolist(self) -> list[str]:
        """All strings, decoded in one go: the lengths between them give way to a byte that UTF-8 never has."""
        raw, end = np.frombuffer(self._blob, np.uint8).copy(), self._starts[:-1]
        raw[end - 1] = 0xFF
        keep = np.ones(len(raw), bool)
        for i in range(2, 9):
            keep[end - i] = False
        texts = raw[keep].tobytes().decode("utf-8", "surrogateescape").split("\udcff")[1:]
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            texts = []                                          # bytes that are not UTF-8
        return texts if len(texts) == len(self) else [self[i] for i in range(len(self))]


class GGUFFile:
    """An open model: one file, or all parts of a split one. Made by `open_gguf`; use it in a `with` statement or close it.

    path      the file that was opened (the first part)
    version   of the format, 2 or 3
    format, facts    the container, in words and as data (source.py)
    metadata  key -> bool, int, float, str, NumPy array (read-only) or StringArray; of the first part. Outlives `close`.
    tensors   name -> TensorInfo, in file order
    n_bytes   size of all parts together
    """

    def __init__(self, parts: "list[_Part]"):
        """Joins parts that have been read. Raises GGUFError when a tensor is in two of them."""
        self.path, self.version, self.metadata = parts[0].path, parts[0].version, MappingProxyType(parts[0].metadata)
        self.n_bytes = sum(len(part.mapping) for part in parts)
        self.format, self.facts = f"GGUF {self.version}", {"gguf_version": self.version, "file_bytes": self.n_bytes}
        self.tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in self.tensors:
                    raise GGUFError(part.path, None, f"tensor {_shown(name)} is in an earlier part too; "
                                                     "the parts do not belong together")
                self.tensors[name] = info
        self._parts: list[_Part] | None = parts

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 `(*shape[:-1], row_bytes)`: a read-only view of the mapping, nothing is copied.

        Raises GGUFError if the file has no such tensor, ValueError after `close`.
        """
        info = self._info(name)
        return view(self._open_parts()[info.part].mapping, info)

    def release_all(self) -> None:
        """Tells the system that the file's pages are not wanted in memory for now; reading them again works. Best effort."""
        for part in self._open_parts():
            release_pages(part.mapping, 0, len(part.mapping))

    def files(self) -> list[Path]:
        """The file, or all parts of a split model, in order. Raises ValueError after `close`."""
        return [part.path for part in self._open_parts()]

    def close(self) -> None:
        """Closes the files. Views from `raw` stay valid; the mapping goes with the last of them."""
        parts, self._parts = self._parts or [], None
        for part in parts:
            part.close()

    def __enter__(self) -> "GGUFFile":
        """The file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise GGUFError(self.path, None, f"expected a tensor {_shown(name)}, found none of that name")
        return self.tensors[name]

    def _open_parts(self) -> "list[_Part]":
        if self._parts is None:
            raise ValueError(f"{self.path} is closed")
        return self._parts


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Opens a GGUF file; given the first part of a split model (`X-00001-of-00003.gguf`), all parts as one.

    Raises GGUFError, and nothing else, for any file that is missing, unreadable, malformed or incomplete.
    """
    parts: list[_Part] = []
    try:
        parts.append(_read_part(Path(path), 0))
        for number, part_path in enumerate(_later_parts(parts[0]), start=1):
            parts.append(_read_part(part_path, number))
            _check_later_part(parts[0], parts[number], number)
        file = GGUFFile(parts)
        if len(parts) > 1 and len(file.tensors) != _split_number(parts[0], "split.tensors.count"):
            raise GGUFError(path, None, f"expected {_split_number(parts[0], 'split.tensors.count')} tensors in all parts "
                                        f"(split.tensors.count), found {len(file.tensors)}; download the parts again")
        return file
    except BaseException:
        for part in parts:
            part.close()
        raise


# One file -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """What one file holds."""

    path: Path
    mapping: mmap.mmap
    version: int
    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]

    def close(self) -> None:
        try:
            self.mapping.close()
        except BufferError:
            pass                                                # arrays still look at it: it goes when they go


class _Cursor:
    """A position in a mapped file. Every read is checked against the bytes left, and advances it."""

    def __init__(self, path: Path, mapping: mmap.mmap):
        self.path, self.mapping, self.at, self.text_bytes = path, mapping, 0, 0

    def need(self, n_bytes: int, what: str) -> None:
        left = len(self.mapping) - self.at
        if n_bytes > left:
            raise GGUFError(self.path, self.at, f"expected {n_bytes} bytes for {what}, found {left} before the end of the file; "
                                                "it is cut off or damaged: download it again")

    def take(self, n_bytes: int, what: str) -> bytes:
        self.need(n_bytes, what)
        self.at += n_bytes
        return self.mapping[self.at - n_bytes:self.at]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def name(self, max_bytes: int, what: str) -> str:
        """A key or a tensor name: short, and UTF-8, as other programs look them up."""
        at, n_bytes = self.at, self.u64(f"the length of {what}")
        if n_bytes > max_bytes:
            raise GGUFError(self.path, at, f"expected at most {max_bytes} bytes for {what}, found a length of {n_bytes}")
        try:
            return self.text(n_bytes, what).decode()
        except UnicodeDecodeError:
            raise GGUFError(self.path, at + 8, f"expected UTF-8 for {what}, found other bytes") from None

    def text(self, n_bytes: int, what: str) -> bytes:
        """The bytes of a key, a name or a single string."""
        self.need(n_bytes, what)
        self.text_bytes += n_bytes
        if self.text_bytes > MAX_TEXT_BYTES:
            raise GGUFError(self.path, self.at, f"expected at most {MAX_TEXT_BYTES} bytes of text outside of arrays, found more with the "
                                                f"{n_bytes} of {what}")
        return self.take(n_bytes, what)

    def numbers(self, type_id: int, count: int, what: str) -> np.ndarray:
        """`count` numbers or bools of a scalar metadata type: a read-only copy, so metadata does not keep the mapping alive."""
        dtype, at = np.dtype(SCALARS[type_id]), self.at
        values = np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if type_id != BOOL:
            return values
        if count and values.max() > 1:
            i = int(np.argmax(values > 1))
            raise GGUFError(self.path, at + i, f"expected 0 or 1 for a bool in {what}, found {values[i]}")
        return values.view(bool)

    def strings(self, count: int, key: str) -> StringArray:
        """The hot loop of opening a file: hops from length to length, 0.4 microseconds each, unless `_short_strings` sees them all at once;
        nothing is decoded.
        """
        what = f"an array of {count} strings in {_shown(key)}"
        self.need(8 * count, what)                              # so `starts` is never larger than the file
        mapping, end, first, at = self.mapping, len(self.mapping), self.at, self.at
        if (short := _short_strings(mapping, first, count)) is not None:
            self.at = first + int(short[-1]) - 8
            return StringArray(key, mapping[first:self.at], short)
        read_length = struct.Struct("<Q").unpack_from
        starts = array("q", bytes(8 * count + 8))
        try:
            for i in range(count):
                (n_bytes,) = read_length(mapping, at)
                at += 8
                starts[i] = at
                at += n_bytes
                if at > end:
                    raise GGUFError(self.path, starts[i] - 8, f"expected {n_bytes} bytes for string {i} of {what}, found "
                                                              f"{end - starts[i]} before the end of the file; it is damaged")
        except struct.error:
            raise GGUFError(self.path, at, f"expected 8 bytes for the length of string {i} of {what}, found {end - at} before "
                                           "the end of the file; it is damaged") from None
        starts[count] = at + 8                                  # as if another string followed
        self.at = at
        return StringArray(key, mapping[first:at], np.frombuffer(starts, np.int64) - first)


def _short_strings(mapping: mmap.mmap, first: int, count: int) -> np.ndarray | None:
    """Where `count` strings start, counted from `first`, int64 (count + 1,); None unless all are shorter than 256 bytes and without NUL.

    The length of such a string is a byte and seven zeros, which are nowhere else. That each length leads to the next one proves it.
    """
    raw = np.frombuffer(mapping, np.uint8, min(32 * count, MAX_SHORT_BYTES, len(mapping) - first), first)
    zero = raw == 0
    for run in (1, 2, 3):                                       # of 2, 4 and 7 zeros
        zero = zero[:-run] & zero[run:]
    length_at = np.flatnonzero(zero)[:count] - 1
    if not count or len(length_at) < count or length_at[0] < 0:
        return None
    starts = np.append(length_at + 8, length_at[-1] + raw[length_at[-1]] + 16)
    follows = starts[0] == 8 and np.array_equal(np.diff(starts), raw[length_at] + np.int64(8))
    return starts if follows and first + starts[-1] - 8 <= len(mapping) else None


def _read_part(path: Path, number: int) -> _Part:
    mapping = map_file(path)
    try:
        cursor = _Cursor(path, mapping)
        version, n_tensors, n_keys = _read_header(cursor)
        metadata: dict[str, object] = {}
        alignment = DEFAULT_ALIGNMENT
        for i in range(n_keys):
            at = cursor.at
            key = cursor.name(MAX_KEY_CHARS, f"key {i + 1} of {n_keys}")
            if key in metadata:
                raise GGUFError(path, at, f"key {_shown(key)} is in the file twice")
            at, type_id = cursor.at, cursor.u32(f"the type of {_shown(key)}")
            metadata[key] = _read_value(cursor, key, type_id, at)
            if key == "general.alignment":
                alignment = _check_alignment(path, at, type_id, metadata[key])
        records = [_read_tensor_record(cursor, f"tensor {i + 1} of {n_tensors}", number) for i in range(n_tensors)]
        return _Part(path, mapping, version, metadata, _place(cursor, records, alignment))
    except BaseException:
        mapping.close()
        raise


def map_file(path: Path, what: str = "a GGUF file", error_type: type[GGUFError] = GGUFError) -> mmap.mmap:
    """Maps a file into memory, read-only. Raises `error_type` where it is no regular file, is empty or cannot be opened."""
    try:
        mode = os.stat(path).st_mode                            # before opening: opening a pipe would wait for ever
        if not stat.S_ISREG(mode):
            raise error_type(path, None, f"expected {what}, found {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise error_type(path, 0, f"expected {what}, found an empty one; download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise error_type(path, None, "no such file") from None
    except (OSError, ValueError, OverflowError) as error:       # no permission; a zero byte in the path; 32-bit machines
        raise error_type(path, None, f"cannot be opened: {getattr(error, 'strerror', None) or error}") from error


def view(mapping: mmap.mmap, info: TensorInfo) -> np.ndarray:
    """The bytes of a tensor, uint8 `(*shape[:-1], row_bytes)`; nothing is copied."""
    return np.frombuffer(mapping, np.uint8, info.n_bytes, info.offset).reshape(*info.shape[:-1], info.row_bytes)


def release_pages(mapping: mmap.mmap, first: int, n_bytes: int) -> None:
    """Tells the system that these pages are not wanted in memory for now. A hint: where it is refused, nothing is lost."""
    if hasattr(mapping, "madvise"):                         # not on Windows
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_DONTNEED, first, n_bytes)


def _read_header(cursor: _Cursor) -> tuple[int, int, int]:
    magic = cursor.take(4, "the magic number")
    if magic != b"GGUF":
        remedy = "; this is a Git LFS pointer to the model: run `git lfs pull`" if magic == b"vers" else ""
        raise GGUFError(cursor.path, 0, f"expected a GGUF file, which starts with b'GGUF', found {magic}{remedy}")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        if version & 0xFFFF == 0 and version:
            found = "a big-endian file; convert it to little-endian with gguf-py's gguf_convert_endian"
        else:
            found = f"version {version}; " + ("convert the model again, with a present-day converter" if version == 1 else
                                              "it is damaged, or newer than this program")
        raise GGUFError(cursor.path, 4, f"expected GGUF version 2 or 3, found {found}")
    at, counts = cursor.at, []
    for kind in ("tensors", "keys"):
        counts.append(cursor.u64(f"the number of {kind}"))
        if counts[-1] > MAX_RECORDS:
            raise GGUFError(cursor.path, cursor.at - 8, f"expected at most {MAX_RECORDS} {kind}, found {counts[-1]}")
    n_tensors, n_keys = counts
    left = len(cursor.mapping) - cursor.at
    if n_tensors * MIN_TENSOR_BYTES + n_keys * MIN_KEY_BYTES > left:
        raise GGUFError(cursor.path, at, f"the file claims {n_tensors} tensors and {n_keys} keys, for which the {left} bytes "
                                         "after the header are too few; it is cut off or damaged: download it again")
    return version, n_tensors, n_keys


def _read_value(cursor: _Cursor, key: str, type_id: int, at: int) -> object:
    shown = _shown(key)
    if type_id in SCALARS:
        return cursor.numbers(type_id, 1, shown)[0].item()
    if type_id == STRING:
        return _text(cursor.text(cursor.u64(f"the length of {shown}"), shown), key)
    if type_id != ARRAY:
        raise GGUFError(cursor.path, at, f"expected a metadata type from 0 to 12 for {shown}, found {type_id}")
    at, item_id = cursor.at, cursor.u32(f"the element type of {shown}")
    count = cursor.u64(f"the length of {shown}")
    if item_id in SCALARS:
        return cursor.numbers(item_id, count, f"{count} elements of {shown}")
    if item_id == STRING:
        return cursor.strings(count, key)
    if item_id == ARRAY:                                        # legal, but no model has one, and depth is unbounded
        raise GGUFError(cursor.path, at, f"{shown} is an array of arrays, which is not supported")
    raise GGUFError(cursor.path, at, f"expected an element type from 0 to 12 for {shown}, found {item_id}")


def _check_alignment(path: Path, at: int, type_id: int, alignment: object) -> int:
    if type_id != 4 or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise GGUFError(path, at, f"expected a power of two up to {MAX_ALIGNMENT}, as uint32, for general.alignment, "
                                  f"found {_shown(alignment)} of type {type_id}")
    return alignment


def _read_tensor_record(cursor: _Cursor, what: str, part: int) -> tuple[int, TensorInfo]:
    """(where the record starts, the tensor with its offset still counted from the start of the data)."""
    path, start = cursor.path, cursor.at
    name = cursor.name(MAX_NAME_BYTES, f"the name of {what}")
    shown = _shown(name)
    at, n_dims = cursor.at, cursor.u32(f"the number of dimensions of {shown}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise GGUFError(path, at, f"expected 1 to {MAX_DIMS} dimensions for tensor {shown}, found {n_dims}")
    at, dims = cursor.at, [cursor.u64(f"a dimension of {shown}") for _ in range(n_dims)]
    if 0 in dims:                                               # llama.cpp accepts it, but no weight is empty
        raise GGUFError(path, at, f"expected dimensions above zero for tensor {shown}, found {dims}")
    type_at, type_id = cursor.at, cursor.u32(f"the type of {shown}")
    type_name = TYPE_IDS.get(type_id)
    block = BLOCKS.get(type_name)
    if block is None:
        raise GGUFError(path, type_at, f"tensor {shown} has the unknown type {type_id}; this program may be too old for it")
    if dims[0] % block.elements:
        raise GGUFError(path, at, f"expected whole blocks of {block.elements} elements ({type_name}) in each row of tensor "
                                  f"{shown}, found rows of {dims[0]}")
    n_bytes = math.prod(dims) // block.elements * block.n_bytes         # Python integers: no product can wrap
    return start, TensorInfo(name, type_name, tuple(reversed(dims)), n_bytes, cursor.u64(f"the offset of {shown}"), part)


def _place(cursor: _Cursor, records: list[tuple[int, TensorInfo]], alignment: int) -> dict[str, TensorInfo]:
    """Tensors by name, with offsets counted from the start of the file, after checking that they are inside of it and do not overlap."""
    path, size = cursor.path, len(cursor.mapping)
    data_start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for at, info in records:
        shown, start = _shown(info.name), data_start + info.offset
        if info.name in tensors:
            raise GGUFError(path, at, f"tensor {shown} is in the file twice")
        if info.offset % alignment:
            raise GGUFError(path, at, f"expected an offset that is a multiple of the alignment {alignment} for tensor {shown}, "
                                      f"found {info.offset}")
        if start + info.n_bytes > size:
            raise GGUFError(path, at, f"expected {info.n_bytes} bytes for tensor {shown} from byte {start}, found "
                                      f"{max(0, size - start)} before the end of the file; it is cut off: download it again")
        tensors[info.name] = replace(info, offset=start)
    last_end, last_shown = 0, ""
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset < last_end:                              # holes do no harm; shared bytes show a forged index
            raise GGUFError(path, info.offset, f"tensor {_shown(info.name)} overlaps {last_shown}")
        last_end, last_shown = info.offset + info.n_bytes, _shown(info.name)
    return tensors


def _text(raw: bytes, key: str) -> str:
    """A metadata string. Values need not be UTF-8 to be of use (a vocabulary may hold split characters): warn and go on."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        warnings.warn(f"metadata {_shown(key)}: bytes that are not UTF-8 are shown as U+FFFD", UnicodeWarning, stacklevel=3)
        return raw.decode("utf-8", "replace")


def _shown(value: object) -> str:
    """A name from the file for a message: quoted, on one line, shortened."""
    text = repr(value) if not isinstance(value, str) else repr(value[:81])
    return text if len(text) <= 80 else text[:77] + "..."


# Split models -------------------------------------------------------------------------------------------------------------

PART_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


def _split_number(part: _Part, key: str) -> int:
    value = part.metadata.get(key)
    if type(value) is not int:
        raise GGUFError(part.path, None, f"expected a whole number as {key} in a part of a split model, "
                                         f"found {'no such key' if value is None else _shown(value)}")
    return value


def _later_parts(first: _Part) -> list[Path]:
    """The other files of a split model, none for a model in one file. Raises GGUFError if `first` is not the first part."""
    in_name = PART_NAME.fullmatch(first.path.name)
    if "split.count" not in first.metadata and (in_name is None or in_name[3] in ("00000", "00001")):
        return []
    count = _split_number(first, "split.count")
    if count <= 1 and (in_name is None or in_name[3] == "00001"):
        return []
    if in_name is None or int(in_name[3]) != count:
        raise GGUFError(first.path, None, f"split.count says that the model has {count} parts, so a name that ends in "
                                          f"-00001-of-{count:05}.gguf was expected; give the parts their own names again")
    names = [f"{in_name[1]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    if _split_number(first, "split.no") != 0 or int(in_name[2]) != 1:
        raise GGUFError(first.path, None, f"this is not the first part of a split model: open {names[0]}")
    for number, name in enumerate(names, start=1):
        if not os.path.exists(first.path.with_name(name)):
            raise GGUFError(first.path, None, f"part {number} of {count} is missing: put {name} into the same folder")
    return [first.path.with_name(name) for name in names[1:]]


def _check_later_part(first: _Part, part: _Part, number: int) -> None:
    for key, expected in (("split.no", number), ("split.count", _split_number(first, "split.count"))):
        found = _split_number(part, key)
        if found != expected:
            raise GGUFError(part.path, None, f"expected {key} = {expected}, found {found}; the parts do not belong together")
