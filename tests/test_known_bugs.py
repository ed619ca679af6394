"""Every known bug: compare names the tensor that departs first, and mostly what kind of mistake it is."""

import pytest
from few_layers import few_layers
from planted_bugs import assert_named, assert_nothing_departs
from shapes import prompt, random_model, reference, write_model

import refimpl
from refimpl.lab.compare.compare import deviations
from refimpl.lab.compare.known_bugs import BUGS, K_QUANTS, MOE, PLE, Bug, inject
from refimpl.lab.compare.record import trace
from refimpl.lab.compare.tolerance import measured
from refimpl.model import blocks

TEXT = ("def parse(self, text):\n    for line in text.splitlines():\n        if line.startswith('#'):\n            continue\n"
        "        key, value = line.split('=')\n        self.items[key] = value\n    return self.items\n\n\n"
        "def write(self, path):\n    with open(path, 'w') as file:\n")
# compare names the tensor and not the mistake; all others are recognised
NOT_RECOGNISED = {
    "6-bit scales unpacked wrongly", "a stale key visible to the draft", "drafter's embedding not scaled",
    "expert halves read in the wrong order", "first token drafted again", "gate and up of the experts swapped",
    "keys shared from the wrong layer", "per-layer input of the next layer", "router reads the normed input",
    "state fed back from before the drafter's norm",
}

# what shows only where a prompt is longer than the window, which is 64 in the built-in model; the others have a shorter one
OF_THE_WINDOW = {"window one too long", "window one too short"}
BEYOND_THE_WINDOW = "beyond the window"


@pytest.fixture(autouse=True, scope="module")
def used_memory():
    """Fresh caches hold what an earlier request left, not the zeros of fresh pages: a key that should not be visible shows."""
    empty = blocks.empty_block

    def filled(shape, dtype):
        block = empty(shape, dtype)
        block[:, 0], block[:, 1] = 0.5, 2.0
        return block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "empty_block", filled)
        yield


class Subject:
    """A model, its right trace, and the noise of a float32 engine on it."""

    def __init__(self, path, n=16):
        self.path, self.model = path, reference(path)
        self.ids = self.model.tokenizer.encode(TEXT)[:n] if path is None else prompt(n)
        self.right = self.trace(self.model)
        self.noise = {name: 2 * size for name, size in measured(self.model, self.ids, "exact", deviations).items()}

    def trace(self, model, drafting=True):
        """With two steps of a drafter, where there is one: these read the prompt once more."""
        if self.path is not None or not drafting:
            return trace(model, self.ids)
        return trace(model, self.ids, drafter=refimpl.load_drafter(None, model), draft_max=2)

    def wrong(self, bug):
        """A trace with the bug, with a drafter's steps if the bug is in them."""
        with inject(bug):
            return self.trace(reference(self.path) if bug.at_load else self.model, drafting=bug.first.startswith("draft"))


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bugs")
    wide = random_model("26B-A4B", seed=6, hidden_size=256, intermediate_size=256, **few_layers("26B-A4B"))
    return {MOE: Subject(None, 32), BEYOND_THE_WINDOW: Subject(None, 72),
            PLE: Subject(write_model(folder / "ple.gguf", random_model("E2B", seed=6, **few_layers("E2B")))),
            K_QUANTS: Subject(write_model(folder / "k.gguf", wide, "Q4_K"))}


@pytest.mark.parametrize("name", BUGS)
def test_the_first_departure_is_named(name, subjects):
    bug = BUGS[name]
    assert_named(bug, subjects[BEYOND_THE_WINDOW if name in OF_THE_WINDOW else bug.on])


def test_only_these_kinds_are_not_recognised():
    assert {name for name, bug in BUGS.items() if not bug.kind} == NOT_RECOGNISED


def test_without_a_bug_nothing_departs(subjects):
    for subject in subjects.values():
        assert_nothing_departs(subject, subject.trace(subject.model))


def test_a_bug_is_gone_after_its_block(subjects):
    bug = BUGS["values not normalised"]
    before = bug.function.__code__
    with pytest.raises(KeyError), inject(bug):
        assert bug.function.__code__ is not before
        raise KeyError
    assert bug.function.__code__ is before
    with pytest.raises(ValueError, match="is 0 times in attention"), inject(Bug(bug.function, "no such text", "", MOE, "")):
        pass
