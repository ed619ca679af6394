"""Arm without an Arm machine: features as systems report them, and every intrinsic assembled. Under an emulator: emulation/run.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from refimpl.kernels.cores.cpu_features import AT_HWCAP, AT_HWCAP2, arm_features
from refimpl.kernels.machine import intrinsics, narrow  # noqa: F401  (they define the intrinsics)
from refimpl.kernels.machine.isa import ARM, INTRINSICS, add_features

# instructions that an intrinsic must consist of, by the lowest set that has them; those above inherit
INSTRUCTIONS = {"neon": {"fma": "fmla", "load_f16": "fcvtl", "round_f16": "fcvtn", "look_up": "tbl"},
                "dotprod": {"dot16_int8": "sdot"}, "i8mm": {"dot16": "usdot"}}


@pytest.fixture(scope="module")
def assembly():
    script = Path(__file__).with_name("arm_assembly.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=script.parent.parent)
    assert done.returncode == 0, f"LLVM cannot compile an intrinsic for Arm: {done.stderr[-2000:]}"
    return json.loads(done.stdout)


def words(text: str) -> list[str]:
    """The instructions of a function."""
    return [line.split()[0] for line in text.splitlines() if line.startswith("\t") and not line.startswith("\t.")]


def test_every_intrinsic_can_be_assembled_for_every_set(assembly):
    assert list(assembly) == list(ARM)
    for isa, functions in assembly.items():
        assert functions.keys() == INTRINSICS.keys()
        assert [name for name, text in functions.items() if not words(text)] == [], isa


@pytest.mark.parametrize("isa", ARM)
def test_intrinsics_are_the_instructions_that_their_set_is_named_for(assembly, isa):
    own = {name: word for lower in (isa, *ARM[isa].inherits) for name, word in INSTRUCTIONS.get(lower, {}).items()}
    for name, word in own.items():
        assert word in {each.rstrip("2") for each in words(assembly[isa][name])}, (isa, name, words(assembly[isa][name]))
    dots = {word for text in assembly[isa].values() for word in words(text) if word.endswith(("dot", "mmla"))}
    assert dots == {word for word in own.values() if word.endswith("dot")}, isa


@pytest.mark.parametrize("isa", ARM)
def test_no_set_calls_a_library(assembly, isa):
    """Where the instructions lack something LLVM calls a function that need not exist, and whose bits nobody promises."""
    for name, text in assembly[isa].items():
        assert "bl" not in words(text), (name, text)


def test_dot_products_take_activations_from_lanes_of_one_load(assembly):
    for isa, name, word in (("dotprod", "dot16_int8", "sdot"), ("i8mm", "dot16", "usdot")):
        lines = [line for line in assembly[isa][name].splitlines() if line.split()[:1] == [word]]
        assert len(lines) == 16 and all("b[" in line for line in lines), lines
        assert "ld1r" not in words(assembly[isa][name])


@pytest.mark.parametrize("hwcap,hwcap2,dotprod,i8mm", [(0, 0, False, False), (1 << 20, 0, True, False), (1 << 20, 1 << 13, True, True),
                                                       (~(1 << 20), ~(1 << 13), False, False)])
def test_features_on_linux(hwcap, hwcap2, dotprod, i8mm):
    assert arm_features("linux", auxval={AT_HWCAP: hwcap, AT_HWCAP2: hwcap2}.get) == {"dotprod": dotprod, "i8mm": i8mm}


@pytest.mark.parametrize("known,dotprod,i8mm", [
    ({}, False, False), ({"hw.optional.arm.FEAT_DotProd": 1, "hw.optional.arm.FEAT_I8MM": 0}, True, False),
    ({"hw.optional.arm.FEAT_DotProd": 1, "hw.optional.arm.FEAT_I8MM": 1}, True, True)])
def test_features_on_macos(known, dotprod, i8mm):
    """M1 has no FEAT_I8MM; systems before macOS 12 know neither name."""
    assert arm_features("darwin", sysctl=known.get) == {"dotprod": dotprod, "i8mm": i8mm}


def test_a_system_that_is_not_asked_has_neither():
    assert arm_features("win32") == {"dotprod": False, "i8mm": False}


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_linux_can_be_asked():
    assert set(arm_features("linux")) == {"dotprod", "i8mm"}


def test_features_are_added_behind_those_that_llvm_knows():
    assert add_features("+neon,-dotprod", {"dotprod": True, "i8mm": False}) == "+neon,-dotprod,+dotprod,-i8mm"
    assert add_features("", {"dotprod": True}) == "+dotprod"


@pytest.mark.parametrize("target", ["neon", "dotprod", "i8mm"])
def test_the_script_that_compiles_for_the_emulator_finds_what_it_replaces(target):
    """The emulator is not run here; without this nobody would notice that a module has moved."""
    code = ("import os, sys; sys.path.insert(0, 'tests/emulation'); from cross_compile import TARGETS, pretend; "
            f"target = TARGETS[{target!r}]; os.environ |= target.environment(); pretend(target); "
            "from refimpl.kernels.machine import isa; print(isa.ISA)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.stdout.strip() == target, done.stderr[-500:]
