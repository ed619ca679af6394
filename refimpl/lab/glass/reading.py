"""What a token reads, and how long each part of its step takes: bytes of weights and of keys and values, seconds, memory bandwidth."""

import functools
import statistics
import time
from collections.abc import Callable

import numpy as np

from refimpl.lab.explain.weight_traffic import PARTS, read_by_part
from refimpl.loading.model import Model
from refimpl.model.cache import Cache
from refimpl.model.config import MoeFfn

STEPS = 5
BANDWIDTH_BYTES, BANDWIDTH_PASSES = 256 << 20, 3
ENDS = {"attention": ("attn_out", "attn_norm", "attn_post_norm", "kqv_out"), "experts": ("ffn_norm_2", "ffn_moe_out", "ffn_moe"),
        "dense feed-forward": ("ffn_norm_1", "ffn_norm", "ffn_gate", "ffn_up", "ffn_geglu", "ffn_mlp", "ffn_out")}
PART = {name: part for part, names in ENDS.items() for name in names}
"""The part that was being computed when a value appears. All others belong to "the rest", but for Q, K and V."""


def weight_bytes(model: Model) -> dict[str, float]:
    """Bytes of the file that one token reads, by part (weight_traffic.PARTS)."""
    routed = [spec.ffn for spec in model.config.layers if isinstance(spec.ffn, MoeFfn)]
    chosen = routed[0].n_used / routed[0].n_expert if routed else 1.0
    return read_by_part([(name, info.n_bytes, info.row_bytes) for name, info in model.file.tensors.items()], chosen)


def step_seconds(model: Model, cache: Cache, last: int, pause: Callable[[], None]) -> dict[str, float]:
    """Seconds of one more token by part, the median of a few steps, which leave no trace in the cache; `last`: any id."""
    seen = []
    for _ in range(STEPS):
        took, before = dict.fromkeys(PARTS, 0.0), time.perf_counter()

        def look(name: str, value: np.ndarray, took: dict = took):
            nonlocal before
            now, role = time.perf_counter(), name.rpartition("-")[0] or name
            part = "attention" if role[1:4] == "cur" else PART.get(role, "the rest")
            took[part] += now - before
            before = now
        state_TD = model.forward(np.array([last]), cache, look)
        before = time.perf_counter()
        model.head(state_TD)
        took["head"] += time.perf_counter() - before
        seen.append(took)
        pause()
    return {part: statistics.median(took[part] for took in seen) for part in PARTS}


@functools.cache
def bandwidth(n_threads: int) -> float:
    """Bytes per second that so many threads read from memory, the best of a few passes; measured once."""
    from refimpl.lab.bench.bandwidth import read_bandwidth

    return max(read_bandwidth(n_threads, BANDWIDTH_BYTES, BANDWIDTH_PASSES))


def as_json(model: Model, cache: Cache, last: int, pause: Callable[[], None]) -> dict[str, object]:
    """All of it: `weights` and `seconds` by part; `kv`: for every layer bytes of a position; bytes per second of memory (0 where it is not
    measured, as the reference is not bound by it).
    """
    itemsize = np.dtype(model.backend.kv_type).itemsize
    return {"parts": list(PARTS), "weights": [round(n) for n in weight_bytes(model).values()],
            "seconds": [float(f"{s:.4g}") for s in step_seconds(model, cache, last, pause).values()],
            "kv": [2 * spec.n_kv * spec.head_dim * itemsize for spec in model.config.layers],
            "bandwidth": float(f"{bandwidth(model.backend.threads):.4g}") if model.backend.name == "kernels" else 0,
            "file_bytes": model.file.n_bytes}
