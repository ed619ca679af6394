"""The textbook: NumPy, float32, no cleverness. Whoever wants it faster writes a twin with the same name and signature."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from refimpl.reference.attention import attend
from refimpl.reference.matmul import matmul, matmul_q8
from refimpl.reference.moe import run_experts

PRODUCTS = {"exact": matmul, "q8": matmul_q8}


@dataclass(frozen=True)
class Backend:
    """The few functions that cost time, as the forward pass calls them."""

    matmul: Callable
    attend: Callable
    run_experts: Callable


def backend(arithmetic: str) -> Backend:
    """The reference in "exact" or "q8" arithmetic. Raises KeyError for another name."""
    product = PRODUCTS[arithmetic]
    return Backend(product, attend, partial(run_experts, product))
