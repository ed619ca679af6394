"""The other instruction sets than the machine's best: their processes compile for a minute, and run before anything needs what they find,
while test_kernels.py compiles for the best one. test_bits.py compares.
"""

import pytest
from instruction_sets import OTHERS, computed

from refimpl.kernels.machine.isa import BEST, ISA

pytestmark = pytest.mark.skipif(ISA != BEST, reason="REFIMPL_ISA is set: the sets are compared from the best one on")


@pytest.mark.parametrize("isa", OTHERS)
def test_an_instruction_set_computes_everything(isa, shared_folder):
    assert all(len(text) == 64 for text in computed(isa, folder=shared_folder)["digests"]["2"].values())
