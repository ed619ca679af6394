"""Hugging Face directories: `config.json` beside one or more safetensors files, memory-mapped. Takes no file at its word.

Several files are listed in `model.safetensors.index.json`. Matrices that compressed-tensors has packed to 4 bits (quants/w4a16.py) are
one tensor of Q4_0 each; those with a scale that Q4_0 cannot hold, F32.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from refimpl.formats.gguf import TensorInfo
from refimpl.formats.quants import w4a16
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.quants.codecs import dequantize
from refimpl.formats.safetensors import CheckpointError, TensorFile

MAX_JSON = 100_000_000
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"


class Checkpoint:
    """An open directory, made by `open_checkpoint`.

    path      the folder
    config    what config.json says
    tensors   name -> TensorInfo; a packed matrix is one tensor, `NAME.weight`
    n_files   safetensors files
    n_bytes   of these files together
    """

    def __init__(self, path: Path, config: dict[str, object], shards: list[TensorFile], packed: bool):
        self.path, self.config, self.tensors = path, config, {}
        self.n_files, self.n_bytes = len(shards), sum(shard.n_bytes for shard in shards)
        self._shards, self._packed = shards, {}
        for shard in shards:
            for name, info in shard.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(shard.path, None, f"tensor {name!r} is in another file too")
                self.tensors[name] = info
        if packed:
            for name in [name for name in self.tensors if name.endswith(PACKED)]:
                self._join(name.removesuffix(PACKED))

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 `(*shape[:-1], row_bytes)`: a read-only view of the mapping; of a packed one, a new array."""
        if name not in self._packed:
            return self._view(self.tensors[name])
        packed, scale = self._packed[name]
        if self.tensors[name].type == "F32":
            return w4a16.to_float32(self._view(packed), self._scales(scale)).view(np.uint8)
        return w4a16.to_q4_0(self._view(packed), self._scales(scale))

    def release_all(self) -> None:
        """Tells the system that the files' pages are not wanted in memory for now. Best effort."""
        for shard in self._shards:
            shard.release_all()

    def files(self) -> list[Path]:
        """The safetensors files."""
        return [shard.path for shard in self._shards]

    def _view(self, info: TensorInfo) -> np.ndarray:
        return self._shards[info.part].raw(info.name)

    def _scales(self, info: TensorInfo) -> np.ndarray:
        return dequantize(self._view(info), info.type)

    def _join(self, base: str):
        """Replaces the three parts of `base.weight` by it. Reads the scales, a ninth of the bytes, to see whether Q4_0 holds them."""
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
    """Opens a Hugging Face directory. Tensors whose names are not `wanted` are skipped unchecked.

    Raises CheckpointError for what is missing or malformed, and for weights quantized in another way than W4A16.
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
    shards = [TensorFile(path / name, wanted, part) for part, name in enumerate(names)]
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
    """The object in a JSON file. Raises CheckpointError for anything else; if there is no such file, the message ends with `remedy`."""
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
