"""From logits to the next token: greedy, or one random draw after temperature, top-k, top-p and min-p.

The order is that of transformers (`GenerationMixin._get_logits_processor`): the logits are divided by the temperature first, then
top-k, top-p and min-p filter in turn. llama.cpp's default order applies the temperature last, so with a temperature other than 1 its
top-p and min-p keep other tokens.

    weight  exp((logit - largest logit) / temperature), in float64
    top-k   keep logits >= the k-th largest (all tokens equal to the k-th stay, as in transformers)
    top-p   keep the most probable tokens until their mass reaches p; of equal tokens the lower id comes first
    min-p   keep tokens at least min_p times as probable as the most probable one
    draw    u uniform in [0, 1): the first kept token, in order of id, whose cumulative probability exceeds u

Before all of that, logits are changed: penalties and biases are added, and what a constraint (constraint.py) does not allow becomes -inf.
A draw takes exactly one number from the generator, so the n-th token depends only on the seed, n and the logits.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from refimpl.decode.constraint import FREE, Constraint


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. The defaults are the ones Gemma 4 is published with. Raises ValueError naming a bad value.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch that filter off; `seed` starts the generator. Of a token that has
    been picked n times, n * `frequency_penalty` is taken from the logit, and `presence_penalty` where n > 0 (OpenAI's definition, over
    the answer); `logit_bias` has (id, what is added) pairs.
    """

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self):
        """Checks every value once."""
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
            _require(is_number and math.isfinite(value), name, value, "a finite number")
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
            _require(is_integer and value >= 0, name, value, "an integer >= 0")
        _require(self.temperature >= 0, "temperature", self.temperature, ">= 0 (0 is greedy)")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (1 is off)")
        _require(0 <= self.min_p < 1, "min_p", self.min_p, "at least 0 and below 1 (0 is off)")
        _require(all(math.isfinite(bias) for _, bias in self.logit_bias), "logit_bias", self.logit_bias, "ids with finite numbers")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], **overrides: object) -> "Sampling":
        """The settings of a GGUF file (`general.sampling.*`), else Gemma's defaults. An override of None counts as not given."""
        values = {}
        for name, key in (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p")):
            if (value := metadata.get(f"general.sampling.{key}")) is not None:
                values[name] = value if name == "top_k" else _as_written(value)
        return cls(**(values | {name: value for name, value in overrides.items() if value is not None}))


class Sampler:
    """Picks the tokens of one answer by a `Sampling`, with its own random generator: the same seed gives the same picks."""

    def __init__(self, sampling: Sampling, suppress: Iterable[int] = (), constraint: Constraint = FREE):
        """`suppress`: ids that are never picked (GGUF's tokenizer.ggml.suppress_tokens)."""
        self.sampling, self.constraint = sampling, constraint
        self._suppress = np.array(sorted(set(suppress)), np.int64)
        self._bias = dict(sampling.logit_bias)
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))
        self._counts: dict[int, int] = {}

    def pick(self, logits_V: np.ndarray) -> int:
        """The id of the next token. Greedy takes the largest logit (the lowest id of equal ones) and draws nothing.

        Raises ValueError if the logits hold NaN or +inf, or nothing but -inf.
        """
        token = self._choose(logits_V)
        self.constraint.accept(token)
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _choose(self, logits_V: np.ndarray) -> int:
        if self.sampling.temperature == 0:
            return int(np.argmax(self._checked(logits_V)))
        id_K, p_K = self.distribution(logits_V)
        cumulative_K = np.cumsum(p_K)
        threshold = self._random.random() * cumulative_K[-1]
        # "right": the strict comparison of the rule above; the minimum is for a threshold that rounds up to the whole sum
        return int(id_K[min(np.searchsorted(cumulative_K, threshold, side="right"), len(id_K) - 1)])

    def distribution(self, logits_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The distribution `pick` draws from: the remaining ids, ascending, and their probabilities (float64, sum 1).

        Greedy is a single id. Draws nothing. Errors as in `pick`.
        """
        logits_V, s = self._checked(logits_V), self.sampling
        if s.temperature == 0:
            return np.array([np.argmax(logits_V)]), np.ones(1)
        id_K = np.arange(logits_V.size)
        if 0 < s.top_k < logits_V.size:  # before the division, which could round two logits to a tie
            id_K = np.flatnonzero(logits_V >= np.partition(logits_V, -s.top_k)[-s.top_k])
        with np.errstate(over="ignore"):  # with a tiny temperature all but the largest are -inf, of weight 0
            weight_K = np.exp((logits_V[id_K].astype(np.float64) - logits_V.max()) / s.temperature)
        if s.top_p < 1:
            kept_K = _top_p(weight_K, s.top_p)
            id_K, weight_K = id_K[kept_K], weight_K[kept_K]
        # relative to the most probable token, whose weight is exp(0) = 1
        kept_K = (weight_K >= s.min_p) & (weight_K > 0)
        id_K, weight_K = id_K[kept_K], weight_K[kept_K]
        return id_K, weight_K / weight_K.sum()

    def _checked(self, logits_V: np.ndarray) -> np.ndarray:
        logits_V = np.asarray(logits_V, np.float32)
        if logits_V.ndim != 1 or not logits_V.size:
            raise ValueError(f"logits must be one non-empty vector, not of shape {logits_V.shape}")
        if self._suppress.size and not 0 <= self._suppress[0] <= self._suppress[-1] < logits_V.size:
            raise ValueError(f"suppressed ids {self._suppress.tolist()} do not all lie in the vocabulary of {logits_V.size}")
        if outside := [i for i in self._bias if not 0 <= i < logits_V.size]:
            raise ValueError(f"logit_bias: token id {outside[0]} is outside of the vocabulary (0 to {logits_V.size - 1})")
        if self._suppress.size or self._bias or self._counts:
            logits_V = logits_V.copy()
            for i, bias in self._bias.items():
                logits_V[i] += np.float32(bias)
            for i, n in self._counts.items():
                logits_V[i] -= np.float32(n * self.sampling.frequency_penalty + self.sampling.presence_penalty)
            logits_V[self._suppress] = -np.inf
        logits_V = self.constraint.mask(logits_V)
        if not np.isfinite(top := logits_V.max()):  # max() is NaN as soon as one logit is
            found = "NaN" if np.isnan(top) else "+inf" if top > 0 else "nothing but -inf"
            raise ValueError(f"cannot sample: the logits hold {found}")
        return logits_V


def _top_p(weight_K: np.ndarray, p: float) -> np.ndarray:
    """Positions, ascending, of the smallest set of largest weights whose mass reaches `p`: transformers' rule.

    A token stays if the mass of it and everything less probable exceeds 1 - p.
    """
    cut = (1.0 - p) * weight_K.sum()
    # All tokens lighter than cut / K together weigh less than the cut, so none of them stays: only the others are sorted.
    candidate_C = np.flatnonzero(weight_K >= cut / len(weight_K) * (1.0 - 1e-9))
    order_C = candidate_C[np.argsort(-weight_K[candidate_C], kind="stable")]  # stable: of equal weights the lower id first
    mass_C = np.cumsum(weight_K[order_C])
    n_kept = 1 + np.count_nonzero(mass_C[:-1] < weight_K.sum() - cut)
    return np.sort(order_C[:n_kept])


def _as_written(value: object) -> object:
    """0.95 for a float32 of 0.949999988: the shortest decimal that rounds to it."""
    return float(str(np.float32(value))) if isinstance(value, float | np.floating) else value


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, not {value!r}")
