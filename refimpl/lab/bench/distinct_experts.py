"""How many experts the rows of a call need together."""

import numpy as np


def distinct_if_independent(n_expert: int, n_used: int, n_rows):
    """n_expert * (1 - (1 - n_used / n_expert)^n_rows): for rows that choose evenly and know nothing of each other."""
    return n_expert * (1 - (1 - n_used / n_expert) ** np.asarray(n_rows))
