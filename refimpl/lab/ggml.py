"""ggml's own quantizers and decoders, through the library inside llama-cpp-python (`pip install '.[llamacpp]'`): a second witness."""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np

from refimpl.formats.blocks import BLOCKS, TYPE_IDS, fields_of

_NUMBER = {name: number for number, name in TYPE_IDS.items()}
_FLOATS, _BYTES = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_uint8)
_TO_FLOAT = ctypes.CFUNCTYPE(None, _BYTES, _FLOATS, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """struct ggml_type_traits (ggml.h)."""

    _fields_ = [("type_name", ctypes.c_char_p), ("blck_size", ctypes.c_int64), ("blck_size_interleave", ctypes.c_int64),
                ("type_size", ctypes.c_size_t), ("is_quantized", ctypes.c_bool), ("to_float", _TO_FLOAT),
                ("from_float_ref", ctypes.c_void_p)]


@cache
def library() -> ctypes.CDLL:
    """libggml-base. Raises ValueError where llama-cpp-python is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None:
        raise ValueError("llama-cpp-python is not installed: pip install 'refimpl[llamacpp]'")
    found = sorted((Path(spec.origin).parent / "lib").glob("*ggml-base*"))
    if not found:
        raise ValueError(f"{Path(spec.origin).parent}: no ggml-base library in it")
    lib = ctypes.CDLL(str(found[0]))
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, _FLOATS, _BYTES, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _FLOATS]
    return lib


def ggml_quantize(x: np.ndarray, type_name: str) -> np.ndarray:
    """float32 (rows, D) -> uint8 (rows, row_bytes), with the same importance for every weight where a type asks for it."""
    x, block, lib = np.ascontiguousarray(x, np.float32), BLOCKS[type_name], library()
    out = np.zeros((len(x), block.row_bytes(x.shape[1])), np.uint8)
    if type_name in ("Q8_1", "Q8_K"):       # for activations: not in the table of ggml_quantize_chunk
        to = {"Q8_1": lib.quantize_row_q8_1_ref, "Q8_K": lib.quantize_row_q8_K_ref}[type_name]
        to(x.ctypes.data_as(_FLOATS), out.ctypes.data_as(_BYTES), ctypes.c_int64(x.size))
        return out
    ones = np.ones(x.shape[1], np.float32)
    importance = ones.ctypes.data_as(_FLOATS) if lib.ggml_quantize_requires_imatrix(_NUMBER[type_name]) else None
    lib.ggml_quantize_chunk(_NUMBER[type_name], x.ctypes.data_as(_FLOATS), out.ctypes.data_as(_BYTES), 0, len(x), x.shape[1], importance)
    return out


def ggml_dequantize(raw: np.ndarray, type_name: str) -> np.ndarray:
    """uint8 (rows, row_bytes) -> float32 (rows, D). Raises ValueError for a type that ggml has no decoder of."""
    raw, block, lib = np.ascontiguousarray(raw), BLOCKS[type_name], library()
    out = np.empty((len(raw), fields_of(raw, block).shape[1] * block.elements), np.float32)
    to_float = lib.ggml_get_type_traits(_NUMBER[type_name]).contents.to_float
    if type_name == "Q8_K":
        to_float = lib.dequantize_row_q8_K
    elif not to_float:
        raise ValueError(f"ggml has no decoder of {type_name}")
    to_float(raw.ctypes.data_as(_BYTES), out.ctypes.data_as(_FLOATS), ctypes.c_int64(out.size))
    return out
