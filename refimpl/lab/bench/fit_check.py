"""What `fit` predicts, held against what happens: files are run, one after the other, and the errors tabulated.

Speed: `bench`, which measures the parts before and after the whole, so that a machine whose speed drifts is the same one in both. Memory:
`generate` in a process of its own, whose private memory is looked at until it ends. Starts: the same, timed to its first token.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import psutil

from refimpl.kernels.cores.threads import prepare
from refimpl.kernels.machine.jit import FOLDER
from refimpl.lab.bench.bench import Plan, bench
from refimpl.lab.bench.disk import measure_room
from refimpl.lab.bench.fit import starts
from refimpl.lab.bench.predict import memory_of, outlined
from refimpl.loading.open import open_model
from refimpl.loading.tile_folders import trial
from refimpl.model.backend import kernel_backend
from refimpl.progress import silent

START = "{} start"
BOUNDS = {"prompt": 0.25, "decode": 0.15, "memory": 0.03, **{START.format(which): 0.5 for which in ("first", "next", "cold")}}
"""Relative errors that predictions are meant to stay within."""
PLAN = Plan(n_prompt=512, n_new=32, repetitions=5)
N_WORDS, N_NEW = 900, 8
NOTHING = "it said nothing"
EVERY = 0.02                        # seconds between two looks at a process


def check(paths: Sequence[Path], plan: Plan = PLAN, *, threads: int | None = None,
          progress: Callable[..., AbstractContextManager] = silent) -> dict[str, object]:
    """{machine, errors}: for each file prompt and decode (tokens/s), memory (MB) and starts (seconds): {file, what, predicted, measured,
    low, high, error, bound}; `error` is predicted / measured - 1.

    Raises what `bench` raises, and ValueError where memory cannot be looked at (outside of Linux).
    """
    errors, machine = [], {}
    for path in paths:
        result = bench(path, plan, threads=threads, progress=progress)
        machine = result["machine"]
        for test in result["tests"]:
            run = test["engines"]["refimpl"]
            speed = run["tokens_per_second"]
            errors.append(_entry(path, test["test"], run["predicted_tokens_per_second"], speed["median"], speed["min"], speed["max"], 2))
        predicted, measured = check_memory(path, threads)
        errors.append(_entry(path, "memory", predicted / 1e6, measured / 1e6, measured / 1e6, measured / 1e6, 0))
        for which, (predicted, seconds) in check_starts(path, threads).items():
            errors.append(_entry(path, START.format(which), predicted, seconds, seconds, seconds, 1))
    return {"machine": machine, "errors": errors}


def _entry(path: Path, what: str, predicted: float, measured: float, low: float, high: float, digits: int) -> dict[str, object]:
    return {"file": Path(path).name, "what": what, "predicted": predicted, "measured": measured, "low": low, "high": high,
            "error": predicted / measured - 1, "bound": BOUNDS[what], "digits": digits}


def check_memory(path: Path, threads: int | None = None) -> tuple[int, int]:
    """(predicted, measured) bytes of private memory: most of what a process takes that loads the file, weights in memory, reads a prompt of
    N_WORDS short words and writes N_NEW tokens. Raises ValueError where the process fails, or the system does not say.
    """
    words = " ".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), N_WORDS))
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.txt"
        prompt.write_text(words, encoding="utf-8")
        with open(Path(folder) / "said", "w+b") as said:
            running = _generating(path, threads, "-f", str(prompt), "-n", str(N_NEW), "--json", "--cache-disk", "0",
                                  stdout=said, stderr=subprocess.STDOUT)
            try:
                most = _most_private(running)
            finally:
                running.kill()
            said.seek(0)
            line = _last_line(said.read())
    if running.returncode or line == NOTHING:
        raise ValueError(f"{path}: could not be run to look at its memory: {line}")
    done = json.loads(line)
    n_tokens = done["n_prompt"] + done["n_generated"]
    return memory_of(outlined(open_model(path)), n_tokens, np.dtype(np.float16), rows=min(512, done["n_prompt"])).total, most


def check_starts(path: Path, threads: int | None = None) -> dict[str, tuple[float, float]]:
    """(predicted, measured) seconds from the command to the first token, for each kind of start (`fit.starts`), with kernels compiled, and
    rearranged weights in a folder of their own. Raises ValueError where the process says nothing.
    """
    source = open_model(path)
    predicted = starts(memory_of(outlined(source), 512, np.dtype(np.float16)).weights, measure_room(kernel_backend("q8", prepare(threads))))
    measured = {}
    with trial() as root:
        if FOLDER is not None:
            (root / FOLDER.name).symlink_to(FOLDER)
        for which in predicted:
            _settle([*source.files(), *root.glob("weights-*/*")], let_go=which != "next")
            measured[which] = _seconds_to_a_token(path, threads, str(root))
            if which == "first":
                _keep(path, threads, str(root))
    return {which: (predicted[which], seconds) for which, seconds in measured.items()}


def _seconds_to_a_token(path: Path, threads: int | None, cache: str) -> float:
    with tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        with _generating(path, threads, "-p", "x", "-n", "1", cache=cache, stdout=subprocess.PIPE, stderr=errors) as running:
            said, seconds = running.stdout.read(1), time.perf_counter() - began
            running.stdout.read()
        errors.seek(0)
        why = _last_line(errors.read())
    if running.returncode or not said:
        raise ValueError(f"{path}: could not be started to time it: status {running.returncode}: {why}")
    return seconds


def _keep(path: Path, threads: int | None, cache: str):
    """Lets a process stay until all weights are rearranged and kept, which a short answer does not wait for. Raises ValueError."""
    code = f"import refimpl; refimpl.load({str(path)!r}, threads={threads}).wait_until_kept()"
    done = subprocess.run([sys.executable, "-c", code], env=_environment(cache), capture_output=True)
    if done.returncode:
        raise ValueError(f"{path}: its weights could not be rearranged: {_last_line(done.stderr)}")


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else NOTHING


def _settle(files: Sequence[Path], let_go: bool):
    """Waits until they are on the disk. With `let_go` the system is asked not to keep them in memory, where it can be asked."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if let_go and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _generating(path: Path, threads: int | None, *options: str, cache: str | None = None, **streams) -> subprocess.Popen:
    command = [sys.executable, "-m", "refimpl", "generate", "-m", str(path), "--temp", "0", *options,
               *(["-t", str(threads)] if threads else [])]
    return subprocess.Popen(command, env=_environment(cache), **streams)


def _environment(cache: str | None) -> dict[str, str]:
    return os.environ | {"PYTHONSAFEPATH": "1"} | ({"REFIMPL_CACHE_DIR": cache} if cache else {})


def _most_private(running: subprocess.Popen) -> int:
    """Most bytes of private memory while a process ran. Raises ValueError where the system does not say."""
    most, process = 0, psutil.Process(running.pid)
    while running.poll() is None:
        try:
            info = process.memory_info()
        except psutil.Error:
            break
        if not hasattr(info, "shared"):
            raise ValueError("private memory of a process can only be looked at on Linux")
        most = max(most, info.rss - info.shared)
        time.sleep(EVERY)
    running.wait()
    return most
