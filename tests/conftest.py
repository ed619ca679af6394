"""Models and folders that several test modules share. Imports torch in fixtures only: the process that starts the workers needs none."""

import gc
import os

# read when torch or Numba load their OpenMP: two workers and their processes share the cores, and an idle thread that spins takes one
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import signal
from types import SimpleNamespace

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:          # a shell's background jobs ignore Ctrl-C, and so would processes of tests
    signal.signal(signal.SIGINT, signal.default_int_handler)

# the first two compile for minutes, for different instruction sets; then those that compile nothing, so that no kernel is compiled twice
# at a time; then long ones, so that no worker is left alone with one of them at the end
FIRST = ("test_kernels", "test_other_sets", "test_parity", "test_known_bugs", "test_blocks", "test_chat", "test_container", "test_layout",
         "test_speculative", "test_notebooks", "test_judge", "test_fuzz", "test_convert", "test_compare")


@pytest.fixture(scope="session")
def moe(tmp_path_factory):
    """(file, configuration) of a small 26B-A4B."""
    from shapes import opened, random_model, write_model

    return opened(write_model(tmp_path_factory.mktemp("models") / "moe.gguf", random_model("26B-A4B"), "Q4_0"))


@pytest.fixture(scope="session")
def ple(tmp_path_factory):
    """(file, configuration) of a small E2B."""
    from shapes import opened, random_model, write_model

    return opened(write_model(tmp_path_factory.mktemp("models") / "ple.gguf", random_model("E2B"), "Q4_0"))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder of this run, the same for all workers of pytest-xdist. Whoever writes there holds a lock or renames what is whole."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def pytest_collection_finish():
    gc.collect()
    gc.freeze()             # what was imported stays: no later collection looks through it again


# ---- the order of files, and what was left out, which pytest-xdist does not say

def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.hookimpl(tryfirst=True)
def pytest_deselected(items):
    worker = getattr(items[0].config, "workeroutput", None) if items else None
    if worker is not None:
        worker["deselected"] = worker.get("deselected", 0) + len(items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    n, reporter = getattr(node, "workeroutput", {}).get("deselected"), node.config.pluginmanager.get_plugin("terminalreporter")
    if n and reporter and "deselected" not in reporter.stats:         # every worker leaves out the same
        reporter.stats["deselected"] = [SimpleNamespace() for _ in range(n)]
