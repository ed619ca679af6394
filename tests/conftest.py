"""Models and folders that several test modules share."""

import os

import pytest
from shapes import opened, random_model, write_model


@pytest.fixture(scope="session")
def moe(tmp_path_factory):
    """(file, configuration) of a small 26B-A4B."""
    return opened(write_model(tmp_path_factory.mktemp("models") / "moe.gguf", random_model("26B-A4B"), "Q4_0"))


@pytest.fixture(scope="session")
def ple(tmp_path_factory):
    """(file, configuration) of a small E2B."""
    return opened(write_model(tmp_path_factory.mktemp("models") / "ple.gguf", random_model("E2B"), "Q4_0"))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder of this run, the same for all workers of pytest-xdist. Whoever writes there holds a lock or renames what is whole."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder
