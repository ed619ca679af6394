"""How good is the built-in model? Bits per byte of the held-out modules: `python -m refimpl.tiny.evaluate [model.gguf]`.

Two baselines on the same text: a 5-gram model with the same vocabulary and training text, and `xz -9` of the held-out files.
Needs the standard library of the Python that the model was trained on; other versions have other text.
"""

import argparse
import json
import lzma
import math
from collections.abc import Callable

import numpy as np

from refimpl.cli.app import bar
from refimpl.loading.model import Model, load
from refimpl.progress import Progress, silent
from refimpl.tiny.corpus import Corpus, read_corpus
from refimpl.tiny.ngram import NgramModel

WINDOW = 512


def model_bits(model: Model, ids: list[int], advance: Callable[[int], None] = lambda n_tokens: None) -> float:
    """Bits the model needs for ids[1:]: windows of 512 tokens that overlap by half; each token is scored once."""
    bits, end, lo = 0.0, 1, 0
    while end < len(ids):
        hi = min(lo + WINDOW, len(ids) - 1)
        n_new = hi + 1 - end
        state_TD = model.prefill(ids[lo:hi], model.new_cache())[-n_new:]
        logit_TV = model.head(state_TD).astype(np.float64)
        top_T = logit_TV.max(axis=1)
        log_sum_T = top_T + np.log(np.exp(logit_TV - top_T[:, None]).sum(axis=1))
        bits += float((log_sum_T - logit_TV[np.arange(n_new), ids[end:hi + 1]]).sum()) / math.log(2)
        advance(n_new)
        end, lo = hi + 1, lo + WINDOW // 2
    return bits


def encode_file(model: Model, text: str) -> list[int]:
    """<bos>, the text, <eos>: as in training."""
    return [*model.tokenizer.encode(text), model.tokenizer.eos]


def evaluate(model: Model, corpus: Corpus, limit: int | None = None, progress: Progress = silent) -> dict[str, object]:
    """Bits per byte of the held-out files (the first `limit` of them) for the model and both baselines."""
    held = dict(list(corpus.heldout.items())[:limit])
    n_bytes = sum(len(text.encode()) for text in held.values())
    files = [encode_file(model, text) for text in held.values()]
    texts, train = (*corpus.library.values(), *corpus.tests.values()), []
    with progress("training files tokenized", len(texts)) as advance:
        for text in texts:
            train.append(np.array(encode_file(model, text)))
            advance(1)
    packed = lzma.compress("".join(held.values()).encode(), preset=9)
    n_tokens = sum(map(len, files)) - len(files)
    with progress("5-gram model", len(files) + 1) as advance:
        ngram, ngram_bits = NgramModel(train), 0.0
        advance(1)
        for ids in files:
            ngram_bits += ngram.bits(np.array(ids))
            advance(1)
    with progress("held-out tokens", n_tokens) as advance:
        bits = sum(model_bits(model, ids, advance) for ids in files)
    return {
        "python": corpus.python, "files": len(held), "bytes": n_bytes, "tokens": n_tokens,
        "bytes_per_token": round(n_bytes / n_tokens, 3),
        "xz -9": round(8 * len(packed) / n_bytes, 4),
        "5-gram": round(ngram_bits / n_bytes, 4),
        "model": round(bits / n_bytes, 4),
    }


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m refimpl.tiny.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="a GGUF file with the same vocabulary (default: the built-in model)")
    parser.add_argument("--files", type=int, help="only the first N held-out files")
    args = parser.parse_args()
    try:
        model = load(args.model)
    except (ValueError, OSError) as e:
        parser.error(str(e))
    print(json.dumps(evaluate(model, read_corpus(), args.files, bar), indent=1))


if __name__ == "__main__":
    main()
