"""What `refimpl judge` says about llama-server, in each of its configurations. Run by hand, where llama-server is installed:

    python tests/judge_llama_server.py PATH/TO/llama-server [MODEL.gguf ...]        # default: the built-in model and random ones

Prints the verdicts of every run, and at the end the table of refimpl/lab/judge/README.md.
"""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from refimpl.lab.compare.tolerance import judge as exact_model
from refimpl.lab.judge.http import Http
from refimpl.lab.judge.judge import QUESTIONS, collect, judge
from refimpl.loading.model import BUILT_IN
from refimpl.text.templates import GEMMA4_TEMPLATE

CONFIGURATIONS = {
    "-np 1 --no-cache-prompt": (["-np", "1", "--no-cache-prompt"], "f16"),
    "-np 1": (["-np", "1"], "f16"),
    "-np 4": (["-np", "4"], "f16"),
    "-np 4 --swa-full": (["-np", "4", "--swa-full"], "f16"),
    "-np 4 -fa off": (["-np", "4", "-fa", "off"], "f16"),
    "-np 1 -ctk q8_0 -ctv q8_0": (["-np", "1", "-ctk", "q8_0", "-ctv", "q8_0"], "f16"),
    "-np 1 -ctk q8_0 -ctv q8_0, judged with --kv q8_0": (["-np", "1", "-ctk", "q8_0", "-ctv", "q8_0"], "q8_0"),
    "-np 1 -ctk q4_0 -ctv q4_0": (["-np", "1", "-ctk", "q4_0", "-ctv", "q4_0"], "f16"),
    "-np 1 -ctk q4_0 -ctv q4_0, judged with --kv q4_0": (["-np", "1", "-ctk", "q4_0", "-ctv", "q4_0"], "q4_0"),
}


@contextlib.contextmanager
def llama_server(binary, path, options):
    """Its address, once it answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([binary, "-m", path, "--port", str(port), "-t", "1", "-c", "4096", *options], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health") as response:
                if response.status == 200:
                    break
            if process.poll() is not None:
                raise SystemExit(f"{binary} stopped: {' '.join(options)}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def models(folder):
    """Name and file of the built-in model and of random ones; heads of the latter are 32 and 64 wide, as blocks of keys need."""
    from shapes import random_model, write_model  # torch, which files that are given do not need

    yield "built-in", str(BUILT_IN)
    for shape, block in (("26B-A4B", "Q4_0"), ("E2B", "Q8_0"), ("12B", "Q4_0"), ("31B", "BF16")):
        made = random_model(shape, seed=1, head_dim=32, global_head_dim=64, sliding_window=32)
        path = write_model(folder / f"{shape}.gguf", made, block, {"tokenizer.chat_template": GEMMA4_TEMPLATE})
        yield f"random {shape} {block}", str(path)


def main():
    """Runs all."""
    binary, *given = sys.argv[1:]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in [(Path(path).name, path) for path in given] or models(Path(folder)):
            model = exact_model(path, threads=1)
            for options, (arguments, kv) in CONFIGURATIONS.items():
                with llama_server(binary, path, arguments) as url:
                    end, found = collect(Http(url), model)
                result = judge(end, found, model, kv_type=kv)
                print(f"\n{name}, {options}: {result.engine}, status {result.status}")
                for verdict in result.verdicts:
                    print(f"    {verdict.question:14} {verdict.answer:12} {verdict.evidence} ({verdict.basis})", flush=True)
                print(*(f"    note: {note}" for note in result.notes), sep="\n", flush=True)
                rows.append((name, options, *(_cell(verdict) for verdict in result.verdicts)))
    print("\n| model | llama-server |", " | ".join(QUESTIONS[:-2]), "|")
    for row in rows:
        print("|", " | ".join(row), "|")


def _cell(verdict):
    level = verdict.figures.get("level")
    return verdict.answer + (f" ({level:.1f})" if level is not None else "")


if __name__ == "__main__":
    main()
