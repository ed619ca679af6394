"""What is asked of every planted bug. A subject has `model`, `right` (a trace), `noise`, and `wrong(bug)`, a trace with the bug."""

from refimpl.lab.compare.compare import Comparison, compare
from refimpl.lab.compare.trace import Trace


def assert_named(bug, subject):
    """The first departure is where the bug says, and is recognised if the bug says as what."""
    found = compare(subject.right, subject.wrong(bug), subject.noise)
    assert found.first is not None, "not noticed"
    assert found.first.name == bug.expected(subject.model.config), found.diagnosis
    if bug.kind:
        assert found.diagnosis.kind == bug.kind, found.diagnosis


def assert_nothing_departs(subject, again: Trace) -> Comparison:
    """`again`, a trace of the same without a bug, is the same."""
    found = compare(subject.right, again, subject.noise)
    assert found.first is None and not found.tie and max(judgement.error for judgement in found.judged) == 0.0
    return found
