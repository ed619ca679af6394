"""Trains the projector that ships: `python -m refimpl.tiny.training.train_projector` repeats it from scratch (needs the `train` extra).

The text model, the built-in one, is not changed: the gradients of its next-token loss run through it, and stop at the soft tokens. What
is trained is transformers' own vision tower of Gemma 4 in miniature, and the matrix behind it. The pictures are cards with a word
(tiny/pictures.py); the model has to write the word, and a newline, behind the picture.

Two parts, since the text model takes most of the time. In the first the mean of a picture's soft tokens alone has to tell the word, by
its product with the embeddings of all words; the second adds the loss of the text model. Most pictures are pieces of cards, which is
quicker.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from transformers import Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder, Gemma4VisionModel

from refimpl.media.patches import patches
from refimpl.tiny.pictures import HEIGHT, WIDTH, WORDS, random_card
from refimpl.tiny.training import vocabulary
from refimpl.tiny.training.network import SHAPE
from refimpl.tiny.training.optimiser import Optimiser
from refimpl.tiny.training.train_drafter import load_target

VISION = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
              patch_size=16, position_embedding_size=256, use_clipped_linears=False, standardize=False)
PIECES = ((48, 24), (60, 24), (48, 36)), ((48, 24),)    # dots of the pieces in both parts: 8 to 12 soft tokens
DOT = 4                                         # pixels of a dot
WARM_UP, DECAY = 30, 0.6                        # of each part: steps over which the learning rate rises, share over which it falls to 0
BEFORE, BEHIND = ("", "# "), ("", "\n")         # texts around the picture


class Eyes(torch.nn.Module):
    """A vision tower and the matrix to the width of the text model."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        config = Gemma4VisionConfig(**VISION)
        config._attn_implementation = "sdpa"
        text = type("Text", (), {"hidden_size": SHAPE["hidden_size"]})
        self.vision_tower, self.embed_vision = Gemma4VisionModel(config), Gemma4MultimodalEmbedder(config, text)
        for name, p in self.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                torch.nn.init.constant_(p, p.shape[0] ** -0.25)
            elif name.endswith("position_embedding_table"):
                torch.nn.init.normal_(p, std=0.02)
            elif p.ndim >= 2:
                torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)

    def forward(self, patches_BTP: torch.Tensor, pos_T2: torch.Tensor) -> torch.Tensor:
        """The soft tokens of pictures of one size: (B, n, width)."""
        pooled = self.vision_tower(patches_BTP, pos_T2[None].expand(len(patches_BTP), -1, -1)).last_hidden_state
        return self.embed_vision(pooled[None])[0].reshape(len(patches_BTP), -1, SHAPE["hidden_size"])


class Reader:
    """The text model as a judge of soft tokens."""

    def __init__(self):
        import refimpl

        self.model = load_target()
        self.model.config._attn_implementation, self.model.config._experts_implementation = "sdpa", "eager"
        tokenizer = refimpl.load(backend="reference").tokenizer
        self.bos = tokenizer.bos
        self.markers = tokenizer.id_of("<|image>"), tokenizer.id_of("<image|>")
        self.texts = {text: tokenizer.encode(text, bos=False) for text in (*BEFORE, *BEHIND)}
        self.words = [tokenizer.encode(f"{word}\n", bos=False) for word in WORDS]
        embedding = self.model.model.embed_tokens.weight.detach()
        self.word_WD = F.normalize(torch.stack([embedding[ids[:-1]].mean(0) for ids in self.words]), dim=-1)

    def loss(self, soft_BND: torch.Tensor, words: np.ndarray, rng: np.random.Generator):
        """(nats a token of the words and the newlines behind them, share of words whose every token is the most probable one)."""
        n, rows, places = soft_BND.shape[1], [], []
        for word in words:
            before, behind = self.texts[BEFORE[rng.integers(len(BEFORE))]], self.texts[BEHIND[rng.integers(len(BEHIND))]]
            head = [self.bos, *before, self.markers[0]]
            rows.append([*head, *[vocabulary.PAD] * n, self.markers[1], *behind, *self.words[word]])
            places.append((len(head), len(rows[-1]) - len(self.words[word])))
        length = max(map(len, rows))
        ids = torch.tensor([row + [vocabulary.PAD] * (length - len(row)) for row in rows])
        target, mask = torch.full_like(ids, -100), {kind: [] for kind in ("full_attention", "sliding_attention")}
        x = self.model.model.embed_tokens(ids)
        x = torch.stack([torch.cat([x[b, :first], soft_BND[b], x[b, first + n:]]) for b, (first, _) in enumerate(places)])
        query, key = torch.arange(length)[:, None], torch.arange(length)[None]
        for b, (first, answer) in enumerate(places):
            target[b, answer - 1:len(rows[b]) - 1] = ids[b, answer:len(rows[b])]
            end = torch.where((query >= first) & (query < first + n), first + n, query + 1)
            mask["full_attention"].append(key <= query)
            mask["sliding_attention"].append((key < end) & (key > query - SHAPE["sliding_window"]))
        hidden = self.model.model(inputs_embeds=x, attention_mask={kind: torch.stack(m)[:, None] for kind, m in mask.items()},
                                  use_cache=False).last_hidden_state
        wanted = target >= 0
        cap = self.model.config.final_logit_softcapping
        logits = torch.tanh(hidden[wanted] @ self.model.model.embed_tokens.weight.T / cap) * cap
        right = torch.zeros_like(ids, dtype=torch.bool)
        right[wanted] = logits.argmax(-1) == target[wanted]
        return F.cross_entropy(logits, target[wanted]), (right | ~wanted).all(-1).float().mean().item()

    def mean_loss(self, soft_BND: torch.Tensor, words: np.ndarray):
        """The same of the mean of the soft tokens, by its product with the embedding of each word."""
        score = soft_BND.mean(1) @ self.word_WD.T
        target = torch.from_numpy(words)
        return F.cross_entropy(score, target), (score.argmax(-1) == target).float().mean().item()


def enlarged(card_HWC: np.ndarray) -> np.ndarray:
    """A card as the budget makes it, and a piece likewise."""
    height, width, _ = card_HWC.shape
    return np.array(PIL.Image.fromarray(card_HWC).resize((DOT * width, DOT * height), PIL.Image.Resampling.BICUBIC))


def batch(rng: np.random.Generator, n: int, size: tuple[int, int]):
    """(numbers of words, patches, positions) of `n` random cards of one size."""
    words = rng.integers(0, len(WORDS), n)
    cut = [patches(enlarged(random_card(WORDS[word], rng, size))) for word in words]
    return words, torch.from_numpy(np.stack([found for found, _ in cut])), torch.from_numpy(cut[0][1])


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m refimpl.tiny.training.train_projector", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="projector-run", help="folder for the log and the result")
    parser.add_argument("--steps", type=int, nargs=2, default=[700, 300], metavar=("MEAN", "TEXT"),
                        help="by the mean of the soft tokens alone; by the text model too")
    parser.add_argument("--batch", type=int, default=32, help="pieces in a step, or twice the number of whole cards")
    parser.add_argument("--whole", type=float, nargs=2, default=[0.1, 0.3], metavar=("MEAN", "TEXT"),
                        help="share of steps with whole cards")
    parser.add_argument("--start", type=Path, help="projector.pt of an earlier run to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    """Trains the projector in `--out`."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    eyes, reader = Eyes(args.seed), Reader()
    if args.start:
        eyes.load_state_dict(torch.load(args.start, weights_only=True))
    named = [(name.replace(".linear.", "."), p) for name, p in eyes.named_parameters()]
    optimiser = Optimiser(named, args.muon_lr, args.adam_lr)
    ends, began, shown = np.cumsum(args.steps), time.process_time(), None
    for step in range(ends[-1]):
        part = int(step >= ends[0])
        done, steps = (step - ends[0], args.steps[1]) if part else (step, args.steps[0])
        rng = np.random.default_rng([args.seed, step])
        whole = rng.random() < args.whole[part]
        size = (WIDTH, HEIGHT) if whole else PIECES[part][rng.integers(len(PIECES[part]))]
        words, patches_BTP, pos_T2 = batch(rng, args.batch // 2 if whole else args.batch, size)
        soft = eyes(patches_BTP, pos_T2)
        loss, mean_right = reader.mean_loss(soft, words)
        found = [loss.item(), mean_right, np.nan, np.nan]
        if part:
            nats, right = reader.loss(soft, words, rng)
            loss, found[2:] = loss + nats, [nats.item(), right]
        loss.backward()
        gradient = torch.cat([p.grad.reshape(-1) for _, p in named])
        for _, p in named:
            p.grad *= min(1.0, 1.0 / (gradient.norm().item() + 1e-6))
        optimiser.step(min((done + 1) / WARM_UP, 1, (steps - done) / (DECAY * steps)))
        eyes.zero_grad()
        shown = found if shown is None or step in ends else [b if np.isnan(a) else 0.95 * a + 0.05 * b for a, b in zip(shown, found)]
        if (step + 1) % 25 == 0 or step + 1 == ends[-1]:
            record = dict(zip(("mean_nats", "mean_right", "nats", "right"), (round(x, 4) for x in shown)))
            line = json.dumps({"step": step + 1, "seconds": round(time.process_time() - began, 1)} | record)
            print(line, flush=True)
            with open(out / "log.jsonl", "a") as log:
                log.write(line + "\n")
            torch.save(eyes.state_dict(), out / "projector.pt")


if __name__ == "__main__":
    main()
