"""Failures that a long run survives: those with one line for people. Imports formats only."""

from refimpl.formats.gguf import GGUFError

FAILURES = (GGUFError, ValueError, OSError, MemoryError)


def line_of(e: Exception) -> str:
    """What one of FAILURES says, in one line."""
    if isinstance(e, OSError) and e.filename is not None:
        return f"{e.filename}: {e.strerror}"
    return "not enough memory" if isinstance(e, MemoryError) else " ".join(str(e).split())
