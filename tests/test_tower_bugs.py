"""Every known bug of pictures and sounds: compare names the tensor that departs first, and where it can what kind of mistake it is."""

import pytest
from planted_bugs import assert_named, assert_nothing_departs
from tower_traces import opened, parts, small_budget, tower_folder  # noqa: F401  (a fixture)

from refimpl.lab.compare.compare import deviations
from refimpl.lab.compare.known_bugs import inject
from refimpl.lab.compare.record import trace
from refimpl.lab.compare.tolerance import measured
from refimpl.lab.compare.towers.inputs import traced_prompt
from refimpl.lab.compare.towers.known_bugs import LARGE, SMALL, TOWER_BUGS, UNIFIED

# compare names the tensor and not the mistake; all others are recognised
NOT_RECOGNISED = {
    "GELU by the sigmoid of 1.702 x", "Hann's window half a sample on", "bounds of clipped matrices ignored",
    "conv_norm and norm_conv crossed", "power instead of magnitude", "tables of x and y exchanged",
}


class Subject:
    """A model and its towers, their right trace, and the noise of a float32 engine on them."""

    def __init__(self, folder, kind):
        self.folder = tower_folder(folder, kind)[1]
        self.model, self.projector = opened(self.folder)
        self.ids, self.media = traced_prompt(self.model, self.projector, parts(self.projector))
        self.right = self.trace(self.projector)
        self.noise = {name: 2 * size for name, size in measured(self.model, self.ids, "exact", deviations, media=self.media).items()}

    def trace(self, projector):
        """From files to logits."""
        ids, media = traced_prompt(self.model, projector, parts(projector))
        return trace(self.model, ids, media=media)

    def wrong(self, bug):
        """A trace with the bug."""
        with inject(bug):
            return self.trace(opened(self.folder)[1] if bug.at_load else self.projector)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    return {kind: Subject(tmp_path_factory.mktemp(kind), kind) for kind in (SMALL, LARGE, UNIFIED)}


@pytest.mark.parametrize("name", TOWER_BUGS)
def test_the_first_departure_is_named(name, subjects):
    bug = TOWER_BUGS[name]
    assert_named(bug, subjects[bug.on])


def test_only_these_kinds_are_not_recognised():
    assert {name for name, bug in TOWER_BUGS.items() if not bug.kind} == NOT_RECOGNISED


def test_without_a_bug_nothing_departs(subjects):
    for subject in subjects.values():
        found = assert_nothing_departs(subject, subject.trace(subject.projector))
        assert {name for name in subject.right.names() if name.startswith(("image0.", "audio0."))} <= {j.name for j in found.judged}
