"""The command line as tests run it: in this process (`run`), or in one of its own (`process`) for signals, pipes and whole exits."""

import contextlib
import io
import os
import resource
import subprocess
import sys
from pathlib import Path
from unittest import mock

import refimpl.cli

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "refimpl"]


def run(*args, stdin: str | bytes = "", env=None, cwd=None) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of `refimpl ARGS`, with `env` on top of the environment."""
    stdin = stdin if isinstance(stdin, bytes) else stdin.encode()
    streams = [io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="") for data in (stdin, b"", b"")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"NO_COLOR": "1", **(env or {})}))
        stack.enter_context(contextlib.chdir(cwd or os.getcwd()))
        for name, stream in zip(("stdin", "stdout", "stderr"), streams):
            stack.enter_context(mock.patch.object(sys, name, stream))
        try:
            status = refimpl.cli.status(list(map(str, args)))
        except SystemExit as e:
            status = e.code
    said = []
    for stream in streams[1:]:
        stream.flush()
        said.append(stream.buffer.getvalue().decode())
    return status, *said


def process(*args, stdin: str | bytes | None = None, env=None, cwd=ROOT) -> tuple[int, str, str]:
    """The same from a process of its own."""
    stdin = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run([*COMMAND, *map(str, args)], input=stdin, capture_output=True, cwd=cwd, timeout=120,
                          env={**os.environ, "NO_COLOR": "1", **(env or {})})
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@contextlib.contextmanager
def files_of_at_most(n_bytes: int):
    """Here a file that grows beyond this is a disk that is full, for this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_one_line(result: tuple[int, str, str], status: int, *says: str):
    """Failed with `status`, nothing on standard output and one line on standard error, in which `says` are."""
    code, out, err = result
    assert code == status, (code, err)
    lines = [line for line in err.strip().splitlines() if not line.startswith("compiling kernels")]     # said where this is the first use
    assert out == "" and len(lines) == 1 and "Traceback" not in err, err
    for text in says:
        assert text in err, err
