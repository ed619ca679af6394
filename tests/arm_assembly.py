"""Assembles every intrinsic for every instruction set of Arm and prints {"set": {"intrinsic": assembly}}. test_arm.py runs it.

In a process of its own: where LLVM has no instruction for something it does not raise an exception, it ends the process.
"""

import json
import sys

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types

from refimpl.kernels.machine import intrinsics, narrow  # noqa: F401  (they define the intrinsics)
from refimpl.kernels.machine.isa import ARM, BYTE, INTRINSICS, Address, add_features, emitter

TRIPLE = "aarch64-unknown-linux-gnu"
SCALARS = {types.intp: ir.IntType(64), types.int32: ir.IntType(32), types.float32: ir.FloatType(), types.void: ir.VoidType(),
           Address: BYTE.as_pointer()}


def llvm_type(kind: types.Type) -> ir.Type:
    """LLVM's type of a parameter or a result."""
    return SCALARS[kind] if kind in SCALARS else kind.llvm


def assembly(machine: llvm.TargetMachine, name: str, isa: str) -> str:
    """The function that an intrinsic is on an instruction set, optimized as a part of a kernel would be."""
    intrinsic, module = INTRINSICS[name], ir.Module()
    module.triple = TRIPLE
    # vectors come and go through memory: there are not enough registers to pass them
    memory = [kind.llvm.as_pointer() if hasattr(kind, "llvm") else llvm_type(kind) for kind in (*intrinsic.parameters, intrinsic.result)]
    *arguments, result = memory
    out = result if result == ir.VoidType() or hasattr(intrinsic.result, "llvm") else result.as_pointer()
    has_result = intrinsic.result is not types.void
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [*arguments, *[out] * has_result]), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    values = [builder.load(argument) if hasattr(kind, "llvm") else argument for kind, argument in zip(intrinsic.parameters, function.args)]
    value = emitter(intrinsic.bodies, isa)(builder, *values)
    if has_result:
        builder.store(value, function.args[-1])
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed)


def main():
    """All of them."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    found = {}
    for isa, wanted in ARM.items():
        features = add_features("+neon", dict.fromkeys(wanted.needs, True))
        machine = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=wanted.cpu, features=features, opt=3)
        found[isa] = {name: assembly(machine, name, isa) for name in INTRINSICS}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
