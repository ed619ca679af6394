"""The client of the llama.cpp process (process.py): starts it, sends requests, turns its end and its errors into one line."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from refimpl.extras import require

N_BATCH, N_UBATCH = 2048, 512           # llama-bench's
PACKAGE = Path(__file__).parents[3]     # the folder that holds refimpl


class LlamaCppError(ValueError):
    """llama.cpp refused the model or a request, or stopped. One line."""


class LlamaCpp:
    """A model loaded by llama.cpp. `facts` says which version, and how it computes. Close it, or use it in a `with` statement."""

    kv_bytes = 2                        # keys and values are float16

    @staticmethod
    def check():
        """Raises MissingExtra where llama-cpp-python is not installed. Does not import it: its library belongs into the other process."""
        if importlib.util.find_spec("llama_cpp") is None:
            require("llama_cpp", "llamacpp")

    def __init__(self, path: Path, n_ctx: int, n_threads: int, batch: int | None = None, command: Sequence[str] | None = None):
        """Starts the process and waits for the model. `batch`: tokens in a call, None for what llama-bench takes (2048, in parts of 512).

        `command` (tests) replaces `python -m refimpl.lab.llamacpp.process`. Raises LlamaCppError.
        """
        paths = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
        sizes = map(str, (n_ctx, n_threads, batch or N_BATCH, batch or N_UBATCH))
        self.batch = batch or N_BATCH
        self._folder = tempfile.TemporaryDirectory()
        self._stderr, self._n_read = Path(self._folder.name) / "stderr", 0
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*(command or (sys.executable, "-m", "refimpl.lab.llamacpp.process")), str(Path(path).absolute()), *sizes],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8",
                env=os.environ | {"PYTHONPATH": paths, "GGML_NO_BACKTRACE": "1"})
        try:
            self.facts = self._reply()
        except BaseException:
            self.close()
            raise

    def measure(self, context: Sequence[int], ids: Sequence[int], together: bool) -> float:
        """Seconds that `ids` take after `context`, as one prompt or one by one, with logits for the last of each call. LlamaCppError."""
        return self._ask("time", context=list(context), ids=list(ids), together=together)["seconds"]

    def rows(self, ids: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """Logits at positions first, first + 1, ... of `ids`, float32 (at most `batch`, V) at a time. Raises LlamaCppError."""
        ids, file = list(ids), Path(self._folder.name) / "rows"
        for start in range(0, first, self.batch):
            self._ask("logits", ids=ids[start:min(start + self.batch, first)], start=start, file="")
        for start in range(first, len(ids), self.batch):
            n = self._ask("logits", ids=ids[start:start + self.batch], start=start, file=str(file))["rows"]
            yield np.fromfile(file, np.float32).reshape(n, -1)

    def trace(self, ids: Sequence[int], names: Sequence[str]) -> dict[str, np.ndarray]:
        """The tensors of the graph, `ids` in one batch, whose names without the layer are among `names`. Raises LlamaCppError."""
        file = Path(self._folder.name) / "trace.npz"
        self._ask("trace", ids=[int(i) for i in ids], names=list(names), file=str(file))
        with np.load(file) as found:
            return {name: found[name] for name in found.files}

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

    def _ask(self, ask: str, **request: object) -> dict[str, object]:
        with contextlib.suppress(BrokenPipeError):              # the answer says why
            self._process.stdin.write(json.dumps({"ask": ask} | request) + "\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, object]:
        line = self._process.stdout.readline()
        status = None if line.endswith("\n") else self._process.wait()
        lines = [text.strip() for text in self._stderr.read_text("utf-8", "replace").splitlines() if text.strip()]
        logged, self._n_read = lines[self._n_read:], len(lines)
        if status is not None:
            raise LlamaCppError(f"llama.cpp stopped ({_ending(status)}): {logged[-1] if logged else 'it did not say why'}")
        reply = json.loads(line)
        if "error" in reply:            # the first line of the log is the cause, the rest follows from it
            raise LlamaCppError(f"llama.cpp: {reply['error']}" + (f": {logged[0]}" if logged else ""))
        return reply


def _ending(status: int) -> str:
    """An exit status in words; a negative one is a signal."""
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
