"""Packages that only some commands need: imported there, or one line says how to install them. Imports nothing of the package."""

import importlib
import importlib.metadata
import re
import shlex
from types import ModuleType


class MissingExtra(ValueError):
    """A package that is not installed. One line: what is missing, and a command that installs it."""


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`. Where it is missing: MissingExtra, with what the extra `extra` of pyproject.toml lists.

    The command names the packages themselves: it works in a checkout and for an installed wheel alike, whatever that was called.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        packages = " ".join(map(shlex.quote, missing(extra))) or shlex.quote(e.name or module)
        raise MissingExtra(f"{e.name or module} is not installed; pip install {packages}") from None


def missing(extra: str) -> list[str]:
    """The requirements of an extra of this package that are not installed, as pip takes them ("torch==2.13.0")."""
    found = []
    for line in importlib.metadata.requires("refimpl") or ():
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if re.search(rf"""extra\s*==\s*['"]{re.escape(extra)}['"]""", marker):
            name = re.match(r"[\w.-]+", requirement)[0]
            if name.lower() == "refimpl":              # an extra that includes others: refimpl[plot]
                found += [other for inner in re.findall(r"[\w-]+", requirement.partition("[")[2]) for other in missing(inner)]
            else:
                try:
                    importlib.metadata.version(name)
                except importlib.metadata.PackageNotFoundError:
                    found.append(requirement)
    return found
