"""Quantization-aware training against rounding afterwards, on equal terms:
`python -m refimpl.tiny.training.qat` (needs the `train` extra).

Every branch starts from one float checkpoint (`python -m refimpl.tiny.training.train --qat 0 --out tiny-float` makes one; with `--steps
1200 --decay 0.01` it stops at full learning rate, like the one of the results that ship), sees the batches of its seed and takes the same
number of steps, the learning rate falling to 0: one in float, the control, and one on each grid of grids.py. The control is then rounded
to every grid: post-training quantization, after the same training. All are measured on held-out text.

Results are appended to `rows.jsonl` run by run, and the unrounded weights are kept; the same command continues with the first run that is
missing. The optimiser starts anew at the base's learning rates, with a warm-up of `WARM_UP` steps.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from refimpl.tiny import corpus
from refimpl.tiny.training.grids import GRIDS, Q4_0, TWO_BITS, Grid, SignedMaximum, on_grid
from refimpl.tiny.training.held_out import HeldOut, bytes_of_ids
from refimpl.tiny.training.network import build_model
from refimpl.tiny.training.optimiser import Optimiser, is_quantized
from refimpl.tiny.training.train import Windows, backward, clip, encode_parts, flatten, training_text

WARM_UP = 10
LIBRARY_SHARE = 0.7
BINS_PER_LEVEL = 16
CORE = ("float", "2-bit", "3-bit", "q4_0", "w4a16")          # of every seed, before q4_k of any


def factor(step: int, steps: int) -> float:
    """Learning-rate factor of a branch: linear warm-up over WARM_UP steps, then linear to 0."""
    return min((step + 1) / WARM_UP, (steps - step) / max(1, steps - WARM_UP))


def histogram(parameters, grid: SignedMaximum) -> list[int]:
    """Counts of the unrounded weights in units of their block's scale, w / d: BINS_PER_LEVEL bins for each code, from -half - 0.5 to
    half + 0.5.
    """
    n_bins = (2 * grid.half + 1) * BINS_PER_LEVEL
    counts = torch.zeros(n_bins)
    for p in parameters:
        blocks = p.detach().reshape(-1, 32)
        d = grid.encode(p.detach()).scales[0].float()
        positions = (blocks / d)[d[:, 0] != 0]
        counts += torch.histc(positions, n_bins, -grid.half - 0.5, grid.half + 0.5)
    return [int(n) for n in counts]


def train_branch(model, flat_parts, windows: Windows, grid: Grid | None, args: argparse.Namespace, seed: int) -> dict[str, object]:
    """Trains `model` in place, on `grid` or in float. Returns its history: loss, share of codes that change in a step, histograms."""
    _, flat_grad, ((named, _),) = flat_parts
    optimiser = Optimiser(named, args.muon_lr, args.adam_lr)
    quantized = [p for name, p in model.named_parameters() if is_quantized(name)]
    looked = grid if isinstance(grid, SignedMaximum) else Q4_0
    others = (looked,) if grid is not None else (Q4_0, TWO_BITS)
    look_at = {round(args.steps * share / 4) for share in range(5)}
    losses, flips, histograms, before, began = [], [], [], None, time.time()
    for step in range(args.steps + 1):
        if step in look_at:
            histograms.append({"step": step} | {g.name: histogram(quantized, g) for g in others})
        if step == args.steps:
            break
        ids, target = windows.batch(np.random.default_rng([seed, step]), args.batch, LIBRARY_SHARE)
        if grid is None:
            nats, _ = backward(model, ids, target)
        else:
            codes = [grid.encode(p.detach()).q for p in quantized]
            if before is not None:
                changed = sum((a != b).sum().item() for a, b in zip(codes, before))
                flips.append(changed / sum(q.numel() for q in codes))
            before = codes
            with on_grid(quantized, grid):
                nats, _ = backward(model, ids, target)
        clip(flat_grad)
        optimiser.step(factor(step, args.steps))
        flat_grad.zero_()
        losses.append(nats.item())
    return {"train_nats": [round(float(np.mean(losses[i:i + 10])), 4) for i in range(0, len(losses), 10)],
            "flips": [round(float(np.mean(flips[i:i + 10])), 5) for i in range(0, len(flips), 10)],
            "histograms": histograms, "seconds": round(time.time() - began, 1)}


def measure_rounded(model, quantized, grid: Grid, held: HeldOut, reference) -> dict[str, float]:
    """The model with the weights that a file on this grid holds."""
    with on_grid(quantized, grid):
        return held.measure(model, reference)


def run_branch(model, flat_parts, base, windows, held: HeldOut, args, seed: int, name: str) -> list[dict[str, object]]:
    """Trains, saves and measures one branch. Returns the rows for rows.jsonl; the first has the history."""
    model.load_state_dict(base)
    grid = None if name == "float" else GRIDS[name]
    history = train_branch(model, flat_parts, windows, grid, args, seed)
    save(flat_parts[0], state_file(args.out, name, seed))
    quantized = [p for n, p in model.named_parameters() if is_quantized(n)]
    if grid is None:
        reference = held.states(model), model.model.embed_tokens.weight.detach().clone()
        rows = [{"seed": seed, "trained": "float", "stored": "float"} | held.measure(model, reference)]
        rows += [{"seed": seed, "trained": "float", "stored": g} | measure_rounded(model, quantized, GRIDS[g], held, reference)
                 for g in GRIDS]
    else:
        flat, own = flat_parts[0], flat_parts[0].clone()
        flat.copy_(torch.load(state_file(args.out, "float", seed), weights_only=True))
        reference = held.states(model), model.model.embed_tokens.weight.detach().clone()
        flat.copy_(own)
        rows = [{"seed": seed, "trained": name, "stored": name} | measure_rounded(model, quantized, grid, held, reference)]
    rows[0]["history"] = history
    return rows


def state_file(out: str, name: str, seed: int) -> Path:
    """The file of a branch's unrounded weights."""
    return Path(out) / f"{name}-{seed}.pt"


def save(flat: torch.Tensor, path: Path):
    """Writes them atomically."""
    torch.save(flat, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def prepare_held_out(args: argparse.Namespace):
    """(a model, its flat arrays, held-out windows)"""
    from tokenizers import Tokenizer

    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(Path(args.base) / "tokenizer.json"))
    held = HeldOut(encode_parts(tokenizer, training_text(args.quick).heldout), bytes_of_ids(tokenizer), args.windows)
    model = build_model(0)
    return model, flatten(model, 1), held


def prepare(args: argparse.Namespace):
    """(a model, its flat arrays, the base's weights, training windows, held-out windows)"""
    from tokenizers import Tokenizer

    model, flat_parts, held = prepare_held_out(args)
    windows = Windows.of(Tokenizer.from_file(str(Path(args.base) / "tokenizer.json")), training_text(args.quick))
    return model, flat_parts, torch.load(Path(args.base) / "model.pt", weights_only=True), windows, held


def plan(args: argparse.Namespace) -> list[tuple[int, str]]:
    """(seed, branch) in the order they run, the most important first."""
    seeds = range(args.seeds)
    return [(seed, name) for seed in seeds for name in CORE] + [(seed, "q4_k") for seed in seeds]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m refimpl.tiny.training.qat", description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="tiny-float", help="folder of the float checkpoint: model.pt and tokenizer.json")
    parser.add_argument("--out", default="tiny-qat", help="folder for the rows and the weights; an existing one is resumed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="of every branch")
    parser.add_argument("--batch", type=int, default=8, help="sequences of 512 tokens in a step")
    parser.add_argument("--windows", type=int, default=96, help="held-out windows, of which 256 tokens each are counted")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--quick", action="store_true", help="on a twentieth of the text, to check that everything works")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    """Runs every branch that has no row yet."""
    args = parse_arguments(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key != "out"} | {"python": corpus.read_corpus().python}
    rows_file, settings_file = out / "rows.jsonl", out / "settings.json"
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        raise SystemExit(f"{settings_file}: this folder belongs to a run with other options; repeat those, or give another --out")
    settings_file.write_text(json.dumps(settings, indent=1))
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
    done = {(row["seed"], row["trained"]) for row in rows}
    prepared = None
    for seed, name in plan(args):
        if (seed, name) in done:
            continue
        prepared = prepared or prepare(args)
        model, flat_parts, base, windows, held = prepared
        new = run_branch(model, flat_parts, base, windows, held, args, seed, name)
        with open(rows_file, "a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in new))
        for row in new:
            shown = {key: value for key, value in row.items() if key != "history"}
            print(*(f"{key} {value:.4f}" if isinstance(value, float) else value for key, value in shown.items()), flush=True)


if __name__ == "__main__":
    main()
