"""What intrinsics are on Arm: emitters for registers of 128 bits, a quarter of 16 lanes."""

from functools import partial

from llvmlite import ir

from refimpl.kernels.machine.isa import BYTE, INT, by_128_bits, call, load

BYTES, INTS = ir.VectorType(BYTE, 16), ir.VectorType(INT, 4)


def look_up(builder, v, table):
    """`tbl`, with the 16 bytes of `table`."""
    return by_128_bits(builder, lambda quarter: call(builder, "llvm.aarch64.neon.tbl1.v16i8", BYTES, table, quarter), v)


def dot16(name: str):
    """The emitter for `sdot` or `usdot`. The 16 activations are one load; the instruction takes a lane of the vector, its four numbers."""
    def four_lanes(builder, total, weights, four):
        return call(builder, f"llvm.aarch64.neon.{name}.v4i32.v16i8", INTS, total, weights, four)

    def emit(builder, total, *weights_and_activations):
        *weights, activations = weights_and_activations
        sixteen, nothing = load(builder, activations, INTS), ir.Constant(INTS, ir.Undefined)
        for k, w in enumerate(weights):
            four = builder.bitcast(builder.shuffle_vector(sixteen, nothing, ir.Constant(INTS, [k] * 4)), BYTES)
            total = by_128_bits(builder, partial(four_lanes, builder, four=four), total, w)
        return total
    return emit
