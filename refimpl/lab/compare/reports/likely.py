"""Known bugs that a comparison looks like: those that depart first at the same tensor, in the same way."""

import difflib
import inspect
from pathlib import Path

from refimpl.lab.compare.judgement import Comparison
from refimpl.lab.compare.known_bugs import BUGS, Bug, changed
from refimpl.lab.compare.names import place_of
from refimpl.lab.compare.towers.known_bugs import TOWER_BUGS

MOST = 4            # at most so many are named


def likely(result: Comparison) -> list[tuple[str, Bug]]:
    """(name, bug) of known bugs with the same first tensor, whatever its layer, and the same kind of difference."""
    place = None if result.first is None else place_of(result.first.name)
    if place is None or result.diagnosis is None:
        return []
    found = []
    for name, bug in (BUGS | TOWER_BUGS).items():
        its = place_of(bug.first.format(full=0, shared=0))
        if its is not None and (its.name, its.tower) == (place.name, place.tower) and bug.kind == result.diagnosis.kind:
            found.append((name, bug))
    return found[:MOST]


def code_of(bug: Bug) -> tuple[str, str]:
    """(where the code is, the change that makes the mistake as a diff)."""
    file = Path(inspect.getfile(bug.function)).as_posix()
    where = f"refimpl/{file.rpartition('/refimpl/')[2]}, {bug.function.__qualname__}"
    right = changed(Bug(bug.function, bug.old, bug.old, bug.on, bug.first))
    lines = list(difflib.unified_diff(right.splitlines(), changed(bug).splitlines(), n=2, lineterm=""))[2:]
    return where, "\n".join(line for line in lines if not line.startswith("@@"))
