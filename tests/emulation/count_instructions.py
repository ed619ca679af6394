"""Counts the instructions of the innermost loop of a product on Arm, from assembly, and asks llvm-mca (if it is there) for a prediction.

    python tests/emulation/count_instructions.py [neon dotprod i8mm portable] [--type Q4_0] [--rows 1]

Per block of 32 columns and 16 rows of weights, for each number of rows of activations. The cycles are those of LLVM's model of a processor.
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


def innermost_loop(assembly: str) -> list[str]:
    """The lines of the longest loop without a loop inside, in the first function (those after it are for calls from Python)."""
    lines = assembly.partition(".Lfunc_end0:")[0].splitlines()
    at = {line.rstrip(":"): i for i, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line)}
    loops = [(at[match[1]], i) for i, line in enumerate(lines) if (match := BRANCH.match(line)) and at.get(match[1], i) < i]
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    first, last = max(inner, key=lambda loop: loop[1] - loop[0])
    return [line for line in lines[first:last + 1] if re.match(r"\t[a-z]", line)]


def assembly_of(weight_type: str, n_rows: int) -> str:
    """A tile times `n_rows` rows."""
    from numba import njit, types

    from refimpl.kernels.machine.intrinsics import address
    from refimpl.kernels.machine.tile_product import tile_times_rows
    from refimpl.kernels.machine.tile_rows import Activations
    from refimpl.kernels.machine.unpack import FORMATS

    rows = ", ".join(f"row[{i}]" for i in range(n_rows))
    scope = {"address": address, "tile_times_rows": tile_times_rows, "Activations": Activations}
    exec(f"def product(fmt, tile, n, a, q, d, s, m, row, out):\n"
         f"    tile_times_rows(fmt, address(tile), n, Activations(a, q, d, s, m), ({rows},), 0, address(out))", scope)
    product = njit(scope["product"], error_model="numpy", nogil=True)
    floats, fmt = types.Array(types.float32, 2, "C"), FORMATS["q8"][weight_type]._numba_type_
    sums, numbers = types.Array(types.int32, 2, "C"), types.Array(types.int64, 1, "C")
    bytes_, signed = types.Array(types.uint8, 1, "C"), types.Array(types.int8, 2, "C")
    product.compile((fmt, bytes_, types.int64, floats, signed, floats, sums, floats, numbers, types.Array(types.float32, 1, "C")))
    return next(iter(product.inspect_asm().values()))


def cycles(loop: list[str], cpu: str) -> str:
    """What llvm-mca says of a turn of the loop."""
    body = "\n".join(line for line in loop if not line.startswith("\tb")) + "\n"
    done = subprocess.run(["llvm-mca", "-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+dotprod,+i8mm", "-iterations=100"], input=body,
                          capture_output=True, text=True)
    found = re.search(r"Total Cycles: +(\d+)", done.stdout)
    return f"{int(found[1]) / 100:.0f} cycles ({cpu})" if found else f"llvm-mca: {done.stderr.strip().splitlines()[-1]}"


def main():
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", default=list(MODELS))
    parser.add_argument("--type", default="Q4_0")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4])
    arguments = parser.parse_args()
    if len(arguments.targets) > 1:                  # an instruction set is chosen at import
        for name in arguments.targets:
            subprocess.run([sys.executable, __file__, name, "--type", arguments.type, "--rows", *map(str, arguments.rows)], check=True)
        return
    (name,) = arguments.targets
    os.environ |= TARGETS[name].environment()
    pretend(TARGETS[name])
    for n_rows in arguments.rows:
        loop = innermost_loop(assembly_of(arguments.type, n_rows))
        memory = sum("[sp" in line for line in loop)
        dots = sum(line.split()[0] in ("sdot", "usdot", "smmla") for line in loop)
        predicted = f"; {cycles(loop, MODELS[name])}" if shutil.which("llvm-mca") else "; no llvm-mca here"
        print(f"{arguments.type} {name}, {n_rows} rows: {len(loop)} instructions a block, {dots} dot products, {memory} with the stack"
              f"{predicted}", flush=True)


if __name__ == "__main__":
    main()
