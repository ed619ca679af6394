"""The textbook: NumPy, float32, no cleverness. Whoever wants it faster writes a twin with the same name and signature."""

from refimpl.reference.attention import attend
from refimpl.reference.matmul import matmul
from refimpl.reference.moe import run_experts

__all__ = ["attend", "matmul", "run_experts"]
