"""A trace of llama.cpp, live through llama-cpp-python: its scheduler shows every tensor of the graph to a callback.

It runs in a process of its own (this file as a module: model, ids, threads, output), because it ends its process when an assertion fails.
There the callback finds name, sizes, strides and data in ggml's `struct ggml_tensor`, whose layout is that of llama-cpp-python 0.3.36; a
build that lays it out otherwise is noticed by the name.
"""

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refimpl.formats.gguf import GGUFFile, open_gguf
from refimpl.formats.safetensors import TensorFile, TensorWriter
from refimpl.lab.compare.names import BY_NAME, place_of
from refimpl.lab.compare.trace import Trace, TraceError

TYPES = {0: np.float32, 1: np.float16, 24: np.int8, 25: np.int16, 26: np.int32, 27: np.int64}       # ggml_type


def trace(path: str | os.PathLike, ids: Sequence[int], threads: int = 1) -> Trace:
    """Runs `ids` in one call and keeps every tensor that has a name of ours. Raises TraceError, with what llama.cpp said."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise TraceError("llama.cpp is missing: pip install 'refimpl[llamacpp]'")
    file = open_gguf(path)
    with tempfile.TemporaryDirectory() as folder:
        out, asked = Path(folder) / "trace.safetensors", Path(folder) / "ids.json"
        asked.write_text(json.dumps([int(i) for i in ids]))
        package = str(Path(__file__).parents[4])
        paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        done = subprocess.run([sys.executable, "-m", __name__, str(Path(path).absolute()), str(asked), str(threads), str(out)],
                              env=os.environ | {"PYTHONPATH": paths, "GGML_NO_BACKTRACE": "1"}, capture_output=True, text=True,
                              errors="replace")
        if done.returncode or not out.exists():
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            raise TraceError(f"llama.cpp: {path}: {said[-1] if said else f'ended with status {done.returncode}'}")
        found = TensorFile(out)
        raw = {name: found.array(name).copy() for name in found.tensors}
    return Trace("llama.cpp", tuple(map(int, ids)), tuple(range(len(ids))), "q8", in_our_terms(raw, len(ids), file),
                 {"engine": found.metadata["engine"]})


def in_our_terms(raw: dict[str, np.ndarray], n_tok: int, file: GGUFFile) -> dict[str, np.ndarray]:
    """llama.cpp's tensors, positions in front; its weights of experts times the experts' scales, which it applies later."""
    arrays = {}
    for name, value in raw.items():
        base, _, layer = name.partition("-")
        if base in ("ffn_moe_weights", "h_nextn"):              # before they are renormalised; here the final norm: not ours
            continue
        if base == "ffn_moe_weights_norm":
            name = f"ffn_moe_weights-{layer}"
        if place_of(name) is None or value.size % n_tok:
            continue
        arrays[name] = value.reshape(n_tok, -1)
    for name in [name for name in arrays if name.startswith("ffn_moe_weights-")]:
        scale = f"blk.{name.rpartition('-')[2]}.ffn_down_exps.scale"
        if scale in file.tensors:
            arrays[name] = arrays[name] * file.raw(scale).view("<f4").ravel()[arrays[name.replace("weights", "topk")]]
    return arrays


# ---- inside of the process

class Tensor(ctypes.Structure):
    """ggml.h: struct ggml_tensor, up to its name."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
                ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32), ("src", ctypes.c_void_p * 10),
                ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64)]


def array_of(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor that lies in this process's memory, axes as NumPy has them, those of size 1 in front left out."""
    dtype, sizes, strides = np.dtype(TYPES[tensor.type]), list(tensor.ne), list(tensor.nb)
    n_bytes = sum((n - 1) * step for n, step in zip(sizes, strides)) + dtype.itemsize
    memory = np.frombuffer((ctypes.c_char * n_bytes).from_address(tensor.data), np.uint8)
    array = np.lib.stride_tricks.as_strided(memory[:dtype.itemsize].view(dtype), sizes[::-1], strides[::-1]).copy()
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    return array


def main(path: str, asked: str, threads: str, out: str):
    """Runs the ids in `asked` and writes what the callback saw."""
    import llama_cpp as lib
    from llama_cpp._ggml import libggml

    from refimpl.lab.llamacpp import process as quiet

    ids, found = json.loads(Path(asked).read_text()), {}
    libggml.ggml_get_name.restype = ctypes.c_char_p

    def look(address, ask, data):
        if ask:
            return True
        tensor = Tensor.from_address(address)
        if libggml.ggml_get_name(ctypes.c_void_p(address)) != tensor.name:
            os.write(2, b"this build lays struct ggml_tensor out otherwise; use llama-cpp-python 0.3.36\n")
            os._exit(1)
        name = tensor.name.decode("utf-8", "replace")
        base = name.partition("-")[0]
        if (base in BY_NAME or base == "ffn_moe_weights_norm") and tensor.type in TYPES and tensor.data:
            found[name] = array_of(tensor)
        return True

    log, callback = lib.llama_log_callback(quiet._tell_errors), lib.ggml_backend_sched_eval_callback(look)
    lib.llama_log_set(log, None)
    lib.llama_backend_init()
    how = lib.llama_model_default_params()
    how.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(path.encode(), how)
    if not model:
        sys.exit("the model could not be loaded")
    how = lib.llama_context_default_params()
    how.n_ctx = how.n_batch = how.n_ubatch = max(len(ids), 32)
    how.n_threads = how.n_threads_batch = int(threads)
    how.op_offload = how.offload_kqv = False
    how.cb_eval = callback
    context = lib.llama_init_from_model(model, how)
    if not context:
        sys.exit(f"no context of {len(ids)} tokens could be made")
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    status = lib.llama_decode(context, batch)
    if status:
        sys.exit(f"llama_decode returned {status}")
    with TensorWriter(out, 4096 + 256 * len(found)) as file:
        for name, array in found.items():
            array = array.astype(np.int32) if array.dtype.kind == "i" else array
            file.add(name, array.dtype, array.shape)
            file.write(name, 0, array)
        file.finish({"engine": f"llama.cpp (llama-cpp-python {lib.__version__})"})


if __name__ == "__main__":
    main(*sys.argv[1:])
