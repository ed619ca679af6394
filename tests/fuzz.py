"""Coverage-guided fuzzing by hand, for hours if you like (needs `pip install atheris`, Linux):

    PYTHONPATH=.:tests python tests/fuzz.py container CORPUS -runs=1000000 -max_len=4096

Targets: container (bytes are a GGUF file), header (bytes are a safetensors file), model (bytes are decisions of fuzz_cases.make_gguf: load,
encode, a few logits), projector (the same of a projector: load, a picture, a sound), directory (decisions of make_directory: load a
drafter, draft), template (words of Jinja). CORPUS is a folder that is filled with inputs that reach new code; `--seed` before it writes
the first ones there. Whatever breaks the promise stops the run and leaves a file crash-*; shrink it, put it into
tests/files/fuzz/TARGET-NAME, and test_fuzz.py runs it from then on.
"""

import resource
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["refimpl.formats", "refimpl.model", "refimpl.loading", "refimpl.decode", "jinja2"]):
    import fuzz_cases
    import jinja2.sandbox  # noqa: F401  (chat.py imports it late)
    import test_fuzz

OUTSIDE = ("open", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "sys._getframe")
rendering = False


def no_escape(event, arguments):
    """A template that opens, starts or loads anything has left its sandbox."""
    if rendering and event.startswith(OUTSIDE) and not str(arguments[:1]).endswith((".py',)", ".pyc',)")):     # Jinja's own modules
        raise SystemExit(f"a template reached {event} {arguments}")


def main():
    """Runs a target until libFuzzer's own limits (-runs, -max_total_time)."""
    target, seed = sys.argv.pop(1), "--seed" in sys.argv
    run = test_fuzz.TARGETS[target](Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)))
    if seed:
        sys.argv.remove("--seed")
        corpus = Path(next(word for word in sys.argv[1:] if not word.startswith("-")))
        corpus.mkdir(exist_ok=True)
        for i, data in enumerate(test_fuzz.SEEDS[target]):
            (corpus / f"seed-{i}").write_bytes(data)
    if target == "template":
        for words in ("{{ 1 }}", "{{ 1 / 0 }}", "{% if %}"):    # what these load is loaded before the watch begins
            fuzz_cases.run_template(words)
        sys.addaudithook(no_escape)
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))

    def once(data):
        global rendering
        rendering = target == "template"
        try:
            run(data)
        finally:
            rendering = False
    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
