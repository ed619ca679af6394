"""House rules: imports run downwards, import is quick and light, printing is the command line's."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "refimpl"
ORDER = ["formats", "reference", "kernels", "model", "decode", "lab", "cli"]
FILES = sorted(PACKAGE.rglob("*.py"))
ADAPTER = "refimpl.lab.engines.transformers"       # looks into transformers where it is installed: imported inside of functions only


def level(module: str) -> int | None:
    """Where `refimpl.<part>...` stands in the order; None for what stands outside of it (tiny, the face)."""
    parts = module.split(".")
    return ORDER.index(parts[1]) if len(parts) > 1 and parts[1] in ORDER else None


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
    own = level(name_of(path))
    for module in imports_of(path):
        theirs = level(module)
        if own is not None and theirs is not None:
            assert theirs <= own, f"{name_of(path)} imports {module}, which is above it"
        if own == ORDER.index("kernels"):
            assert not module.startswith("refimpl.reference"), f"{name_of(path)} imports {module}: twins share the block table only"
        if own is not None:
            assert not module.startswith("refimpl.tiny"), f"{name_of(path)} imports {module}: the package does not need its training"
        if "tiny" not in path.parts and not (name_of(path) == ADAPTER and module not in imports_of(path, nested=False)):
            assert module.split(".")[0] not in ("torch", "transformers"), f"{name_of(path)} imports {module}"


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
    heavy = "torch transformers numba gguf rich typer jinja2".split()
    code = f"import refimpl, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_import_takes_under_half_a_second():
    """The best of three, in processor time, so that a busy machine does not fail it."""
    code = "import time; t = time.process_time(); import refimpl; print(time.process_time() - t)"
    seconds = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(seconds) < 0.5, seconds
