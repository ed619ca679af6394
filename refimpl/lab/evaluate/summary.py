"""The figures of an evaluation: means and errors of columns of numbers, one for each token that counts."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from refimpl.lab.evaluate.windows import Window, bytes_of
from refimpl.text.tokenizer import Tokenizer

SHARES = (50, 90, 99, 99.9, 100)
"""Percentiles of the divergence."""


def mean_and_error(x: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, with exactly rounded sums (math.fsum): the order does not matter."""
    mean = math.fsum(x) / len(x)
    spread = math.fsum((float(v) - mean) ** 2 for v in x)
    return mean, math.sqrt(spread / len(x) / (len(x) - 1)) if len(x) > 1 else 0.0


def summary(columns: Mapping[str, np.ndarray], windows: Sequence[Window], documents: Sequence[str], tokenizer: Tokenizer,
            token_type_V: np.ndarray, top: int) -> dict[str, object]:
    """Tokens, bytes, perplexity, bits per byte, all of it document by document, and the comparison where there was one."""
    document_of = np.repeat([window.document for window in windows], [window.n_counted for window in windows])
    ids = np.concatenate([window.ids[window.first:] for window in windows])
    result = scores(columns["nll"], bytes_of(ids, tokenizer, token_type_V))
    result["per_document"] = [{"name": documents[i]} | scores(columns["nll"][here], bytes_of(ids[here], tokenizer, token_type_V))
                              for i in sorted(set(document_of.tolist())) for here in [document_of == i]]
    if "base_nll" in columns:
        result["comparison"] = comparison(columns, top)
    return result


def scores(nll: np.ndarray, n_bytes: int) -> dict[str, object]:
    """Perplexity and bits per byte of some tokens."""
    mean, error = mean_and_error(nll)
    return {"tokens": len(nll), "bytes": n_bytes, "nll": mean, "nll_error": error, "perplexity": math.exp(mean),
            "perplexity_error": math.exp(mean) * error, "bits_per_byte": math.fsum(nll) / math.log(2) / n_bytes if n_bytes else None}


def comparison(columns: Mapping[str, np.ndarray], top: int) -> dict[str, object]:
    """How far it is from the base."""
    base, _ = mean_and_error(columns["base_nll"])
    ratio, ratio_error = mean_and_error(columns["nll"] - columns["base_nll"])
    low, low_error = mean_and_error(columns["kl_low"])
    high, high_error = mean_and_error(columns["kl_high"])
    same, same_error = mean_and_error(columns["same_top"])
    shared, shared_error = mean_and_error(columns["shared_top"] / top)
    return {"base_perplexity": math.exp(base), "log_ratio": ratio, "log_ratio_error": ratio_error,
            "kl_exact": bool((columns["kl_low"] == columns["kl_high"]).all()), "kl_low": low, "kl_low_error": low_error,
            "kl_high": high, "kl_high_error": high_error,
            "kl_low_percentiles": dict(zip(map(str, SHARES), np.percentile(columns["kl_low"], SHARES).tolist())),
            "kl_high_percentiles": dict(zip(map(str, SHARES), np.percentile(columns["kl_high"], SHARES).tolist())),
            "same_top": same, "same_top_error": same_error, "top": top, "shared_top": shared, "shared_top_error": shared_error}
