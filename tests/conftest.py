"""Models that several test modules read."""

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
