"""Trains the model that ships: `python -m refimpl.tiny.training.train` repeats it from scratch (needs the `train` extra).

A run can be stopped at any time; the same command resumes it from its last saved state.

The model is transformers' own `Gemma4ForCausalLM` in the shape of the 26B-A4B, or of E2B, in miniature. The last part of the training is
quantization-aware: every matrix is rounded to the Q4_0 grid before the forward pass, and the gradient updates the unrounded
weights (a straight-through estimator, Bengio et al. 2013, arXiv:1308.3432), so the file loses nothing.

Matrices are trained with Muon (Jordan et al. 2024: momentum, orthogonalised by a Newton-Schulz iteration), everything else with
AdamW. Two single-threaded processes, each with half of a batch, are faster on two cores than one process with two threads.

glibc returns large arrays to the system at every free; MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 in the environment
keeps them, which saves a quarter of the time.
"""

import argparse
import json
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from refimpl.formats.gguf import open_gguf
from refimpl.formats.matrix import Matrix
from refimpl.tiny import corpus
from refimpl.tiny.training import vocabulary
from refimpl.tiny.training.grids import Q4_0, on_grid
from refimpl.tiny.training.network import NO_MASKS, SHAPES, build_model, loss_of
from refimpl.tiny.training.optimiser import Optimiser, is_quantized
from refimpl.tiny.training.precision import autocast

WINDOW = 512                  # tokens in a training sequence
BALANCE, Z = 0.01, 1e-4       # weights of the load-balancing and router-logit losses (Fedus et al. 2021; Zoph et al. 2022)


# ---- the data

def encode_parts(tokenizer, part: dict[str, str]) -> list[np.ndarray]:
    """One array of ids per file, <bos> first and <eos> last."""
    encoded = tokenizer.encode_batch(list(part.values()), add_special_tokens=False)
    return [np.array([vocabulary.BOS, *e.ids, vocabulary.EOS], np.int64) for e in encoded]


class Windows:
    """Random training windows: <bos>, then WINDOW - 1 tokens from the start of a line; a given share of them from library code."""

    def __init__(self, library: list[np.ndarray], tests: list[np.ndarray], newline_ids: np.ndarray):
        self.streams = [np.concatenate(library), np.concatenate(tests)]
        self.starts = [np.flatnonzero(np.isin(s[:-WINDOW - 1], newline_ids)) + 1 for s in self.streams]

    @classmethod
    def of(cls, tokenizer, text: corpus.Corpus) -> "Windows":
        """The windows of a corpus."""
        newline_ids = np.array([i for token, i in tokenizer.get_vocab().items() if set(token) == {"\n"}])
        return cls(encode_parts(tokenizer, text.library), encode_parts(tokenizer, text.tests), newline_ids)

    def batch(self, rng: np.random.Generator, n: int, library_share: float):
        """(ids, next ids), int64 (n, WINDOW) each."""
        rows = []
        for _ in range(n):
            which = 0 if rng.random() < library_share else 1
            start = self.starts[which][rng.integers(len(self.starts[which]))]
            rows.append(np.concatenate([[vocabulary.BOS], self.streams[which][start:start + WINDOW]]))
        rows = torch.from_numpy(np.stack(rows))
        return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def mean_nats(model, files: list[np.ndarray], max_windows: int | None = None) -> tuple[float, int]:
    """Nats per token over whole files: windows of WINDOW that overlap by half, only the new half counted. (nats, n_tokens)"""
    nats = n_tokens = 0
    n_windows = 0
    for ids in files:
        end, lo = 1, 0
        while end < len(ids) and (max_windows is None or n_windows < max_windows):
            hi = min(lo + WINDOW, len(ids) - 1)
            x, y = ids[lo:hi], ids[lo + 1:hi + 1]
            pad = -len(x) % model.config.sliding_window
            x = torch.from_numpy(np.pad(x, (0, pad)))[None]
            with autocast():
                hidden = model.model(input_ids=x, attention_mask=NO_MASKS, use_cache=False).last_hidden_state[0, :len(y)]
            cap = model.config.final_logit_softcapping
            logits = torch.tanh(hidden.float() @ model.model.embed_tokens.weight.T / cap) * cap
            new = hi + 1 - end
            nats += F.cross_entropy(logits[-new:], torch.from_numpy(y[-new:]), reduction="sum").item()
            n_tokens += new
            end, lo = hi + 1, lo + WINDOW // 2
            n_windows += 1
    return nats / n_tokens, n_tokens


# ---- the run

def schedule(step: int, steps: int, decay: float) -> float:
    """Learning-rate factor: linear warm-up over 100 steps, constant, then linear to 0 over the last share `decay` of the run."""
    return min((step + 1) / 100, 1.0, (steps - step) / (steps * decay))


def backward(model, ids_BT: torch.Tensor, target_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Backpropagates a batch, adding to the gradients. Returns (next-token loss in nats, router losses, None without a router)."""
    has_router = model.config.enable_moe_block
    nats, balance = loss_of(model, ids_BT, target_BT, with_router=has_router)
    (nats + BALANCE * balance if has_router else nats).backward()
    return nats, balance


def clip(flat_grad: torch.Tensor):
    """Scales all gradients to a norm of at most 1."""
    flat_grad *= min(1.0, 1.0 / (flat_grad.norm().item() + 1e-6))


def start_with_embedding(model, path: str):
    """Replaces the embedding, which is the head too, by that of a GGUF file with the same vocabulary and width."""
    file = open_gguf(path)
    w_VD = Matrix(file.raw("token_embd.weight"), file.tensors["token_embd.weight"].type).float32()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.from_numpy(w_VD))


def flatten(model, n_owners: int):
    """Puts all parameters, and all gradients, in one array each, owner by owner, so that workers exchange single arrays.

    Returns (flat, flat_grad, [(named parameters, slice)] per owner).
    """
    named = sorted(model.named_parameters(), key=lambda item: -item[1].numel())
    owners = [[] for _ in range(n_owners)]
    for item in named:
        min(owners, key=lambda own: sum(p.numel() for _, p in own)).append(item)
    flat = torch.cat([p.detach().reshape(-1) for own in owners for _, p in own])
    flat_grad = torch.zeros_like(flat)
    at, parts = 0, []
    for own in owners:
        first = at
        for _, p in own:
            p.data = flat[at:at + p.numel()].view_as(p)
            p.grad = flat_grad[at:at + p.numel()].view_as(p)
            at += p.numel()
        parts.append((own, slice(first, at)))
    return flat, flat_grad, parts


def worker(rank: int, args: argparse.Namespace, tokenizer_json: str):
    """One of `args.workers` processes: its share of every batch, its share of the update."""
    from tokenizers import Tokenizer

    torch.set_num_threads(1)
    if args.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{args.out}/rendezvous", rank=rank, world_size=args.workers)
    text = training_text(args.quick)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    windows = Windows.of(tokenizer, text)
    validation = encode_parts(tokenizer, text.validation)

    model = build_model(args.seed, SHAPES[args.shape])
    if args.embedding:
        start_with_embedding(model, args.embedding)
    flat, flat_grad, parts = flatten(model, args.workers)
    mine = parts[rank][0]
    optimiser = Optimiser(mine, args.muon_lr, args.adam_lr)
    quantized = [p for name, p in model.named_parameters() if is_quantized(name)]
    step, state_file = 0, Path(args.out) / f"state-{rank}.pt"
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        flat.copy_(saved["flat"])
        optimiser.state, optimiser.n_steps, step = saved["state"], saved["step"], saved["step"]
    log = open(Path(args.out) / "log.jsonl", "a") if rank == 0 else None
    show = _progress(args.steps, step) if rank == 0 else lambda *_: None
    ema, began = None, time.time()
    while step < args.steps:
        decay_from = args.steps * (1 - args.decay)
        library_share = args.library_share if step < decay_from else args.library_share_end
        rng = np.random.default_rng([args.seed, step, rank])
        ids, target = windows.batch(rng, args.batch // args.workers, library_share)
        grid = step >= args.steps * (1 - args.qat)
        with on_grid(quantized, Q4_0) if grid else nullcontext():
            nats, balance = backward(model, ids, target)
        if args.workers > 1:
            dist.all_reduce(flat_grad)
            flat_grad /= args.workers
        clip(flat_grad)
        optimiser.step(schedule(step, args.steps, args.decay))
        flat_grad.zero_()
        if args.workers > 1:
            for owner, (_, part) in enumerate(parts):
                dist.broadcast(flat[part], src=owner)
        step += 1
        ema = nats.item() if ema is None else 0.98 * ema + 0.02 * nats.item()
        show(step, ema)
        last = step == args.steps
        if step % args.save_every == 0 or last:
            torch.save({"flat": flat, "state": optimiser.state, "step": step}, f"{state_file}.tmp")
            os.replace(f"{state_file}.tmp", state_file)
        if rank == 0 and (step % 20 == 0 or last):
            record = {"step": step, "train_nats": round(ema, 4), "grid": grid, "seconds": round(time.time() - began, 1)}
            if balance is not None:
                record["balance"] = round(balance.item(), 3)
            if step % args.evaluate_every == 0 or last:
                record["validation_nats"] = round(mean_nats(model, validation, None if last else 60)[0], 4)
            log.write(json.dumps(record) + "\n")
            log.flush()
    if rank == 0:
        torch.save(model.state_dict(), Path(args.out) / "model.pt")
        (Path(args.out) / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1))


def _progress(steps: int, done: int):
    """A progress bar on standard error; silent if that is not a terminal."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not sys.stderr.isatty():
        return lambda *_: None
    bar = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[nats]} nats/token"), console=Console(stderr=True))
    task = bar.add_task("", total=steps, completed=done, nats="-")
    bar.start()

    def show(step: int, ema: float):
        bar.update(task, completed=step, nats=f"{ema:.3f}")
        if step == steps:
            bar.stop()
    return show


def training_text(quick: bool) -> corpus.Corpus:
    """The whole corpus, or a twentieth of it (tests: a hundredth)."""
    text = corpus.read_corpus()
    if not quick:
        return text
    library, tests = list(text.library.items())[::20], list(text.tests.items())[::100]
    return replace(text, library=dict(library), tests=dict(tests), validation=dict(list(text.validation.items())[::20]))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m refimpl.tiny.training.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="tiny-run", help="folder for the state, the log and the result; an existing one is resumed")
    parser.add_argument("--shape", choices=list(SHAPES), default="26B-A4B", help="the model that this is a miniature of")
    parser.add_argument("--embedding", metavar="GGUF", help="a model of the same vocabulary and width; its embedding is the first one here")
    parser.add_argument("--steps", type=int, default=3700)
    parser.add_argument("--batch", type=int, default=16, help=f"sequences of {WINDOW} tokens in a step")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.6, help="share of the run over which the learning rate falls to 0")
    parser.add_argument("--qat", type=float, default=0.15, help="share of the run, at its end, on the Q4_0 grid")
    parser.add_argument("--library-share", type=float, default=0.5, help="share of windows from library code, the rest from tests")
    parser.add_argument("--library-share-end", type=float, default=0.7, help="the same while the learning rate falls")
    parser.add_argument("--evaluate-every", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="a minute on a little text, to check that everything works: "
                        "12 steps of one sequence in one process, overriding other options")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.batch, args.workers, args.save_every, args.evaluate_every = 12, 1, 1, 4, 12
    if args.batch % args.workers:
        parser.error(f"--batch {args.batch} is not a multiple of --workers {args.workers}")
    return args


def main(argv: list[str] | None = None):
    """Trains the model in `--out`, or continues."""
    args = parse_arguments(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rendezvous").unlink(missing_ok=True)
    args.out = str(out.resolve())
    vocabulary_file = out / "tokenizer.json"
    if not vocabulary_file.exists():
        text = training_text(args.quick)
        vocabulary.train_vocabulary([*text.library.values(), *text.tests.values()]).save(str(vocabulary_file))
    tokenizer_json = vocabulary_file.read_text()
    if args.workers == 1:
        worker(0, args, tokenizer_json)
    else:
        torch.multiprocessing.spawn(worker, (args, tokenizer_json), nprocs=args.workers)


if __name__ == "__main__":
    main()
