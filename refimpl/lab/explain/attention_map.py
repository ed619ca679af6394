"""Who looks at whom: the attention weights of a model on a text, from its own queries and keys."""

from collections.abc import Sequence

import numpy as np

from refimpl.loading.model import Model
from refimpl.reference.attention import attend


def weights_of(q_TNH: np.ndarray, k_SKH: np.ndarray, first_T: np.ndarray, end_T: np.ndarray) -> np.ndarray:
    """The weights in `attend`, float32 (N, T, S): what it gives when the values are the rows of an identity matrix.

    Values are as wide as a head, so the identity goes in H columns at a time. Arguments as in reference/attention.py.
    """
    n_keys, n_kv, width = k_SKH.shape
    unit_SS = np.eye(n_keys, -(-n_keys // width) * width, dtype=np.float32)
    parts = [attend(q_TNH, k_SKH, np.repeat(unit_SS[:, None, at:at + width], n_kv, axis=1), first_T, end_T)
             for at in range(0, n_keys, width)]
    return np.concatenate(parts, axis=-1)[..., :n_keys].transpose(1, 0, 2)


def attention_maps(model: Model, ids: Sequence[int]) -> list[np.ndarray]:
    """The weights of every layer on `ids`, float32 (N, T, T) each: row t of a head sums to 1 over the positions that token t sees.

    The queries and keys are those of the model, before its cache rounds keys to float16.
    """
    seen: dict[str, np.ndarray] = {}
    model.logits(ids, tap=lambda name, value: seen.setdefault(name, value.copy()) if name[1:].startswith("cur_pos-") else None)
    pos_T = np.arange(len(ids))
    maps = []
    for spec in model.config.layers:
        first_T = np.maximum(0, pos_T - spec.window + 1) if spec.window else np.zeros_like(pos_T)
        maps.append(weights_of(seen[f"Qcur_pos-{spec.index}"], seen[f"Kcur_pos-{spec.kv_from}"], first_T, pos_T + 1))
    return maps


HABITS = ("the token itself", "the one before", "the same token earlier", "behind the same token", "<bos>", "elsewhere")


def habits(maps: Sequence[np.ndarray], ids: Sequence[int]) -> np.ndarray:
    """Where the weight of each head goes, on average over the text: (L, N, 6), shares in the order of HABITS.

    A place that fits several is counted for the first. "Behind the same token": the token there follows an earlier copy of the one that
    looks. The first two tokens do not count, for whom most of these are one and the same.
    """
    pos, ids = np.arange(len(ids)), np.asarray(ids)
    behind = np.concatenate([[-1], ids[:-1]])
    free_TS, found = np.tril(np.ones((len(ids), len(ids)), bool)), []
    for fits in (pos[:, None] == pos, pos[:, None] == pos + 1, ids[:, None] == ids, ids[:, None] == behind, pos == 0, free_TS):
        taken_TS = fits & free_TS
        free_TS = free_TS & ~taken_TS
        found.append([(weight_NTS * taken_TS).sum(axis=-1)[:, 2:].mean(axis=-1) for weight_NTS in maps])
    return np.array(found).transpose(1, 2, 0)
