"""Counts the instructions of the innermost loop of a product on Arm, from assembly, and asks llvm-mca (if it is there) for a prediction.

    python tests/emulation/count_instructions.py [neon dotprod i8mm portable] [--type Q4_0] [--rows 1]

Per block and 16 rows of weights (of superblocks: what is not unrolled), for one row of activations and for four. The cycles
are those of LLVM's model of a processor.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys

from cross_compile import TARGETS, pretend

MODELS = {"portable": "cortex-a72", "neon": "cortex-a72", "dotprod": "cortex-a76", "i8mm": "neoverse-n2"}
BRANCH = re.compile(r"\t(?:b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s*(\.L\w+)")


def innermost_loops(assembly: str) -> list[list[str]]:
    """The instructions of the loops without a loop inside, in the first function (those after it are for calls from Python): one loop over
    the blocks, or one for each half of the tile. Short ones are something else.
    """
    lines = assembly.partition(".Lfunc_end0:")[0].splitlines()
    at = {line.rstrip(":"): i for i, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line)}
    loops = [(at[match[1]], i) for i, line in enumerate(lines) if (match := BRANCH.match(line)) and at.get(match[1], i) < i]
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    bodies = [[line for line in lines[first:last + 1] if re.match(r"\t[a-z]", line)] for first, last in inner]
    return [body for body in bodies if 2 * len(body) > max(map(len, bodies))]


def assembly_of(weight_type: str, n_rows: int) -> str:
    """A tile times one row or four."""
    from numba import njit, types

    from refimpl.kernels.machine.intrinsics import address
    from refimpl.kernels.machine.tile_product import tile_times_4, tile_times_rows
    from refimpl.kernels.machine.tile_rows import Activations
    from refimpl.kernels.machine.unpack import FORMATS

    rows = ", ".join(f"row[{i}]" for i in range(n_rows))
    scope = {"address": address, "multiply": tile_times_4 if n_rows == 4 else tile_times_rows, "Activations": Activations}
    exec(f"def product(fmt, tile, n, a, q, d, s, m, row, out):\n"
         f"    multiply(fmt, address(tile), n, Activations(a, q, d, s, m), ({rows},), 0, address(out))", scope)
    product = njit(scope["product"], error_model="numpy", nogil=True)
    floats, fmt = types.Array(types.float32, 2, "C"), FORMATS["q8"][weight_type]._numba_type_
    sums, numbers = types.Array(types.int32, 2, "C"), types.Array(types.int64, 1, "C")
    bytes_, signed = types.Array(types.uint8, 1, "C"), types.Array(types.int8, 2, "C")
    product.compile((fmt, bytes_, types.int64, floats, signed, floats, sums, floats, numbers, types.Array(types.float32, 1, "C")))
    return next(iter(product.inspect_asm().values()))


def cycles(loop: list[str], cpu: str) -> int:
    """What llvm-mca says of a turn of a loop."""
    body = "\n".join(line for line in loop if not line.startswith("\tb")) + "\n"
    done = subprocess.run(["llvm-mca", "-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+dotprod,+i8mm", "-iterations=100"], input=body,
                          capture_output=True, text=True)
    found = re.search(r"Total Cycles: +(\d+)", done.stdout)
    if not found:
        sys.exit(f"llvm-mca: {done.stderr.strip().splitlines()[-1]}")
    return round(int(found[1]) / 100)


def main():
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", default=list(MODELS))
    parser.add_argument("--type", default="Q4_0")
    parser.add_argument("--rows", type=int, nargs="*", choices=(1, 4), default=[1, 4])
    arguments = parser.parse_args()
    if len(arguments.targets) > 1:                  # an instruction set is chosen at import
        for name in arguments.targets:
            subprocess.run([sys.executable, __file__, name, "--type", arguments.type, "--rows", *map(str, arguments.rows)], check=True)
        return
    (name,) = arguments.targets
    os.environ |= TARGETS[name].environment()
    pretend(TARGETS[name])
    for n_rows in arguments.rows:
        loops = innermost_loops(assembly_of(arguments.type, n_rows))
        lines = sum(loops, [])
        # 16 lanes of every row are added to a float once a block, so not in loops inside of that over blocks
        part = "" if name == "portable" or sum("\tfmla\t" in line for line in lines) >= 4 * n_rows else "in loops inside of it, "
        memory, dots = sum("[sp" in line for line in lines), sum(line.split()[0] in ("sdot", "usdot") for line in lines)
        predicted = (f"{sum(cycles(loop, MODELS[name]) for loop in loops)} cycles ({MODELS[name]})" if shutil.which("llvm-mca")
                     else "no llvm-mca here")
        print(f"{arguments.type} {name}, {n_rows} rows: {part}{len(lines)} instructions, {dots} dot products, {memory} with the stack; "
              f"{predicted}", flush=True)


if __name__ == "__main__":
    main()
