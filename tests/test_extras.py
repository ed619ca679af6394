"""What a missing package is answered with."""

import importlib.metadata

import pytest

from refimpl import extras


def listed(monkeypatch, installed):
    lines = ['numpy>=2', 'torch==2.13.0; extra == "train"', 'matplotlib>=3.9; extra == "plot"', 'refimpl[plot]; extra == "notebooks"',
             'nbclient>=0.10; extra == "notebooks"']

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(importlib.metadata, "version", version)


def test_the_line_names_the_package_and_a_command(monkeypatch):
    listed(monkeypatch, {"numpy"})
    with pytest.raises(extras.MissingExtra, match="no_such_module is not installed; pip install torch==2.13.0$"):
        extras.require("no_such_module", "train")


def test_an_extra_may_include_another_and_what_is_there_is_not_named(monkeypatch):
    listed(monkeypatch, {"numpy"})
    assert extras.missing("notebooks") == ["matplotlib>=3.9", "nbclient>=0.10"]
    listed(monkeypatch, {"numpy", "matplotlib"})
    assert extras.missing("notebooks") == ["nbclient>=0.10"]


def test_what_is_installed_is_returned():
    assert extras.require("json", "plot").dumps([]) == "[]"
