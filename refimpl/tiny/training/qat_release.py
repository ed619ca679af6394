"""What is left of a quantization-aware training whose weights are released as bfloat16 numbers:
`python -m refimpl.tiny.training.qat_release`.

A release without codes holds the products scale * code, rounded to bfloat16. Converted to Q4_0 by llama.cpp's rule, and by finding its
grid again (files/recover_scales.py), each is compared with the release itself. Two more comparisons put the figures of qat.py in
proportion: the control rounded with least squares in place of the rule, and the controls of different seeds with each other.

Needs the folder of a `python -m refimpl.tiny.training.qat`; measures the branches in it and appends to its `releases.jsonl`.
"""

import argparse
import json
from pathlib import Path

import torch

from refimpl.files.qat_grid import distance_of
from refimpl.files.recover_scales import quantize_q4_0_on_grid
from refimpl.formats.quants.codecs import dequantize, quantize
from refimpl.tiny.training.grids import GRIDS
from refimpl.tiny.training.optimiser import is_quantized
from refimpl.tiny.training.qat import CORE, parse_arguments, prepare_held_out, state_file

CONVERSIONS = {"absmax": lambda x: quantize(x, "Q4_0"), "recovered": quantize_q4_0_on_grid}      # qat_results.RELEASES
RULE, LEAST_SQUARES = "Q4_0 by the rule", "Q4_0 by least squares"


def through(conversion, w: torch.Tensor) -> torch.Tensor:
    """The weights after this conversion to Q4_0 and back."""
    return torch.from_numpy(dequantize(conversion(w.numpy()), "Q4_0"))


def put(matrices: list[torch.nn.Parameter], values: list[torch.Tensor]):
    """Sets the matrices."""
    for p, value in zip(matrices, values):
        p.data.copy_(value)


class Bench:
    """A model to put weights into, and the held-out text."""

    def __init__(self, args: argparse.Namespace):
        self.model, (self.flat, *_), self.held = prepare_held_out(args)
        self.out = args.out

    def load(self, name: str, seed: int) -> list[torch.nn.Parameter]:
        """Loads the unrounded weights of a branch into the model. Returns the matrices."""
        self.flat.copy_(torch.load(state_file(self.out, name, seed), weights_only=True))
        return [p for n, p in self.model.named_parameters() if is_quantized(n)]

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What `measure` compares with: the model as it is now."""
        return self.held.states(self.model), self.model.model.embed_tokens.weight.detach().clone()

    def measure(self, matrices, values, reference) -> dict[str, float]:
        """The model with these matrices, against the reference."""
        put(matrices, values)
        return self.held.measure(self.model, reference)

    def releases(self, name: str, seed: int):
        """Both conversions of a bfloat16 release, a row each."""
        matrices = self.load(name, seed)
        release = [GRIDS[name].round(p.data).bfloat16().float() for p in matrices]
        moved = sum(distance_of(p.numpy().reshape(-1, 32)).n_moved for p in release)
        put(matrices, release)
        reference = self.reference()
        common = {"seed": seed, "trained": name, "moved": moved / sum(p.numel() for p in matrices)}
        for conversion, convert in CONVERSIONS.items():
            yield common | {"converted": conversion} | self.measure(matrices, [through(convert, w) for w in release], reference)

    def controls(self, seed: int):
        """The control rounded in two ways, and against the control of seed 0."""
        matrices = self.load("float", seed)
        reference, own = self.reference(), [p.data.clone() for p in matrices]
        for name, convert in ((RULE, CONVERSIONS["absmax"]), (LEAST_SQUARES, CONVERSIONS["recovered"])):
            found = self.measure(matrices, [through(convert, w) for w in own], reference)
            yield {"seed": seed, "trained": "float", "converted": name} | found
        if seed:
            self.load("float", 0)
            yield {"seed": seed, "trained": "float", "converted": "control of seed 0"} | self.held.measure(self.model, reference)


def main(argv: list[str] | None = None):
    """Measures every branch whose weights are there and that has no row yet."""
    parser = argparse.ArgumentParser(prog="python -m refimpl.tiny.training.qat_release", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="tiny-qat", help="folder of a `python -m refimpl.tiny.training.qat`")
    out = Path(parser.parse_args(argv).out)
    settings = json.loads((out / "settings.json").read_text())
    args = parse_arguments(["--out", str(out)])
    vars(args).update({key: value for key, value in settings.items() if key != "python"})
    file = out / "releases.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["seed"], row["trained"]) for row in rows}
    bench = None
    for seed in range(args.seeds):
        for name in CORE:
            if (seed, name) in done or not state_file(args.out, name, seed).exists():
                continue
            bench = bench or Bench(args)
            new = list(bench.controls(seed) if name == "float" else bench.releases(name, seed))
            with open(file, "a") as target:
                target.write("".join(json.dumps(row) + "\n" for row in new))
            for row in new:
                print(*(f"{key} {value:.4f}" if isinstance(value, float) else value for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
