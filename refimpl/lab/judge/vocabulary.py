"""Tokens that an endpoint names by their text, as ids of the file's vocabulary."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from refimpl.lab.judge.answers import Answer, Listed, Step
from refimpl.text.tokenizer import Tokenizer

SURE = 0.999        # of the probability of all tokens with a text, that one of them has, so that the text stands for it


class Vocabulary:
    """Bytes to ids. Several tokens may have the same: a letter, and the byte token of it. `first_only`: of an answer nothing is known but
    what its first token may be.
    """

    def __init__(self, tokenizer: Tokenizer, first_only: bool = False):
        self.tokenizer, self.first_only, self._ids = tokenizer, first_only, defaultdict(list)
        for i in range(tokenizer.n_vocab):
            self._ids[tokenizer.bytes_of(i)].append(i)

    def ids_of(self, token: Listed) -> list[int]:
        """The tokens that it may be; none for what the vocabulary does not have."""
        if token.id is not None:
            return [token.id] if 0 <= token.id < self.tokenizer.n_vocab else []
        return self._ids.get(token.bytes, [])

    def is_other(self, token: Listed) -> bool:
        """Does the endpoint say an id and a text that do not belong together here? Control tokens may have no text there."""
        if token.id is None or not token.bytes or token.bytes.startswith(b"token_id:"):
            return False
        if "\ufffd" in token.bytes.decode(errors="replace"):       # a part of a character, perhaps with others before it
            return False
        if not 0 <= token.id < self.tokenizer.n_vocab:
            return True
        spelled = self.tokenizer.token(token.id).encode()           # as mlx_lm has it
        return token.bytes not in (self.tokenizer.bytes_of(token.id), spelled)

    def known(self, answer: Answer) -> Sequence[Step]:
        """The steps before which every token is known: all, unless the endpoint leaves tokens out of its list, or lists others."""
        if self.first_only:
            return answer.steps[:1]
        if all(step.chosen.id is not None for step in answer.steps):
            gap = next((n for n, step in enumerate(answer.steps) if self._follows_others(step.chosen)), len(answer.steps))
            return answer.steps[:gap]
        return () if answer.n_missing else answer.steps

    def _follows_others(self, token: Listed) -> bool:
        """Does its text have more before it than its id has?"""
        own = self.tokenizer.bytes_of(token.id) if 0 <= token.id < self.tokenizer.n_vocab else b""
        return bool(own) and len(token.bytes) > len(own) and token.bytes.endswith(own) and not token.bytes.startswith(b"token_id:")

    def chosen(self, steps: Sequence[Step], before_ids: int) -> tuple[list[int], list[int]]:
        """(ids of the chosen tokens up to the first that is not known, indices of those that may be another one). Where several tokens
        have the text, the first in the vocabulary that is no byte token is taken. `before_ids`: at most so many.
        """
        ids, unsure = [], []
        for n, step in enumerate(steps[:before_ids]):
            candidates = self.ids_of(step.chosen)
            if not candidates:
                break
            if len(candidates) > 1:
                unsure.append(n)
            ids.append(next((i for i in candidates if not self._is_byte(i)), candidates[0]))
        return ids, unsure

    def is_sure(self, step: Step, taken: int, log_p_V: np.ndarray) -> bool:
        """Is the chosen token of this step, whose text several have, `taken` by all odds? `log_p_V`: ours."""
        p = np.exp(log_p_V[self.ids_of(step.chosen)].astype(np.float64))
        return float(np.exp(log_p_V[taken])) >= SURE * p.sum()

    def listing(self, top: Sequence[Listed], log_p_V: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """(ids, their log-probabilities at the endpoint, are these all that are listed?). Tokens of one text, most probable first, are
        those that are most probable by `log_p_V`.
        """
        ids, logprobs, taken = [], [], set()
        for token in top:
            free = [i for i in self.ids_of(token) if i not in taken]
            if free:
                best = max(free, key=lambda i: log_p_V[i])
                taken.add(best)
                ids.append(best)
                logprobs.append(token.logprob)
        return np.array(ids, int), np.array(logprobs, np.float64), len(ids) == len(top)

    def _is_byte(self, i: int) -> bool:
        name = self.tokenizer.token(i)
        return len(name) == 6 and name.startswith("<0x") and name.endswith(">")
