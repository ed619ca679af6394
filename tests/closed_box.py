"""What the glass box costs while it is closed: `python tests/closed_box.py MODEL [TOKENS]`. By hand; it needs a quiet machine.

One cache, a token at a time, in turn by the forward pass as it is and by its source with every call of `tap` taken out.
"""

import ast
import inspect
import statistics
import sys
import time
from types import ModuleType

import numpy as np

import refimpl
from refimpl.model import gemma4


class WithoutTaps(ast.NodeTransformer):
    """`tap(name, value)` becomes `value`."""

    taken_out = 0

    def visit_Call(self, node):
        self.generic_visit(node)
        if not (isinstance(node.func, ast.Name) and node.func.id == "tap"):
            return node
        self.taken_out += 1
        return node.args[1]


def main(path, n_tok):
    without = WithoutTaps()
    source = ast.fix_missing_locations(without.visit(ast.parse(inspect.getsource(gemma4))))
    bare = sys.modules["bare"] = ModuleType("bare")         # a dataclass looks for its module there
    exec(compile(source, gemma4.__file__, "exec"), bare.__dict__)
    model = refimpl.load(path)
    cache = model.new_cache(2 * n_tok + 40)

    def seconds(module, token):
        before = time.perf_counter()
        state_TD = module.forward(model.config, model.weights, model.backend, np.array([token]), [(cache, 1)])
        module.head(model.config, model.weights, model.backend, state_TD)
        cache.advance(1)
        return time.perf_counter() - before
    for token in range(20):                 # compiled, and warm
        seconds((gemma4, bare)[token % 2], 100 + token)
    took = {gemma4: [], bare: []}
    for i in range(n_tok):
        for module in ((gemma4, bare), (bare, gemma4))[i % 2]:
            took[module].append(seconds(module, 200 + i))
    low, middle, high = statistics.quantiles(np.divide(took[gemma4], took[bare]), n=4)
    print(f"{without.taken_out} taps; with them {statistics.median(took[gemma4]) * 1e3:.2f} ms a token, without "
          f"{statistics.median(took[bare]) * 1e3:.2f}; pair by pair {middle:.4f} times as long (quartiles {low:.4f}, {high:.4f}; "
          f"{n_tok} pairs)")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 400)
