"""Bits per byte of held-out text, and the divergence of one model from another on it. In float32, with torch."""

import math
from contextlib import contextmanager

import numpy as np
import torch

from refimpl.tiny.training.network import NO_MASKS
from refimpl.tiny.training.vocabulary import SPACE

WINDOW = 512
COUNTED = 256                   # the second half of a window is scored, the first is its context
ROWS = 2048                     # rows of logits in memory at a time
BATCH = 8


class HeldOut:
    """`n_windows` windows, evenly spread over files of ids (those that are long enough), and the UTF-8 bytes of their scored halves."""

    def __init__(self, files: list[np.ndarray], bytes_of_id: np.ndarray, n_windows: int):
        all_ = [ids[lo:lo + WINDOW + 1] for ids in files for lo in range(0, len(ids) - WINDOW, COUNTED)]
        rows = np.stack([all_[i] for i in np.linspace(0, len(all_) - 1, min(n_windows, len(all_))).round().astype(int)])
        self.ids_BT = torch.from_numpy(rows[:, :-1])
        self.target_T = torch.from_numpy(rows[:, -COUNTED:]).reshape(-1)
        self.n_bytes = int(bytes_of_id[rows[:, -COUNTED:]].sum())

    @torch.no_grad()
    def states(self, model) -> torch.Tensor:
        """The final normalised states from which every scored token is predicted, float32 (tokens, D)."""
        with _in_float32(model):
            parts = [model.model(input_ids=ids, attention_mask=NO_MASKS, use_cache=False).last_hidden_state[:, -COUNTED:]
                     for ids in self.ids_BT.split(BATCH)]
        return torch.cat(parts).reshape(len(self.target_T), -1)

    @torch.no_grad()
    def measure(self, model, reference: tuple[torch.Tensor, torch.Tensor] | None = None) -> dict[str, float]:
        """Nats per token and bits per byte; with `reference`, the states and the head's matrix of another model, also the mean
        KL(reference || model) in nats and the share of tokens where both have the same top-1.
        """
        x_TD, w_VD, cap = self.states(model), model.model.embed_tokens.weight, model.config.final_logit_softcapping
        nats = kl = same = 0.0
        for lo in range(0, len(x_TD), ROWS):
            part = slice(lo, lo + ROWS)
            mine = _log_probabilities(x_TD[part], w_VD, cap)
            nats -= mine.gather(1, self.target_T[part, None]).double().sum().item()
            if reference is not None:
                theirs = _log_probabilities(reference[0][part], reference[1], cap)
                same += (mine.argmax(1) == theirs.argmax(1)).sum().item()
                kl += (theirs.exp() * (theirs - mine)).sum(1).double().sum().item()
        found = {"nats": nats / len(x_TD), "bits_per_byte": nats / math.log(2) / self.n_bytes}
        if reference is not None:
            found |= {"kl": kl / len(x_TD), "top1": same / len(x_TD)}
        return found


def bytes_of_ids(tokenizer) -> np.ndarray:
    """Number of UTF-8 bytes of each token of the vocabulary; 0 for <bos>, <eos> and other control tokens."""
    n_bytes = np.zeros(tokenizer.get_vocab_size(), np.int64)
    special = tokenizer.get_added_tokens_decoder()
    for token, i in tokenizer.get_vocab().items():
        if i not in special:
            is_byte = len(token) == 6 and token.startswith("<0x")
            n_bytes[i] = 1 if is_byte else len(token.replace(SPACE, " ").encode())
    return n_bytes


def _log_probabilities(x_TD: torch.Tensor, w_VD: torch.Tensor, cap: float) -> torch.Tensor:
    return (x_TD @ w_VD.T).div_(cap).tanh_().mul_(cap).log_softmax(1)


@contextmanager
def _in_float32(model):
    """Inside, transformers' own experts instead of those of the training, which compute in bfloat16."""
    quick = model.config._experts_implementation
    model.config._experts_implementation = "grouped_mm"
    try:
        yield
    finally:
        model.config._experts_implementation = quick
