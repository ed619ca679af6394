"""Notebook 9: known bugs as puzzles. The reader gets a broken function and repairs it; `compare` is the judge."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import refimpl
from refimpl.extras import require
from refimpl.lab.compare.compare import Comparison, compare, deviations
from refimpl.lab.compare.known_bugs import BUGS, MOE, Bug, changed, running
from refimpl.lab.compare.record import trace
from refimpl.lab.compare.reports.heat_map import plot
from refimpl.lab.compare.tolerance import measured
from refimpl.lab.compare.trace import Trace
from refimpl.lab.explain.show import drawn
from refimpl.loading.model import BUILT_IN, Model

# from easy to hard, as they are numbered from 1
PUZZLES = ("embedding not scaled", "RoPE turns neighbours", "window one too short", "values are keys after their norm",
           "expert scale before renormalisation", "soft cap twice", "per-layer input of the next layer", "position advances in the draft")
TEXT = ("def parse(self, text):\n    for line in text.splitlines():\n        if line.startswith('#'):\n            continue\n"
        "        key, value = line.split('=')\n        self.items[key] = value\n    return self.items\n\n\n"
        "def write(self, path):\n    with open(path, 'w') as file:\n")
N_TOKENS = 72               # past the window of 64


class WrongAnswer(ValueError):
    """What is to be replaced does not stand exactly once in the broken function, or what comes out is no Python."""


@dataclass(frozen=True)
class Subject:
    """A model, a right trace of it, and the noise of float32 on it."""

    model: Model
    right: Trace
    noise: dict[str, float]

    def trace(self, model: Model) -> Trace:
        """A trace of the same tokens."""
        return traced(model, self.right.ids)


@cache
def subject(on: str) -> Subject:
    """The model that shows bugs of this kind (Bug.on)."""
    model = load(on)
    ids = model.tokenizer.encode(TEXT)[:N_TOKENS]
    right = traced(model, ids)
    return Subject(model, right, {name: 2 * size for name, size in measured(model, ids, "exact", deviations).items()})


def traced(model: Model, ids: Sequence[int]) -> Trace:
    """A trace, of the model with experts with two steps of its drafter."""
    drafting = {"drafter": refimpl.load_drafter(None, model), "draft_max": 2} if model.file.path == BUILT_IN else {}
    return trace(model, ids, **drafting)


def load(on: str) -> Model:
    """The built-in model with experts, or the one with per-layer embeddings."""
    return refimpl.load("built-in" if on == MOE else "built-in:e2b", backend="reference")


def bug_of(number: int) -> Bug:
    """The bug of a puzzle, numbered from 1. Raises ValueError for a number that there is not."""
    if not 1 <= number <= len(PUZZLES):
        raise ValueError(f"there is no puzzle {number}; there are 1 to {len(PUZZLES)}")
    return BUGS[PUZZLES[number - 1]]


def broken(number: int):
    """The function of a puzzle as it is wrong, as Markdown."""
    bug = bug_of(number)
    Markdown = require("IPython.display", "notebooks").Markdown
    return Markdown(f"**Puzzle {number}:** `{bug.function.__qualname__}` of `{bug.function.__module__}`\n\n```python\n{changed(bug)}```")


def compared(number: int, wrong: str = "", right: str = "") -> Comparison:
    """The right model against the broken one in which `wrong` was replaced with `right`. Raises WrongAnswer."""
    bug = bug_of(number)
    source = changed(bug)
    if wrong and source.count(wrong) != 1:
        raise WrongAnswer(f"{wrong!r} is {source.count(wrong)} times in {bug.function.__qualname__}; give a piece that is there once")
    sound = subject(bug.on)
    try:
        with running(bug.function, source.replace(wrong, right) if wrong else source):
            theirs = sound.trace(load(bug.on) if bug.at_load else sound.model)
    except (SyntaxError, NameError, TypeError, IndexError, AttributeError) as e:
        raise WrongAnswer(f"with that, {bug.function.__qualname__} does not run: {e}") from None
    return compare(sound.right, theirs, sound.noise)


def grade(number: int, wrong: str = "", right: str = "") -> str:
    """What `compare` says of the broken function in which `wrong` was replaced with `right`: solved, or where it departs. As text."""
    found = compared(number, wrong, right)
    if found.first is None:
        return f"Puzzle {number} is solved: all {len(found.judged)} tensors are the same within rounding."
    kind = f"; {found.diagnosis.text}" if found.diagnosis and found.diagnosis.text else ""
    return f"Puzzle {number} departs first at {found.first.name}, position {found.first.position}{kind}."


def heat_map(number: int):
    """All tensors of the broken model: blue is within rounding, red is not, framed is what departs first."""
    found = compared(number)
    return drawn(plot(found), f"Puzzle {number}: deviation of every tensor over its tolerance, layers down and steps across; "
                 f"first too large is {found.first.name}.")
