"""How good is a built-in drafter? `python -m refimpl.tiny.evaluate_drafter [MODEL]`: acceptance on held-out code, position by position.

The target continues prompts from the held-out modules; the same prompts are run with the drafter and with two baselines without a network.
`copy` looks for the latest earlier occurrence of the last two tokens (or the last one) and proposes what followed there (Saxena 2023,
"prompt lookup"). `bigram` proposes what followed the last token most often in the training text. A small model repeats itself, which is
easy to predict: the baselines show how much of the acceptance is due to that.
"""

import argparse
import json
import sys

import numpy as np

from refimpl.decode.draft_length import MAX_DRAFT, AutoDraftLength
from refimpl.decode.draft_stats import DraftStats, figures
from refimpl.decode.drafter import load_drafter
from refimpl.decode.generate import generate
from refimpl.loading.hub import BUILT_IN_FOLDERS
from refimpl.loading.model import Model, load
from refimpl.tiny.corpus import read_corpus
from refimpl.tiny.evaluate import encode_file

PROMPT, NEW = 160, 96


class Copy:
    """Proposes what followed the last two tokens, or the last one, at their latest earlier occurrence."""

    def __init__(self, target: Model, text: list[int]):
        self.target, self.text, self.auto = target, text, AutoDraftLength()

    def draft(self, token, state_C, cache, n: int, min_p: float) -> list[int]:
        """As in Drafter."""
        known = self.text[:cache.length] + [token]
        for length in (2, 1):
            for at in range(len(known) - length - 1, -1, -1):
                if known[at:at + length] == known[-length:]:
                    return (known[at + length:at + length + n] + [0] * n)[:n]
        return [0] * n


class Bigram:
    """Proposes what followed a token most often."""

    def __init__(self, target: Model, files: list[list[int]]):
        self.target, self.auto, n = target, AutoDraftLength(), target.config.n_vocab
        pair = np.concatenate([np.array(ids[:-1], np.int64) * n + np.array(ids[1:]) for ids in files])
        pair, count = np.unique(pair, return_counts=True)
        order = np.argsort(count, kind="stable")
        self.next_V = np.zeros(n, np.int64)
        self.next_V[pair[order] // n] = pair[order] % n         # the most frequent is written last

    def draft(self, token, state_C, cache, n: int, min_p: float) -> list[int]:
        """As in Drafter."""
        proposed = []
        for _ in range(n):
            token = int(self.next_V[token])
            proposed.append(token)
        return proposed


def evaluate(name: str, n_prompt: int, n_draft: int, temperature: float, seed: int = 0) -> dict[str, dict[str, object]]:
    """`figures` of the drafter of the built-in model `name` and both baselines: `n_prompt` prompts, `n_draft` draft tokens a round."""
    model, corpus = load(name), read_corpus()
    rng = np.random.default_rng(seed)
    held = [ids for ids in (encode_file(model, text) for text in corpus.heldout.values()) if len(ids) > PROMPT]
    train = [encode_file(model, text) for text in (*corpus.library.values(), *corpus.tests.values())]
    drafter, bigram = load_drafter(name, model), Bigram(model, train)
    totals = {by: DraftStats() for by in ("drafter", "copy", "bigram")}
    for i in range(n_prompt):
        ids = held[i % len(held)]
        first = int(rng.integers(1, len(ids) - PROMPT + 1))
        prompt = [model.tokenizer.bos, *ids[first:first + PROMPT - 1]]
        text = prompt + generate(model, prompt, max_new_tokens=NEW, temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, seed=i).ids
        for by, way in (("drafter", drafter), ("copy", Copy(model, text)), ("bigram", bigram)):
            out = generate(model, prompt, max_new_tokens=NEW, temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, seed=i, drafter=way,
                           draft_max=n_draft)
            if prompt + out.ids != text:
                raise AssertionError("the text with a drafter is not the text without")
            totals[by].merge(out.stats.draft)
        if sys.stderr.isatty():
            print(".", end="", file=sys.stderr, flush=True)
    return {by: figures(stats) for by, stats in totals.items()}


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m refimpl.tiny.evaluate_drafter", description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="built-in", choices=list(BUILT_IN_FOLDERS))
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--draft-max", type=int, default=4, help=f"draft tokens in a round, 1 to {MAX_DRAFT}")
    parser.add_argument("--temp", type=float, nargs="*", default=[0.0, 0.7])
    args = parser.parse_args()
    for temperature in args.temp:
        found = evaluate(args.model, args.prompts, args.draft_max, temperature)
        print(json.dumps({"model": args.model, "temperature": temperature, "prompts": args.prompts} | found, indent=1))


if __name__ == "__main__":
    main()
