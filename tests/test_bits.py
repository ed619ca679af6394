"""The kernels' results have the same bits on every instruction set, with any number of threads, in any chunking: equal, not close."""

from functools import partial

import pytest
from instruction_sets import OTHERS, computed

from refimpl.kernels.machine.isa import BEST, ISA

pytestmark = pytest.mark.skipif(ISA != BEST, reason="REFIMPL_ISA is set: the sets are compared from the best one on")


@pytest.fixture(scope="session")
def found(shared_folder):
    """What the process of an instruction set found, by its name."""
    return partial(computed, folder=shared_folder)


def assert_same(digests: dict[str, str], best: dict[str, str]):
    differ = [name for name in digests if digests[name] != best[name]]
    assert not differ, f"other bits: {differ}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("isa", OTHERS)
def test_every_intrinsic_has_the_bits_of_its_meaning(isa, found):
    """test_simd.py again, under that set."""
    thorough = found(isa, every_type=True)
    assert thorough["intrinsics"] == 0, thorough["said"]


@pytest.mark.parametrize("isa", OTHERS)
def test_every_instruction_set_gives_the_same_bits(isa, found):
    """One type for each way through the kernels, attention, the small kernels, the five shapes and the model that ships in q8; portable
    without the types that these models do not have, and not optimized; avxvnni, which is avx2 but for dot products, with two types alone.
    """
    digests = found(isa)["digests"]["2"]
    assert len(digests) > 50 or isa == "avxvnni" and len(digests) == 2
    assert_same(digests, found(BEST)["digests"]["2"])


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_any_number_of_threads_gives_the_same_bits(threads, found):
    """Some types one by one, attention, the small kernels, the five shapes, the model that ships; with 2 threads also prompts in parts."""
    digests = found(BEST)["digests"]
    assert len(digests[threads]) == len(digests["1"]) > 60
    assert_same(digests[threads], digests["1"])
    assert not [text for text in digests[threads].values() if len(text) != 64]


@pytest.mark.exhaustive
@pytest.mark.parametrize("isa", OTHERS)
def test_every_instruction_set_gives_the_same_bits_for_every_type(isa, found):
    digests, best = (found(each, every_type=True)["digests"]["2"] for each in (isa, BEST))
    assert digests.keys() == best.keys()
    assert_same(digests, best)
