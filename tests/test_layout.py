"""House rules: imports run downwards, import is quick and light, printing is the command line's."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "refimpl"
# from the ground up; a room may import those before it and itself. The longest name that fits is a module's room
ROOMS = ["host", "progress", "extras", "formats.quants", "formats", "media", "reference", "kernels.cores", "kernels.machine", "kernels",
         "model", "model.towers", "text", "loading", "decode", "files", "lab.llamacpp", "lab.engines", "lab.address",
         "lab.failures", "lab.cluster", "lab.bench", "lab.evaluate", "lab.compare", "lab.judge", "lab.explain", "lab.glass", "serve",
         "cli", "tiny", "tiny.training"]
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted(Path(__file__).parent.glob("*.py"))
FOLDERS = sorted({path.parent for path in FILES})
TORCH = ("tiny.training", "lab.compare.engines.transformers")       # the second imports it inside of functions only


def room(module: str) -> str | None:
    """The room of `refimpl.<room>...`; None for the package's own face, and for what is not ours."""
    own = module.removeprefix("refimpl.")
    fits = [name for name in ROOMS if own == name or own.startswith(name + ".")]
    return max(fits, key=len) if module.startswith("refimpl.") and fits else None


def imports_of(path: Path, nested: bool = True) -> list[str]:
    found, tree = [], ast.parse(path.read_text())
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_downwards(path):
    name = name_of(path)
    own = room(name)
    assert own or name in ("refimpl", "refimpl.__main__", "refimpl.lab"), f"{name} is in no room"
    for module in imports_of(path):
        theirs = room(module)
        if own and theirs:
            assert ROOMS.index(theirs) <= ROOMS.index(own), f"{name} imports {module}, which is above it"
            assert not (own.startswith("kernels") and theirs == "reference"), f"{name} imports {module}: twins share the block table only"
        if module.split(".")[0] in ("torch", "transformers"):
            assert own == TORCH[0] or name.endswith(TORCH[1]) and module not in imports_of(path, nested=False), f"{name} imports {module}"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_test_modules_are_imported_by_nobody(path):
    """What several of them need is in a helper. The fuzzer that is run by hand has the targets of test_fuzz.py."""
    found = [module.split(".")[0] for module in imports_of(path) if module.split(".")[0].startswith("test_")]
    assert not found or path.stem == "fuzz" and set(found) == {"test_fuzz"}, f"{path.name} imports {found}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(PACKAGE.parent).as_posix())
def test_a_folder_says_what_it_is_for_and_fits_on_a_screen(folder):
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert docstring and (folder == PACKAGE or re.search("[Ii]mport|room", docstring)), f"{folder}: what it is for, what it may import"
    assert len(list(folder.glob("*.py"))) - 1 <= 15, f"{folder} has more than 15 files"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_command_line_prints(path):
    if "cli" in path.parts or "tiny" in path.parts:
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_import_is_light():
    heavy = "torch transformers numba gguf rich typer jinja2 sentencepiece huggingface_hub PIL soundfile soxr av".split()
    code = f"import refimpl, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_import_loads_little():
    """Which packages, and how many modules of them: what a quick start depends on, and the same on every machine."""
    code = "import sys; before = set(sys.modules); import refimpl; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    packages = {name.split(".")[0] for name in loaded} - sys.stdlib_module_names
    assert packages <= {"refimpl", "numpy", "threadpoolctl", "tokenizers"}, packages
    assert len(loaded) < 365, f"{len(loaded)} modules"
