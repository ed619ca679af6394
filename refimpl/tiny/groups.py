"""The vocabulary in groups of equal size, for a drafter's centroid head."""

import numpy as np


def balanced_groups(w_VD: np.ndarray, n_group: int, n_turns: int, seed: int) -> np.ndarray:
    """The group of every row, int64 (V,), all groups of the same size: k-means by cosine; rows with the most to lose choose first."""
    unit_VD = w_VD / np.linalg.norm(w_VD, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    centre_ZD = unit_VD[rng.choice(len(w_VD), n_group, replace=False)]
    for _ in range(n_turns):
        score_VZ = unit_VD @ centre_ZD.T
        two_VZ = np.partition(score_VZ, -2, axis=1)[:, -2:]
        group_V, room_Z = np.empty(len(w_VD), np.int64), np.full(n_group, len(w_VD) // n_group)
        for row in np.argsort(two_VZ[:, 0] - two_VZ[:, 1], kind="stable"):
            group_V[row] = np.where(room_Z > 0, score_VZ[row], -np.inf).argmax()
            room_Z[group_V[row]] -= 1
        centre_ZD = np.stack([unit_VD[group_V == z].mean(axis=0) for z in range(n_group)])
        centre_ZD /= np.linalg.norm(centre_ZD, axis=1, keepdims=True)
    return group_V
