"""Hugging Face directories: `config.json` beside one or more safetensors files, memory-mapped. Takes no file at its word.

    safetensors    8 bytes: length n of the header, little-endian
                   n bytes: JSON, tensor name -> {"dtype", "shape", "data_offsets": [begin, end] from the end of the header}
                   the tensors' bytes

Source: the format's README (huggingface/safetensors). Several files are listed in `model.safetensors.index.json`. Matrices that
compressed-tensors has packed to 4 bits (w4a16.py) come out as one tensor of Q4_0 each; those with a scale that Q4_0 cannot hold, as F32.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.formats.gguf import MAX_DIMS, GGUFError, TensorInfo, let_go, map_file, view
from refimpl.formats.quants import w4a16
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import dequantize

TYPES = {"F32": ("F32", 4), "F16": ("F16", 2), "BF16": ("BF16", 2), "I64": ("I64", 8), "I32": ("I32", 4)}
# Far above any real header (26B-A4B with every expert on its own: 35,000 tensors, 5 MB). Parsed JSON takes many times its bytes.
MAX_HEADER = 8 << 20
MAX_MARKS = 500_000                 # brackets, commas and colons of a header: each value has one
MAX_SIZE = 1 << 48                  # of one dimension: a product of numbers with thousands of digits would take for ever
MAX_JSON = 100_000_000
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"


class CheckpointError(GGUFError):
    """A directory that cannot be read as a checkpoint. One line, as GGUFError's."""


@dataclass(frozen=True)
class _Shard:
    """One safetensors file."""

    path: Path
    mapping: mmap.mmap
    tensors: dict[str, TensorInfo]


class Checkpoint:
    """An open directory, made by `open_checkpoint`.

    path      the folder
    config    what config.json says
    tensors   name -> TensorInfo; a packed matrix stands there once, as `NAME.weight`
    n_files   safetensors files
    n_bytes   of them together
    """

    def __init__(self, path: Path, config: dict[str, object], shards: list[_Shard], packed: bool):
        self.path, self.config, self.tensors = path, config, {}
        self.n_files, self.n_bytes = len(shards), sum(len(shard.mapping) for shard in shards)
        self._shards, self._packed = shards, {}
        for shard in shards:
            for name, info in shard.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(shard.path, None, f"tensor {name!r} stands in another file too")
                self.tensors[name] = info
        if packed:
            for name in [name for name in self.tensors if name.endswith(PACKED)]:
                self._join(name.removesuffix(PACKED))

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 `(*shape[:-1], row_bytes)`: a read-only view of the mapping; made anew where packed."""
        if name not in self._packed:
            return self._view(self.tensors[name])
        packed, scale = self._packed[name]
        if self.tensors[name].type == "F32":
            return w4a16.to_float32(self._view(packed), self._scales(scale)).view(np.uint8)
        return w4a16.to_q4_0(self._view(packed), self._scales(scale))

    def lies_there(self, name: str) -> bool:
        """Is `raw` a view of the file, which takes no memory?"""
        return name not in self._packed

    def release_all(self) -> None:
        """Tells the system that no page is wanted in memory for now. Best effort."""
        for shard in self._shards:
            let_go(shard.mapping, 0, len(shard.mapping))

    def files(self) -> list[Path]:
        """The safetensors files."""
        return [shard.path for shard in self._shards]

    def _view(self, info: TensorInfo) -> np.ndarray:
        return view(self._shards[info.part].mapping, info)

    def _scales(self, info: TensorInfo) -> np.ndarray:
        return dequantize(self._view(info), info.type)

    def _join(self, base: str):
        """Puts `base.weight` in the place of its three parts. Reads the scales, a ninth of the bytes, to see whether they fit."""
        packed = self.tensors.pop(base + PACKED)
        where = self._shards[packed.part].path

        def refuse(what: str):
            raise CheckpointError(where, packed.offset, f"tensor {base + PACKED!r}: {what}")

        for odd, meaning in ((".weight_zero_point", "asymmetric weights"), (".weight_g_idx", "reordered columns (actorder)")):
            if base + odd in self.tensors:
                refuse(f"there is {base + odd!r} too, that is {meaning}, which this version cannot read")
        for part in (SCALE, SHAPE):
            if base + part not in self.tensors:
                refuse(f"{base + part!r} is missing")
        scale, sizes = self.tensors.pop(base + SCALE), self.tensors.pop(base + SHAPE)
        if packed.type != "I32" or scale.type not in ("BF16", "F16", "F32") or sizes.type != "I64" or sizes.shape != (2,):
            refuse(f"expected I32 with a scale of BF16 and two I64 as its shape, found {packed.type}, {scale.type} and {sizes.type}")
        n_rows, n_cols = (int(n) for n in self._view(sizes).view("<i8"))
        if n_rows < 1 or n_cols < 1 or n_cols % w4a16.GROUP:
            refuse(f"weight_shape is {n_rows} x {n_cols}, expected rows of whole groups of {w4a16.GROUP}")
        expected = (n_rows, n_cols // w4a16.PER_WORD), (n_rows, n_cols // w4a16.GROUP)
        if (packed.shape, scale.shape) != expected:
            refuse(f"weight_shape is {n_rows} x {n_cols}, so words {expected[0]} and scales {expected[1]} were expected, "
                   f"found {packed.shape} and {scale.shape}")
        scale_OB = self._scales(scale)
        if not np.isfinite(scale_OB).all():
            refuse("a scale is no finite number")
        fits = not w4a16.misfits(self._view(packed), scale_OB).any()
        block, name = "Q4_0" if fits else "F32", base + ".weight"
        if name in self.tensors:
            refuse(f"there is an unpacked {name!r} too")
        self.tensors[name] = TensorInfo(name, block, (n_rows, n_cols), n_rows * BLOCKS[block].row_bytes(n_cols), packed.offset, packed.part)
        self._packed[name] = packed, scale


def open_checkpoint(path: str | os.PathLike, wanted: Callable[[str], bool] = lambda name: True) -> Checkpoint:
    """Opens a Hugging Face directory. Tensors whose names are not `wanted` are passed over unseen.

    Raises CheckpointError for what is missing or senseless, and for weights quantized in another way than W4A16.
    """
    path = Path(path)
    config, index = read_json(path / "config.json"), path / "model.safetensors.index.json"
    packed = is_packed(config, path / "config.json")
    weight_map, names = {}, ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else ()
        if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
            raise CheckpointError(index, None, "expected a weight_map of file names in this folder")
        names = sorted(set(files))
        missing = [name for name in names if not (path / name).exists()]
        if missing:
            raise CheckpointError(index, None, f"{len(missing)} of {len(names)} files are missing, first {missing[0]}: download them again")
    shards = []
    for number, name in enumerate(names):
        mapping = map_file(path / name, "a safetensors file", CheckpointError)
        shards.append(_Shard(path / name, mapping, tensors_of(path / name, mapping, number, wanted)))
    _check_index(index, weight_map, {shard.path.name: shard.tensors for shard in shards}, wanted)
    return Checkpoint(path, config, shards, packed)


def is_packed(config: dict[str, object], place: Path) -> bool:
    """Are the weights W4A16? False for weights that are not quantized; CheckpointError, with the scheme, for any other kind."""
    scheme = config.get("quantization_config") or config.get("compression_config")
    if not scheme:
        return False
    if odd := w4a16.other_scheme(scheme):
        raise CheckpointError(place, None, f"the weights are quantized with {odd}; this version reads W4A16 of compressed-tensors "
                              "(pack-quantized, 4 bits, symmetric, groups of 32) and weights that are not quantized")
    return True


def read_json(path: Path, remedy: str = "expected a Hugging Face directory with config.json and safetensors") -> dict[str, object]:
    """The object in a JSON file. Raises CheckpointError for anything else, with a `remedy` where there is no such file."""
    try:
        if path.exists() and not path.is_file():                # opening a pipe would wait for ever
            raise CheckpointError(path, None, "expected a JSON file, found no regular file")
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(path, None, f"is larger than {MAX_JSON:,} bytes, expected a small JSON file")
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path, None, f"no such file; {remedy}{_instead(path.parent)}") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(path, None, f"cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(path, None, "expected a JSON object")
    return found


def _instead(folder: Path) -> str:
    files = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    return f"; to run {files[0].name} in this folder, name the file" if files else ""


def _check_index(index: Path, weight_map: dict[str, str], held: dict[str, Iterable[str]], wanted: Callable[[str], bool]):
    for name, file in weight_map.items():
        if wanted(name) and name not in held[file]:
            raise CheckpointError(index, None, f"says that tensor {name!r} is in {file}, which does not hold it: download both again")


def _parsed(raw: bytes) -> object:
    """The JSON of a header. Raises ValueError for one that is none, has a name twice, or more in it than any model."""
    if sum(raw.count(mark) for mark in b"[{,:") > MAX_MARKS:
        raise ValueError("more entries than any model has")

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(entries := dict(pairs)) != len(pairs):
            raise ValueError("a name stands in it twice")
        return entries
    return json.loads(raw.decode("utf-8"), object_pairs_hook=once)


def tensors_of(path: Path, mapping: mmap.mmap, number: int, wanted: Callable[[str], bool]) -> dict[str, TensorInfo]:
    """The `wanted` tensors in the header of a mapped file, checked against its bytes, of part `number`. Raises CheckpointError."""
    size = len(mapping)
    length = int.from_bytes(mapping[:8], "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise CheckpointError(path, 0, f"expected a header of at most {max(0, size - 8)} bytes, found a length of {length}")
    try:
        header = _parsed(mapping[8:8 + length])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, 8, f"the header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(path, 8, "the header is no JSON object")
    first, tensors, ends = 8 + length, {}, []
    for name, entry in header.items():
        if name == "__metadata__" or not wanted(name):
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, begin, end)
            if not shape or not all(type(n) is int and 0 <= n < MAX_SIZE for n in numbers) or not all(shape) or len(shape) > MAX_DIMS:
                raise ValueError
            known = dtype in TYPES
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(path, 8, f"tensor {name!r}: expected a dtype, a shape and two data_offsets") from None
        if not known:
            raise CheckpointError(path, 8, f"tensor {name!r} is {dtype}, which this version cannot read; it reads {', '.join(TYPES)}")
        block, item = TYPES[dtype]
        if end - begin != math.prod(shape) * item or end > size - first:
            cut = ": the file is cut off, download it again" if end > size - first else ""
            raise CheckpointError(path, 8, f"tensor {name!r}: {shape} of {dtype} do not lie at bytes {begin} to {end} "
                                  f"of {size - first}{cut}")
        tensors[name] = TensorInfo(name, block, shape, end - begin, first + begin, number)
        ends.append((begin, end, name))
    ends.sort()
    for (_, end, name), (begin, _, other) in zip(ends, ends[1:]):
        if begin < end:
            raise CheckpointError(path, 8, f"tensors {name!r} and {other!r} overlap")
    return tensors
