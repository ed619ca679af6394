"""Writing GGUF files, for tests, synthetic models and the models that ship with the package.

The bytes are written by `gguf.GGUFWriter`, not by code of ours: so a file that our reader reads is one that llama.cpp's own tools
agree on. `gguf` is slow to import, so only this module imports it.

Source: the GGUF specification (see gguf.py) and gguf 0.19, `gguf_writer.py`.
"""

import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from refimpl.formats.gguf import MAX_ALIGNMENT, MAX_DIMS, MAX_NAME_BYTES

# Types that NumPy has. All others are passed as the raw bytes of their rows.
PLAIN_TYPES = {"F32": "float32", "F16": "float16", "F64": "float64", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
NUMBER_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64", "bool")
INT_RANGES = {name: np.iinfo(name.lower()) for name in ("UINT32", "INT32", "UINT64", "INT64")}


@dataclass(frozen=True)
class Deferred:
    """An array that is made only when it is written, so that a file may be larger than memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    def array(self) -> np.ndarray:
        """The array. Raises ValueError when its shape or dtype is not the one announced."""
        array = np.ascontiguousarray(self.make())
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"expected an array {self.dtype} {self.shape}, found {array.dtype} {array.shape}")
        return array


def write_gguf(path: str | os.PathLike, metadata: Mapping[str, object], tensors: Iterable[tuple[str, str, np.ndarray | Deferred]],
               progress: Callable[[int], None] = lambda n_bytes: None) -> None:
    """Writes a GGUF version 3 file; it appears under its name when it is complete, and not at all if anything fails.

    metadata  must hold "general.architecture". The type of a value follows from it:
                bool -> BOOL; float -> FLOAT32; str -> STRING
                int -> UINT32, INT32 below zero, UINT64 or INT64 where that is too small
                list of bool, float or str -> array of BOOL, FLOAT32 or STRING
                list of int -> array of INT32, or of the first of UINT32, INT64, UINT64 that holds all of them
                NumPy array (1-D) or scalar -> what its dtype says
              "general.alignment", if present, is also obeyed.
    tensors   (name, type, array) in file order. float32 for "F32", float16 for "F16", and so on for F64 and I8 to I64; for
              quantized types and "BF16" the raw bytes of the rows, uint8 `(*shape[:-1], row_bytes)`. Arrays are kept until they
              are written; a `Deferred` is made then and dropped.
    progress  progress(n) after every tensor of n bytes.

    Raises ValueError for what the format, or our own reader, would refuse: an empty array, a list of mixed types, an alignment
    that is no power of two up to 65536, a name of 64 bytes or more, no dimension or more than four, an empty tensor, a dtype that
    does not fit the type. OSError, with the name of the file, if writing fails.
    """
    path = Path(path)
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError("metadata must hold the string general.architecture")
    writer = GGUFWriter(None, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.alignment":
            if int(value) > MAX_ALIGNMENT:
                raise ValueError(f"general.alignment: expected a power of two up to {MAX_ALIGNMENT}, found {value}")
            writer.add_custom_alignment(int(value))
        elif key != "general.architecture":                     # the constructor has written that one
            _add_value(writer, key, value)
    contents = [_add_tensor(writer, name, type_name, array) for name, type_name, array in tensors]

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")     # same folder: only there is a rename atomic
    try:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for content in contents:
                writer.write_tensor_data(content.array())
                progress(_n_bytes(content))
        finally:
            writer.close()
        os.replace(temporary, path)
    except OSError as error:        # NumPy's has no file name and says only "8 requested and 4 written", the others name the temporary one
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or f"cannot be written, the disk is full ({error})", os.fspath(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _add_value(writer: GGUFWriter, key: str, value: object) -> None:
    # add_key_value, not add_string and add_array: those leave out empty values without a word.
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.name not in NUMBER_TYPES or value.ndim > 1 or not value.size:
            raise ValueError(f"{key}: expected a scalar or a 1-D array with at least one number or bool, "
                             f"found {value.dtype} {value.shape}")
        value_type = GGUFValueType[value.dtype.name.upper()]
        if value.ndim == 1:
            writer.add_key_value(key, value.tolist(), GGUFValueType.ARRAY, value_type)
        else:
            writer.add_key_value(key, value.item(), value_type)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        items = list(value)
        kinds = {type(item) for item in items}
        if len(kinds) != 1:
            raise ValueError(f"{key}: expected a list of one type, not empty, found {sorted(kind.__name__ for kind in kinds)}")
        writer.add_key_value(key, items, GGUFValueType.ARRAY, _value_type(key, items, "INT32", "UINT32", "INT64", "UINT64"))
    else:
        writer.add_key_value(key, value, _value_type(key, [value], "UINT32", "INT32", "UINT64", "INT64"))


def _value_type(key: str, values: list, *int_types: str) -> GGUFValueType:
    """The GGUF type of `values`, which are of one Python type: for integers the first of `int_types` that holds them all."""
    simple = {bool: "BOOL", float: "FLOAT32", str: "STRING"}.get(type(values[0]))
    if simple:
        return GGUFValueType[simple]
    if type(values[0]) is not int:
        raise ValueError(f"{key}: no GGUF type for {type(values[0]).__name__}")
    for name in int_types:
        if INT_RANGES[name].min <= min(values) and max(values) <= INT_RANGES[name].max:
            return GGUFValueType[name]
    raise ValueError(f"{key}: no GGUF type holds integers from {min(values)} to {max(values)}")


def _n_bytes(content: Deferred) -> int:
    return math.prod(content.shape) * np.dtype(content.dtype).itemsize


def _add_tensor(writer: GGUFWriter, name: str, type_name: str, array: np.ndarray | Deferred) -> Deferred:
    expected = np.dtype(PLAIN_TYPES.get(type_name, "uint8"))
    if type_name not in GGMLQuantizationType.__members__:
        raise ValueError(f"tensor {name}: there is no type {type_name}")
    if array.dtype != expected:
        raise ValueError(f"tensor {name}: expected {expected} for {type_name}, found {array.dtype}")
    if len(name.encode()) > MAX_NAME_BYTES or not 1 <= len(array.shape) <= MAX_DIMS or 0 in array.shape:
        raise ValueError(f"tensor {name}: expected a name below 64 bytes and 1 to {MAX_DIMS} dimensions, none of them empty, "
                         f"found {array.shape}")
    content = Deferred(array.shape, expected, lambda: array) if isinstance(array, np.ndarray) else array
    writer.add_tensor_info(name, array.shape, expected, _n_bytes(content), raw_dtype=GGMLQuantizationType[type_name])
    return content
