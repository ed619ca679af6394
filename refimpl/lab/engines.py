"""The names of engines, as `compare`, `eval` and `bench` take them.

    kernels, reference          this package's backends; `kernels:exact`, `reference:q8` say the arithmetic
    llama.cpp                   llama.cpp through llama-cpp-python; `llama.cpp:FILE.gguf` says the file
    transformers:DIRECTORY      Hugging Face transformers on a model directory

Each command takes those that can do its work. Anything else that is named is a file.
"""

from pathlib import Path

KERNELS, REFERENCE, LLAMACPP, TRANSFORMERS = "kernels", "reference", "llama.cpp", "transformers"
TRACED = (TRANSFORMERS, LLAMACPP)                   # compare B
EVALUATED = (KERNELS, REFERENCE, LLAMACPP)          # eval --backend, --against
TIMED = (LLAMACPP,)                                 # bench --vs
ARITHMETIC = {KERNELS: "q8", REFERENCE: "exact"}    # default of each of our backends


def known(name: str, choices: tuple[str, ...]) -> str:
    """`name`. Raises ValueError unless it is one of `choices`."""
    if name not in choices:
        raise ValueError(f"unknown engine {name!r}; choose from {', '.join(choices)}")
    return name


def parse(text: str, choices: tuple[str, ...]) -> tuple[str | None, str]:
    """(engine, what follows its colon, "" for nothing), or (None, text) for the name of a file.

    Raises ValueError for `word:...` where the word is no engine and there is no such file.
    """
    name, colon, rest = text.partition(":")
    if name in choices:
        return name, rest
    if colon and not Path(text).exists() and not set("/\\.") & set(name) and len(name) > 1:
        known(name, choices)
    return None, text
