"""Trains the drafter that ships: `python -m refimpl.tiny.training.train_drafter` repeats it from scratch (needs the `train` extra).

The target, a built-in model, is not changed. It first writes texts of its own, because these are what a drafter has to predict; half of
the training is on them, half on the library's text. A drafter at position p has the target's state of p - 1, the token at p, and the
target's keys and values of 0..p - 1. It predicts the next token, and three more, each from its own state of the step before: the loss
covers all four steps, so it learns to continue from its own states.

    loss = - sum over steps j, tokens v of  P(v) * log Q_j(v),     P = softmax(target's logits at p + j, divided by SHARP)

The last part is quantization-aware, as in train.py. All positions of a window are trained at once: each query sees only the positions
before it. A run can be stopped at any time; the same command resumes it from its last saved state. (The file that ships was trained with
`--steps 900` and continued to 1500, so its learning rate fell twice.)
"""

import argparse
import json
import multiprocessing
import os
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig

from refimpl.formats.gguf import open_gguf
from refimpl.formats.matrix import Matrix
from refimpl.loading.hf_names import gguf_name
from refimpl.loading.hub import local
from refimpl.tiny.corpus import read_corpus
from refimpl.tiny.training import vocabulary
from refimpl.tiny.training.grids import Q4_0, on_grid
from refimpl.tiny.training.network import NO_MASKS, SHAPES, build_model
from refimpl.tiny.training.optimiser import Optimiser
from refimpl.tiny.training.precision import LOW, autocast
from refimpl.tiny.training.train import schedule

OF = {"built-in": "26B-A4B", "built-in:e2b": "E2B"}      # target -> its shape
WIDTH, N_FF, STEPS = 96, 192, 4
WINDOW, PROMPT = 512, 96      # tokens in a window, and in the prompt at the start of the target's own texts
SHARP = 0.7                   # temperature of the labels: sharper, because a drafter proposes the most probable token
TEMPERATURE = 0.7             # of the target's own texts


# ---- the target's own texts

def some_texts(task: tuple[str, int, list[np.ndarray], int]) -> np.ndarray:
    """The share of one process: int64 (n, WINDOW), the target's continuations of random prompts from `files`."""
    import refimpl

    name, seed, files, n = task
    rng = np.random.default_rng([seed, 1])
    model, rows = refimpl.load(name, threads=1), []
    while len(rows) < n:
        ids = files[rng.integers(len(files))]
        if len(ids) < PROMPT + 1:
            continue
        first = rng.integers(1, len(ids) - PROMPT + 1)
        prompt = [model.tokenizer.bos, *ids[first:first + PROMPT - 1].tolist()]
        new = refimpl.generate(model, prompt, max_new_tokens=WINDOW - PROMPT, temperature=TEMPERATURE, top_k=0, top_p=1.0, min_p=0.0,
                               seed=int(rng.integers(1 << 31))).ids
        if len(new) == WINDOW - PROMPT:
            rows.append(prompt + new)
    return np.array(rows, np.int64)


def write_texts(path: Path, name: str, files: list[np.ndarray], n: int, seed: int):
    """Writes n texts of the model `name` to `path`, int64 (n, WINDOW), unless the file exists."""
    if path.exists():
        return
    shares = [(name, seed + i, files, n // 2 + (i < n % 2)) for i in range(2)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        np.save(path.with_suffix(".tmp.npy"), np.concatenate(pool.map(some_texts, shares)))
    os.replace(path.with_suffix(".tmp.npy"), path)


# ---- the networks

def load_target(name: str = "built-in"):
    """A built-in model in transformers' classes, with the weights of the file."""
    file = open_gguf(local(name))
    model = build_model(0, SHAPES[OF[name]])
    scalars = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
    with torch.no_grad():
        for theirs, value in [*model.named_parameters(), *scalars]:
            name = gguf_name(theirs)
            value.copy_(torch.from_numpy(Matrix(file.raw(name), file.tensors[name].type).float32().reshape(value.shape)))
    return model.eval().requires_grad_(False)


def build_drafter(target, seed: int, shape: dict[str, object] = SHAPES["26B-A4B"]) -> Gemma4AssistantForCausalLM:
    """A new drafter for a target of this shape. Its head starts as the target's, projected on its WIDTH largest singular directions, and
    so do the projections.
    """
    torch.manual_seed(seed)
    text = Gemma4TextConfig(**shape | dict(
        hidden_size=WIDTH, intermediate_size=N_FF, num_hidden_layers=4, layer_types=["sliding_attention"] * 3 + ["full_attention"],
        enable_moe_block=False, num_experts=None, top_k_experts=None, moe_intermediate_size=None, num_kv_shared_layers=4,
        hidden_size_per_layer_input=0, use_double_wide_mlp=False, vocab_size_per_layer_input=0, final_logit_softcapping=None))
    drafter = Gemma4AssistantForCausalLM(Gemma4AssistantConfig(
        text_config=text, backbone_hidden_size=shape["hidden_size"], use_ordered_embeddings=False))
    embedding = target.model.embed_tokens.weight.detach()
    directions = torch.linalg.svd(embedding, full_matrices=False).Vh[:WIDTH]                    # (WIDTH, H)
    for name, p in drafter.named_parameters():
        with torch.no_grad():
            if name.endswith("embed_tokens.weight"):
                p.copy_(embedding @ directions.T)
            elif name.startswith("pre_projection"):
                p.copy_(torch.cat([directions, directions], 1))
            elif name.startswith("post_projection"):
                p.copy_(directions.T)
            elif name.endswith("q_norm.weight"):
                p.fill_(p.shape[0] ** -0.25)
            elif p.ndim >= 2:
                torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 * (0.5 if "o_proj" in name or "down_proj" in name else 1.0))
    return drafter


def masks(n_query: int, n_key: int, window: int) -> dict[str, torch.Tensor]:
    """Masks of the queries at positions 1 to n_query: they see keys of earlier positions, in sliding layers the last window - 1."""
    position, key = torch.arange(1, n_query + 1)[:, None], torch.arange(n_key)[None]
    full = key < position
    sliding = full & (position - key < window)
    return {name: torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
            for name, seen in (("full_attention", full), ("sliding_attention", sliding))}


class SoftCrossEntropy(torch.autograd.Function):
    """Mean over rows of - sum_v P[row, v] log softmax(z @ w.T)[row, v], and each row's most probable token; chunk by chunk."""

    @staticmethod
    def forward(ctx, z_TD, w_VD, p_TV):
        """The loss and the most probable tokens; also the gradients, while the logits are in memory."""
        grad_z, grad_w, n, total, best = torch.empty_like(z_TD), torch.zeros_like(w_VD), len(z_TD), 0.0, []
        w_low = w_VD.to(LOW)
        for lo in range(0, n, 512):
            z, p = z_TD[lo:lo + 512].to(LOW), p_TV[lo:lo + 512].float()
            log_q = (z @ w_low.T).float().log_softmax(-1)
            best.append(log_q.argmax(-1))
            total -= (p * log_q).sum()
            grad = log_q.exp_().sub_(p).div_(n).to(LOW)
            grad_z[lo:lo + 512] = (grad @ w_low).float()
            grad_w += (grad.T @ z).float()
        ctx.save_for_backward(grad_z, grad_w)
        best = torch.cat(best)
        ctx.mark_non_differentiable(best)
        return total / n, best

    @staticmethod
    def backward(ctx, grad, _):
        """The gradients from forward, times the gradient of the loss."""
        grad_z, grad_w = ctx.saved_tensors
        return grad * grad_z, grad * grad_w, None


def rollout(target, drafter, ids_BT: torch.Tensor, from_position: int):
    """The steps of a round at all positions from `from_position` on: (normed states z, the target's probabilities, the next tokens)."""
    # queries at 1..n; the last prediction of the last one needs a token to compare with
    window, n = target.config.sliding_window, ids_BT.shape[1] - STEPS - 1
    with torch.no_grad(), autocast():
        out = target.model(input_ids=ids_BT, attention_mask=NO_MASKS, use_cache=False, return_shared_kv_states=True)
        state_BTH, embedded_BTH = out.last_hidden_state.float(), target.model.embed_tokens(ids_BT)
        cap = target.config.final_logit_softcapping
        logit = torch.tanh((state_BTH @ target.model.embed_tokens.weight.T).float() / cap) * (cap / SHARP)
        p_BTV = logit.softmax(-1).bfloat16()
        # in the type of the queries
        shared = {kind: tuple(x.to(LOW) for x in out.shared_kv_states[kind]) for kind in ("full_attention", "sliding_attention")}
    mask, position = masks(n, ids_BT.shape[1], window), torch.arange(1, n + 1)[None]
    mask = {kind: m.to(LOW) for kind, m in mask.items()}
    kept = slice(from_position - 1, n)
    state = state_BTH[:, :n]
    for j in range(STEPS):
        with autocast():
            y = drafter.pre_projection(torch.cat([embedded_BTH[:, 1 + j:1 + j + n], state], -1))
            z = drafter.model(inputs_embeds=y, attention_mask=mask, position_ids=position, shared_kv_states=shared,
                              use_cache=False).last_hidden_state.float()
            state = drafter.post_projection(z).float()
        p = p_BTV[:, 1 + j:1 + j + n][:, kept]
        yield z[:, kept].reshape(-1, WIDTH), p.reshape(-1, p.shape[-1]), ids_BT[:, 2 + j:2 + j + n][:, kept].reshape(-1)


def run(target, drafter, ids_BT: torch.Tensor, from_position: int):
    """(losses of the steps, bool (steps, rows): is the prediction the next token of the text) for positions from `from_position` on."""
    losses, right = [], []
    for z_TD, p_TV, next_T in rollout(target, drafter, ids_BT, from_position):
        loss, best = SoftCrossEntropy.apply(z_TD, drafter.model.embed_tokens.weight, p_TV)
        losses.append(loss)
        right.append(best == next_T)
    return losses, torch.stack(right)


@torch.no_grad()
def acceptance(target, drafter, ids_NT: np.ndarray) -> list[float]:
    """How often the first, the first two, ... predictions are the tokens that the target wrote, on its own texts."""
    right = torch.cat([run(target, drafter, torch.from_numpy(ids_NT[i:i + 8]), PROMPT)[1] for i in range(0, len(ids_NT), 8)], 1)
    return [round(float(right[:j + 1].all(0).float().mean()), 4) for j in range(STEPS)]


# ---- the run

def worker(rank: int, args: argparse.Namespace):
    """One of two single-threaded processes: the first trains on the library's text, the second on the target's own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{args.out}/rendezvous", rank=rank, world_size=2)
    out = Path(args.out)
    library, own, watched = np.load(out / "library.npy"), np.load(out / "own.npy"), np.load(out / "watched.npy")
    target = load_target(args.target)
    drafter = build_drafter(target, args.seed, SHAPES[OF[args.target]])
    named = list(drafter.named_parameters())
    optimiser = Optimiser(named, args.muon_lr, args.adam_lr)
    matrices = [p for _, p in named if p.ndim == 2]
    step, state_file = 0, out / "state.pt"
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        drafter.load_state_dict(saved["drafter"])
        optimiser.state, optimiser.n_steps, step = saved["state"], saved["step"], saved["step"]
    began, mean = time.time(), np.zeros(STEPS)
    while step < args.steps:
        rng = np.random.default_rng([args.seed, step, rank])
        if rank == 0:
            starts = rng.integers(0, len(library) - WINDOW, args.batch // 2)
            rows, first = np.stack([np.concatenate([[vocabulary.BOS], library[s:s + WINDOW - 1]]) for s in starts]), 1
        else:
            rows, first = own[rng.integers(0, len(own), args.batch // 2)], PROMPT
        grid = step >= args.steps * (1 - args.qat)
        with on_grid(matrices, Q4_0) if grid else nullcontext():
            losses, _ = run(target, drafter, torch.from_numpy(rows), first)
            (sum(losses) / STEPS).backward()
        gradient = torch.cat([p.grad.reshape(-1) for _, p in named])
        dist.all_reduce(gradient)
        gradient *= min(1.0, 1.0 / (gradient.norm().item() / 2 + 1e-6)) / 2
        for (_, p), part in zip(named, gradient.split([p.numel() for _, p in named])):
            p.grad = part.view_as(p)
        optimiser.step(schedule(step, args.steps, args.decay))
        for _, p in named:
            p.grad = None
        step += 1
        mean = 0.98 * mean + 0.02 * np.array([loss.item() for loss in losses])
        if rank == 0 and (step % args.save_every == 0 or step == args.steps):
            torch.save({"drafter": drafter.state_dict(), "state": optimiser.state, "step": step}, f"{state_file}.tmp")
            os.replace(f"{state_file}.tmp", state_file)
            record = {"step": step, "library_nats": [round(float(x), 3) for x in mean], "grid": grid,
                      "accepted": acceptance(target, drafter, watched), "seconds": round(time.time() - began)}
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
    if rank == 0:
        torch.save(drafter.state_dict(), out / "drafter.pt")
        (out / "config.json").write_text(json.dumps(drafter.config.to_dict(), indent=1))


def main(argv: list[str] | None = None):
    """Trains the drafter in `--out`, or continues."""
    parser = argparse.ArgumentParser(prog="python -m refimpl.tiny.training.train_drafter", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="drafter-run", help="folder for the texts, the state, the log and the result")
    parser.add_argument("--target", choices=list(OF), default="built-in")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {WINDOW} tokens in a step")
    parser.add_argument("--texts", type=int, default=800, help="windows that the target writes first")
    parser.add_argument("--watched", type=int, default=24, help="windows that acceptance is measured on while training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.7, help="share of the run over which the learning rate falls to 0")
    parser.add_argument("--qat", type=float, default=0.2, help="share of the run, at its end, on the Q4_0 grid")
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args(argv)
    import refimpl

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rendezvous").unlink(missing_ok=True)
    args.out = str(out.resolve())
    text, tokenizer = read_corpus(), refimpl.load(backend="reference").tokenizer
    encode = [[np.array(tokenizer.encode(t)) for t in part.values()] for part in (text.library, text.validation)]
    np.save(out / "library.npy", np.concatenate(encode[0]))
    write_texts(out / "own.npy", args.target, encode[0], args.texts, args.seed)
    write_texts(out / "watched.npy", args.target, encode[1], args.watched, args.seed + 1000)
    torch.multiprocessing.spawn(worker, (args,), nprocs=2)


if __name__ == "__main__":
    main()
