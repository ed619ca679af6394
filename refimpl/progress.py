"""How long work says how far it is: one protocol for all of it. Imports nothing of the package.

    with progress("MB loaded", n_bytes, 10**6) as advance:      # what is counted, how many in all, in which unit to show them
        advance(4096)                                           # as many more are done

The command line passes a bar (`cli/app.py`), everybody else nothing or a function of their own.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

Advance = Callable[[int], None]
Progress = Callable[..., AbstractContextManager[Advance]]       # (what, total, unit=1)


def silent(what: str, total: int, unit: int = 1) -> AbstractContextManager[Advance]:
    """Shows nothing."""
    return contextlib.nullcontext(lambda n: None)
