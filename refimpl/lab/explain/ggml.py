"""ggml's own quantizers and decoders, through the library inside llama-cpp-python (`pip install '.[llamacpp]'`): a second witness."""

import ctypes
import importlib.util
import time
from functools import cache
from pathlib import Path

import numpy as np

from refimpl.extras import require
from refimpl.formats.quants.blocks import BLOCKS, TYPE_IDS, fields_of

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
    """libggml-base. Raises MissingExtra if llama-cpp-python is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None:
        require("llama_cpp", "llamacpp")
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


# ---- how fast ggml multiplies

class _CpuTraits(ctypes.Structure):
    """struct ggml_type_traits_cpu (ggml-cpu.h)."""

    _fields_ = [("from_float", ctypes.c_void_p), ("vec_dot", ctypes.c_void_p), ("vec_dot_type", ctypes.c_int), ("nrows", ctypes.c_int64)]


_DOT = ctypes.CFUNCTYPE(None, ctypes.c_int, _FLOATS, ctypes.c_size_t, _BYTES, ctypes.c_size_t, _BYTES, ctypes.c_size_t, ctypes.c_int)


def ggml_dot_speed(type_name: str, n_weights: int = 65_536, passes: int = 200) -> float:
    """Weights per second that ggml multiplies and adds on one thread, a row with a row of activations in its own 8 bits, out of the cache.

    Random bytes; the quickest of `passes`, less what a call of one block takes.
    """
    found = library()           # the CPU part needs it to be loaded
    cpu = ctypes.CDLL(str(next(Path(found._name).parent.glob("*ggml-cpu*"))))
    cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CpuTraits)
    cpu.ggml_cpu_init()
    traits = cpu.ggml_get_type_traits_cpu(_NUMBER[type_name]).contents
    rng = np.random.default_rng(0)
    x = ggml_quantize(rng.standard_normal((1, n_weights), dtype=np.float32), TYPE_IDS[traits.vec_dot_type])
    w = rng.integers(0, 256, BLOCKS[type_name].row_bytes(n_weights), dtype=np.uint8)
    out, dot = ctypes.c_float(), _DOT(traits.vec_dot)
    arguments = ctypes.byref(out), 0, w.ctypes.data_as(_BYTES), 0, x.ctypes.data_as(_BYTES), 0, 1
    seconds = {n: min(_timed(dot, n, *arguments) for _ in range(passes)) for n in (256, n_weights)}
    return (n_weights - 256) / (seconds[n_weights] - seconds[256])


def _timed(function, *arguments) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began
