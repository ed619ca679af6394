"""llama.cpp, timed in a process of its own: it ends its process when an assertion fails, and its threads should not mix with ours.

The process is this file, run as a module. It loads a model through the C interface that llama-cpp-python wraps, and then talks in lines of
JSON: what it is first, `{"version": ...}`, and for every `{"context": [ids], "ids": [ids], "together": bool}` either `{"seconds": s}` or
`{"error": "one line"}`. It ends when its input does.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

N_BATCH, N_UBATCH = 2048, 512           # llama-bench's
LOG_ERROR, LOG_CONTINUED = 4, 5         # ggml_log_level


class LlamaCppError(ValueError):
    """llama.cpp is missing, refused the model or gave up. One line."""


class LlamaCpp:
    """A model loaded by llama.cpp. `facts` says which llama.cpp and how it computes. Close it, or use it in a `with` statement."""

    kv_bytes = 2                        # keys and values are float16

    @staticmethod
    def check():
        """Raises LlamaCppError where llama-cpp-python is not installed."""
        if importlib.util.find_spec("llama_cpp") is None:
            raise LlamaCppError("llama.cpp is missing: pip install 'refimpl[llamacpp]'")

    def __init__(self, path: Path, n_ctx: int, n_threads: int, command: Sequence[str] | None = None):
        """Starts the process (`command`, for tests, in place of our own) and waits for the model. Raises LlamaCppError."""
        package = str(Path(__file__).parents[3])
        paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self._folder = tempfile.TemporaryDirectory()
        self._stderr, self._heard = Path(self._folder.name) / "stderr", 0
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*(command or (sys.executable, "-m", __name__)), str(Path(path).absolute()), str(n_ctx), str(n_threads)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8",
                env=os.environ | {"PYTHONPATH": paths, "GGML_NO_BACKTRACE": "1"})
        try:
            self.facts = self._reply()
        except BaseException:
            self.close()
            raise

    def measure(self, context: Sequence[int], ids: Sequence[int], together: bool) -> float:
        """Seconds that `ids` take after `context`: as one prompt, or one after the other; logits for the last of a call. LlamaCppError."""
        return self._ask(context=list(context), ids=list(ids), together=together)["seconds"]

    def close(self):
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> "LlamaCpp":
        """Itself."""
        return self

    def __exit__(self, *error: object):
        """Closes it."""
        self.close()

    def _ask(self, **request: object) -> dict[str, object]:
        with contextlib.suppress(BrokenPipeError):              # the answer says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, object]:
        line = self._process.stdout.readline()
        status = None if line.endswith("\n") else self._process.wait()
        said = [words.strip() for words in self._stderr.read_text("utf-8", "replace").splitlines() if words.strip()]
        said, self._heard = said[self._heard:], len(said)
        if status is not None:
            raise LlamaCppError(f"llama.cpp stopped ({_ending(status)}): {said[-1] if said else 'it did not say why'}")
        reply = json.loads(line)
        if "error" in reply:            # what it said first is the cause, the rest what followed from it
            raise LlamaCppError(f"llama.cpp: {reply['error']}" + (f": {said[0]}" if said else ""))
        return reply


def _ending(status: int) -> str:
    """An exit status in words; negative means a signal."""
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


# ---- inside of the process

class _Engine:
    """One model and one context in this process."""

    def __init__(self, path: str, n_ctx: int, n_threads: int, n_batch: int = N_BATCH, n_ubatch: int = N_UBATCH):
        import llama_cpp

        self.lib = lib = llama_cpp
        self.log = lib.llama_log_callback(_tell_errors)                 # kept: C holds no reference
        lib.llama_log_set(self.log, None)
        lib.llama_backend_init()
        how = lib.llama_model_default_params()
        how.n_gpu_layers, how.load_mode = 0, lib.LLAMA_LOAD_MODE_MMAP
        self.model = lib.llama_model_load_from_file(path.encode(), how)
        if not self.model:
            raise RuntimeError("the model could not be loaded")
        how = lib.llama_context_default_params()
        how.n_ctx, how.n_batch, how.n_ubatch = n_ctx, n_batch, n_ubatch
        how.n_threads = how.n_threads_batch = n_threads
        how.op_offload = how.offload_kqv = False                        # not to a GPU either
        how.swa_full = False                                            # a ring in sliding layers, as in llama.cpp's own tools
        self.context = lib.llama_init_from_model(self.model, how)
        if not self.context:
            raise RuntimeError(f"no context of {n_ctx} tokens could be made")
        self.n_batch = lib.llama_n_batch(self.context)                  # no more than the context
        self.facts = {"version": lib.__version__, "system": lib.llama_print_system_info().decode().strip(" |"), "n_threads": n_threads,
                      "n_batch": self.n_batch, "n_ubatch": n_ubatch, "kv": "float16"}

    def measure(self, context: list[int], ids: list[int], together: bool) -> float:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.run(self.calls(context, self.n_batch))
        calls = self.calls(ids, self.n_batch if together else 1)
        began = time.perf_counter()
        self.run(calls)
        return time.perf_counter() - began

    def calls(self, ids: list[int], size: int) -> list:
        return [(self.lib.llama_token * len(part))(*part) for part in (ids[i:i + size] for i in range(0, len(ids), size))]

    def run(self, calls: list):
        for ids in calls:
            status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, len(ids)))
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            self.lib.llama_synchronize(self.context)


def _tell_errors(level: int, text: bytes, data: object):
    """llama.cpp's log: errors only."""
    _tell_errors.on = level == LOG_ERROR or level == LOG_CONTINUED and _tell_errors.on
    if _tell_errors.on:
        os.write(2, text)


_tell_errors.on = False


def timed(engine, **request) -> dict:
    """The answer to a request to measure."""
    return {"seconds": engine.measure(**request)}


def serve(engine, requests: Iterable[str], reply, answer: Callable[..., dict]):
    """Answers one line after the other by `answer(engine, **request)`. An error is an answer too."""
    reply(engine.facts)
    for line in requests:
        try:
            reply(answer(engine, **json.loads(line)))
        except Exception as e:
            reply({"error": " ".join(f"{e}".split())})


def talk(make: Callable[[], object], answer: Callable):
    """The process: what `make` gives answers, by `answer(engine, **request)`, or why there is none is the only answer.

    Standard output is for answers alone, whatever a library writes goes to standard error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)                        # Ctrl-C is for the one that started us, who then ends us
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(what: dict):
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        engine = make()
    except Exception as e:
        reply({"error": " ".join(f"{e}".split())})
    else:
        serve(engine, sys.stdin, reply, answer)


if __name__ == "__main__":
    talk(lambda: _Engine(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])), timed)
