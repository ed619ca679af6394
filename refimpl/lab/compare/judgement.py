"""What a comparison finds: the verdict on every tensor, on the whole, and how much of the two runs it is about."""

from dataclasses import dataclass, field

from refimpl.lab.compare.diagnoses import Diagnosis
from refimpl.lab.compare.mismatch import Mismatch

SAME, DEPARTS, UNDECIDED = "same", "departs", "undecided"


@dataclass(frozen=True)
class Judgement:
    """One tensor, or one stage (stages.py): its deviation and tolerance, the element with the largest difference, and "same",
    "departs" or "tie".
    """

    name: str
    verdict: str
    error: float = 0.0
    tolerance: float = 0.0
    position: int = -1
    index: tuple[int, ...] = ()
    ours: float = 0.0
    theirs: float = 0.0


@dataclass(frozen=True)
class Coverage:
    """How much was compared: tensors, of those that the trace to judge by has; positions of the prompt, of `n_positions`."""

    tensors: int = 0
    n_tensors: int = 0
    positions: tuple[int, ...] = ()
    n_positions: int = 0


@dataclass(frozen=True)
class Comparison:
    """All tensors' judgements in graph order, and those of `stages` (stages.py), without tensors where a stage before them departs. `first`
    is the first that departs, None where none does; `diagnosis` is what it looks like, `mismatch` the two tensors, where it is one.

    `missing` tensors are in one trace only, `unknown` ones have no name of ours. `arithmetic`: of `a` and `b`. `undecided`: why it cannot
    be called the same although nothing departs, "" where it can.
    """

    a: str
    b: str
    judged: list[Judgement]
    first: Judgement | None
    diagnosis: Diagnosis | None
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    tie: str = ""
    tolerance_from: str = ""
    arithmetic: tuple[str, str] = ("", "")
    stages: list[Judgement] = field(default_factory=list)
    coverage: Coverage = Coverage()
    undecided: str = ""
    mismatch: Mismatch | None = field(default=None, repr=False, compare=False)

    @property
    def verdict(self) -> str:
        """"same", "departs" or "undecided"."""
        return DEPARTS if self.first is not None else UNDECIDED if self.undecided else SAME
