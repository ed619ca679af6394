"""How types.npz was made: blocks written by ggml's own quantizers, blocks of random bytes, and the weights that ggml reads in them.

    python tests/files/make_types.py

For every block type TYPE, 256 weights a row: `TYPE raw`, uint8 (2, row_bytes), the first row quantized by ggml from `normal`, the second
random (drawn again until all its weights are finite and below 1e4); `TYPE weights`, float32 (2, 256), both as ggml decodes them. Types that
ask for an importance matrix were given ones. Needs llama-cpp-python 0.3.36 (ggml 0.25.3).
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

TYPES = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ1_0", "TQ2_0", "NVFP4", "Q1_0", "Q2_0", "Q8_K")


def main():
    """Makes the file."""
    from refimpl.lab.explain.ggml import ggml_dequantize, ggml_quantize

    rng = np.random.default_rng(11)
    normal = rng.standard_normal((1, 256), dtype=np.float32)
    out = {"normal": normal}
    for name in TYPES:
        first = ggml_quantize(normal, name)
        while True:
            raw = np.concatenate([first, rng.integers(0, 256, first.shape, dtype=np.uint8)])
            weights = ggml_dequantize(raw, name)
            if np.abs(weights).max() < 1e4:
                break
        out |= {f"{name} raw": raw, f"{name} weights": weights}
    np.savez_compressed(HERE / "types.npz", **out)


if __name__ == "__main__":
    main()
