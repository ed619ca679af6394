"""How well does the built-in projector read? `python -m refimpl.tiny.evaluate_projector`: cards that it was not trained on.

A card counts as read where the model's greedy continuation is the word, to its last letter, and a newline behind it.
"""

import argparse
import json
from collections.abc import Sequence

import numpy as np

from refimpl.decode.generate import generate
from refimpl.loading.model import Model, load
from refimpl.loading.projector import Projector, load_projector
from refimpl.media.parts import Image
from refimpl.tiny.pictures import TOKENS, held_out


def read(model: Model, projector: Projector, card_HWC: np.ndarray, tokens: int = TOKENS, before: str = "", behind: str = "\n") -> str:
    """What the model writes behind a picture, greedily, to the end of the line."""
    prompt = [part for part in (before, Image(card_HWC, tokens), behind) if not isinstance(part, str) or part]
    return generate(model, prompt, max_new_tokens=6, temperature=0, projector=projector).text.split("\n")[0]


def evaluate(n: int, seed: int = 0, tokens: int = TOKENS,
             around: Sequence[tuple[str, str]] = (("", "\n"), ("# ", ""))) -> dict[str, object]:
    """The share of `n` cards that is read, in each of the texts around them, and the words that were misread."""
    model = load()
    projector = load_projector(None, model)
    found: dict[str, object] = {"cards": n, "tokens": tokens}
    for before, behind in around:
        read_as = [(word, read(model, projector, card, tokens, before, behind)) for word, card in held_out(n, seed)]
        found[f"{before}<picture>{behind}"] = {"read": sum(word == text for word, text in read_as) / n,
                                               "misread": [pair for pair in read_as if pair[0] != pair[1]][:20]}
    return found


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m refimpl.tiny.evaluate_projector", description=__doc__.split("\n")[0])
    parser.add_argument("--cards", type=int, default=480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="budget of a picture")
    args = parser.parse_args()
    print(json.dumps(evaluate(args.cards, args.seed, args.tokens), indent=1))


if __name__ == "__main__":
    main()
