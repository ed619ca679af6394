"""The text: the Python standard library's own source, split by file.

Four parts, chosen by the MD5 of each file's path, so that every machine with the same Python has the same split:

- `library`: modules to learn from;
- `tests`: the library's test folders, to learn from as well (twice as much text, but another style);
- `validation`: modules measured while training;
- `heldout`: modules that nothing is tuned on; the figures in README.md of this folder are measured on them.

The tests of a held-out or validation module (`test_textwrap.py` for `textwrap.py`) are left out altogether, because they quote it.
Generated tables (character sets, Unicode names, help topics) and files that are not UTF-8 are left out too.
"""

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

LICENCE = "PSF-2.0 (Python Software Foundation License)"
_TABLES = ("pydoc_data/", "encodings/cp", "encodings/mac_", "encodings/iso8859", "encodings/koi8", "encodings/kz1048",
           "encodings/tis_620", "encodings/hp_roman8", "encodings/palmos", "encodings/ptcp154", "lib2to3/tests/data/",
           "idlelib/help", "__phello__", "_sysconfigdata", "test/cjkencodings", "test/test_unicode", "test/encoded_modules")
_TEST_FOLDERS = ("test", "tests", "idle_test")
_COMMON_STEMS = {"__init__", "__main__", "main", "util", "utils", "base", "abc", "common", "core"}


@dataclass(frozen=True)
class Corpus:
    """The split text. Each part maps a path inside the standard library to the file's text."""

    python: str
    library: dict[str, str]
    tests: dict[str, str]
    validation: dict[str, str]
    heldout: dict[str, str]


def read_corpus(root: Path | None = None) -> Corpus:
    """Reads and splits the standard library under `root` (this Python's own when None is given)."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else Path(root)
    library, tests, validation, heldout = {}, {}, {}, {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "dist-packages/")) or name.startswith(_TABLES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) < 200:
            continue
        if any(part in _TEST_FOLDERS for part in name.split("/")[:-1]):
            tests[name] = text
            continue
        bucket = int(hashlib.md5(name.encode()).hexdigest(), 16) % 100
        (heldout if bucket < 6 else validation if bucket < 8 else library)[name] = text
    kept_back = {_stem(name) for name in (*heldout, *validation)} - _COMMON_STEMS
    tests = {name: text for name, text in tests.items() if not _names_any(name, kept_back)}
    return Corpus(platform.python_version(), library, tests, validation, heldout)


def _stem(name: str) -> str:
    parts = name.removesuffix(".py").split("/")
    return parts[-2] if parts[-1] == "__init__" and len(parts) > 1 else parts[-1].lstrip("_")


def _names_any(name: str, stems: set[str]) -> bool:
    """Is this test file (or a folder it is in) named after one of the modules?"""
    parts = name.removesuffix(".py").split("/")
    return any(part.removeprefix("test_").lstrip("_") in stems for part in parts if part.startswith("test_"))
