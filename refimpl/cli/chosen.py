"""What was chosen for the user, and why: one line on standard error."""

import numpy as np

from refimpl.cli.show.table import size


def chosen(m, threads: int | None, *more: str) -> str:
    """What a model runs on: threads (as given with -t), where its weights are, and `more`."""
    from refimpl.loading.memory import parts_of, tables_of

    n, tables = m.backend.threads, [id(table) for table in tables_of(m.weights)]
    weights = size(sum(part.nbytes if isinstance(part, np.ndarray) else part.n_bytes for part in parts_of(m.weights)
                       if id(part) not in tables))
    where = "mapped from the disk: rearranged at an earlier start" if m.mapped else "in memory"
    cores = "as given" if threads else "one a core: -t"
    return f"chosen: {n} thread{'s' if n > 1 else ''} ({cores}), weights of {weights} {where}" + "".join(f", {what}" for what in more)


def context(n_ctx: int, own: int, given: int | None, why: str) -> str:
    """The context, in words: as given, the model's own, or less and `why`."""
    return f"context {n_ctx:,} ({'as given' if given else why if n_ctx < own else 'the whole of the model'})"
