"""The child process that runs llama.cpp, started by client.py as `python -m refimpl.lab.llamacpp.process MODEL N_CTX N_THREADS N_BATCH
N_UBATCH`. llama.cpp has a process to itself because it aborts its process when an assertion fails, and so that its threads do not mix with
ours.

It loads the model once, through the C interface that llama-cpp-python wraps, writes one line of JSON with its facts, `{"version": ...}`,
and answers every line of JSON on standard input with one on standard output, until its input ends. What is asked and answered:

    {"ask": "time", "context": [ids], "ids": [ids], "together": bool}       {"seconds": s}      ids after context, in one batch or singly
    {"ask": "logits", "ids": [ids], "start": n, "file": path}               {"rows": n}         ids at positions n, n + 1, ...
    {"ask": "trace", "ids": [ids], "names": [names], "file": path}          {"tensors": n}      ids in one batch, every named tensor

`logits` at start 0 forgets all tokens before; it writes float32 (ids, vocabulary) to the file, or nothing where its name is empty. `trace`
writes an .npz. A failed request is answered by {"error": "one line"}.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

LOG_ERROR, LOG_CONTINUED = 4, 5                                                                     # ggml_log_level
TYPES = {0: np.float32, 1: np.float16, 24: np.int8, 25: np.int16, 26: np.int32, 27: np.int64}       # ggml_type


class Engine:
    """A model and a context of llama.cpp in this process. Raises RuntimeError for what llama.cpp refuses."""

    def __init__(self, path: str, n_ctx: int, n_threads: int, n_batch: int, n_ubatch: int):
        import llama_cpp

        self.lib, self.n_threads = llama_cpp, n_threads
        self._log = self.lib.llama_log_callback(log_errors)                 # kept: C holds no reference
        self.lib.llama_log_set(self._log, None)
        self.lib.llama_backend_init()
        parameters = self.lib.llama_model_default_params()
        parameters.n_gpu_layers, parameters.load_mode = 0, self.lib.LLAMA_LOAD_MODE_MMAP
        self.model = self.lib.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise RuntimeError("the model could not be loaded")
        self.context = self.new_context(n_ctx, n_batch, n_ubatch)
        self.n_batch = self.lib.llama_n_batch(self.context)                 # at most the context
        self.facts = {"version": self.lib.__version__, "system": self.lib.llama_print_system_info().decode().strip(" |"),
                      "n_threads": n_threads, "n_batch": self.n_batch, "n_ubatch": n_ubatch, "kv": "float16"}

    def new_context(self, n_ctx: int, n_batch: int, n_ubatch: int, watch=None):
        """A context on the CPU; `watch` sees the tensors of the graph."""
        parameters = self.lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = n_ctx, n_batch, n_ubatch
        parameters.n_threads = parameters.n_threads_batch = self.n_threads
        parameters.op_offload = parameters.offload_kqv = False
        parameters.swa_full = False                                         # a ring in sliding layers, as in llama.cpp's own tools
        if watch is not None:
            parameters.cb_eval = watch
        context = self.lib.llama_init_from_model(self.model, parameters)
        if not context:
            raise RuntimeError(f"no context of {n_ctx} tokens could be made")
        return context

    def answer(self, ask: str, **arguments) -> dict:
        """The answer to a request."""
        return {"time": self.time, "logits": self.logits, "trace": self.trace}[ask](**arguments)

    def time(self, context: Sequence[int], ids: Sequence[int], together: bool) -> dict:
        """Seconds of `ids` after `context`, whose own time does not count."""
        self.forget()
        self.run(self.batches(context, self.n_batch))
        batches = self.batches(ids, self.n_batch if together else 1)
        began = time.perf_counter()
        self.run(batches)
        return {"seconds": time.perf_counter() - began}

    def logits(self, ids: Sequence[int], start: int, file: str) -> dict:
        """Writes the logits of all `ids` into `file`, or of none where that is ""."""
        if not start:
            self.forget()
        self.decode_all(self.context, ids, start, every=bool(file))
        if file:
            n_vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
            rows = ctypes.cast(self.lib.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float * (len(ids) * n_vocab)))
            np.frombuffer(rows.contents, np.float32).tofile(file)
        return {"rows": len(ids)}

    def trace(self, ids: Sequence[int], names: Sequence[str], file: str) -> dict:
        """Writes the tensors whose names, without the layer, are among `names`."""
        watch, size = Watch(names), max(len(ids), 32)
        callback = self.lib.ggml_backend_sched_eval_callback(watch)         # kept until the context is freed
        context = self.new_context(size, size, size, callback)
        try:
            self.decode_all(context, ids, 0, every=True)
        finally:
            self.lib.llama_free(context)
        with open(file, "wb") as out:
            np.savez(out, **watch.found)
        return {"tensors": len(watch.found)}

    def forget(self):
        """Empties the cache."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def batches(self, ids: Sequence[int], size: int) -> list:
        """`ids` as C arrays of at most `size`."""
        return [(self.lib.llama_token * len(part))(*part) for part in (ids[i:i + size] for i in range(0, len(ids), size))]

    def run(self, batches: Iterable):
        """Runs batches one after the other, each to its end; logits for the last token of each."""
        for ids in batches:
            self.check(self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, len(ids))))
            self.lib.llama_synchronize(self.context)

    def decode_all(self, context, ids: Sequence[int], start: int, every: bool):
        """Runs `ids` at positions start, start + 1, ... in one batch; logits for `every` token, else for the last one."""
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, start + i, 1, 0, every
            batch.logits[len(ids) - 1] = True               # a batch without any is taken for one of embeddings
            self.check(self.lib.llama_decode(context, batch))
        finally:
            self.lib.llama_batch_free(batch)

    def check(self, status: int):
        """Raises RuntimeError unless llama_decode succeeded."""
        if status:
            raise RuntimeError(f"llama_decode returned {status}")


def log_errors(level: int, text: bytes, data: object):
    """llama.cpp's log: errors only."""
    log_errors.on = level == LOG_ERROR or level == LOG_CONTINUED and log_errors.on
    if log_errors.on:
        os.write(2, text)


log_errors.on = False


# ---- the tensors of the graph

class Tensor(ctypes.Structure):
    """ggml.h: struct ggml_tensor up to its name, as llama-cpp-python 0.3.36 has it."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
                ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32), ("src", ctypes.c_void_p * 10),
                ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64)]


def array_of(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor in this process's memory, axes in NumPy's order, without leading axes of 1 (but at least two axes)."""
    dtype, sizes, strides = np.dtype(TYPES[tensor.type]), list(tensor.ne), list(tensor.nb)
    n_bytes = sum((n - 1) * step for n, step in zip(sizes, strides)) + dtype.itemsize
    memory = np.frombuffer((ctypes.c_char * n_bytes).from_address(tensor.data), np.uint8)
    array = np.lib.stride_tricks.as_strided(memory[:dtype.itemsize].view(dtype), sizes[::-1], strides[::-1]).copy()
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    return array


class Watch:
    """The callback of llama.cpp's scheduler: keeps the tensors whose names, without the layer, are among `names`.

    A build with another layout of struct ggml_tensor is noticed by the name and ends the process.
    """

    def __init__(self, names: Sequence[str]):
        from llama_cpp._ggml import libggml

        self.names, self.found, self._name_of = frozenset(names), {}, libggml.ggml_get_name
        self._name_of.restype = ctypes.c_char_p

    def __call__(self, address: int, ask: bool, data: object) -> bool:
        """`ask`: is this tensor wanted? All are: they are computed one after the other. Otherwise it has just been computed."""
        if ask:
            return True
        tensor = Tensor.from_address(address)
        if self._name_of(ctypes.c_void_p(address)) != tensor.name:
            os.write(2, b"this build has another layout of struct ggml_tensor; use llama-cpp-python 0.3.36\n")
            os._exit(1)
        name = tensor.name.decode("utf-8", "replace")
        if name.partition("-")[0] in self.names and tensor.type in TYPES and tensor.data:
            array = array_of(tensor)
            self.found[name] = array.astype(np.int32) if array.dtype.kind == "i" else array
        return True


# ---- requests

def serve(engine, requests: Iterable[str], reply: Callable[[dict], None]):
    """Gives the engine's facts, then answers one line after the other."""
    reply(engine.facts)
    for line in requests:
        try:
            reply(engine.answer(**json.loads(line)))
        except Exception as e:
            reply({"error": " ".join(f"{e}".split())})


def main(path: str, *sizes: str):
    """The process. Standard output is for answers alone: whatever a library writes goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                        # Ctrl-C is for the parent, who then ends us
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(answer: dict):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        engine = Engine(path, *map(int, sizes))
    except Exception as e:
        reply({"error": " ".join(f"{e}".split())})
    else:
        serve(engine, sys.stdin, reply)


if __name__ == "__main__":
    main(*sys.argv[1:])
