"""Taps: how a caller sees, and may change, the values inside the forward pass.

The forward pass hands every value that has a name (llama.cpp's names, lab/compare/names.py) through `tap(name, value)`, which returns it.
So a tap costs a function call where nobody looks, and a line of the forward pass still reads as its formula.
"""

from collections.abc import Callable

import numpy as np

Tap = Callable[[str, np.ndarray], np.ndarray]
"""What the forward pass calls: returns the value that the computation goes on with."""
Look = Callable[[str, np.ndarray], object]
"""What callers pass: its return value is ignored. Writing into the array changes the rest of the run."""


def no_tap(name: str, value: np.ndarray) -> np.ndarray:
    """Looks at nothing."""
    return value


def tap_of(look: Look) -> Tap:
    """The tap that shows each value to `look`."""
    if look is no_tap:
        return no_tap

    def tap(name: str, value: np.ndarray) -> np.ndarray:
        look(name, value)
        return value
    return tap


def both(first: Look, then: Look) -> Look:
    """Shows each value to `first`, then to `then`."""
    if then is no_tap:
        return first

    def look(name: str, value: np.ndarray):
        first(name, value)
        then(name, value)
    return look


def of_layer(tap: Tap, i: int) -> Tap:
    """The tap for values inside layer i: adds "-i" to their names."""
    if tap is no_tap:
        return no_tap
    return lambda name, value: tap(f"{name}-{i}", value)


def prefixed(look: Look, prefix: str) -> Look:
    """Shows each value with `prefix` before its name."""
    if look is no_tap:
        return no_tap
    return lambda name, value: look(prefix + name, value)
